"""Progress and messages of a run on the terminal, as a handler of the standard `logging`.

Modules log to loggers below ``nidl_dcl`` and know of no terminal; who starts a run adds handlers.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

_LINE_SECONDS = 10.0
"""Seconds between plain lines of one activity."""

_LOGGER = logging.getLogger("nidl_dcl")
_PROGRESS = logging.getLogger("nidl_dcl.progress")


def log_progress(what: str, done: int, total: int) -> None:
    """Log how far an activity has come.

    Parameters
    ----------
    what : str
        Its name.
    done, total : int
        Steps.
    """
    _PROGRESS.info("%s: %d of %d", what, done, total)


def progress_of(what: str) -> Callable[[int, int], None]:
    """Return `log_progress` of one activity."""
    return lambda done, total: log_progress(what, done, total)


def progress_in(record: logging.LogRecord) -> tuple[str, int, int] | None:
    """Return what `log_progress` was given, where a record is of it."""
    found: Any = record.args
    return found if record.name == _PROGRESS.name else None


@contextmanager
def handled_by(handler: logging.Handler, *, alone: bool = False) -> Iterator[None]:
    """Give the messages of the package to a handler, closed at the end of a block.

    With `alone`, the root logger does not get them.
    """
    level, propagate = _LOGGER.level, _LOGGER.propagate
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(level if 0 < level < logging.INFO else logging.INFO)
    _LOGGER.propagate = propagate and not alone
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)
        _LOGGER.propagate = propagate
        handler.close()


class ConsoleHandler(logging.Handler):
    """Messages and progress on a stream, by default stderr.

    Bars are drawn if it is a terminal; elsewhere there is a line now and then.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self.stream = stream or sys.stderr
        self._bar: Any = None
        self._what = ""
        self._started = self._last_line = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, with control characters (of file names) escaped, or move the bar."""
        from nidl_dcl.io.formats import escape_control  # pandas takes a while to import

        progress = progress_in(record)
        if progress is None:
            self._end_bar()
            self._write(escape_control(record.getMessage()))
        else:
            self._show(*progress)

    def close(self) -> None:
        """End the bar."""
        self._end_bar()
        super().close()

    def _show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._end_bar()
            self._what, self._started, self._last_line = what, now, now
            if self.stream.isatty():
                self._bar = tqdm(total=total, desc=what, file=self.stream, initial=done - 1)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            self._write(f"{what}: {done} of {total}")
        if done >= total:
            if self._bar is None and now - self._started >= 1:
                self._write(f"{what}: {done} of {total} in {now - self._started:.0f} s")
            self._end_bar()

    def _write(self, line: str) -> None:
        self.stream.write(f"{line}\n")
        self.stream.flush()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._what = None, ""

"""The log file of one run: a line for each thing that happened, with time, stage and memory.

What is logged also goes wherever the run's console shows it; who writes what is up to the stages.
"""

from __future__ import annotations

import datetime
import itertools
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nidl_dcl.io.console import NullReporter
from nidl_dcl.io.formats import escape_control

__all__ = ["Logged", "RunLog", "peak_memory_mb"]

_EVERY = 60.0
"""Seconds between lines of one activity."""


class RunLog:
    """A log file that grows line by line: UTC time, stage, peak memory, text.

    A line that cannot be written is left out: what made that fail stops the run elsewhere, with a
    message.

    Parameters
    ----------
    folder : Path
        Gets ``<UTC time>_<command>.log``.
    command : str
        Of the name.
    """

    def __init__(self, folder: Path, command: str) -> None:
        stem = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}_{command}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            self.path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.log"
            with suppress(FileExistsError):
                self._handle = os.open(
                    self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o666
                )
                break
        self.stage = "start"

    def write(self, text: str) -> None:
        """Add a line, or several of a text that has several; control characters are escaped."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        head = f"{now.removesuffix('+00:00')}Z {self.stage:<9} {peak_memory_mb():6.0f} MB  "
        lines = "".join(f"{head}{escape_control(line)}\n" for line in text.splitlines() or [""])
        with suppress(OSError):
            os.write(self._handle, lines.encode("utf-8", "backslashreplace"))

    def write_traceback(self, error: BaseException) -> None:
        """Add where an error came from."""
        self.write("".join(traceback.format_exception(error)))

    def close(self) -> None:
        """End the file."""
        with suppress(OSError):
            os.close(self._handle)

    @contextmanager
    def with_warnings(self) -> Iterator[None]:
        """Log warnings that are shown inside the block, too."""
        show = warnings.showwarning

        def log_and_show(message: Any, *args: Any, **kwargs: Any) -> None:
            self.write(f"Warning: {message}")
            show(message, *args, **kwargs)

        warnings.showwarning = log_and_show
        try:
            yield
        finally:
            if warnings.showwarning is log_and_show:
                warnings.showwarning = show


class Logged(NullReporter):
    """A console whose messages and progress are logged, too.

    Parameters
    ----------
    console : Quiet
        What shows them.
    log : RunLog
        What keeps them: of progress the beginning, a line a minute, and the end.
    """

    def __init__(self, console: NullReporter, log: RunLog) -> None:
        self.console = console
        self.log = log
        self.what = ""
        self.last_line = 0.0

    def say(self, text: str) -> None:
        """Show and log a message."""
        self.console.say(text)
        self.log.write(text)

    def progress(self, what: str, done: int, total: int) -> None:
        """Show the state of an activity, and log it when that is due."""
        self.console.progress(what, done, total)
        now = time.monotonic()
        if what != self.what or done >= total or now - self.last_line >= _EVERY:
            self.log.write(f"{what}: {done} of {total}")
            self.what, self.last_line = what, now

    def close(self) -> None:
        """End any bar."""
        self.console.close()


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6

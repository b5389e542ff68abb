"""The log file of one run: a line for each message, with time, stage and peak memory."""

from __future__ import annotations

import datetime
import itertools
import logging
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

from nidl_dcl.io.console import handled_by, progress_in
from nidl_dcl.io.formats import escape_control

_LINE_SECONDS = 60.0
"""Seconds between lines of one activity."""


class RunLog(logging.Handler):
    """A log file that grows line by line: UTC time, stage, peak memory, text.

    Of an activity it has the beginning, a line a minute and the end. A line that cannot be written
    is left out: what made that fail stops the run elsewhere, with a message. The file is called
    ``<UTC time>_<command>.log``.
    """

    def __init__(self, folder: Path, command: str) -> None:
        super().__init__()
        stem = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}_{command}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            self.path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.log"
            with suppress(FileExistsError):
                self._file = os.open(
                    self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o666
                )
                break
        self.stage = "start"
        self._what, self._last_line = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Add a message, or how far an activity has come."""
        progress = progress_in(record)
        if progress is not None:
            what, done, total = progress
            now = time.monotonic()
            if what == self._what and done < total and now - self._last_line < _LINE_SECONDS:
                return
            self._what, self._last_line = what, now
        self.write(record.getMessage())

    def write(self, text: str) -> None:
        """Add a line, or several of a text that has several; control characters are escaped."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        head = f"{now.removesuffix('+00:00')}Z {self.stage:<9} {peak_memory_mb():6.0f} MB  "
        lines = "".join(f"{head}{escape_control(line)}\n" for line in text.splitlines() or [""])
        with suppress(OSError):
            os.write(self._file, lines.encode("utf-8", "backslashreplace"))

    def write_traceback(self, error: BaseException) -> None:
        """Add where an error came from."""
        self.write("".join(traceback.format_exception(error)))

    def close(self) -> None:
        """End the file."""
        with suppress(OSError):
            os.close(self._file)
        super().close()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Log the package's messages, and warnings that are shown, for the length of a block."""
        show = warnings.showwarning

        def log_and_show(message: Any, *args: Any, **kwargs: Any) -> None:
            self.write(f"Warning: {message}")
            show(message, *args, **kwargs)

        warnings.showwarning = log_and_show
        try:
            with handled_by(self):
                yield
        finally:
            if warnings.showwarning is log_and_show:
                warnings.showwarning = show


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6

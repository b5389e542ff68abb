"""What a run says while it works: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["ConsoleReporter", "NullReporter", "progress_of"]

_EVERY = 10.0
"""Seconds between plain lines of one activity."""


class NullReporter:
    """Says nothing; what stages use when called from Python."""

    def say(self, text: str) -> None:
        """Take a message."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Take the state of an activity."""

    def close(self) -> None:
        """End any bar."""


class ConsoleReporter(NullReporter):
    """Messages and progress on a stream.

    Parameters
    ----------
    stream : text stream, default=sys.stderr
        Bars are drawn if it is a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.bar: Any = None
        self.what = ""
        self.started = 0.0
        self.last_line = 0.0

    def say(self, text: str) -> None:
        """Write one line; control characters, of file names for instance, are escaped."""
        from nidl_dcl.io.formats import escape_control

        self.close()
        self.stream.write(escape_control(text) + "\n")
        self.stream.flush()

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far an activity has come.

        Parameters
        ----------
        what : str
            Its name; another one ends the bar of the last.
        done, total : int
            Steps.
        """
        now = time.monotonic()
        if what != self.what:
            self.close()
            self.what, self.started, self.last_line = what, now, now
            if self.stream.isatty():
                self.bar = tqdm(
                    total=total, desc=what, file=self.stream, leave=True, initial=done - 1
                )
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif now - self.last_line >= _EVERY:
            self.last_line = now
            self.stream.write(f"{what}: {done} of {total}\n")
            self.stream.flush()
        if done >= total:
            if self.bar is None and now - self.started >= 1:
                self.stream.write(f"{what}: {done} of {total} in {now - self.started:.0f} s\n")
                self.stream.flush()
            self.close()

    def close(self) -> None:
        """End the bar under way, if any."""
        if self.bar is not None:
            self.bar.close()
        self.bar, self.what = None, ""


def progress_of(console: NullReporter, what: str) -> Callable[[int, int], None]:
    """Return a function of steps done and in all that tells the console of `what`."""
    return lambda done, total: console.progress(what, done, total)

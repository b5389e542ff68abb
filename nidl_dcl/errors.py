"""Exceptions of nidl_dcl and the exit status each one stands for; raised by every other module.

Each inherits the built-in exception that callers already catch.
"""

from __future__ import annotations

import difflib
import errno
import os
import traceback
from collections.abc import Iterable


class NidlDclError(Exception):
    """Base of the errors whose message says what is wrong, where, and what to do."""

    exit_status = 1


class UsageError(NidlDclError, ValueError):
    """A missing folder, an unknown participant, target or option: exit status 2."""

    exit_status = 2


class InputsUnusableError(NidlDclError, ValueError):
    """Nothing to do, or too many inputs skipped: exit status 3."""

    exit_status = 3


class OutputInUseError(NidlDclError, RuntimeError):
    """Another run writes to the same output: exit status 4."""

    exit_status = 4


class NonFiniteError(NidlDclError, FloatingPointError, ValueError):
    """A NaN or infinite value in an input or a loss; the weights are those of the last good step."""


class NoRoomError(NidlDclError, OSError):
    """A disk, or a quota, is full: exit status 1; the files that were there are whole."""


class LostProcessError(NidlDclError, RuntimeError):
    """Another process of a training has ended or does not answer: exit status 1."""


class OnAnotherProcessError(NidlDclError, RuntimeError):
    """An error of another process of a training, which has said it there, with its exit status."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}

_GONE = {
    *(errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ETIMEDOUT),
}

_LOADER = "torch.utils.data.dataloader"

_WHOLE = "The files that were there are whole"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the hint " Did you mean 'x'?" with the closest of the known names; empty without one."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def exit_status(error: BaseException) -> int:
    """Return the exit status that an exception stands for."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        # Lightning's exit after a SIGTERM carries no status.
        return error.code if isinstance(error.code, int) else 143
    if isinstance(error, NidlDclError):
        return error.exit_status
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return 2
    return 1


def describe(error: BaseException) -> str:
    """Return what happened, to which file, and what to do."""
    if " in DataLoader worker process " in str(error):
        # The text is a whole traceback, whose last line is the error.
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, NidlDclError):
        return str(error).strip()
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted. The same command goes on from here."
    if isinstance(error, SystemExit):
        if exit_status(error) == 143:
            return "Terminated. The same command goes on from here."
        return f"Ended with status {error.code}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"Memory ran out ({error}). {_WHOLE}. Take a lower --batch-size or --nprocs, "
            "--chunk-size, a coarser --spacing, or a machine with more memory; with the same "
            "options, the same command goes on from here."
        )
    if _worker_died(error):
        return (
            f"A loading worker died ({error}), mostly because memory ran out. {_WHOLE}: the same "
            "command goes on from the last checkpoint. If it happens again, take a lower --nprocs, "
            "or more memory."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error)
    return f"Unexpected fault: {type(error).__name__}: {error}. Run with -v to see where."


def _worker_died(error: BaseException) -> bool:
    """Return whether a loader says so, or its pipe to a worker is broken."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    if not isinstance(error, ConnectionError | EOFError):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == _LOADER for frame, _ in frames)


def _of_the_system(error: OSError) -> str:
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    why = error.strerror or os.strerror(error.errno or 0)
    if error.errno in _NO_ROOM:
        return (
            f"{path} cannot be written: the disk, or a quota, is full ({why}). {_WHOLE}. Make room "
            "and give the same command again."
        )
    if error.errno in _FORBIDDEN:
        return (
            f"{path} may not be read or written ({why}). {_WHOLE}. Change its rights, or choose "
            "another folder, and give the same command again."
        )
    if error.errno in _GONE:
        return (
            f"{path} cannot be reached ({why}): is its disk or network folder still there? "
            f"{_WHOLE}. When it is back, give the same command again."
        )
    return f"{path}: {why}. {_WHOLE}. Run with -v to see where."

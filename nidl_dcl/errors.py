"""Exceptions of nidl_dcl and the exit status each one stands for; raised by every other module.

Each inherits the built-in exception that callers already catch.
"""

from __future__ import annotations

__all__ = [
    "InputsUnusableError",
    "LostProcessError",
    "NidlDclError",
    "NoRoomError",
    "NonFiniteError",
    "OnAnotherProcessError",
    "OutputInUseError",
    "UsageError",
]


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

"""What callbacks keep from fit to fit: nothing, since each fit begins with them as they were given.

The object that a caller gave is the one that runs, so that it can be asked for what it found.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

_LARGE = 2**20
"""Bytes from which an array counts as data, which callbacks read and do not change."""

_records: dict[int, _Record] = {}
"""By the id of a callback, which need not be hashable."""


class _Record:
    """A callback's attributes before a fit, copied, and those after it, as they are."""

    def __init__(self, callback: Any, memo: dict[int, Any]) -> None:
        self.before = _copied(vars(callback), memo)
        self.after: dict[str, Any] | None = None


def callback_list(callbacks: Any) -> list[Any]:
    """Return callbacks, given as Lightning takes them, as a list."""
    if isinstance(callbacks, list | tuple):
        return list(callbacks)
    return [] if callbacks is None else [callbacks]


@contextmanager
def restored(callbacks: Any, shared: Iterable[Any]) -> Iterator[None]:
    """Begin a fit in the block with callbacks as they were before the last one that they ran in.

    What was assigned to them since that fit stays. `shared` are objects that a callback may hold, and
    that are not its own.
    """
    given, memo = callback_list(callbacks), {id(value): value for value in shared}
    for callback in given:
        if id(callback) in _records:
            state = _copied(_given_state(callback), dict(memo))
            vars(callback).clear()
            vars(callback).update(state)
        else:
            weakref.finalize(callback, _records.pop, id(callback), None)
        _records[id(callback)] = _Record(callback, dict(memo))
    try:
        yield
    finally:
        for callback in given:
            _records[id(callback)].after = dict(vars(callback))


def as_given(callbacks: Any) -> Any:
    """Return callbacks with those that ran in a fit replaced by ones in the state before it."""
    if isinstance(callbacks, list | tuple):
        return type(callbacks)(as_given(callback) for callback in callbacks)
    if id(callbacks) not in _records:
        return callbacks
    return _with_state(callbacks, _given_state(callbacks))


def copied_as_given(callbacks: Any, memo: dict[int, Any]) -> Any:
    """Return copies of callbacks in the state in which they were given, as ``copy.deepcopy`` does."""
    if isinstance(callbacks, list | tuple):
        return type(callbacks)(copied_as_given(callback, memo) for callback in callbacks)
    if callbacks is None or isinstance(callbacks, type):
        return callbacks
    return _with_state(callbacks, _copied(vars(as_given(callbacks)), memo))


def _with_state(callback: Any, state: Mapping[str, Any]) -> Any:
    twin = object.__new__(type(callback))
    vars(twin).update(state)
    return twin


def _given_state(callback: Any) -> Mapping[str, Any]:
    record = _records[id(callback)]
    if record.after is None:  # in the middle of a fit
        return record.before
    nothing = object()
    assigned = {
        name: value
        for name, value in vars(callback).items()
        if record.after.get(name, nothing) is not value
    }
    return {**record.before, **assigned}


def _copied(state: Mapping[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Return copies of attributes; data, and what cannot be copied, are shared."""
    copies = {}
    for name, value in state.items():
        if (
            isinstance(value, DataLoader | Dataset | L.Trainer)
            or getattr(value, "nbytes", 0) > _LARGE
        ):
            memo[id(value)] = value
        try:
            copies[name] = copy.deepcopy(value, memo)
        except Exception:  # an open file, a lock, a generator, …
            copies[name] = value
    return copies

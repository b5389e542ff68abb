"""The arguments of an estimator: what a caller gave, defaults and checks.

What is built from them is left to the estimator, trainers to `trainers`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import numpy as np

from nidl_dcl.models.serialization import is_plain
from nidl_dcl.randomness import fresh_seed

TRAINER_OPTIONS = tuple(inspect.signature(L.Trainer.__init__).parameters)[1:]
"""Options that go to ``lightning.Trainer``."""

OPTIONS: dict[str, Any] = {
    "random_state": None,
    "ignore": None,
    "save_hparams": True,
    "views": None,
    "views_on_device": False,
    "batch_size": 32,
    "num_workers": 0,
    "warm_start": False,
}
"""Options of every estimator of this package, and their defaults."""


class Arguments:
    """Arguments of an estimator as a caller gave them, over the defaults of options not given.

    Known are the names in the constructor's signature (`named`), the options of the class and those
    of ``lightning.Trainer``; a TypeError for another one names the closest known one.
    """

    def __init__(self, owner: Any, given: Mapping[str, Any]) -> None:
        signature = inspect.signature(owner).parameters.values()
        self.named = [p.name for p in signature if p.kind is not p.VAR_KEYWORD]
        self.given: dict[str, Any] = dict(given)
        self._owner = owner.__name__
        self._defaults = {**OPTIONS, **owner._more_options}
        for name in self._unknown(given):
            close = difflib.get_close_matches(name, self._known(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{self._owner} got an unknown option {name!r}.{hint}")

    def __getitem__(self, name: str) -> Any:
        return self.given[name] if name in self.given else self._defaults[name]

    def update(self, changed: Mapping[str, Any]) -> None:
        """Change what was given; a ValueError names what is unknown, as scikit-learn does."""
        for name in self._unknown(changed):
            raise ValueError(
                f"Invalid parameter {name!r} for estimator {self._owner}. Valid parameters are: "
                f"{self._known()!r}."
            )
        self.given.update(changed)

    def plain(self) -> dict[str, Any]:
        """Return what was given that is numbers, texts or containers of such, less ``ignore``."""
        left_out = {"callbacks", *(self["ignore"] or ())}
        return {k: v for k, v in self.given.items() if k not in left_out and is_plain(v)}

    def check(self) -> None:
        """Raise a ValueError or TypeError for an option of a value that it cannot have."""
        if "kwargs" in self.given:
            raise TypeError("kwargs is not an option: unpack it, DCL(..., **kwargs).")
        batch_size, num_workers = self["batch_size"], self["num_workers"]
        if not _is_int(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        if not _is_int(num_workers) or num_workers < 0:
            raise ValueError(f"num_workers must be an integer of 0 or more, got {num_workers!r}.")
        random_state, views = self["random_state"], self["views"]
        try:
            fresh_seed(copy.deepcopy(random_state))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"random_state must be an integer or None, got {random_state!r}."
            ) from error
        if views is not None and not callable(views):
            raise TypeError(f"views must be callable, got {type(views).__name__}.")

    def _known(self) -> list[str]:
        return [*self.named, *self._defaults, *TRAINER_OPTIONS]

    def _unknown(self, names: Iterable[str]) -> list[str]:
        # scikit-learn's checks pass "kwargs", the name in the signature; `check` refuses it.
        return [name for name in names if name not in self._known() and name != "kwargs"]


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)

"""The arguments of an estimator: what a caller gave, defaults and checks.

What is built from them is left to the estimator, trainers to `trainers`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import lightning as L
import numpy as np

from nidl_dcl.errors import did_you_mean
from nidl_dcl.models.serialization import is_plain
from nidl_dcl.randomness import fresh_seed

TRAINER_OPTIONS = tuple(inspect.signature(L.Trainer.__init__).parameters)[1:]
"""Options that go to ``lightning.Trainer``."""

T = TypeVar("T")

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
    """Arguments of an estimator: as its caller gave them, and as the classes here take them.

    `given` is the call of the constructor, hence what a copy is made of. A subclass may fix or change
    what it passes on, so `values` holds what arrived; indexing gives these, over the defaults of
    options. Known are the names in the constructors' signatures, the options of the class and those
    of ``lightning.Trainer``; a TypeError for another one names the closest known one.

    Parameters
    ----------
    owner, base : type
        The estimator's class, and the one that takes the options.
    given : mapping
        What arrived at the latter.
    """

    def __init__(self, owner: type, base: type, given: Mapping[str, Any]) -> None:
        self.given: dict[str, Any] = dict(given)
        self.values: dict[str, Any] = dict(given)
        self.complete = False
        self._owner = owner.__name__
        more: Mapping[str, Any] = getattr(owner, "_more_options", {})
        self._defaults = {**OPTIONS, **more}
        ancestors = owner.__mro__[: owner.__mro__.index(base) + 1]
        constructors = [kind for kind in ancestors if "__init__" in vars(kind)]
        found: dict[str, tuple[Any, type]] = {}  # name: default, class
        self.named: list[str] = []
        reached = True  # an ancestor's arguments can be given as long as **kwargs lead to it
        for kind in constructors:
            parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
            names = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            for parameter in names:
                if parameter.name not in found:
                    found[parameter.name] = parameter.default, kind
                    self.named += [parameter.name] * reached
            reached = reached and any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named_defaults = {name: default for name, (default, _) in found.items()}
        self.known = frozenset((*found, *self._defaults, *TRAINER_OPTIONS))
        self._settable = [*self.named, *((*self._defaults, *TRAINER_OPTIONS) if reached else ())]
        self.rebuilding = frozenset(
            name for name, (_, kind) in found.items() if "_arguments_changed" not in vars(kind)
        )
        for name in given:
            if name not in self.known and name != "kwargs":  # `check` refuses that one
                hint = did_you_mean(name, self.known)
                raise TypeError(f"{self._owner} got an unknown option {name!r}.{hint}")

    def __getitem__(self, name: str) -> Any:
        return self.values[name] if name in self.values else self._defaults[name]

    def record(self, constructor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the call of the constructor, which has ended.

        Parameters
        ----------
        constructor : callable
            The ``__init__`` of the class.
        args, kwargs : tuple, mapping
            What it was called with.
        """
        bound = inspect.signature(constructor).bind(None, *args, **kwargs)
        bound.apply_defaults()
        self.given = {}
        for parameter in list(bound.signature.parameters.values())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                self.given.update(bound.arguments[parameter.name])
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                self.given[parameter.name] = bound.arguments[parameter.name]
        self.complete = True

    def find(self, name: str) -> Any:
        """Return the value of an argument in use, or raise a KeyError."""
        return self.given[name] if name in self.given.keys() - self.values.keys() else self[name]

    def params(self) -> dict[str, Any]:
        """Return what was given, and the arguments of ancestors that have their defaults."""
        more = {
            name: self.values[name]
            for name in self.named
            if name in self.values and self.values[name] is self._named_defaults[name]
        }
        return {**more, **self.given}

    def refuse_unknown(self, names: Iterable[str]) -> None:
        """Raise a ValueError that names what cannot be set, as scikit-learn does."""
        for name in names:
            if name not in self._settable and name != "kwargs":  # scikit-learn's checks pass that
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {self._owner}. Valid parameters are: "
                    f"{self._settable!r}."
                )

    def update(self, changed: Mapping[str, Any]) -> None:
        """Change what was given."""
        self.given.update(changed)
        self.values.update(changed)

    def plain(self) -> dict[str, Any]:
        """Return what was given that is numbers, texts or containers of such, less ``ignore``."""
        left_out = {"callbacks", *(self["ignore"] or ())}
        return {k: v for k, v in self.given.items() if k not in left_out and is_plain(v)}

    def check(self) -> None:
        """Raise a ValueError or TypeError for an option of a value that it cannot have."""
        if "kwargs" in self.values:
            raise TypeError("kwargs is not an option: unpack it, DCL(..., **kwargs).")
        batch_size, num_workers = self["batch_size"], self["num_workers"]
        if not _is_int(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        if not _is_int(num_workers) or num_workers < 0:
            raise ValueError(f"num_workers must be an integer of 0 or more, got {num_workers!r}.")
        random_state, views = self["random_state"], self["views"]
        try:
            if random_state is not None:  # None would draw from NumPy's global generator
                fresh_seed(copy.deepcopy(random_state))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"random_state must be an integer or None, got {random_state!r}."
            ) from error
        if views is not None and not callable(views):
            raise TypeError(f"views must be callable, got {type(views).__name__}.")


def keywords(**names: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Let a method take arguments by further names, such as those that nidl documents."""

    def decorate(method: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(method)
        def renamed(*args: Any, **kwargs: Any) -> T:
            for other, name in names.items():
                if other in kwargs:
                    if name in kwargs:
                        raise TypeError(f"{method.__name__} got both {name} and {other}.")
                    kwargs[name] = kwargs.pop(other)
            return method(*args, **kwargs)

        return renamed

    return decorate


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)

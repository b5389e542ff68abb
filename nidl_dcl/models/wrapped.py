"""Networks inside of wrappers that change how they run: compiled, or over several devices.

A wrapper puts ``_orig_mod.`` or ``module.`` into the names of a state. Here the states of a network
are matched by the names that they have without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")

_PREFIXES = ("_orig_mod", "module")


def inner_name(name: str) -> str:
    """Return the name of a state without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _PREFIXES)


def inner_names(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return states by their inner names; by their own, where two would get the same."""
    own = dict(named)
    inner = {inner_name(name): value for name, value in own.items()}
    return inner if len(inner) == len(own) else own


def match_names(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return a state by those of `names` that have the same inner names; the rest by its own."""
    own = inner_names((name, name) for name in names)
    return {own.get(name, name): value for name, value in inner_names(state.items()).items()}


def inner_module(module: Any) -> Any:
    """Return the network that torch's own wrappers hold."""
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    compiled = getattr(module, "_orig_mod", None)
    return inner_module(compiled) if isinstance(compiled, nn.Module) else module


def is_wrapped(module: Any, network: Any) -> bool:
    """Return whether a module holds the parameters of a network, by the same inner names."""
    if not isinstance(module, nn.Module) or not isinstance(network, nn.Module):
        return False
    one, other = (
        {name: id(p) for name, p in inner_names(m.named_parameters()).items()}
        for m in (module, network)
    )
    return bool(one) and one == other

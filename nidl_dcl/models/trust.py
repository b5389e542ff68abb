"""Whose code a name may bring in: our packages, and those that the one who starts a run has said."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nidl_dcl.errors import UsageError

__all__ = ["TRUSTED", "is_of", "refuse_unsaid"]

TRUSTED = ("nidl_dcl", "monai", "torch.nn")
"""Packages whose modules may be imported by name, whoever names them."""


def is_of(module: str, packages: Iterable[str]) -> bool:
    """Return whether a module is one of the packages, or lies in one."""
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def refuse_unsaid(file: str | Path, names: Iterable[str], said: Iterable[str]) -> None:
    """Refuse packages that a file of options names and nobody else has said.

    Parameters
    ----------
    file : path
        Where the options were read.
    names : iterable of str
        Its packages, and classes as ``package.module:Class``.
    said : iterable of str
        Packages and classes that came from elsewhere, such as the command line.

    Raises
    ------
    UsageError
        Naming the file and the first of them.
    """
    allowed = (*TRUSTED, *(name.partition(":")[0] for name in said))
    for name in names:
        if not is_of(name.partition(":")[0], allowed):
            option = "--encoder" if ":" in name else "--trust"
            raise UsageError(
                f"{file} names {name}, which is code, and a file alone must not make code run. If "
                f"you trust it, say {option} {name} on the command line, in Python trust=[{name!r}]."
            )

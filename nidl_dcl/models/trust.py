"""Packages whose code a name in a file may import: ours, and those that the user names.

The classes themselves are imported and checked by `serialization`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nidl_dcl.errors import UsageError

TRUSTED = ("nidl_dcl", "monai", "torch.nn")
"""Packages whose modules may be imported by name, whoever names them."""


def is_of(module: str, packages: Iterable[str]) -> bool:
    """Return whether a module is one of the packages, or part of one."""
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def refuse_untrusted(file: str | Path, names: Iterable[str], trusted: Iterable[str]) -> None:
    """Refuse packages that a file of options names and the user has not.

    Parameters
    ----------
    file : path
        The file.
    names : iterable of str
        Packages in it, and classes as ``package.module:Class``.
    trusted : iterable of str
        Packages and classes from elsewhere, such as the command line.

    Raises
    ------
    UsageError
        Naming the file and the first of them.
    """
    allowed = (*TRUSTED, *(name.partition(":")[0] for name in trusted))
    for name in names:
        if not is_of(name.partition(":")[0], allowed):
            option = "--encoder" if ":" in name else "--trust"
            raise UsageError(
                f"{file} names {name}, which is code, and a file alone must not make code run. If "
                f"you trust it, pass {option} {name} on the command line, in Python trust=[{name!r}]."
            )

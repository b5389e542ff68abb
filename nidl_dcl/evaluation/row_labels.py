"""Rows of pandas objects that are given side by side: matched by their labels, never by accident.

What the columns hold is read in `features`, `people`, `targets` and `confounds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pandas as pd

from nidl_dcl.errors import UsageError


def align_rows(features: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands beside features with its rows in the order of the features.

    Objects without labels (arrays, lists) are taken as they are, by position.

    Parameters
    ----------
    features : array-like, shape (n_images, n_features)
    given : mapping of str to object
        Name to what was given under it: anything with rows, or a list, a dict or a dataclass of such
        things.

    Raises
    ------
    UsageError
        For other labels than those of the features, labels in another order where labels are not
        unique, and for objects that differ in their labels beside features that have none.
    """
    if isinstance(features, pd.DataFrame):
        return {name: _aligned(value, features.index, name) for name, value in given.items()}
    labeled = [pair for name, value in given.items() for pair in _labeled(value, name)]
    for name, rows in labeled[1:]:
        first, known = labeled[0]
        if len(rows) == len(known) and not rows.equals(known):
            raise UsageError(
                f"{first} and {name} are pandas objects whose rows have other labels, or the same in "
                f"another order ({_difference(known, rows)}), and the features have none, so it is "
                "not known which rows belong together. Give the features as a DataFrame with the labels "
                "of their rows; or, where the rows are in the same order, take the labels away "
                "(.to_numpy(), or .reset_index(drop=True))."
            )
    return dict(given)


def _labeled(value: Any, name: str) -> list[tuple[str, pd.Index[Any]]]:
    """Return the labels of all pandas objects in a value."""
    if isinstance(value, pd.Series | pd.DataFrame):
        return [(name, value.index)]
    return [pair for key, one in _parts(value, name) for pair in _labeled(one, key)]


def _aligned(value: Any, rows: pd.Index[Any], name: str) -> Any:
    """Return a value with the rows of all pandas objects in it in the order of `rows`."""
    if isinstance(value, pd.Series | pd.DataFrame):
        # Another number of rows is refused where the value is read, by its name.
        if value.index.equals(rows) or len(value) != len(rows):
            return value
        if value.index.is_unique and rows.is_unique and not len(rows.difference(value.index)):
            return value.loc[rows]
        raise UsageError(
            f"The rows of {name} have other labels than those of the features "
            f"({_difference(rows, value.index)}), so it is not known which belong together. Give "
            "both the same labels; or, where the rows are in the same order, take the labels away "
            "(.to_numpy(), or .reset_index(drop=True) of both)."
        )
    if not _labeled(value, name):
        return value
    parts = [_aligned(one, rows, key) for key, one in _parts(value, name)]
    if isinstance(value, Mapping):
        return dict(zip(value, parts, strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **dict(zip([f.name for f in fields(value)], parts, strict=True)))
    return parts


def _parts(value: Any, name: str) -> list[tuple[str, Any]]:
    """Return what a dict, a list or a dataclass holds, each with its name for messages."""
    if isinstance(value, Mapping):
        return [(f"{name} {key!r}", one) for key, one in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, list | tuple) and any(
        isinstance(one, pd.Series | pd.DataFrame) or is_dataclass(one) for one in value
    ):
        return [(name, one) for one in value]
    return []


def _difference(one: pd.Index[Any], other: pd.Index[Any]) -> str:
    """Say where two indexes of one length differ first."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((f"row {i}: {a!r} and {b!r}" for i, (a, b) in pairs if a != b), "by their types")

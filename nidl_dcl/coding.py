"""What the text of a phenotype column means: coded levels, sex, decimal commas, open ends, numbers.

Works on one column of text; nothing is guessed that the column or its sidecar does not say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

__all__ = ["as_series", "decode", "same_value"]

Values = list[str | None]

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_COMMA = re.compile("[+-]?[0-9]+,[0-9]+")
_THOUSANDS = re.compile("[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_OPEN_END = re.compile(r"(?:[<>≤≥]=? ?)?([0-9]+(?:\.[0-9]+)?) ?\+?")
_SEX = {"m": "M", "male": "M", "man": "M", "boy": "M"} | {
    "f": "F",
    "female": "F",
    "woman": "F",
    "girl": "F",
}
_NO_ANSWER = {"missing", "n/a", "not applicable", "not available", "unknown", "no data"}


def decode(
    name: str, values: Sequence[str | None], about: Mapping[str, Any]
) -> tuple[Values, list[str]]:
    """Return a column in plain form, and notes on what was read how.

    In this order: whole numbers become the labels that the sidecar's ``Levels`` give them (and
    nothing when a label says missing); in a column of sex or gender, M, m, Male … become ``M``
    and F, female … ``F``; decimal commas become points; ``89+`` becomes ``89`` when all else in
    the column is a number.

    Parameters
    ----------
    name : str
        The column.
    values : sequence of (str or None)
        Text, None where missing.
    about : mapping
        What the sidecar says of the column.
    """
    notes: list[str] = []
    decoded = _levels(name, list(values), about.get("Levels"), notes)
    if re.search("(^|[^a-z])(sex|gender)([^a-z]|$)", name.lower()):
        decoded = _sex(name, decoded, notes)
    decoded = _commas(name, decoded, notes)
    return _open_ends(name, decoded, notes), notes


def as_series(values: Sequence[str | None]) -> pd.Series[Any]:
    """Return float64 (NaN missing) where every value is a number, else strings (``<NA>`` missing).

    A column without any value is float64.
    """
    if all(v is None or _NUMBER.fullmatch(v) for v in values):
        return pd.Series([float("nan") if v is None else float(v) for v in values], dtype="float64")
    return pd.Series(pd.array(list(values), dtype="string"))


def same_value(one: str | None, other: str | None) -> bool:
    """Return whether two values do not contradict each other: equal, equal numbers, or missing."""
    if one is None or other is None or one == other:
        return True
    return bool(_NUMBER.fullmatch(one) and _NUMBER.fullmatch(other) and float(one) == float(other))


def _code(text: str) -> str:
    """Return a code without the decimals and zeros that spreadsheets add."""
    return str(int(float(text))) if re.fullmatch(r"[+-]?[0-9]+(\.0*)?", text) else text


def _levels(name: str, values: Values, levels: Any, notes: list[str]) -> Values:
    codes = sorted({_code(v) for v in values if v is not None})
    if not isinstance(levels, Mapping) or not codes:
        return values
    labels: dict[str, str] = {}
    for key, label in levels.items():
        if isinstance(label, Mapping):
            label = label.get("LongName") or label.get("Description")
        if isinstance(label, str) and label.strip():
            labels[_code(str(key).strip())] = " ".join(label.split())
    absent = {code for code, label in labels.items() if label.lower() in _NO_ANSWER}
    if absent & set(codes):
        values = [None if v is not None and _code(v) in absent else v for v in values]
        codes = [code for code in codes if code not in absent]
        notes.append(f"{name}: {', '.join(sorted(absent))} means missing, as its Levels say")
    if not codes or not all(re.fullmatch("[+-]?[0-9]+", code) for code in codes):
        return values
    if not set(codes) <= set(labels):
        return values
    notes.append(f"{name}: codes read by its Levels ({_listed(labels, codes)})")
    return [None if v is None else labels[_code(v)] for v in values]


def _sex(name: str, values: Values, notes: list[str]) -> Values:
    plain: Values = [None if v is None else _SEX.get(v.lower(), v) for v in values]
    changed = {v: p for v, p in zip(values, plain, strict=True) if v and p and v != p}
    if changed:
        notes.append(f"{name}: {_listed(changed, sorted(changed))}")
    present = {_code(v) for v in values if v is not None}
    if present and present <= {"0", "1", "2"}:
        notes.append(f"{name}: coded by numbers without Levels in a sidecar; kept as numbers")
    return plain


def _commas(name: str, values: Values, notes: list[str]) -> Values:
    present = [v for v in values if v is not None]
    commas = [v for v in present if _COMMA.fullmatch(v)]
    if not commas or not all(_NUMBER.fullmatch(v) or _COMMA.fullmatch(v) for v in present):
        return values
    if all(_THOUSANDS.fullmatch(v) for v in commas):
        notes.append(f"{name}: {commas[0]!r} could be a decimal or thousands comma; kept as text")
        return values
    notes.append(f"{name}: decimal commas read as points ({len(commas)} values)")
    return [v if v is None else v.replace(",", ".") for v in values]


def _open_ends(name: str, values: Values, notes: list[str]) -> Values:
    numbers = [v is not None and _NUMBER.fullmatch(v) is not None for v in values]
    odd = sorted({v for v, n in zip(values, numbers, strict=True) if v is not None and not n})
    if not odd or not any(numbers) or not all(_OPEN_END.fullmatch(v) for v in odd):
        return values
    plain = {v: match[1] for v in odd if (match := _OPEN_END.fullmatch(v))}
    notes.append(f"{name}: open ends read as their limit ({_listed(plain, odd)})")
    return [v if v is None else plain.get(v, v) for v in values]


def _listed(meaning: Mapping[str, str], keys: Sequence[str]) -> str:
    shown = ", ".join(f"{key} = {meaning[key]}" for key in keys[:6])
    return shown + (", …" if len(keys) > 6 else "")

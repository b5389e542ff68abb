"""Decode the text of a phenotype column: coded levels, sex, decimal commas, open ends, numbers.

One column is decoded at a time, and nothing is guessed that neither the column nor its sidecar says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from nidl_dcl.bids.quantities import hold_units, read_quantities

Values = list[str | None]
_NUMERALS = re.compile("[0-9.eE+-]*")
_CODE = re.compile(r"[+-]?[0-9]+(?:\.0*)?")
_COMMA = re.compile("[+-]?[0-9]+,[0-9]+")
_THOUSANDS = re.compile("[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_OPEN_END = re.compile(r"(?:[<>≤≥]=? ?)?([0-9]+(?:\.[0-9]+)?) ?\+?")

_SEX = {
    **dict.fromkeys(("m", "male", "man", "boy"), "M"),
    **dict.fromkeys(("f", "female", "woman", "girl"), "F"),
}

_NO_ANSWER = {
    *("missing", "missing data", "missing value", "no data", "not applicable", "not available"),
    *("n/a", "na", "not collected", "not recorded", "unknown"),
}


def decode(
    name: str, values: Sequence[str | None], about: Mapping[str, Any]
) -> tuple[Values, list[str]]:
    """Return a decoded column, and notes on what was changed.

    In this order: whole numbers become their labels in the sidecar's ``Levels`` (a missing value
    when the label says so); in a column of sex or gender, M, m, Male … become ``M`` and F, female …
    ``F``; decimal commas become points, if the column has no decimal points; ``89+`` becomes ``89``
    when all other values are numbers; ``022Y`` or ``22 years`` becomes ``22`` when all values are
    numbers of one unit of time (see `quantities`). Other values stay as they are, with a note where most of the
    column is numbers. Units are never converted.

    Parameters
    ----------
    name : str
        Name of the column.
    values : sequence of (str or None)
        Text, None where missing.
    about : mapping
        Description of the column in the sidecar.
    """
    counts = Counter(value for value in values if value is not None)
    meaning: dict[str, str | None] = {text: text for text in counts}
    notes: list[str] = []
    _levels(meaning, about.get("Levels"), notes)
    if _is_called(name, "sex", "gender"):
        _sex(meaning, notes)
    if _floats(_left(meaning)) is None:
        _commas(meaning, notes)
        _open_ends(meaning, notes)
        _quantities(meaning, about.get("Units"), notes)
        _odd_ones(meaning, counts, notes)
    if _is_called(name, "age") and str(about.get("Units", "y")).strip().lower().startswith("y"):
        _ages(meaning, notes)
    notes = [f"{name[:60]}: {note}" for note in notes]
    return [None if v is None else meaning[v] for v in values], notes


def as_series(values: Sequence[str | None]) -> pd.Series[Any]:
    """Return float64 (NaN missing) where every value is a number, else strings (``<NA>`` missing).

    A column without any value is float64.
    """
    present = [value for value in dict.fromkeys(values) if value is not None]
    numbers = _floats(present)
    if numbers is None:
        return pd.Series(pd.array(list(values), dtype="string"))
    of: dict[str | None, float] = dict(zip(present, numbers, strict=True))
    of[None] = float("nan")
    return pd.Series([of[value] for value in values], dtype="float64")


def same_value(one: str | None, other: str | None) -> bool:
    """Return whether two values agree: they are equal, equal numbers, or one is missing."""
    if one is None or other is None or one == other:
        return True
    numbers = _floats((one, other))
    return numbers is not None and numbers[0] == numbers[1]


def _floats(texts: Collection[str]) -> list[float] | None:
    """Return texts as numbers, None if one is not; ``inf``, ``nan`` and ``1_0`` are not numbers."""
    if not _NUMERALS.fullmatch("".join(texts)):
        return None
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _is_called(name: str, *words: str) -> bool:
    return re.search(f"(^|[^a-z])({'|'.join(words)})([^a-z]|$)", name.lower()) is not None


def _left(meaning: Mapping[str, str | None]) -> list[str]:
    return [value for value in meaning.values() if value is not None]


def _code(text: str) -> str:
    """Return a code without the decimals and zeros that spreadsheets add."""
    if not _CODE.fullmatch(text):
        return text
    sign = "-" if text.startswith("-") else ""
    return sign + (text.lstrip("+-").partition(".")[0].lstrip("0") or "0")


def _levels(meaning: dict[str, str | None], levels: Any, notes: list[str]) -> None:
    if not isinstance(levels, Mapping):
        return
    labels: dict[str, str] = {}
    for key, label in levels.items():
        if isinstance(label, Mapping):
            label = label.get("LongName") or label.get("Description")
        if isinstance(label, str) and label.strip():
            code, label = _code(str(key).strip()), " ".join(label.split())
            if labels.setdefault(code, label) != label:
                notes.append(f"its Levels name {code[:40]} twice and are not used")
                return
    codes = {text: _code(text) for text in meaning}
    absent = {c for c in codes.values() if labels.get(c, "").lower() in _NO_ANSWER}
    for text in [text for text, code in codes.items() if code in absent]:
        meaning[text] = None
        del codes[text]
    if absent:
        notes.append(f"{', '.join(sorted(absent))} means missing, as its Levels say")
    whole = sorted(set(codes.values()))
    if not whole or not all(_CODE.fullmatch(code) for code in whole):
        return
    unnamed = [code for code in whole if code not in labels]
    if not unnamed:
        notes.append(f"codes read by its Levels ({_shown(labels, whole)})")
        meaning.update({text: labels[code] for text, code in codes.items()})
    elif len(unnamed) < len(whole):
        shown = ", ".join(code[:40] for code in unnamed[:6])
        notes.append(f"its Levels name only some of the values (not {shown}); kept as numbers")


def _sex(meaning: dict[str, str | None], notes: list[str]) -> None:
    plain = {text: _SEX.get(v.lower(), v) for text, v in meaning.items() if v is not None}
    changed = {v: p for v, p in zip(_left(meaning), plain.values(), strict=True) if v != p}
    meaning.update(plain)
    if changed:
        notes.append(_shown(changed, sorted(changed)))
    coded = [text for text, value in plain.items() if _code(value) in ("0", "1", "2")]
    if coded and len(coded) == len(plain):
        notes.append("coded by numbers without Levels in a sidecar; kept as numbers")
    elif coded:
        notes.append("words and numbers in one column; the numbers are kept as they are")


def _commas(meaning: dict[str, str | None], notes: list[str]) -> None:
    left = _left(meaning)
    commas = [v for v in left if _COMMA.fullmatch(v)]
    others = [v for v in left if not _COMMA.fullmatch(v)]
    if not commas or _floats(others) is None:
        return
    if any("." in v for v in others):
        notes.append("decimal commas and decimal points in one column; kept as text")
    elif all(_THOUSANDS.fullmatch(v) for v in commas):
        notes.append(f"{commas[0]!r} could be a decimal or thousands comma; kept as text")
    else:
        notes.append(f"decimal commas read as points ({len(commas)} different values)")
        meaning.update({t: v.replace(",", ".") for t, v in meaning.items() if v is not None})


def _open_ends(meaning: dict[str, str | None], notes: list[str]) -> None:
    odd = sorted(v for v in _left(meaning) if _floats([v]) is None)
    ends = {v: match[1] for v in odd if (match := _OPEN_END.fullmatch(v))}
    if odd and len(ends) == len(odd) < len(_left(meaning)):
        notes.append(f"open ends read as their limit ({_shown(ends, odd)})")
        meaning.update({t: ends.get(v, v) for t, v in meaning.items() if v is not None})


def _quantities(meaning: dict[str, str | None], declared: Any, notes: list[str]) -> None:
    read = read_quantities(_left(meaning))
    if read is not None:
        numbers, unit = read
        notes.append(f"read as numbers of {unit} ({_shown(numbers, sorted(numbers))})")
        if declared and not str(declared).strip().lower().startswith(unit[0]):
            notes.append(
                f"its cells say {unit} and its Units {str(declared)[:40]}; the cells count"
            )
        meaning.update({t: numbers[v] for t, v in meaning.items() if v is not None})
    elif hold_units(_left(meaning)):
        notes.append(
            "numbers with units that are not the same in all cells; kept as text, which is not "
            "predicted. Convert them to one unit"
        )


def _odd_ones(meaning: dict[str, str | None], counts: Counter[str], notes: list[str]) -> None:
    """Note the values that keep a column from being numeric."""
    odd = sorted(text for text, v in meaning.items() if v is not None and _floats([v]) is None)
    n_odd = sum(counts[text] for text in odd)
    n_all = sum(counts[text] for text, value in meaning.items() if value is not None)
    if 0 < 2 * n_odd < n_all:
        shown = ", ".join(repr(text[:40]) for text in odd[:6]) + (", …" if len(odd) > 6 else "")
        notes.append(f"{n_odd} of {n_all} values are not numbers ({shown}); kept as text")


def _ages(meaning: dict[str, str | None], notes: list[str]) -> None:
    left = _left(meaning)
    odd = [v for v, n in zip(left, _floats(left) or [], strict=False) if not 0 <= n <= 120]
    if odd:
        shown = ", ".join(v[:40] for v in odd[:6]) + (", …" if len(odd) > 6 else "")
        notes.append(
            f"{shown} is no age in years; kept. Declare codes of missing values in the sidecar's "
            "Levels, and another unit in its Units"
        )


def _shown(meaning: Mapping[str, str], keys: Sequence[str]) -> str:
    shown = ", ".join(f"{key[:40]} = {meaning[key][:40]}" for key in keys[:6])
    return shown + (", …" if len(keys) > 6 else "")

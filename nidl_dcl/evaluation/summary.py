"""Scores of targets as a table to print: at the end of a command, or of one prediction in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from nidl_dcl.evaluation.metrics import multiplicity_note, p_words

_SOMETIMES = {"log_brain_volume": "brain volume", "confounds": "confounds", "site": "site alone"}
"""Baselines that some predictions have, and the columns they get."""


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `predict` as a table to print, and one of external validity below it."""
    scored = [row for row in rows if "metric" in row]  # else nothing was cross-validated here
    there = {name for row in scored for name in _SOMETIMES if name in row}
    shown = []
    for row in scored:
        named = ("score", "low", "high", "observed", "chance", "half", "dummy", "untrained")
        places = _decimals(row.get(name) for name in (*named, "voxels", *_SOMETIMES))
        texts = {name: _text(value, places) for name, value in row.items()}
        shown.append(
            {
                "target": row["target"],
                "metric": row["metric"],
                "score [95 % interval]": _with_ends(row, places=places),
                "dummy": texts.get("dummy", ""),
                "untrained encoder": texts.get("untrained", ""),
                "voxels": texts.get("voxels", ""),
                **{words: texts.get(k, "") for k, words in _SOMETIMES.items() if k in there},
                "half the labels": texts.get("half", ""),
                "first repeat": texts.get("observed", ""),
                "shuffled": texts.get("chance", ""),
                "p": p_words(row.get("p"), row.get("permutations")).removeprefix("= "),
                "n": row["n"],
            }
        )
    outside = []
    for row in (given["external"] for given in rows if given.get("external")):
        places = _decimals(row.get(name) for name in ("score", "internal", "dummy"))
        few = row.get("too_few")
        outside.append(
            {
                "read out from another cohort": row["target"],
                "metric": row["metric"],
                "here [95 % interval]": "too few to say" if few else _with_ends(row, places=places),
                "in its own cohort": _with_ends(row, "internal", places),
                "dummy": "" if few else _text(row.get("dummy"), places),
                "n": row["n"],
                "n there": row["n_internal"],
                "in both, not scored": row["n_overlap"],
            }
        )
    tables = [pd.DataFrame(part).to_string(index=False) for part in (shown, outside) if part]
    if "log_brain_volume" in there:
        tables.append(
            "Alignment takes the size of the brain out of the images. So the logarithm of its volume is "
            "predicted\nfrom, too, beside the embeddings, the untrained encoder's features and the "
            "voxels, with the weight of\na tenth of the columns; 'brain volume' is that alone."
        )
    if several := multiplicity_note(len(shown)):
        tables.append(several)
    return "\n\n".join(tables)


def _decimals(values: Any) -> int:
    """Return the decimals that tell the numbers of a row apart, two to five."""
    known = {value for value in values if value is not None}
    for places in range(2, 5):
        if len({f"{value:.{places}f}" for value in known}) == len(known):
            return places
    return 5


def _with_ends(row: Mapping[str, Any], inside: str = "", places: int = 2) -> str:
    """Return a score with its interval, of another cohort's by the prefix of its names."""
    low, high = (row.get(f"{inside}_{end}" if inside else end) for end in ("low", "high"))
    ends = "" if low is None else f" [{_text(low, places)}, {_text(high, places)}]"
    return _text(row[inside or "score"], places) + ends


def _text(value: Any, places: int) -> str:
    return "" if not isinstance(value, int | float) else f"{value:.{places}f}"

"""What a command prints at its end: the scores of each target as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `predict` as a table to print, and one of external validity below it."""
    shown = []
    with_confounds = any("confounds" in row for row in rows)
    with_volume = any("log_brain_volume" in row for row in rows)
    for row in rows:
        if "metric" not in row:  # nothing was cross-validated here
            continue
        shown.append(
            {
                "target": row["target"],
                "metric": row["metric"],
                "score [95 % interval]": _with_ends(row),
                "chance": _two(row.get("chance")),
                "dummy": _two(row.get("dummy")),
                "untrained encoder": _two(row.get("untrained")),
                "voxels": _two(row.get("voxels")),
                "half the labels": _two(row.get("half")),
                **({"brain volume": _two(row.get("log_brain_volume"))} if with_volume else {}),
                **({"confounds": _two(row.get("confounds"))} if with_confounds else {}),
                "n": row["n"],
            }
        )
    outside = [
        {
            "read out from another cohort": row["target"],
            "metric": row["metric"],
            "here [95 % interval]": _with_ends(row),
            "in its own cohort": _with_ends(row, "internal"),
            "dummy": _two(row.get("dummy")),
            "n": row["n"],
            "n there": row["n_internal"],
            "in both, not scored": row["n_overlap"],
        }
        for row in (given["external"] for given in rows if given.get("external"))
    ]
    tables = [pd.DataFrame(part).to_string(index=False) for part in (shown, outside) if part]
    if with_volume:
        tables.append(
            "Alignment takes the size of the brain out of the images. So the logarithm of its volume is "
            "predicted\nfrom, too, beside the embeddings, the untrained encoder's features and the "
            "voxels, with the weight of\na tenth of the columns; 'brain volume' is that alone."
        )
    return "\n\n".join(tables)


def _with_ends(row: Mapping[str, Any], inside: str = "") -> str:
    """Return a score with its interval, of another cohort's by the prefix of its names."""
    low, high = (row.get(f"{inside}_{end}" if inside else end) for end in ("low", "high"))
    ends = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return _two(row[inside or "score"]) + ends


def _two(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"

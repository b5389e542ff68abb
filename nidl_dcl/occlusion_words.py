"""What a map of occlusion says: its extremes and its checks, as numbers and in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["describe_map", "where"]

Array = NDArray[np.float64]


def describe_map(
    name: str,
    units: str,
    of: str,
    table: pd.DataFrame,
    mean: Array,
    own: Array,
    untrained: Array,
) -> dict[str, Any]:
    """Return the extremes and the checks of one map, as numbers and in words.

    Parameters
    ----------
    name, units : str
        Of the output.
    of : str
        What is predicted, for sentences.
    table : DataFrame
        Columns ``x``, ``y``, ``z``, ``place`` and ``change`` of every block, the strongest first.
    mean, untrained : ndarray, shape (n_few,)
        Changes on the mean brain of the blocks that were hidden in all volumes, by the encoder and
        by one that was not trained.
    own : ndarray, shape (n_participants, n_few)
        Changes of the same blocks on participants' own volumes.
    """
    changes, place = table["change"].to_numpy(), str(table["place"].iloc[0])
    x, y, z = (float(v) for v in table[["x", "y", "z"]].iloc[0])
    total = np.abs(changes).sum()
    tenth = max(1, round(len(changes) / 10))
    held = float(np.abs(changes[:tenth]).sum() / total) if total > 0 else None
    pairs = [_correlation(a, b) for i, a in enumerate(own) for b in own[:i]]
    known = [r for r in pairs if r is not None]
    with_own = _correlation(mean, own.mean(axis=0))
    among = float(np.mean(known)) if known else None
    with_untrained = _correlation(mean, untrained)
    sentences = [
        (
            f"Hiding a block of the mean brain changes the prediction of {of} ({units}) by up to "
            f"{abs(changes[0]):.3g}: at x {x:.0f}, y {y:.0f}, z {z:.0f} mm ({place}), what is there "
            f"makes it {'higher' if changes[0] > 0 else 'lower'}. Over all blocks it adds "
            f"{changes.min():.3g} to {changes.max():.3g}."
        )
    ]
    if held is not None:
        sentences.append(
            f"The strongest tenth of the blocks holds {100 * held:.0f} % of all change; 10 % would "
            "be the same everywhere."
        )
    checks = []
    if with_own is not None:
        checks.append(
            f"the map of the mean brain correlates with that of {len(own)} participants' own "
            f"volumes by r = {with_own:.2f}"
        )
    if among is not None:
        checks.append(f"their maps with one another by {among:.2f} on average")
    if with_untrained is not None:
        checks.append(
            "that of the mean brain with that of the encoder before training, with a read-out of "
            f"its own, by {with_untrained:.2f} (near 1: the map shows the form of the network "
            "rather than what it learnt)"
        )
    if checks:
        text = "; ".join(checks)
        sentences.append(text[0].upper() + text[1:] + ".")
    return {
        "Name": name,
        "Units": units,
        "Minimum": float(changes.min()),
        "Maximum": float(changes.max()),
        "Peak": [x, y, z],
        "PeakChange": float(changes[0]),
        "PeakPlace": place,
        "StrongestTenth": held,
        "CorrelationParticipants": with_own,
        "CorrelationAmongParticipants": among,
        "CorrelationUntrained": with_untrained,
        "Sentences": sentences,
    }


def where(x: float, y: float, z: float) -> str:
    """Say roughly where a place lies from the middle of the volume."""
    words = [
        low if value < -15 else high
        for value, low, high in ((x, "left", "right"), (y, "back", "front"), (z, "low", "high"))
        if abs(value) > 15
    ]
    return " ".join(words) or "middle"


def _correlation(a: Array, b: Array) -> float | None:
    if len(a) < 3 or not (np.ptp(a) > 0 and np.ptp(b) > 0):
        return None
    return float(np.corrcoef(a, b)[0, 1])

"""Nearest neighbors of embeddings by cosine similarity: who resembles whom, and who nobody.

Works block by block, so that no matrix of all pairs is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from nidl_dcl.evaluation.bootstrap import bootstrap_groups

_BLOCK = 512

_NEIGHBORS = 5


def distance_to_others(matrix: ArrayLike, person_id: Sequence[str]) -> NDArray[np.float64]:
    """Return the mean cosine distance of each row to its five nearest rows of other participants.

    It is 0 (alike) to 2; NaN where there is nobody else.
    """
    rows, person = _unit(matrix), _codes(person_id)
    found = np.full(len(rows), np.nan)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        distance = 1.0 - rows[part] @ rows.T
        distance[person[part, None] == person] = np.inf
        nearest = np.sort(
            np.partition(distance, min(_NEIGHBORS, len(rows)) - 1, axis=1)[:, :_NEIGHBORS], axis=1
        )
        known = np.isfinite(nearest)
        count = known.sum(axis=1)
        whole = np.where(known, nearest, 0.0).sum(axis=1)
        found[part] = np.divide(whole, count, out=np.full(len(count), np.nan), where=count > 0)
    return found


def retrieve_participants(
    features: Mapping[str, Sequence[ArrayLike]],
    person_id: Sequence[str],
    session_id: Sequence[str | None],
    content: Sequence[str],
    *,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return how often the nearest neighbor of an image is of the same participant.

    Where participants have several sessions, images of the same participant and session are no
    candidates, so that a session has to find another one. Copies of an image count once.

    Parameters
    ----------
    features : mapping of str to sequence of array of shape (n, d)
        Kinds of features; shares are averaged over several arrays (seeds) of one kind.
    person_id, session_id, content : sequence, length n
        Whose image it is, of which session, and a checksum of its voxels (empty if unknown).
    seed : int, default=0
        Of the interval over participants drawn with replacement.

    Returns
    -------
    table : DataFrame
        One row for each kind: ``features n_images n_participants n_candidates share low high
        chance``; no row where no participant has a second image.
    words : dict
        ``unit`` ("session", "image" or None) and a ``sentence``.
    """
    columns = ["features", "n_images", "n_participants", "n_candidates"]
    columns += ["share", "low", "high", "chance"]
    text = pd.Series(list(content), dtype=object)
    once = np.flatnonzero(~(text.duplicated() & (text != "")))
    person, session = _codes(person_id)[once], _codes([str(s) for s in session_id])[once]
    pairs = pd.DataFrame({"person": person, "session": session}).drop_duplicates()
    images, visits = np.bincount(person), np.bincount(pairs["person"])
    across = bool((visits > 1).any())
    asked = np.flatnonzero((visits if across else images)[person] > 1)
    if not len(asked):
        return pd.DataFrame(columns=columns), {
            "unit": None,
            "sentence": "No participant has a second image, so it is not known whether an image "
            "finds another one of the same participant.",
        }
    unit = "session" if across else "image"
    visit = session if across else np.arange(len(person))
    rows = []
    for name, matrices in features.items():
        runs = [_hits(_unit(matrix)[once], person, visit, asked) for matrix in matrices]
        hit = np.mean([run[0] for run in runs], axis=0)
        chance, candidates = runs[0][1:]
        low, high = _interval(hit, person[asked], seed)
        counts = (len(asked), len(np.unique(person[asked])), int(np.median(candidates)))
        rows.append((name, *counts, float(hit.mean()), low, high, float(chance.mean())))
    table = pd.DataFrame(rows, columns=columns)
    first = table.iloc[0]
    rest = "".join(f", {row.features} {row.share:.0%}" for row in table.iloc[1:].itertuples())
    return table, {
        "unit": unit,
        "sentence": (
            f"For {first.share:.0%} of {first.n_images} images the nearest neighbor in cosine "
            f"similarity is another {unit} of the same participant (chance {100 * first.chance:.2g}%{rest})."
        ),
    }


def _hits(
    rows: NDArray[np.float32],
    person: NDArray[np.intp],
    visit: NDArray[np.intp],
    asked: NDArray[np.intp],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Return for each row asked about: found its person, the chance of that, candidates."""
    hit, chance = np.zeros(len(asked)), np.zeros(len(asked))
    candidates = np.zeros(len(asked), dtype=np.intp)
    for start in range(0, len(asked), _BLOCK):
        part = slice(start, start + _BLOCK)
        which = asked[part]
        same = person[which, None] == person
        barred = same & (visit[which, None] == visit)
        similarity = rows[which] @ rows.T
        similarity[barred] = -np.inf
        hit[part] = person[similarity.argmax(axis=1)] == person[which]
        candidates[part] = (~barred).sum(axis=1)
        chance[part] = (same & ~barred).sum(axis=1) / candidates[part]
    return hit, chance, candidates


def _interval(
    hit: NDArray[np.float64], person: NDArray[np.intp], seed: int
) -> tuple[float | None, float | None]:
    """Return the interval of the share over participants, None where it has none."""
    people, code = np.unique(person, return_inverse=True)
    hits, asked = np.bincount(code, hit), np.bincount(code)

    def share(count: NDArray[np.intp]) -> dict[str, float]:
        return {"share": float(count @ hits / (count @ asked))}

    ends = bootstrap_groups(share, len(people), seed, "retrieval")["share"]["ci95"]
    return (ends[0], ends[1]) if ends else (None, None)


def _codes(values: Sequence[str]) -> NDArray[np.intp]:
    return np.unique(np.asarray(list(values), dtype=str), return_inverse=True)[1].astype(np.intp)


def _unit(matrix: ArrayLike) -> NDArray[np.float32]:
    rows = np.asarray(matrix, dtype=np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1.0), dtype=np.float32)

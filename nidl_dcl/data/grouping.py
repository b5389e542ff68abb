"""Who stays on one side of every split: participants who share an image, a family, or both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def connected_groups(people: Iterable[Any], *labels: Iterable[Any]) -> list[str]:
    """Return for each row the participant that stands for its group.

    Parameters
    ----------
    people : iterable of length n
        Participants.
    *labels : iterables of length n
        Rows with an equal label, in any of them, are of one group, and so on in a chain; missing
        labels join nobody.

    Returns
    -------
    list of str
        The first participant of the group, in the order of their names.
    """
    who, names = pd.factorize(np.array([str(p) for p in people], dtype=object), sort=True)
    rows, columns, count = [who], [who], len(names)
    for label in labels:
        codes, values = pd.factorize(pd.Series(list(label), dtype=object))
        known = codes >= 0
        rows.append(who[known])
        columns.append(codes[known] + count)
        count += len(values)
    at = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(at[0]), dtype=np.int8), at), shape=(count, count))
    component = connected_components(graph, directed=False)[1][: len(names)]
    first = pd.Series(names).groupby(component).transform("first")
    return [str(name) for name in first.to_numpy()[who]]

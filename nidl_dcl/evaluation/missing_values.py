"""Missing values of the columns beside a target: how many there are, and what becomes of the rows.

Who is left out is decided in `folds` and `targets`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Labels = NDArray[np.object_]

_CONSEQUENCES = {
    "group": "Each of them is taken for a group of their own, so relatives among them may be in "
    "training and test at once",
    "site": "They are part of all scores but those by site (how well it is decoded, within sites, at "
    "new sites), the baseline 'site' knows nothing of them, and harmonization leaves them as they are",
    "confound": "They are left out, since what it does to their images cannot be removed",
}


def describe_missing(
    kind: str, column: str, missing: NDArray[np.bool_], people: Labels
) -> dict[str, Any] | None:
    """Return how many participants lack a value in all of their images, or in some, in words too.

    Parameters
    ----------
    kind : {"group", "site", "confound"}
        What the column is used for.
    column : str
    missing : ndarray of bool, shape (n_images,)
    people : ndarray of object, shape (n_images,)
        Whose images these are.

    Returns
    -------
    dict or None
        ``n_images``, ``n_participants`` (with such an image), ``sentence``; None without any.
    """
    if not missing.any():
        return None
    n, n_all = (len(pd.unique(who)) for who in (people[missing], people))
    n_images = int(missing.sum())
    images = f" ({n_images} images)" if n_images != n else ""
    return {
        "n_images": n_images,
        "n_participants": n,
        "sentence": f"{n} of {n_all} participants{images} have no value of the {kind} column "
        f"{column!r}. {_CONSEQUENCES[kind]}.",
    }

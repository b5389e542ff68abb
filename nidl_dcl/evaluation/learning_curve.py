"""Scores against the number of labeled participants: the same folds, fewer to learn from.

Every fold keeps all of its test participants; which of the others a model may learn from is decided
here, how it learns in `cross_validation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.cross_validation import (
    ProgressCounter,
    cross_validate,
    cross_validate_dummy,
)
from nidl_dcl.evaluation.features import Source
from nidl_dcl.evaluation.folds import CVDesign, main_class
from nidl_dcl.evaluation.metrics import METRIC_WORDS, compared, interval, score_bounds
from nidl_dcl.evaluation.targets import MIN_CLASS
from nidl_dcl.randomness import permutation

MIN_LABELED = 10
"""Labeled participants (groups) of the smallest size."""


def check_shares(asked: bool | Sequence[float]) -> None:
    """Raise `UsageError` for shares of the labeled participants that make no sense."""
    if isinstance(asked, bool | np.bool_):
        return
    shares = np.atleast_1d(np.asarray(asked, dtype=object))
    numbers = [s for s in shares if isinstance(s, int | float | np.number) and s is not True]
    if len(numbers) < len(shares) or not all(0 < s <= 1 for s in numbers):
        raise UsageError(
            "learning_curve is True, False, or shares of the labeled participants above 0 and at "
            f"most 1, such as [0.5, 0.25]; got {asked!r}."
        )


def learning_shares(design: CVDesign, asked: bool | Sequence[float]) -> list[float]:
    """Return the shares of the labeled participants to learn from, the smallest first.

    Parameters
    ----------
    design : CVDesign
    asked : bool or sequence of float
        True: a half, a quarter and so on. All of them (1) is always there, and left out are shares
        that leave fewer than ten groups, two in a fold, or three in a class; False: none at all.
    """
    if isinstance(asked, bool | np.bool_):
        if not asked:
            return []
        asked = [0.5**i for i in range(1, 31)]
    kinds = np.bincount(_kinds(design))
    least = max(MIN_LABELED, 2 * design.n_folds)
    enough = []
    for share in sorted({float(s) for s in asked if s < 1}):
        kept = _kept(kinds, share)
        if kept.sum() >= least and (len(kinds) == 1 or kept.min() >= MIN_CLASS):
            enough.append(share)
    return [*enough, 1.0]


def labeled_groups(design: CVDesign, share: float, seed: int) -> NDArray[np.bool_]:
    """Return which groups may be learned from, in each repeat.

    Classes stay in proportion, folds equally full, and the groups of a smaller share are among
    those of a larger one.

    Parameters
    ----------
    design : CVDesign
    share : float
        Of the groups.
    seed : int
        Key of the choice.

    Returns
    -------
    ndarray of bool, shape (n_repeats, n_groups)
    """
    kinds, chosen = _kinds(design), []
    for repeat, fold in enumerate(design.fold):
        table = pd.DataFrame({"kind": kinds, "fold": fold})
        table = table.iloc[permutation(len(fold), seed, "learning curve", repeat)]
        # First one of each fold, then a second one of each, and so on.
        turn = table.groupby(["kind", "fold"]).cumcount()
        rank = table.loc[turn.sort_values(kind="stable").index].groupby("kind").cumcount()
        chosen.append(rank.sort_index().to_numpy() < _kept(np.bincount(kinds), share)[kinds])
    return np.stack(chosen)


def learning_curve(
    design: CVDesign,
    sources: Mapping[str, Sequence[Source]],
    scores: Mapping[str, Mapping[str, Any]],
    headline: Mapping[str, Any],
    *,
    target: str,
    shares: Sequence[float],
    seed: int,
    counter: ProgressCounter,
) -> dict[str, Any] | None:
    """Return the main score of all features against the number of labeled participants.

    Parameters
    ----------
    design : CVDesign
    sources : mapping of str to sequence of Source
        ``embeddings`` and the baselines but for ``dummy``, which is added; scores of several
        sources under a name are averaged fold by fold.
    scores : mapping of str to mapping
        Scores of each with all labeled participants, ``dummy`` included.
    headline : mapping
        Its ``metric`` and ``best_baseline``.
    target : str
    shares : sequence of float
        As `learning_shares` returns them, the last one 1; None is returned without any.
    seed : int
        Key of who is learned from.
    counter : ProgressCounter
        Counts one step per source, repeat and share below 1.

    Returns
    -------
    dict or None
        ``metric``; ``shares``; ``n_participants``, those learned from (mean over the folds), for
        each share; ``scores``, name to ``mean`` and ``ci95`` for each share; ``sentence``.
    """
    if not shares:
        return None
    metric = str(headline["metric"])
    sizes: list[float] = []
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in scores}
    for share in shares:
        groups = labeled_groups(design, share, seed)
        tested = _people(design, np.ones_like(groups))
        kept = _people(design, groups)
        learned = kept.sum(axis=1, keepdims=True) - kept
        sizes.append(float(learned.mean()))
        found = {name: known[metric] for name, known in scores.items()}
        if share < 1:
            rows, ratio = groups[:, design.group[design.unit]], float((tested / learned).mean())
            runs = {
                name: [cross_validate(design, source, counter, rows)[1] for source in given]
                for name, given in sources.items()
            }
            runs["dummy"] = [cross_validate_dummy(design, rows)[1]]
            for name in scores:
                folds = np.mean([[fold[metric] for fold in run] for run in runs[name]], axis=0)
                found[name] = interval(folds, ratio, score_bounds(metric))
        for name, score in found.items():
            points[name].append({key: score[key] for key in ("mean", "ci95")})
    return {
        "metric": metric,
        "shares": list(shares),
        "n_participants": sizes,
        "scores": points,
        "sentence": _sentence(metric, target, sizes, points, str(headline["best_baseline"])),
    }


def _kinds(design: CVDesign) -> NDArray[np.intp]:
    """Return the class of each group; for numbers, they are all of one kind."""
    if design.task == "classification":
        return np.unique(main_class(design.value, design.group), return_inverse=True)[1]
    return np.zeros(design.n_groups, dtype=np.intp)


def _kept(kinds: NDArray[np.intp], share: float) -> NDArray[np.intp]:
    """Return how many of the groups of each kind a share is."""
    return np.rint(kinds * share).astype(np.intp)


def _people(design: CVDesign, groups: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the participants in each fold, shape (n_repeats, n_folds), of the groups given."""
    people = np.rint(np.bincount(design.group, weights=design.weight))
    in_fold = design.fold[:, None] == np.arange(design.n_folds)[:, None]
    return np.asarray((in_fold * (people * groups)[:, None]).sum(axis=2))


def _sentence(
    metric: str,
    target: str,
    sizes: Sequence[float],
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    best: str,
) -> str:
    """Say from how many participants on the embeddings are as good as the best baseline with all."""
    own = [float(point["mean"]) for point in points["embeddings"]]
    goal, words = float(points[best][-1]["mean"]), METRIC_WORDS.get(metric, metric)
    everyone = f"{sizes[-1]:.0f}"
    if len(sizes) == 1:
        return (
            f"There are too few participants for a learning curve: half of the {everyone} to learn "
            "from are not enough."
        )
    sign = -1.0 if metric == "mae" else 1.0
    reached = len(own)
    while reached and sign * own[reached - 1] >= sign * goal:
        reached -= 1
    rival = f"{target} as well, on average, as the best baseline, {best}, does"
    if reached == len(own):
        first = f"With all {everyone} labeled participants, the embeddings do not predict {rival}"
    elif reached == len(own) - 1:
        first = (
            f"It takes all {everyone} labeled participants for the embeddings to predict {rival}"
        )
    else:
        first = (
            f"With {sizes[reached]:.0f} labeled participants, the embeddings predict {rival} with "
            f"all {everyone}"
        )
    mine, theirs = compared(own[min(reached, len(own) - 1)], goal)
    half, whole = compared(own[-2], own[-1])
    return (
        f"{first} ({words} {mine} against {theirs}). From "
        f"{sizes[-2]:.0f} to {everyone} participants, the {words} of the embeddings goes from "
        f"{half} to {whole}."
    )

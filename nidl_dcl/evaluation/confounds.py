"""Features cleaned inside the folds: harmonized by site (ComBat), freed of confounds.

Everything is learnt from the training rows of a fold and applied to its test rows. The target is
never given to it; which rows are used, and what is fitted in what is left, is decided elsewhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.features import Components, Features, principal_axes
from nidl_dcl.evaluation.targets import Target, Values, read_apart, read_values

__all__ = [
    "MIN_SITE_IMAGES",
    "Cleaned",
    "EncodedConfounds",
    "can_harmonize",
    "confound_reasons",
    "encode_confounds",
    "harmonization_counts",
    "learn_harmonization",
    "read_confounds",
    "read_target_beside",
    "require_harmonization",
]

Array = NDArray[np.float64]


Rows = NDArray[np.intp]


Labels = NDArray[np.object_]


Maps = dict[str, tuple[Array, Array]]


MIN_SITE_IMAGES = 3
"""Training images that a site needs to be harmonized."""


_KEPT = 64
"""Training sets whose harmonization is kept: permutations meet the same ones again."""


@dataclass(frozen=True, eq=False)
class EncodedConfounds:
    """Confounds of the rows in use, as numbers.

    Attributes
    ----------
    names : tuple of str
        One per column of `matrix`: the confound, with ``=category`` where it has categories.
    matrix : ndarray, shape (n_used, n_columns)
        Numbers as they are, a column of 0 and 1 for each category.
    blocks : tuple of slice
        Columns of each confound that has categories.
    described : dict
        Name to what it is taken for, JSON types only.
    """

    names: tuple[str, ...]
    matrix: Array
    blocks: tuple[slice, ...]
    described: dict[str, Any]

    def rows(self, train: Rows, rows: Rows) -> Array:
        """Return rows of `matrix`, those of a category without a training row as an average row."""
        taken, known = self.matrix[rows], self.matrix[train]
        for block in self.blocks:
            new = taken[:, block] @ known[:, block].max(axis=0) == 0
            taken[new, block] = known[:, block].mean(axis=0)
        return taken

    def model(self, train: Rows, cleaned: Array) -> tuple[Array, Array]:
        """Return the linear effect of the confounds on features, learnt from training rows.

        What is left of features `z` of rows `r` is
        ``z - intercept - confounds.rows(train, r) @ coefficients``.

        Parameters
        ----------
        train : ndarray of int, shape (n_train,)
        cleaned : ndarray, shape (n_train, n_features)
            Their features, standardized and perhaps harmonized (`Cleaned.before_confounds`).

        Returns
        -------
        intercept : ndarray, shape (n_features,)
        coefficients : ndarray, shape (n_columns, n_features)
        """
        known = self.rows(train, train)
        mean, spread = known.mean(axis=0), _spread(known)
        coefficients = np.linalg.pinv((known - mean) / spread) @ cleaned / spread[:, None]
        return cleaned.mean(axis=0) - mean @ coefficients, coefficients


@dataclass(frozen=True, eq=False)
class Cleaned:
    """A source whose rows are harmonized by site, then freed of the linear effect of confounds.

    Features are standardized first. Wide data known by inner products are harmonized in their
    principal component scores; without harmonization the confounds are removed from the wide data
    themselves.

    Attributes
    ----------
    source : Features or Components
    confounds : Confounds or None
    site : ndarray of object or None, shape (n_used,)
        Site of each row, None where unknown. A row whose site has fewer than `MIN_SITE_IMAGES`
        training rows is left as it is.
    """

    source: Features | Components
    confounds: EncodedConfounds | None = None
    site: Labels | None = None
    _maps: dict[bytes, Maps] = field(default_factory=dict, repr=False)

    def coordinates(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return the cleaned rows in the principal axes of the training rows."""
        if isinstance(self.source, Components) and self.site is None:
            if self.confounds is None:
                return self.source.coordinates(train, test)
            known = self.confounds.rows(train, train)
            mean, spread = known.mean(axis=0), _spread(known)
            designs = [
                np.column_stack([np.ones(len(r)), (self.confounds.rows(train, r) - mean) / spread])
                for r in (train, test)
            ]
            return self.source.residual_coordinates(train, test, *designs)
        return principal_axes(*self.cleaned(train, test))

    def cleaned(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return training rows (with centered columns) and test rows, cleaned."""
        known, new = self.before_confounds(train, test)
        if self.confounds is None:
            mean = known.mean(axis=0)
            return known - mean, new - mean
        intercept, coefficients = self.confounds.model(train, known)
        left = known - intercept - self.confounds.rows(train, train) @ coefficients
        left_new = new - intercept - self.confounds.rows(train, test) @ coefficients
        # What rounding leaves of a column that the confounds explain is nothing.
        real = left.std(axis=0) > 1e-9 * _spread(known)
        return left * real, left_new * real

    def before_confounds(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return training and test rows, standardized and, with sites, harmonized."""
        if isinstance(self.source, Features):
            known, new = self.source.standardized(train, test)
        else:
            known, new = self.source.coordinates(train, test)
            # The prior of ComBat is shared by the columns, so their signs must not be accidents.
            largest = known[np.abs(known).argmax(axis=0), np.arange(known.shape[1])]
            known, new = known * np.sign(largest), new * np.sign(largest)
        if self.site is None:
            return known, new
        maps = self.harmonization(train, known)
        return (_harmonized(known, self.site[train], maps), _harmonized(new, self.site[test], maps))

    def harmonization(self, train: Rows, known: Array) -> Maps:
        """Return `learnt_harmonization` of training rows, kept for the next time."""
        assert self.site is not None
        key = np.ascontiguousarray(train).tobytes()
        if key not in self._maps:
            while len(self._maps) >= _KEPT:
                del self._maps[next(iter(self._maps))]
            self._maps[key] = learn_harmonization(known, self.site[train])
        return self._maps[key]


def can_harmonize() -> bool:
    """Return whether the package that harmonizes is there."""
    return importlib.util.find_spec("pycombat") is not None


def require_harmonization() -> None:
    """Raise `UsageError` when the package that harmonizes is not there."""
    if not can_harmonize():
        raise UsageError(
            "--harmonize needs the package pycombat: pip install 'nidl_dcl[harmonize]'."
        )


def learn_harmonization(known: Array, site: Labels) -> Maps:
    """Return what ComBat does to the features of each site: a shift and a scale.

    ComBat (Johnson et al. 2007, parametric, no covariates) gives every site the mean and the
    variance of all, by estimates that are shrunk towards what the site does to all features. Where
    there is nothing to shrink towards (a single feature, one without variance inside the sites),
    the estimates of the site alone are taken.

    Parameters
    ----------
    known : ndarray, shape (n, n_features)
        Training rows.
    site : ndarray of object, shape (n,)
        None where unknown.

    Returns
    -------
    dict
        Site to shift and scale, each of shape (n_features,): a harmonized row is
        ``row * scale + shift``. Sites with fewer than `MIN_SITE_IMAGES` rows are not in it; it is
        empty with fewer than two other sites.
    """
    counts = pd.Series(site, dtype=object).value_counts()
    labels = sorted(str(label) for label in counts.index[counts >= MIN_SITE_IMAGES])
    if len(labels) < 2:
        return {}
    maps = _each_site(known, site, labels)
    rows = np.flatnonzero(np.isin(site.astype(str), labels) & (site != None))  # noqa: E711
    mean, spread = known[rows].mean(axis=0), _spread(known[rows])
    z = (known[rows] - mean) / spread
    within = z - np.stack([z[site[rows] == label].mean(axis=0) for label in site[rows]])
    varying = np.flatnonzero(within.std(axis=0) > 1e-6)
    if len(varying) < 2:
        return maps
    from pycombat import Combat

    # Two rows per site, all 0 and all 1, show what the fitted correction does to any row.
    probes = np.repeat(np.tile([0.0, 1.0], len(labels))[:, None], len(varying), axis=1)
    with np.errstate(all="ignore"):
        combat = Combat().fit(z[:, varying], site[rows].astype(str))
        probed = combat.transform(probes, np.repeat(labels, 2))
    for i, label in enumerate(labels):
        scale = probed[2 * i + 1] - probed[2 * i]
        shift = mean[varying] * (1 - scale) + spread[varying] * probed[2 * i]
        found = np.isfinite(scale) & np.isfinite(shift)
        maps[label][0][varying[found]], maps[label][1][varying[found]] = shift[found], scale[found]
    return maps


def _each_site(known: Array, site: Labels, labels: Sequence[str]) -> Maps:
    """Return shift and scale by the estimates of each site alone, where ComBat has no prior."""
    parts = {label: known[site == label] for label in labels}
    together = np.concatenate(list(parts.values()))
    within = np.concatenate([part - part.mean(axis=0) for part in parts.values()])
    spread = np.where(within.std(axis=0) > 1e-6 * _spread(together), within.std(axis=0), 0.0)
    maps = {}
    for label, part in parts.items():
        own = part.std(axis=0)
        usable = (spread > 0) & (own > 1e-6 * spread)
        scale = np.where(usable, spread / np.where(usable, own, 1.0), 1.0)
        maps[label] = (together.mean(axis=0) - part.mean(axis=0) * scale, scale)
    return maps


def harmonization_counts(site: Labels, folds: Rows) -> dict[str, Any]:
    """Return how many images harmonization leaves as they are when they are tested.

    Parameters
    ----------
    site : ndarray of object, shape (n_used,)
    folds : ndarray of int, shape (n_repeats, n_used)
        Test fold of each row.

    Returns
    -------
    dict
        ``n_images_not_harmonized`` (in one repeat or more), ``sites_not_harmonized`` (label to such
        images), ``n_images_without_site`` (among them).
    """
    left = np.zeros(len(site), dtype=bool)
    for fold in folds:
        for k in np.unique(fold):
            counts = pd.Series(site[fold != k], dtype=object).value_counts()
            usable = counts.index[counts >= MIN_SITE_IMAGES]
            usable = usable if len(usable) > 1 else usable[:0]
            left |= (fold == k) & ~pd.Series(site, dtype=object).isin(usable).to_numpy()
    by_site = pd.Series(site[left], dtype=object).value_counts().sort_index()
    return {
        "n_images_not_harmonized": int(left.sum()),
        "sites_not_harmonized": {str(label): int(n) for label, n in by_site.items()},
        "n_images_without_site": int(pd.Series(site, dtype=object).isna().sum()),
    }


def read_confounds(
    table: pd.DataFrame, groups: Labels, aside: NDArray[np.bool_], target: str
) -> dict[str, Values]:
    """Read columns by the rules of targets: numbers, or categories.

    Parameters
    ----------
    table : DataFrame, shape (n_images, n_confounds)
    groups : ndarray of object, shape (n_images,)
    aside : ndarray of bool, shape (n_images,)
        Rows held out: they do not decide what a column is.
    target : str
        A column of this name is refused.

    Raises
    ------
    UsageError
        For the target itself, or a name that is there twice.
    InputsUnusableError
        For a column without a value.
    """
    names = [str(name) for name in table.columns]
    if target in names:
        raise UsageError(
            f"{target!r} is the target and cannot be a confound too: nothing would be left to "
            "predict. Leave it out of the confounds, or of the targets."
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UsageError(f"Confound {twice[0]!r} is given twice.")
    found = {}
    for i, name in enumerate(names):
        column = table.iloc[:, i].reset_index(drop=True)
        seen = read_values(column[~aside], groups[~aside], name=name, what="confound")
        read = read_values(column, groups, name=name, task=seen.task, what="confound")
        found[name] = replace(read, rule=seen.rule)
    return found


def confound_reasons(confounds: Mapping[str, Values], n: int) -> Labels:
    """Return why each of `n` rows lacks a confound, empty text where it has all."""
    reasons = np.full(n, "", dtype=object)
    for name, read in confounds.items():
        lacks = ~_usable(read) & (reasons == "")
        reasons[lacks] = f"confound missing: {name}"
    return reasons


def read_target_beside(
    y: pd.Series[Any],
    groups: Labels,
    aside: NDArray[np.bool_],
    confounds: Mapping[str, Values] | None,
    *,
    name: str = "target",
    task: str = "auto",
) -> Target:
    """Read a target: its task is decided by all rows, the rest by those with all confounds.

    Parameters
    ----------
    y : Series, shape (n_images,)
    groups, aside, name, task
        As for `nidl_dcl.evaluation.targets.read_apart`: rows held out decide nothing.
    confounds : mapping or None
        As `read_confounds` gives them.

    Raises
    ------
    UsageError
        For a confound that has the values of the target.
    InputsUnusableError
        As `nidl_dcl.evaluation.targets.read_apart`, and when no row has the target and all confounds.
    """
    if not confounds or aside.all():
        return read_apart(y, groups, aside, name=name, task=task)
    decided = read_values(y[~aside], groups[~aside], name=name, task=task)
    values = read_values(y, groups, name=name, task=decided.task)
    lacking = confound_reasons(confounds, len(y))
    left = values.present & (lacking == "")
    seen = left & ~aside
    if not seen.any():
        raise InputsUnusableError(
            f"No image has both the target {name!r} and the confounds "
            f"{', '.join(map(repr, confounds))}. Leave a confound out, or check the ids of the "
            "phenotype table."
        )
    for column, other in confounds.items():
        if (other.texts[seen] == values.texts[seen]).all():
            raise UsageError(
                f"Confound {column!r} has the values of the target {name!r}: nothing would be left "
                "to predict. Leave it out."
            )
    read = read_apart(y.where(left), groups, aside, name=name, task=decided.task)
    dropped = values.present & (lacking != "")
    reasons = np.where(dropped, lacking, read.reasons)
    return replace(read, rule=decided.rule, reasons=reasons, texts=values.texts)


def encode_confounds(
    confounds: Mapping[str, Values], rows: Rows, groups: Labels, n_seen: int | None = None
) -> EncodedConfounds:
    """Return the confounds of the rows in use as numbers.

    Parameters
    ----------
    confounds : dict
        As `read_confounds` gives them.
    rows : ndarray of int, shape (n_used,)
    groups : ndarray of object, shape (n_images,)
    n_seen : int, optional
        The first of `rows` that decide which categories there are; the others are held out.

    Raises
    ------
    UsageError
        For a confound that is constant, and for as many columns as half of the groups.
    """
    names: list[str] = []
    columns: list[Array] = []
    blocks: list[slice] = []
    described: dict[str, Any] = {}
    n_seen = len(rows) if n_seen is None else n_seen
    for name, read in confounds.items():
        numeric = read.task == "regression"
        values = read.numbers[rows] if numeric else read.texts[rows]
        levels = sorted(set(values[:n_seen].tolist()))
        if len(levels) < 2:
            raise UsageError(
                f"Confound {name!r} is constant: each of the {n_seen} images in use has "
                f"{levels[0]!r}. There is nothing to remove; leave it out."
            )
        described[name] = {"kind": "numeric" if numeric else "categorical", "rule": read.rule}
        if numeric:
            names.append(name)
            columns.append(values.astype(np.float64))
            continue
        described[name]["categories"] = {
            level: int((values[:n_seen] == level).sum()) for level in levels
        }
        blocks.append(slice(len(names), len(names) + len(levels)))
        names += [f"{name}={level}" for level in levels]
        columns += [(values == level).astype(np.float64) for level in levels]
    n_groups = len(set(groups[rows[:n_seen]]))
    if len(names) > n_groups // 2:
        raise UsageError(
            f"The confounds {', '.join(map(repr, confounds))} make {len(names)} columns (one for "
            f"each category) for {n_groups} participants: too little would be left of the "
            "features. Merge categories, or leave a confound out."
        )
    return EncodedConfounds(tuple(names), np.column_stack(columns), tuple(blocks), described)


def _usable(read: Values) -> NDArray[np.bool_]:
    return np.isfinite(read.numbers) if read.task == "regression" else read.present


def _harmonized(x: Array, site: Labels, maps: Maps) -> Array:
    result = x.copy()
    for label, (shift, scale) in maps.items():
        rows = site == label
        result[rows] = x[rows] * scale + shift
    return result


def _spread(known: Array) -> Array:
    """Return standard deviations, 1 for columns that are constant."""
    spread = known.std(axis=0)
    constant = spread <= 1e-12 * np.abs(known).max(axis=0)
    return np.where(constant, 1.0, spread)

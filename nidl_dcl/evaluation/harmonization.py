"""Features harmonized by site (ComBat) and freed from confounds, inside the folds.

Everything is learned from the training rows of a fold and applied to its test rows; the target is
never given to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.confounds import EncodedConfounds, scale_of
from nidl_dcl.evaluation.features import Components, Features, principal_axes

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
Labels = NDArray[np.object_]
SiteMaps = dict[str, tuple[Array, Array]]

MIN_SITE_IMAGES = 3
"""Training images that a site needs to be harmonized."""

_KEPT = 64
"""Training sets whose harmonization is kept: permutations meet the same ones again."""


@dataclass(frozen=True, eq=False)
class AdjustedFeatures:
    """A source whose rows are harmonized by site, then freed from the linear effect of confounds.

    Features are standardized first. Wide data known by inner products are harmonized in their
    principal component scores; without harmonization the confounds are removed from the wide data
    themselves.

    Attributes
    ----------
    source : Features or Components
    confounds : EncodedConfounds or None
    site : ndarray of object or None, shape (n_used,)
        Site of each row, None where unknown. A row whose site has fewer than `MIN_SITE_IMAGES`
        training rows is left as it is.
    """

    source: Features | Components
    confounds: EncodedConfounds | None = None
    site: Labels | None = None
    _maps: dict[bytes, SiteMaps] = field(default_factory=dict, repr=False)

    def coordinates(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return the adjusted rows in the principal axes of the training rows."""
        if isinstance(self.source, Components) and self.site is None:
            if self.confounds is None:
                return self.source.coordinates(train, test)
            known = self.confounds.rows(train, train)
            mean, spread = known.mean(axis=0), scale_of(known)
            designs = [
                np.column_stack([np.ones(len(r)), (self.confounds.rows(train, r) - mean) / spread])
                for r in (train, test)
            ]
            return self.source.residual_coordinates(train, test, *designs)
        return principal_axes(*self.adjusted(train, test))

    def adjusted(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return training rows (with centered columns) and test rows, adjusted."""
        known, new = self.before_confounds(train, test)
        if self.confounds is None:
            mean = known.mean(axis=0)
            return known - mean, new - mean
        intercept, coefficients = self.confounds.effect(train, known)
        left = known - intercept - self.confounds.rows(train, train) @ coefficients
        left_new = new - intercept - self.confounds.rows(train, test) @ coefficients
        # What rounding leaves of a column that the confounds explain is nothing.
        real = left.std(axis=0) > 1e-9 * scale_of(known)
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
        key = train.tobytes()
        if key not in self._maps:
            while len(self._maps) >= _KEPT:
                del self._maps[next(iter(self._maps))]
            self._maps[key] = learn_harmonization(known, self.site[train])
        maps = self._maps[key]
        return _harmonized(known, self.site[train], maps), _harmonized(new, self.site[test], maps)


def can_harmonize() -> bool:
    """Return whether the package that harmonizes is there."""
    return importlib.util.find_spec("pycombat") is not None


def require_harmonization() -> None:
    """Raise `UsageError` when the package that harmonizes is not there."""
    if not can_harmonize():
        raise UsageError(
            "--harmonize needs the package pycombat: pip install 'nidl_dcl[harmonize]'."
        )


def learn_harmonization(known: Array, site: Labels) -> SiteMaps:
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
    labels = _usable_sites(site)
    if not labels:
        return {}
    maps = _each_site(known, site, labels)
    rows = np.flatnonzero(pd.Series(site, dtype=object).isin(labels))
    mean, spread = known[rows].mean(axis=0), scale_of(known[rows])
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


def _usable_sites(site: Labels) -> list[str]:
    """Return the sites with enough training rows; none where there are fewer than two of them."""
    counts = pd.Series(site, dtype=object).value_counts()
    labels = sorted(str(label) for label in counts.index[counts >= MIN_SITE_IMAGES])
    return labels if len(labels) > 1 else []


def _each_site(known: Array, site: Labels, labels: Sequence[str]) -> SiteMaps:
    """Return shift and scale by the estimates of each site alone, where ComBat has no prior."""
    parts = {label: known[site == label] for label in labels}
    pooled = np.concatenate(list(parts.values()))
    within = np.concatenate([part - part.mean(axis=0) for part in parts.values()])
    spread = np.where(within.std(axis=0) > 1e-6 * scale_of(pooled), within.std(axis=0), 0.0)
    maps = {}
    for label, part in parts.items():
        own = part.std(axis=0)
        usable = (spread > 0) & (own > 1e-6 * spread)
        scale = np.where(usable, spread / np.where(usable, own, 1.0), 1.0)
        maps[label] = (pooled.mean(axis=0) - part.mean(axis=0) * scale, scale)
    return maps


def describe_harmonization(site: Labels, folds: Rows) -> dict[str, Any]:
    """Say what harmonization does, and how many images it leaves as they are when they are tested.

    Parameters
    ----------
    site : ndarray of object, shape (n_used,)
    folds : ndarray of int, shape (n_repeats, n_used)
        Test fold of each row.

    Returns
    -------
    dict
        ``method``; ``n_images_not_harmonized`` (in one repeat or more), ``sites_not_harmonized``
        (label to such images), ``n_images_without_site`` (among them); ``sentence``.
    """
    left, sites = np.zeros(len(site), dtype=bool), pd.Series(site, dtype=object)
    for fold in folds:
        for k in np.unique(fold):
            left |= (fold == k) & ~sites.isin(_usable_sites(site[fold != k])).to_numpy()
    by_site = sites[left].value_counts().sort_index()
    n_left = int(left.sum())
    return {
        "method": "ComBat by site (parametric, no covariates), learned in the training rows of each "
        "fold; voxels: in their principal component scores",
        "n_images_not_harmonized": n_left,
        "sites_not_harmonized": {str(label): int(n) for label, n in by_site.items()},
        "n_images_without_site": int(sites.isna().sum()),
        "sentence": "Features are harmonized by site inside the folds (ComBat, without the target). "
        + (
            f"{n_left} of {len(site)} images were tested as they are, since their site was unknown "
            "or had too few training images."
            if n_left
            else "No image was left out of it."
        ),
    }


def _harmonized(x: Array, site: Labels, maps: SiteMaps) -> Array:
    result = x.copy()
    for label, (shift, scale) in maps.items():
        rows = site == label
        result[rows] = x[rows] * scale + shift
    return result

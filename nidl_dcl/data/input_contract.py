"""Whether a dataset's images are what a model was trained on, and how to meet it if they are not.

The contract itself is a `volumes.Preparation`, saved with the weights.
"""

from __future__ import annotations

import pandas as pd

from nidl_dcl.bids.presets import PRESETS, Preset
from nidl_dcl.errors import UsageError
from nidl_dcl.volumes.preparation import Origin, Preparation

__all__ = ["origin_of", "require_contract"]

_COARSER = 1.25
"""How much coarser images may be than what a model learnt from, or than its own voxels."""


def origin_of(paths: pd.Series, form: Preset, coarsest: float) -> Origin:
    """Return what the images of a dataset are, from their names.

    Parameters
    ----------
    paths : Series of str
        The images in use.
    form : Preset
        Their layout; says what names do not.
    coarsest : float
        Longest side of a voxel, in mm.
    """
    names = paths.astype(str).str.rpartition("/")[2]
    spaces = names.str.extract("_space-([a-zA-Z0-9+]+)", expand=False).fillna(form.space)
    endings = names.str.extract(r"_([a-zA-Z0-9]+)\.[^/]*$", expand=False).fillna(form.suffix)
    return Origin(
        contrast="+".join(sorted(set(endings))),
        space="+".join(sorted(set(spaces))),
        stripped=form.stripped,
        coarsest=coarsest,
    )


def require_contract(
    contract: Preparation, *, intensity: str, masked: bool, origin: Origin, coarse: str = ""
) -> None:
    """Refuse images that a model cannot be expected to understand.

    Templates of one family (``MNI152…``) count as one space. A model whose folder does not say what
    it was trained on is taken for all images of its intensity rule.

    Parameters
    ----------
    contract : Preparation
        Of the model.
    intensity : str
        Rule that the dataset's images ask for.
    masked : bool
        Every image has a brain mask.
    origin : Origin
        What the images are.
    coarse : str, optional
        The image with the longest voxel side, for the message.

    Raises
    ------
    UsageError
        Naming what differs and how to meet the contract.
    """
    if contract.masked and not masked:
        raise UsageError(
            "The model was trained on brain-masked images and this dataset has no brain masks (or "
            "not all). Add a derivative with desc-brain_mask images and name it with --mask NAME."
        )
    if contract.intensity != intensity:
        raise UsageError(
            f"The model was trained on images of the intensity rule {contract.intensity!r} and "
            f"these are {intensity!r}. {_presets_like(contract, intensity=True)} If they are "
            f"{contract.intensity!r} all the same: --intensity {contract.intensity}."
        )
    learnt = contract.origin
    if learnt is None:
        return
    if learnt.contrast != origin.contrast:
        raise UsageError(
            f"The model was trained on {learnt.contrast} images and these are {origin.contrast}. "
            f"{_presets_like(contract)} A contrast is chosen with --bids-filter-file "
            '({"suffix": "T2w"}, for instance).'
        )
    if _family(learnt.space) != _family(origin.space):
        raise UsageError(
            f"The model was trained on images in the space {learnt.space} and these are in "
            f"{origin.space}. {_presets_like(contract)}"
        )
    if learnt.stripped != origin.stripped and not contract.masked:
        kinds = ("with skull", "without skull")
        raise UsageError(
            f"The model was trained on images {kinds[learnt.stripped]} and these are "
            f"{kinds[origin.stripped]}. {_presets_like(contract)}"
        )
    allowed = _COARSER * max(learnt.coarsest, *contract.spacing)
    if origin.coarsest > allowed:
        raise UsageError(
            f"{coarse or 'An image'} has voxels of {origin.coarsest:g} mm. The model was trained on "
            f"voxels of {learnt.coarsest:g} mm at most, prepared at "
            f"{' x '.join(f'{mm:g}' for mm in contract.spacing)} mm, and takes up to {allowed:.3g} "
            "mm: finer images are averaged, but detail that was never there cannot be added. Leave "
            "such images out (--participant-label, --session-label, --bids-filter-file), or train a "
            "model with a --spacing that suits them."
        )


def _family(space: str) -> str:
    return "MNI152" if space.startswith("MNI152") else space


def _presets_like(contract: Preparation, *, intensity: bool = False) -> str:
    """Return which presets give images like those of the model."""
    fitting = []
    for name, form in PRESETS.items():
        if form.rule != contract.intensity:
            continue
        space = form.entities.get("space") or form.space
        learnt = contract.origin
        if not intensity and learnt is not None:
            same = form.suffix in (learnt.contrast, "brain"), form.stripped == learnt.stripped
            if not all(same) or _family(space) != _family(learnt.space):
                continue
        fitting.append(name)
    if not fitting:
        return "Give it images like those it was trained on."
    return f"Presets with such images: --preset {', '.join(fitting)}."

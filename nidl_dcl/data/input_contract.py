"""Whether a dataset's images are like those a model was trained on, and what to do if they are not.

The input contract itself is a `volumes.preparation.Preparation`, saved with the weights.
"""

from __future__ import annotations

import pandas as pd

from nidl_dcl.bids.presets import PRESETS, Preset
from nidl_dcl.errors import UsageError
from nidl_dcl.volumes.preparation import Origin, Preparation

_COARSER = 1.25
"""How much coarser images may be than those a model was trained on, or than its own voxels."""


def origin_of(
    paths: pd.Series, preset: Preset, coarsest: float, preprocessing: str = "none"
) -> Origin:
    """Return contrast, space and stripping of the images of a dataset, from their names.

    Parameters
    ----------
    paths : Series of str
        The images in use.
    preset : Preset
        Of the dataset: what the names do not tell.
    coarsest : float
        Longest side of a voxel, in mm.
    preprocessing : {"none", "strip", "rigid", "align"}
        What the program did to them before.
    """
    names = paths.astype(str).str.rpartition("/")[2]
    spaces = names.str.extract("_space-([a-zA-Z0-9+]+)", expand=False).fillna(preset.space)
    endings = names.str.extract(r"_([a-zA-Z0-9]+)\.[^/]*$", expand=False).fillna(preset.suffix)
    return Origin(
        contrast="+".join(sorted(set(endings))),
        space="+".join(sorted(set(spaces))),
        stripped=preset.stripped,
        coarsest=coarsest,
        preprocessing=preprocessing,
    )


def require_contract(
    contract: Preparation, *, intensity: str, masked: bool, origin: Origin, coarse: str = ""
) -> None:
    """Refuse images that differ from those a model was trained on.

    Templates of one family (``MNI152…``) count as one space. A model whose folder has no record of
    what it was trained on takes all images of its intensity rule.

    Parameters
    ----------
    contract : Preparation
        Of the model.
    intensity : str
        Intensity rule of the dataset's images.
    masked : bool
        Whether every image has a brain mask.
    origin : Origin
        Contrast, space, stripping and voxel size of the images.
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
            f"these are {intensity!r}. {_presets_like(contract.intensity)} If they are "
            f"{contract.intensity!r} all the same: --intensity {contract.intensity}."
        )
    trained_on = contract.origin
    if trained_on is None:
        return
    presets = _presets_like(contract.intensity, trained_on)
    if trained_on.contrast != origin.contrast:
        raise UsageError(
            f"The model was trained on {trained_on.contrast} images and these are {origin.contrast}. "
            f"{presets} A contrast is chosen with --bids-filter-file "
            '({"suffix": "T2w"}, for instance).'
        )
    if _family(trained_on.space) != _family(origin.space):
        raise UsageError(
            f"The model was trained on images in the space {trained_on.space} and these are in "
            f"{origin.space}. {_how_to_align(trained_on)}{presets}"
        )
    if trained_on.stripped != origin.stripped and not contract.masked:
        kinds = ("with skull", "without skull")
        raise UsageError(
            f"The model was trained on images {kinds[trained_on.stripped]} and these are "
            f"{kinds[origin.stripped]}. {_how_to_align(trained_on)}{presets}"
        )
    done = {trained_on.preprocessing, origin.preprocessing} - {"none"}
    if len(done) == 2:  # of images that others prepared, their space is known alone
        raise UsageError(
            f"The model was trained on images after --preprocess {trained_on.preprocessing} and "
            f"these are after --preprocess {origin.preprocessing}. Use --preprocess auto."
        )
    allowed = _COARSER * max(trained_on.coarsest, *contract.spacing)
    if origin.coarsest > allowed:
        raise UsageError(
            f"{coarse or 'An image'} has voxels of {origin.coarsest:g} mm. The model was trained on "
            f"voxels of {trained_on.coarsest:g} mm at most, prepared at "
            f"{' x '.join(f'{mm:g}' for mm in contract.spacing)} mm, and takes up to {allowed:.3g} "
            "mm: finer images are averaged, but detail that was never there cannot be added. Leave "
            "such images out (--participant-label, --session-label, --bids-filter-file), or train a "
            "model with a --spacing that suits them."
        )


def _how_to_align(trained_on: Origin) -> str:
    """Return what makes such images of scans, if the program does."""
    if trained_on.preprocessing == "none":
        return ""
    return f"Of scans, --preprocess auto (or {trained_on.preprocessing}) makes such images. "


def _family(space: str) -> str:
    return "MNI152" if space.startswith("MNI152") else space


def _presets_like(rule: str, origin: Origin | None = None) -> str:
    """Return which presets give images like those of a model, or of its intensity rule alone."""
    fitting = [
        name
        for name, preset in PRESETS.items()
        if preset.rule == rule and (origin is None or _like(preset, origin))
    ]
    if not fitting:
        return "Give it images like those it was trained on."
    return f"Presets with such images: --preset {', '.join(fitting)}."


def _like(preset: Preset, origin: Origin) -> bool:
    return (
        preset.suffix in (origin.contrast, "brain")
        and preset.stripped == origin.stripped
        and _family(preset.entities.get("space") or preset.space) == _family(origin.space)
    )

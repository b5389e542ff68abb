"""Pair each image with its brain mask in a derivative, by the entities of both names.

No file is opened. Applying masks is left to `nidl_dcl.volumes`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from nidl_dcl.bids.presets import Preset
from nidl_dcl.bids.search import Candidate, search
from nidl_dcl.bids.walk import Progress
from nidl_dcl.errors import UsageError

_COMPARED = ("acquisition", "ceagent", "reconstruction", "run", "echo", "inv", "part", "res")
_NATIVE = {None, "T1w", "orig", "individual"}
Pairs = list[str | None]


def pair_masks(
    images: Sequence[Candidate],
    preset: Preset,
    home: str,
    datasets: Mapping[str, Path],
    mask: str,
    *,
    complete: bool = True,
    progress: Progress | None = None,
) -> tuple[str, Pairs] | None:
    """Return the derivative whose masks are used, and the mask of each image.

    A mask belongs to an image of the same participant, session and space when the entities that
    both names have (acquisition, run, resolution …) agree; of several, the one with most in common.

    Parameters
    ----------
    images : sequence of Candidate
        The usable images.
    preset : Preset
        Their layout.
    home : str
        The dataset that holds the images; its own masks go first unless it is the raw one.
    datasets : mapping of str to Path
        Roots by name: the raw dataset and the derivatives.
    mask : str
        ``"auto"``, ``"none"`` or the name of a dataset.
    complete : bool, default=True
        Whether all images must have a mask.
    progress : callable, optional
        As in `walk.DatasetWalker`.

    Returns
    -------
    (str, list of str) or None
        Name of the dataset and paths of masks relative to it; None when no masks are used.

    Raises
    ------
    UsageError
        When only some images have a mask, when several derivatives hold masks and `mask` names none
        of them, or when the named derivative is unknown or holds none.
    """
    if mask == "none" or (mask == "auto" and preset.masks == "none") or not images:
        return None
    if mask != "auto" and mask not in datasets:
        known = ", ".join(repr(n) for n in datasets if n != "raw") or "there is none"
        raise UsageError(
            f"--mask {mask}: no derivative of that name. Known: {known}. "
            "Name one with --derivatives NAME=PATH, or use --mask auto or --mask none."
        )
    if mask != "auto":
        names = [mask]
    elif preset.masks == "own":
        names = [home]
    else:
        own = [home] if preset.derivatives else []
        names = own + [name for name in datasets if name not in ("raw", home)]
    held: dict[str, Pairs] = {}
    participants = {image.participant for image in images}
    for name in names:
        mask_preset = _mask_preset(preset, own=name == home)
        masks = search(datasets[name], mask_preset, {}, participants, progress=progress).usable
        of: defaultdict[tuple[str, str | None], list[Candidate]] = defaultdict(list)
        for found in masks:
            of[found.participant, found.session].append(found)
        pairs = [_best(image, of[image.participant, image.session]) for image in images]
        if any(pairs):
            held[name] = pairs
            if name == home:
                break
    if not held:
        if mask == "auto":
            return None
        raise UsageError(
            f"--mask {mask}: {datasets[mask]} holds no brain mask of the {len(images)} images used. "
            "Masks are named like sub-<label>/anat/sub-<label>_desc-brain_mask.nii.gz, with the "
            "image's session and space."
        )
    if len(held) > 1:
        raise UsageError(
            f"Several derivatives hold brain masks: {', '.join(held)}. "
            f"Say which: --mask {next(iter(held))} (or --mask none)."
        )
    name, pairs = next(iter(held.items()))
    have = sum(pair is not None for pair in pairs)
    if complete and have < len(images):
        lacking = next(c.path for c, pair in zip(images, pairs, strict=True) if pair is None)
        raise UsageError(
            f"{have} of {len(images)} images have a brain mask in {name!r}; {lacking}, for one, "
            "has none (or several that fit equally). Complete the masks, leave those "
            "participants out, or pass --mask none to use whole heads."
        )
    return name, pairs


def _mask_preset(preset: Preset, *, own: bool) -> Preset:
    return Preset(
        "brain masks",
        suffix=preset.mask_suffix if own else "mask",
        entities={} if own and preset.mask_desc is None else {"desc": preset.mask_desc or "brain"},
        folders=tuple(dict.fromkeys((*Preset("").folders, *preset.folders))),
        derivatives=("any",),
    )


def _best(image: Candidate, masks: Sequence[Candidate]) -> str | None:
    """Return the path of the mask of an image, None unless exactly one fits best."""
    scores: defaultdict[int, list[Candidate]] = defaultdict(list)
    for mask in masks:
        spaces = image.entities.get("space"), mask.entities.get("space")
        if spaces[0] != spaces[1] and not set(spaces) <= _NATIVE:
            continue
        if mask.entities.get("modality") not in (None, image.entities.get("suffix")):
            continue
        both = [n for n in _COMPARED if n in image.entities and n in mask.entities]
        if all(image.entities[n] == mask.entities[n] for n in both):
            alone = sum(n in mask.entities for n in _COMPARED) - len(both)
            scores[len(both) - alone].append(mask)
    fitting = scores[max(scores)] if scores else []
    return fitting[0].path if len(fitting) == 1 else None

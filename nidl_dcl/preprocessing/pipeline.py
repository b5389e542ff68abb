"""All steps for one image: from a file to a masked, aligned brain with measures and a verdict."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.preprocessing.bias_field import correct_bias_field
from nidl_dcl.preprocessing.brain_extraction import (
    extract_brain,
    largest_component,
    locate_brain,
)
from nidl_dcl.preprocessing.head import Head, read_head
from nidl_dcl.preprocessing.measures import Measures, measure_alignment, overlap
from nidl_dcl.preprocessing.registration import TURNS, register_affine, score_turn, to_rigid
from nidl_dcl.preprocessing.resampling import resample
from nidl_dcl.preprocessing.shrinking import shrink
from nidl_dcl.preprocessing.template import Template, load_template
from nidl_dcl.preprocessing.verdict import Verdict, gravest, judge
from nidl_dcl.status import UnreadableVolumeError
from nidl_dcl.volumes.reading import Float32

__all__ = ["AlignedBrain", "Outcome", "keep_size", "preprocess_t1w"]


@dataclass(frozen=True, eq=False)
class AlignedBrain:
    """A head and its brain, there and in the space of the template.

    Attributes
    ----------
    head : Head
        As read.
    corrected : ndarray of float32
        The head without bias field, air at 0, on its own grid.
    mask : ndarray of bool
        The brain on the same grid.
    matrix : ndarray of float64, shape (4, 4)
        From mm of the image to mm of the template.
    aligned, aligned_mask : ndarray of float32 and of bool
        The masked brain and its mask on the template's grid.
    template : Template
        That grid.
    """

    head: Head
    corrected: Float32
    mask: NDArray[np.bool_]
    matrix: NDArray[np.float64]
    aligned: Float32
    aligned_mask: NDArray[np.bool_]
    template: Template


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one image.

    Attributes
    ----------
    verdict : Verdict
        Whether it may be used.
    measures : Measures or None
        None when no brain was found, or no image.
    brain : AlignedBrain or None
        As for `measures`; there also for an image that is skipped, to be looked at.
    """

    verdict: Verdict
    measures: Measures | None = None
    brain: AlignedBrain | None = None


_UPRIGHT = np.array([[0, 1], [1, 1], [2, 1]])


_TURNED = "The header's orientation is wrong by quarter turns; left and right are in doubt, too."


_MIRRORED = "Its sform and qform disagree about left and right; the sform is used."


_PERHAPS_TURNED = ("brain_size", "contrast", "misaligned")


_THICK_MM = 4.0


_ALIKE = 0.9
"""Overlap of what is not 0 with the brain found in it, from which an image is a stripped one."""


_HEAD_ML = 2600.0
"""Volume above which what is not 0 is more than a brain."""


_RANK = {"ok": 2, "warn": 1, "skip": 0}


_LEAST_ML = 100.0
"""Volume below which a mask is no brain, whoever's it is."""


def preprocess_t1w(path: str | os.PathLike[str], *, resolution: int = 2) -> Outcome:
    """Find the brain in one head, take out the bias field and align the brain to the template.

    Parameters
    ----------
    path : path-like
        A T1-weighted head, or a brain that is stripped already.
    resolution : int, default=2
        Voxel size of the aligned brain in mm.

    Returns
    -------
    Outcome
        Never an exception because of what the file holds.
    """
    try:
        head = read_head(path)
    except UnreadableVolumeError as error:
        return Outcome(Verdict("skip", error.code, str(error)))
    template = load_template(resolution)
    bright = _above_air(head.data)
    best = _attempt(head, bright, template, TURNS[0])
    if best.verdict.status == "skip" or best.verdict.code in _PERHAPS_TURNED:
        turn = _likeliest_turn(bright, head.affine)
        if turn is not TURNS[0]:
            best = max(best, _attempt(head, bright, template, turn), key=_quality)
    return best


def _likeliest_turn(bright: Float32, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the turn after which the rough brain found is most like the template."""
    small, grid = shrink(bright, affine, 2.0)
    scores = []
    for turn in TURNS:
        mask = _seen_after(turn, locate_brain, small)
        scores.append(score_turn(small * mask, mask, grid, turn) if mask.any() else -1.0)
    return TURNS[int(np.argmax(scores))]


def _seen_after(
    turn: NDArray[np.float64], find: Callable[[Float32], NDArray[np.bool_]], data: Float32
) -> NDArray[np.bool_]:
    """Return the mask that `find` gives of the turned head, on the grid of the head as it is."""
    axes = np.stack([np.abs(turn).argmax(axis=0), turn.sum(axis=0)], axis=1)
    mask: NDArray[np.bool_] = find(apply_orientation(data, axes))
    back: NDArray[np.bool_] = apply_orientation(mask, ornt_transform(_UPRIGHT, axes))
    return back


def _quality(outcome: Outcome) -> tuple[int, float]:
    likeness = outcome.measures.upright if outcome.measures else -1.0
    return _RANK[outcome.verdict.status], likeness


def _above_air(data: Float32) -> Float32:
    """Return values above the darkest half percent, which is air, or what stands for it."""
    return np.maximum(data - np.percentile(data, 0.5).astype(np.float32), 0)


def _attempt(head: Head, bright: Float32, template: Template, turn: NDArray[np.float64]) -> Outcome:
    """Return what comes out when the head is upright after `turn`."""
    mask = _seen_after(turn, extract_brain, bright)
    own = _own_mask(bright, head.voxel_ml)
    stripped = own is not None and overlap(own, mask) > _ALIKE
    if own is not None and stripped:
        mask = own
    ml = mask.sum() * head.voxel_ml
    if ml < _LEAST_ML:
        return Outcome(Verdict("skip", "no_brain", f"A brain of {ml:.0f} ml was found."))
    corrected = correct_bias_field(bright, mask, head.affine)
    try:
        matrix = register_affine(corrected * mask, mask, head.affine, turn)
        brain = _bring(head, corrected, mask, matrix, template)
    except (RuntimeError, np.linalg.LinAlgError) as error:
        reason = str(error).strip().splitlines()[-1]
        return Outcome(Verdict("skip", "misaligned", f"Registration failed ({reason})."))
    if not brain.aligned_mask.any():
        return Outcome(Verdict("skip", "misaligned", "Registration lost the brain."))
    measures = measure_alignment(
        head, mask, matrix, brain.aligned, brain.aligned_mask, template, stripped=stripped
    )
    told = _told(head, turn, measures, stripped=stripped)
    return Outcome(gravest(list(told)), measures, brain)


def _bring(
    head: Head,
    corrected: Float32,
    mask: NDArray[np.bool_],
    matrix: NDArray[np.float64],
    template: Template,
) -> AlignedBrain:
    """Resample the head, mask it, and keep the spline within the range of the brain."""
    part = _around(mask)
    there = head.affine.copy()
    there[:3, 3] += there[:3, :3] @ [cut.start for cut in part]
    inside = resample(mask[part], there, matrix, template, order=1) > 0.5
    aligned = resample(corrected[part], there, matrix, template) * inside
    np.clip(aligned, 0, corrected[mask].max(), out=aligned)
    return AlignedBrain(head, corrected, mask, matrix, aligned, inside, template)


def _around(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Return the part that holds the mask, with what a spline and a filter reach beyond it."""
    part = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(0, cut.start - 8), cut.stop + 8) for cut in part)


def keep_size(brain: AlignedBrain) -> AlignedBrain:
    """Return the brain aligned by the rotation and translation of its affine transform alone."""
    center = brain.head.affine[:3] @ [*ndimage.center_of_mass(brain.mask), 1]
    rigid = to_rigid(brain.matrix, center)
    return _bring(brain.head, brain.corrected, brain.mask, rigid, brain.template)


def _own_mask(bright: Float32, voxel_ml: float) -> NDArray[np.bool_] | None:
    """Return where an image is not 0, if that may be a brain."""
    inside = largest_component(bright > 0)
    if inside.sum() * voxel_ml > _HEAD_ML or inside.mean() > 0.9:
        return None
    return np.asarray(ndimage.binary_fill_holes(inside))


def _told(
    head: Head, turn: NDArray[np.float64], measures: Measures, *, stripped: bool
) -> Iterator[Verdict]:
    """Yield all there is to say about a head and its alignment, what matters most first."""
    if turn is not TURNS[0]:
        yield Verdict("warn", "turned", _TURNED)
    if head.side_in_doubt:
        yield Verdict("warn", "handedness", _MIRRORED)
    yield judge(measures)
    if stripped:
        yield Verdict("warn", "stripped", "It holds no skull; its own brain is kept.")
    longest = float(voxel_sizes(head.affine).max())
    if longest > _THICK_MM:
        yield Verdict("warn", "thick_slices", f"Its voxels are up to {longest:.1f} mm long.")

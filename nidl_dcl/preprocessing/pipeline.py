"""All steps for one image: from a file to a masked, aligned brain with measures and a verdict."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.preprocessing.bias_field import correct_bias_field
from nidl_dcl.preprocessing.brain_extraction import extract_brain, largest_component, locate_brain
from nidl_dcl.preprocessing.head import Head, read_head, read_mask
from nidl_dcl.preprocessing.measures import Measures, measure_alignment, measure_brain, overlap
from nidl_dcl.preprocessing.registration import TURNS, register_affine, score_turn, to_rigid
from nidl_dcl.preprocessing.resampling import around, resample
from nidl_dcl.preprocessing.shrinking import shrink
from nidl_dcl.preprocessing.template import Template, load_template
from nidl_dcl.preprocessing.verdict import Verdict, gravest, judge
from nidl_dcl.status import UnreadableVolumeError
from nidl_dcl.volumes.mask_fit import Background, check_mask
from nidl_dcl.volumes.reading import Float32, look_at

__all__ = ["AlignedBrain", "Brain", "Outcome", "keep_size", "preprocess_t1w"]


@dataclass(frozen=True, eq=False)
class Brain:
    """A head and where its brain is.

    Attributes
    ----------
    head : Head
        As read.
    corrected : ndarray of float32
        The head without bias field, air at 0, on its own grid.
    mask : ndarray of bool
        The brain on the same grid.
    """

    head: Head
    corrected: Float32
    mask: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class AlignedBrain(Brain):
    """A head and its brain, there and in the space of the template.

    Attributes
    ----------
    matrix : ndarray of float64, shape (4, 4)
        From mm of the image to mm of the template.
    aligned, aligned_mask : ndarray of float32 and of bool
        The masked brain and its mask on the template's grid.
    template : Template
        That grid.
    """

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
    brain : Brain or None
        An `AlignedBrain` if it was to be aligned. There also for an image that is skipped, to be
        looked at; None when no brain was found, or registration failed.
    """

    verdict: Verdict
    measures: Measures | None = None
    brain: Brain | None = None


_UPRIGHT = np.array([[0, 1], [1, 1], [2, 1]])


_TURNED = "The header's orientation is wrong by quarter turns; left and right are in doubt, too."


_MIRRORED = "Its sform and qform disagree about left and right; the sform is used."


_THICK_MM = 4.0


_ALIKE = 0.9
"""Overlap of what is not 0 with the brain found in it, from which an image is a stripped one."""


_HEAD_ML = 2600.0
"""Volume above which what is not 0 is more than a brain."""


_RANK = {"ok": 2, "warn": 1, "skip": 0}


_LEAST_ML = 100.0
"""Volume below which a mask is no brain, whoever's it is."""


@dataclass(frozen=True, eq=False)
class _Task:
    """One head with what is known of it; `template` is None where nothing is to be aligned."""

    head: Head
    bright: Float32
    given: NDArray[np.bool_] | None
    template: Template | None
    odd_mask: str = ""  # what does not fit about the mask that is given


def preprocess_t1w(
    path: str | os.PathLike[str],
    *,
    mask: str | os.PathLike[str] | None = None,
    align: bool = True,
    resolution: int = 2,
) -> Outcome:
    """Find the brain in one head, take out the bias field and align the brain to the template.

    Parameters
    ----------
    path : path-like
        A T1-weighted head, or a brain that is stripped already.
    mask : path-like, optional
        The brain mask (inside: > 0.5) if there is one, on any grid; then none is looked for.
    align : bool, default=True
        Whether to align the brain. If not, a header that is wrong by quarter turns, or a contrast
        that is not that of a T1w, is not always noticed.
    resolution : int, default=2
        Voxel size of the aligned brain in mm.

    Returns
    -------
    Outcome
        Never an exception because of what the files hold.
    """
    try:
        head = read_head(path)
        given = None if mask is None else read_mask(mask, head)
    except UnreadableVolumeError as error:
        return Outcome(Verdict("skip", error.code, str(error)))
    template = load_template(resolution) if align else None
    odd = ""
    if mask is not None and (sample := look_at(path)[1]) is not None:
        fit = check_mask(Path(mask), Background.of(sample))
        odd = fit.message if fit.code == "mask" else ""
    task = _Task(head, _above_air(head.data), given, template, odd)
    best = _attempt(task, TURNS[0])
    if best.measures is None or judge(best.measures).status != "ok":  # perhaps it is turned
        turn = _likeliest_turn(task)
        if turn is not TURNS[0]:
            best = max(best, _attempt(task, turn), key=_quality)
    return best


def _likeliest_turn(task: _Task) -> NDArray[np.float64]:
    """Return the turn after which the brain, found roughly or given, is most like the template."""
    small, grid = shrink(task.bright, task.head.affine, 2.0)
    given = None if task.given is None else shrink(task.given, task.head.affine, 2.0)[0] > 0.5
    scores = []
    for turn in TURNS:
        mask = _seen_after(turn, locate_brain, small) if given is None else given
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


def _attempt(task: _Task, turn: NDArray[np.float64]) -> Outcome:
    """Return what comes out when the head is upright after `turn`."""
    head, template = task.head, task.template
    mask, stripped = _brain_mask(task, turn)
    ml = mask.sum() * head.voxel_ml
    if ml < _LEAST_ML:
        found = "was found" if task.given is None else "was given"
        return Outcome(Verdict("skip", "no_brain", f"A brain of {ml:.0f} ml {found}."))
    corrected = correct_bias_field(task.bright, mask, head.affine)
    brain = Brain(head, corrected, mask)
    if template is None:
        measures = measure_brain(head, mask, corrected * mask, turn, stripped=stripped)
    else:
        try:
            matrix = register_affine(corrected * mask, mask, head.affine, turn)
            brain = aligned = _bring(brain, matrix, template)
        except (RuntimeError, np.linalg.LinAlgError) as error:
            reason = str(error).strip().splitlines()[-1]
            return Outcome(Verdict("skip", "misaligned", f"Registration failed ({reason})."))
        if not aligned.aligned_mask.any():
            return Outcome(Verdict("skip", "misaligned", "Registration lost the brain."))
        measures = measure_alignment(
            head, mask, matrix, aligned.aligned, aligned.aligned_mask, template, stripped=stripped
        )
    told = list(_told(head, turn, measures, stripped=stripped and task.given is None))
    if task.odd_mask:
        told.append(Verdict("warn", "mask", f"Mask: {task.odd_mask}"))
    return Outcome(gravest(told), measures, brain)


def _brain_mask(task: _Task, turn: NDArray[np.float64]) -> tuple[NDArray[np.bool_], bool]:
    """Return the mask, and whether there is nothing but a brain in the image."""
    own = _own_mask(task.bright, task.head.voxel_ml)
    mask = task.given if task.given is not None else _seen_after(turn, extract_brain, task.bright)
    if own is None or overlap(own, mask) <= _ALIKE:
        return mask, False
    return (own if task.given is None else mask), True


def _bring(brain: Brain, matrix: NDArray[np.float64], template: Template) -> AlignedBrain:
    """Resample the head, mask it, and keep the spline within the range of the brain."""
    part = around(brain.mask, 8)  # what a spline and a filter reach beyond it
    there = brain.head.affine.copy()
    there[:3, 3] += there[:3, :3] @ [cut.start for cut in part]
    inside = resample(brain.mask[part], there, matrix, template, order=1) > 0.5
    aligned = resample(brain.corrected[part], there, matrix, template) * inside
    np.clip(aligned, 0, brain.corrected[brain.mask].max(), out=aligned)
    return AlignedBrain(brain.head, brain.corrected, brain.mask, matrix, aligned, inside, template)


def keep_size(brain: AlignedBrain) -> AlignedBrain:
    """Return the brain aligned by the rotation and translation of its affine transform alone."""
    center = brain.head.affine[:3] @ [*ndimage.center_of_mass(brain.mask), 1]
    rigid = to_rigid(brain.matrix, center)
    return _bring(brain, rigid, brain.template)


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
    elif head.place_in_doubt:
        yield Verdict("warn", "affine", head.place_in_doubt)
    yield judge(measures)
    if stripped:
        yield Verdict("warn", "stripped", "It holds no skull; its own brain is kept.")
    longest = float(voxel_sizes(head.affine).max())
    if longest > _THICK_MM:
        yield Verdict("warn", "thick_slices", f"Its voxels are up to {longest:.1f} mm long.")

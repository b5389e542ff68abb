"""Where the readout of each target looks, as maps and tables in ``figures/``.

The thin part of the stage `predict` about it: whose volumes are taken and what is written. Maps are
computed in `nidl_dcl.evaluation.occlusion`, pictures drawn in `nidl_dcl.report.occlusion`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.evaluation.confounds import (
    EncodedConfounds,
    encode_confounds,
    read_confounds,
    read_target_beside,
)
from nidl_dcl.evaluation.extra_features import read_extra_features
from nidl_dcl.evaluation.folds import CVDesign, make_design
from nidl_dcl.evaluation.occlusion import (
    BLOCK_MM,
    Blocks,
    describe_map,
    find_inside,
    hidden_features,
    lay_blocks,
    name_region,
    spread_changes,
)
from nidl_dcl.evaluation.readout import FittedReadout, fit_readout
from nidl_dcl.evaluation.readout_file import ReadoutFile, read_readout, readout_path
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.console import log_progress
from nidl_dcl.io.formats import beside, write_json, write_npy, write_tsv
from nidl_dcl.models.baselines import embed_untrained, untrained_encoder
from nidl_dcl.models.dcl import DCL
from nidl_dcl.models.serialization import load_model
from nidl_dcl.output.sharing_rules import largest_share
from nidl_dcl.randomness import key_seed
from nidl_dcl.workflow.external import EmbeddedDataset
from nidl_dcl.workflow.options import PredictionOptions, RunOptions

_LOGGER = logging.getLogger(__name__)

RULES = 1
"""Of what is hidden and whose volumes are taken; raised when a map would come out otherwise."""

_AVERAGED = 500
"""Images of which the mean brain is made, at most."""

PEOPLE = 6
"""Participants whose own volumes are taken, for each target; one of each class of more."""

_BASELINE = "the mean of the same volume inside the brain (the head)"

_SPACE = (
    "x, y and z are millimeters to the right, front and top of the middle of the prepared volume. Not a template "
    "space: preparing centers each image on its own brain (head)"
)

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Occlusion:
    """What `occlude` needs of a study; row i of all of it is one image.

    Attributes
    ----------
    output_dir, work_dir : Path
    module : BIDSDataModule
        Set up.
    numbers : sequence of int
        Of the images in the module.
    cohort : EmbeddedDataset
    held_out : ndarray of bool, shape (n_images,)
        Nothing is taken from these.
    untrained : ndarray of shape (n_images, n_features), optional
        Features by the encoder before training, where they were computed already.
    """

    output_dir: Path
    work_dir: Path
    module: BIDSDataModule
    numbers: Sequence[int]
    cohort: EmbeddedDataset
    held_out: NDArray[np.bool_]
    untrained: np.ndarray | None = None

    @property
    def figures(self) -> Path:
        """Where maps and tables go."""
        return self.output_dir / "figures"

    def volume(self, row: int) -> NDArray[np.float32]:
        """Return a prepared volume, shape (d, h, w)."""
        assert self.module.volumes is not None
        return self.module.volumes[self.numbers[row]][0].numpy()

    def name(self, row: int) -> str:
        """Return a name that changes with the content of a prepared volume."""
        assert self.module.volumes is not None
        return self.module.volumes.name(self.numbers[row])


@dataclass(frozen=True, eq=False)
class _Task:
    """A target whose maps are missing."""

    target: str
    stem: Path
    stored: ReadoutFile
    design: CVDesign
    confounds: EncodedConfounds | None
    people: list[int]
    basis: dict[str, Any]


def occlude(
    study: Occlusion,
    labels: Mapping[str, str],
    prediction: PredictionOptions,
    run: RunOptions,
    *,
    trust: Sequence[str] = (),
) -> bool:
    """Write where the readout of each target looks, unless it is there; return whether any was.

    Blocks of the mean brain, of a few participants' own volumes, and of the mean brain before an
    encoder that was not trained, are hidden one after the other; the embeddings of what remains go
    through the readout. Embeddings are kept in the work folder, so that a run that was killed goes
    on and another target costs little.

    Parameters
    ----------
    study : Occlusion
    labels : mapping of str to str
        Targets, and their labels in file names. One without a kept readout is passed over.
    prediction, run
        Options.
    trust : sequence of str
        Packages whose encoders may be imported.
    """
    averaged = np.flatnonzero(~study.held_out)
    spread = np.linspace(0, len(averaged) - 1, min(len(averaged), _AVERAGED))
    averaged = averaged[np.unique(spread.round().astype(int))]
    mean_of = _digest(study.name(row) for row in averaged)
    missing = []
    for target, label in labels.items():
        task = _task(study, target, label, prediction, run, mean_of)
        if task is None:
            _LOGGER.info(f"{target}: no map of where the readout looks, since there is no readout.")
        elif not _is_made(task):
            missing.append(task)
    if not missing:
        return False
    mean = np.zeros(study.volume(int(averaged[0])).shape)
    for row in averaged:
        mean += study.volume(int(row))
    brain = (mean / len(averaged)).astype(np.float32)
    blocks = lay_blocks(find_inside(brain), study.module.preparation.spacing)
    few = blocks.chosen(blocks.thinned)
    model = load_model(study.output_dir / "models" / f"desc-{run.model_name}", trust=trust)
    fresh = untrained_encoder(model, run.random_seed)
    untrained = study.untrained
    if untrained is None:
        untrained = embed_untrained(fresh, study.module, study.numbers, "untrained encoder")
    total = 2 + len(blocks) + len(few) + sum(len(t.people) for t in missing) * (1 + len(few))
    embed = partial(_embed_hidden, counter=_Counter(total))
    kept = study.work_dir / "features" / str(study.cohort.model_sha256)[:16] / "occlusion"
    whole = embed(model, brain, blocks, folder=kept, name=mean_of)
    before = embed(fresh, brain, few)
    # The one file of these that shows a head; pictures are drawn without it, too.
    file = study.figures / f"desc-{run.model_name}_meanbrain.nii.gz"
    write_bytes(file, _nifti(brain, blocks.spacing))
    for task in missing:
        rows = task.design.rows
        used = untrained[rows].astype(np.float64)
        columns, ids = study.cohort.extra_features, study.cohort.ids
        extra = read_extra_features(columns, ids, task.target, used.shape[1])
        beside = extra.rows(rows) if extra else None
        other = fit_readout(
            task.design, used, extra=beside, confounds=task.confounds, scaling="shared"
        )
        linear = task.stored.linear
        own = [
            embed(model, study.volume(row), few, folder=kept, name=study.name(row))
            for row in task.people
        ]
        changes = (
            _changes(linear, whole),
            np.stack([_changes(linear, features) for features in own]),
            _changes(other, before),
        )
        _write(study, task, blocks, *changes, averaged)
    return True


def forget_old(output_dir: Path, model: str, labels: Iterable[str]) -> None:
    """Remove maps of a readout that is another one by now, or gone.

    Parameters
    ----------
    output_dir : Path
    model : str
        Its label in file names.
    labels : iterable of str
        Of targets.
    """
    for label in labels:
        stem = output_dir / "figures" / f"desc-{model}{label}_occlusion"
        about, readout = beside(stem, ".json"), readout_path(output_dir, model, label)
        if not about.is_file():
            continue
        now = read_readout(readout).sha256 if readout.is_file() else None
        if now is None or _made_of(stem).get("readout") != now:
            about.unlink()  # first, since without it there is nothing to show
            for file in stem.parent.glob(f"{stem.name}*"):
                file.unlink()


def _task(
    study: Occlusion,
    target: str,
    label: str,
    prediction: PredictionOptions,
    run: RunOptions,
    mean_of: str,
) -> _Task | None:
    """Return what is to be done for a target; None where no readout was kept."""
    file = readout_path(study.output_dir, run.model_name, label)
    if not file.is_file():
        return None
    stored, cohort = read_readout(file), study.cohort
    images, groups = cohort.images, cohort.images["group_id"].to_numpy()
    known = read_confounds(images[prediction.confounds], groups, study.held_out, target)
    read = read_target_beside(
        images[target], groups, study.held_out, known, name=target, task=stored.task
    )
    people = images["person_id"].to_numpy(dtype=object)
    design = make_design(read, people, groups, n_splits=5, n_repeats=1, seed=run.random_seed)
    removed = encode_confounds(known, design.rows, groups) if known else None
    chosen = _spread_people(design, people, run.random_seed)
    basis = {
        "rules": RULES,
        "block_mm": BLOCK_MM,
        "random_seed": run.random_seed,
        "readout": stored.sha256,
        "model_sha256": cohort.model_sha256,
        "mean_of": mean_of,
        "people": _digest(study.name(row) for row in chosen),
    }
    stem = study.figures / f"desc-{run.model_name}{label}_occlusion"
    return _Task(target, stem, stored, design, removed, chosen, basis)


def _spread_people(design: CVDesign, people: NDArray[np.object_], seed: int) -> list[int]:
    """Return an image each of a few participants, spread over the values of the target."""
    values = design.value[design.unit]
    table = pd.DataFrame({"row": design.rows, "value": values, "who": people[design.rows]})
    table = table.drop_duplicates("who")
    table["order"] = [key_seed(seed, "occlusion", who) for who in table["who"]]
    if design.task == "regression":
        table = table.sort_values(["value", "order"], kind="stable")
        count = min(PEOPLE, len(table))
        at = ((np.arange(count) + 0.5) / count * len(table)).astype(int)
        return [int(row) for row in table["row"].iloc[at]]
    table = table.sort_values("order", kind="stable")
    table["turn"] = table.groupby("value").cumcount()
    table = table.sort_values(["turn", "value"], kind="stable")
    return [int(row) for row in table["row"].iloc[: max(PEOPLE, len(design.labels))]]


def _embed_hidden(
    model: DCL,
    volume: NDArray[np.float32],
    blocks: Blocks,
    *,
    counter: _Counter,
    folder: Path | None = None,
    name: str = "",
) -> NDArray[np.float32]:
    """Return the features of a volume with blocks hidden; they are kept in a folder, if given."""
    laid = hashlib.blake2b(repr((RULES, blocks.size, blocks.corners.tolist())).encode())
    laid.update(np.packbits(blocks.inside).tobytes())
    file = None if folder is None else folder / f"{name}-{laid.hexdigest()[:16]}.npy"
    if file is not None and file.is_file():
        try:
            known: NDArray[np.float32] = np.load(file, allow_pickle=False)
            if len(known) == 1 + len(blocks):
                counter(len(known))
                return known
        except (OSError, ValueError, EOFError):
            pass  # made again
    found = hidden_features(volume, blocks, lambda loader: model.transform(loader).numpy(), counter)
    if file is not None:
        write_npy(file, found)
    return found


class _Counter:
    """Logs how many volumes were embedded."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        log_progress("hiding blocks", self.done, self.total)


def _changes(readout: FittedReadout, features: NDArray[np.float32]) -> Array:
    """Return what each block adds to the answer, shape (n_blocks, n_outputs)."""
    rows = features.astype(np.float64)
    return readout.changes(rows[:1] - rows[1:])


def _write(
    study: Occlusion,
    task: _Task,
    blocks: Blocks,
    mean: Array,
    own: Array,
    untrained: Array,
    averaged: NDArray[np.intp],
) -> None:
    labels, spacing, few = task.stored.linear.labels, blocks.spacing, blocks.thinned
    names = labels[1:] if len(labels) == 2 else labels or (task.target,)
    units = "logit, less the mean of all classes" if len(labels) > 2 else "log-odds"
    if not labels:
        units = study.module.table.units(task.target) or "units of the column"
    outputs, tables, maps, own_maps = [], [], [], []
    for k, name in enumerate(names):
        of = f"{task.target} {name}" if labels else task.target
        average = own[:, :, k].mean(axis=0)
        table = pd.DataFrame(blocks.centres_mm.round(1) + 0.0, columns=["x", "y", "z"])
        table["region"] = [name_region(*row) for row in table[["x", "y", "z"]].to_numpy()]
        table["change"] = mean[:, k]
        for column, values in (
            ("change_participants", average),
            ("sd_participants", own[:, :, k].std(axis=0, ddof=1) if len(own) > 1 else None),
            ("change_untrained", untrained[:, k]),
        ):
            table[column] = pd.Series(values, index=few, dtype=float).reindex(table.index)
        table.insert(0, "output", name)
        tables.append(
            table.sort_values("change", key=lambda c: -c.abs(), kind="stable", ignore_index=True)
        )
        maps.append(spread_changes(mean[:, k], blocks))
        own_maps.append(spread_changes(average, blocks.chosen(few)))
        outputs.append(
            describe_map(name, units, of, tables[-1], mean[few, k], own[:, :, k], untrained[:, k])
        )
    sidecar = {
        "Description": "What each region of the volume adds to the prediction: that of the whole "
        "volume less that of the volume with a block hidden, mean over the blocks that hold a voxel",
        "Positive": "What is there makes the prediction higher (the class more likely) than plain "
        "gray would",
        "Outputs": outputs,
        "Space": _SPACE,
        "BlockSize": blocks.size_mm,
        "Stride": blocks.stride_mm,
        "StrideParticipants": [
            s * (2 if 2 * n <= m else 1)
            for s, n, m in zip(blocks.stride_mm, blocks.stride, blocks.size, strict=True)
        ],
        "Baseline": _BASELINE,
        "Blocks": len(blocks),
        "MeanOf": len(averaged),
        "LargestShare": largest_share(study.cohort.images["participant_id"].iloc[averaged]),
        "Participants": len(own),
        "Task": task.stored.task,
        "Target": task.target,
        "provenance": task.basis,
    }
    write_tsv(beside(task.stem, ".tsv"), pd.concat(tables, ignore_index=True))
    for ending, of_outputs in ((".nii.gz", maps), ("participants.nii.gz", own_maps)):
        write_bytes(beside(task.stem, ending), _nifti(np.stack(of_outputs, axis=-1), spacing))
    write_json(beside(task.stem, ".json"), sidecar)


def _nifti(data: NDArray[np.float32], spacing: Sequence[float]) -> bytes:
    """Return a compressed NIfTI image, its origin in the middle of the volume; bytes never vary."""
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array(data.shape[:3]) - 1) / 2 * np.array(spacing)
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    for put in (image.set_sform, image.set_qform):
        put(affine, code=2)  # aligned to something that is no template
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def _is_made(task: _Task) -> bool:
    files = [".nii.gz", ".tsv", "participants.nii.gz"]
    there = all(beside(task.stem, ending).is_file() for ending in files)
    return there and _made_of(task.stem) == task.basis


def _made_of(stem: Path) -> dict[str, Any]:
    """Return what a map was made from, nothing where that is not known."""
    try:
        return dict(json.loads(beside(stem, ".json").read_text("utf-8"))["provenance"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _digest(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=12).hexdigest()

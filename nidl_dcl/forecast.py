"""What a run would do and cost, said without writing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nidl_dcl.assembly import data_module
from nidl_dcl.console import Quiet
from nidl_dcl.cost import measure_cost
from nidl_dcl.datamodule import BIDSDataModule
from nidl_dcl.intake import input_lines
from nidl_dcl.options import DataOptions, PredictionOptions, RunOptions, TrainingOptions
from nidl_dcl.output import check_places
from nidl_dcl.refusals import check_targets, refuse_unusable

__all__ = ["dry_run"]


def dry_run(
    bids_dir: Path,
    output_dir: Path,
    data: DataOptions,
    training: TrainingOptions | None,
    run: RunOptions,
    console: Quiet | None = None,
    *,
    targets: Sequence[str] | None = None,
    prediction: PredictionOptions | None = None,
) -> list[str]:
    """Return lines that say what a run would do; nothing is written.

    Parameters
    ----------
    bids_dir, output_dir : Path
        The dataset and the output folder.
    data, training, run
        Options; without `training`, nothing is to be trained.
    console : Quiet, optional
        Told of progress.
    targets, prediction : optional
        What is to be predicted; refused as `predict` would.
    """
    check_places(bids_dir, output_dir)
    module = data_module(bids_dir, data, run, training=training, console=console or Quiet())
    module.check()
    if targets is not None:
        prediction = prediction or PredictionOptions()
        check_targets(module, targets, prediction)
        refuse_unusable(module.images, module.persons, targets, prediction)
    preparation = module.preparation
    megabytes = module.plan().entry_bytes * len(module.images) / 1e6
    lines = [
        *input_lines(module, "nidl-dcl index --check"),
        (
            f"volumes of {' x '.join(map(str, preparation.shape or ()))} voxels of "
            f"{' x '.join(f'{s:g}' for s in preparation.spacing)} mm, "
            f"{'brain-masked' if preparation.masked else 'whole head'}"
        ),
        f"{megabytes:.1f} MB of prepared volumes in the work folder, a file each",
    ]
    if training is not None:
        lines += _cost_lines(module, training, run)
    return [*lines, "nothing was written (--dry-run)"]


def _cost_lines(module: BIDSDataModule, training: TrainingOptions, run: RunOptions) -> list[str]:
    """Say how long the training takes, and how much memory, from a few real steps."""
    people = len(module.participants("train"))
    if people < 2:
        return [f"{people} participant to train on: at least 2 are needed"]
    cost = measure_cost(module, training, run)
    epoch = cost.steps * cost.step_seconds
    return [
        (
            f"{people} participants to train on, {cost.steps} step{'s' * (cost.steps > 1)} per epoch, "
            f"{training.max_epochs} epochs"
        ),
        (
            f"about {_duration(epoch)} per epoch, {_duration(epoch * training.max_epochs)} in all "
            f"({cost.step_seconds:.2f} s a step on {cost.device}, measured)"
        ),
        (
            f"about {_duration(cost.prepare_seconds * len(module.images))} before that to read and "
            "prepare the images, divided by the cores at work"
        ),
        f"about {cost.memory_mb / 1000:.1f} GB of memory",
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

"""What a run would do and cost, from a few real steps on a few images, without writing anything."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from joblib import cpu_count
from torch import Tensor

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.data.datasets import TwoViewSamples
from nidl_dcl.data.preprocessed import DERIVATIVE
from nidl_dcl.data.samplers import EpochBatches, two_view_loader
from nidl_dcl.data.views import volume_views
from nidl_dcl.models.baselines import UNTRAINED_SEEDS
from nidl_dcl.models.dcl import DCL
from nidl_dcl.models.model_source import ModelSource, folder_of
from nidl_dcl.models.serialization import load_model, read_description
from nidl_dcl.output.folder import check_paths
from nidl_dcl.volumes.preparation import Preparation, common_shape
from nidl_dcl.workflow.estimate import (
    FewVolumes,
    duration,
    measure_encoding,
    measure_reading,
    occlusion_images,
    prediction_seconds,
    report_seconds,
)
from nidl_dcl.workflow.factory import check_training, data_module, image_table, in_epochs, new_model
from nidl_dcl.workflow.inputs import input_lines
from nidl_dcl.workflow.launcher import run_options
from nidl_dcl.workflow.options import DataOptions, PredictionOptions, RunOptions, TrainingOptions
from nidl_dcl.workflow.preflight import check_targets, known_shape, refuse_unusable, site_column
from nidl_dcl.workflow.preprocess import choose_mode, preprocessing_lines

_IMAGES = 8

_STEPS = 4


@dataclass(frozen=True)
class Cost:
    """What was measured.

    Attributes
    ----------
    prepare_seconds : float
        To read and prepare one image, in one thread.
    steps : int
        Optimizer steps of an epoch.
    step_seconds : float
        Of one optimizer step, loading included.
    draw_seconds : float
        To draw the views of one step, in one process.
    memory_mb : float
        Largest resident size of this process; on a GPU, the largest size allocated there.
    device : str
        Where the steps ran.
    """

    prepare_seconds: float
    steps: int
    step_seconds: float
    draw_seconds: float
    memory_mb: float
    device: str


class _Stamps(L.Callback):
    """The time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def measure_cost(module: BIDSDataModule, training: TrainingOptions, run: RunOptions) -> Cost:
    """Prepare a few images, take a few steps on them, and return what it took.

    Parameters
    ----------
    module : BIDSDataModule
        Checked; gives images, preparation and the size of a batch.
    training, run : TrainingOptions, RunOptions
        As of the real training.
    """
    volumes, seconds = _prepare_few(module)
    people = len(module.participants("train"))
    steps = len(EpochBatches(people, training.batch_size, seed=None))
    devices = int(training.devices) if training.devices.isdigit() else 1
    size = max(2, -(-people // (steps * devices * training.num_nodes)))
    samples = TwoViewSamples(
        FewVolumes(volumes, size * (_STEPS + 1)),
        volume_views(training.views, module.kind),
        seed=run.random_seed,
        lazy=training.views_on_device,
    )
    start = time.perf_counter()
    for i in range(size):
        samples[0, i]
    drawing = 0.0 if samples.lazy else time.perf_counter() - start
    stamps = _Stamps()
    model = new_model(training, run.random_seed)
    # One process, which starts no others, on one process's part of a batch.
    alone = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    model.set_params(
        **(run_options(training) | alone),
        max_epochs=1,
        lr_scheduler=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[stamps],
    )
    model.fit(two_view_loader(samples, size, num_workers=run.nprocs or 0))
    device = str(next(model.parameters()).device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    megabytes = used / 2**20 if sys.platform == "darwin" else used / 2**10
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        megabytes, device = torch.cuda.max_memory_allocated() / 2**20, "cuda"
    return Cost(
        prepare_seconds=seconds,
        steps=steps,
        step_seconds=float(np.median(np.diff(stamps.times))),
        draw_seconds=drawing,
        memory_mb=megabytes,
        device=device,
    )


def _prepare_few(module: BIDSDataModule) -> tuple[list[Tensor], float]:
    """Return a few prepared volumes, and the seconds for one of them."""
    plan = module.plan()
    chosen = np.linspace(0, len(plan) - 1, min(_IMAGES, len(plan))).round().astype(int)
    volumes, seconds = [], []
    for i in chosen:
        start = time.perf_counter()
        volumes.append(plan[int(i)])
        seconds.append(time.perf_counter() - start)
    return volumes, float(np.median(seconds))


def choose_workers(cost: Cost, cores: int) -> int:
    """Return the number of loading workers that keep the encoder busy; they change no result.

    Parameters
    ----------
    cost : Cost
        Measured without workers.
    cores : int
        Of this machine, for this process.

    Returns
    -------
    int
        0 where the encoder runs on the same cores; else as many as draw the views of a step while the
        device computes one, leaving a core for the rest.
    """
    if cost.device == "cpu" or cost.draw_seconds == 0:
        return 0
    computing = max(cost.step_seconds - cost.draw_seconds, 0.01 * cost.step_seconds)
    return min(math.ceil(cost.draw_seconds / computing - 1e-9), max(0, cores - 1))


def dry_run(
    bids_dir: Path,
    output_dir: Path,
    data: DataOptions,
    training: TrainingOptions | None,
    run: RunOptions,
    *,
    model: ModelSource | None = None,
    trust: Sequence[str] | None = None,
    embeds: bool = True,
    targets: Sequence[str] | None = None,
    prediction: PredictionOptions | None = None,
) -> list[str]:
    """Return lines that say what a run would do, and how long each stage takes; nothing is written.

    Parameters
    ----------
    bids_dir, output_dir : Path
        The dataset and the output folder.
    data, training, run
        Options; without `training`, nothing is to be trained.
    model : Path or "builtin", optional
        Folder of the model that is used.
    trust : sequence of str, optional
        Packages whose encoders may be imported.
    embeds : bool, default=True
        Whether images are embedded.
    targets, prediction : optional
        What is to be predicted; refused as `predict` would.
    """
    check_paths(bids_dir, output_dir)
    prediction = prediction or PredictionOptions()
    table = image_table(bids_dir, data)
    folder = output_dir / "models" / f"desc-{run.model_name}"
    source = model or folder
    mode = choose_mode(data, source)
    spent: dict[str, float] = {}
    contract = None
    if training is None:
        before, contract = _read_model("model", source)
    else:
        check_training(training)
        training = known_shape(training, folder)
        before = [] if training.init is None else _read_model("starts from", training.init)[0]
    if mode != "none":
        lines, spent["preprocessing"] = preprocessing_lines(
            bids_dir, table, mode, output_dir / "derivatives" / DERIVATIVE, run.nprocs
        )
        before += lines
        table = image_table(bids_dir, replace(data, mask="none"))
        if training is not None and not training.shape:  # that of the brains, which are masked
            x, y, z = training.spacing * (3 // len(training.spacing))
            training = replace(training, shape=list(common_shape((), (x, y, z), masked=True)))
    start = time.perf_counter()
    if targets is not None:
        check_targets(table, targets, prediction)
    made = training
    if contract is not None and mode != "none":  # which the scans do not meet before that
        made, contract = _like(contract), None
    module = data_module(table, run, training=made, preparation=contract, group=prediction.group)
    module.hold_out(data.holdout or 0.0, prediction.group)
    tasks = refuse_unusable(module.images, targets, prediction, table) if targets else []
    preparation = module.preparation
    spent["reading the dataset"] = time.perf_counter() - start
    megabytes = module.plan().entry_bytes * len(module.images) / 1e6
    lines = [
        *input_lines(table, "nidl-dcl index --check"),
        *before,
        *tasks,
        (
            f"volumes of {' x '.join(map(str, preparation.shape or ()))} voxels of "
            f"{' x '.join(f'{s:g}' for s in preparation.spacing)} mm, "
            f"{'brain-masked' if preparation.masked or mode != 'none' else 'whole head'}"
        ),
        f"{megabytes:.1f} MB of prepared volumes in the work folder, a file each",
    ]
    volumes, prepare_seconds = _prepare_few(module)
    spent["preparing volumes"] = prepare_seconds * len(module.images) / min(8, cpu_count())
    lines.append(
        f"about {duration(spent['preparing volumes'])} to read and prepare the images, at most "
        f"{min(8, cpu_count())} at a time"
    )
    if training is not None:
        told, spent["training"] = _cost_lines(module, training, run)
        lines += told
    if embeds and (encoder := _encoder(training, source, run, trust)) is not None:
        later, more = _later_stages(module, volumes, encoder, targets, prediction)
        lines += later
        spent |= more
    if "training" not in spent or spent["training"]:
        parts = ", ".join(f"{name} {duration(s)}" for name, s in spent.items() if s >= 0.5)
        lines.append(
            f"about {duration(sum(spent.values()))} in all, if nothing is there yet and this machine "
            f"stays as busy as it is: {parts or 'less than a second'}"
        )
    return [*lines, "nothing was written (--dry-run)"]


def _encoder(
    training: TrainingOptions | None,
    source: ModelSource,
    run: RunOptions,
    trust: Sequence[str] | None,
) -> DCL | None:
    """Return a model as it will encode the images; None where there is none."""
    if training is not None:
        return new_model(training, run.random_seed)
    if not (folder_of(source) / "model.json").is_file():
        return None
    return load_model(source, trust=trust or ())


def _later_stages(
    module: BIDSDataModule,
    volumes: Sequence[Tensor],
    encoder: DCL,
    targets: Sequence[str] | None,
    prediction: PredictionOptions,
) -> tuple[list[str], dict[str, float]]:
    """Say how long it takes to embed, predict, map and report, and return the seconds of each."""
    images, spacing = module.images, module.preparation.spacing
    each, n_features = measure_encoding(encoder, volumes)
    spent = {"embedding": each * len(images)}
    lines = [f"about {duration(spent['embedding'])} to embed {len(images)} images"]
    if targets is None:
        return lines, spent
    look, n_voxels = measure_reading(volumes, spacing)
    spent["baselines"] = (UNTRAINED_SEEDS * each + look) * len(images)
    lines.append(
        f"about {duration(spent['baselines'])} for the baselines of the images: "
        f"{UNTRAINED_SEEDS} untrained encoders, the voxels"
    )
    used = images[images["split"] != "holdout"]
    for target in targets:
        site = site_column(module.table.phenotype_columns, prediction.site, target)
        seconds = prediction_seconds(
            used, target, site, prediction, n_features=n_features, n_voxels=n_voxels
        )
        spent[f"predicting {target}"] = seconds
        lines.append(f"about {duration(seconds)} to predict {target}, permutations included")
    if prediction.occlusion:
        n_hidden = occlusion_images(volumes[0], spacing, len(targets))
        spent["occlusion"] = each * n_hidden
        lines.append(
            f"about {duration(spent['occlusion'])} to map where the readouts look: {n_hidden} volumes "
            "with a hidden block"
        )
    spent["report"] = report_seconds(len(targets))
    return [
        *lines,
        f"about {duration(spent['report'])} for the report, which is written anew",
    ], spent


def _read_model(what: str, source: ModelSource) -> tuple[list[str], Preparation | None]:
    """Say what model is used; also return its input contract, if it has one."""
    if not (folder_of(source) / "model.json").is_file():
        return [], None
    about = read_description(source)
    kind = about["encoder"]["class"].rpartition(":")[2]
    line = f"{what} {source}: {kind}, {about['n_features']} numbers an image"
    if seen := (about.get("exposure") or {}).get("n_participants"):
        line += f", trained on {seen} participants"
    contract = about.get("input_contract")
    return [line], Preparation.from_dict(contract) if contract else None


def _like(contract: Preparation) -> TrainingOptions:
    """Return options that prepare volumes of the same size."""
    return TrainingOptions(spacing=[*contract.spacing], shape=[*(contract.shape or ())])


def _cost_lines(
    module: BIDSDataModule, training: TrainingOptions, run: RunOptions
) -> tuple[list[str], float]:
    """Say how long the training takes, and how much memory, from a few real steps."""
    people = len(module.participants("train"))
    if people < 2:
        return [f"{people} participant to train on: at least 2 are needed"], 0.0
    cost = measure_cost(module, training, run)
    epoch = cost.steps * cost.step_seconds
    epochs = in_epochs(training, people).max_epochs or 0
    lines = [
        (
            f"{people} participants to train on, {cost.steps} step{'s' * (cost.steps > 1)} per epoch, "
            f"{epochs} epoch{'s' * (epochs > 1)}"
        ),
        (
            f"about {duration(epoch)} per epoch, {duration(epoch * epochs)} for the training "
            f"({cost.step_seconds:.2f} s a step on {cost.device}, measured)"
        ),
        f"about {cost.memory_mb / 1000:.1f} GB of memory",
    ]
    return lines, epoch * epochs

"""Objects made from options: the data module, the model, and what a change of them would spoil."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from nidl_dcl.console import Quiet
from nidl_dcl.datamodule import BIDSDataModule
from nidl_dcl.dcl import DCL
from nidl_dcl.encoder import ENCODERS
from nidl_dcl.errors import UsageError
from nidl_dcl.json_files import read_json
from nidl_dcl.model_folder import import_module_class, load_model, read_description, weights_sha256
from nidl_dcl.options import DataOptions, RunOptions, TrainingOptions
from nidl_dcl.processes import Place, Team, find_place, run_processes
from nidl_dcl.volumes import Preparation

__all__ = [
    "check_training",
    "data_module",
    "new_model",
    "on_one_process",
    "refuse_changes",
    "run_options",
    "start_processes",
    "take_weights",
    "team_of",
    "training_config",
    "trusted_by_name",
]

_MODEL_RESULT = ("encoder", "views", "max_epochs", "batch_size", "temperature", "learning_rate")


def data_module(
    bids_dir: Path,
    data: DataOptions,
    run: RunOptions,
    *,
    training: TrainingOptions | None = None,
    preparation: Preparation | None = None,
    work: Path | None = None,
    console: Quiet | None = None,
    max_skipped: float | None = None,
) -> BIDSDataModule:
    """Return the data module that the options describe.

    Raises
    ------
    UsageError
        For a missing folder, a label or a filter file that cannot be used.
    """
    if not bids_dir.is_dir():
        raise UsageError(f"BIDS_DIR {bids_dir} is not a folder.")
    allowed = 0.0 if data.strict else data.max_skipped
    made = training or TrainingOptions()
    return BIDSDataModule(
        bids_dir,
        preset=data.preset,
        derivatives=data.derivatives,
        participant_label=data.participant_label or None,
        session_label=data.session_label or None,
        filters=_filters(data.bids_filter_file),
        select=data.select,
        intensity=data.intensity,
        mask=data.mask,
        phenotypes=data.phenotypes,
        preparation=preparation,
        spacing=made.spacing,
        shape=made.shape or None,
        views=made.views,
        views_on_device=made.views_on_device,
        batch_size=made.batch_size,
        num_workers=run.nprocs or 0,
        holdout=data.holdout or 0.0,
        random_state=run.random_seed,
        work_dir=work,
        max_skipped=allowed if max_skipped is None else max_skipped,
        progress=None if console is None else console.progress,
    )


def _filters(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        filters = read_json(file)
    except OSError as error:
        raise UsageError(f"--bids-filter-file {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"--bids-filter-file {file} cannot be used as JSON: {error}.") from error
    if not isinstance(filters, dict):
        raise UsageError(f"--bids-filter-file {file} must hold an object of entities and values.")
    return filters


def check_training(training: TrainingOptions) -> None:
    """Refuse an encoder or a first model that cannot be used, before any image is opened.

    Raises
    ------
    UsageError
        Naming it.
    """
    _encoder_class(training.encoder)
    if training.init is not None:
        read_description(training.init)


def new_model(training: TrainingOptions, seed: int) -> DCL:
    """Return an untrained estimator.

    Raises
    ------
    UsageError
        For an encoder that cannot be found or does not say how long its embedding is.
    """
    kind = _encoder_class(training.encoder)
    n_features = getattr(kind(), "n_features", None)
    if not isinstance(n_features, int):
        raise UsageError(
            f"The encoder {training.encoder} must say the length of its embedding as n_features."
        )
    return DCL(
        kind,
        proj_input_dim=n_features,
        proj_hidden_dim=n_features,
        temperature=training.temperature,
        chunk_size=training.chunk_size,
        learning_rate=training.learning_rate,
        lr_scheduler_kwargs={"warmup_epochs": training.max_epochs / 10},
        random_state=seed,
    )


def run_options(training: TrainingOptions) -> dict[str, Any]:
    """Return what Lightning's Trainer is told about where and how a training runs."""
    return {
        "accelerator": training.accelerator,
        "devices": int(training.devices) if training.devices.isdigit() else training.devices,
        "num_nodes": training.num_nodes,
        "strategy": training.strategy,
        "precision": training.precision,
    }


def start_processes(training: TrainingOptions, command: Sequence[str]) -> int | None:
    """Run `command` as the processes of this machine that a training wants, and wait for them.

    Returns
    -------
    int or None
        Their exit status; None where one process is enough, or somebody else starts them.

    Raises
    ------
    UsageError
        For devices that there are not, or several machines that nobody named.
    """
    if find_place().processes > 1:
        return None
    here, _ = _processes_here(training)
    if here * training.num_nodes == 1:
        return None
    if training.num_nodes > 1:
        missing = [n for n in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
        if missing:
            raise UsageError(
                f"--num-nodes {training.num_nodes}: start the command on every node by srun or "
                f"torchrun, or set {', '.join(missing)}."
            )
    node = int(os.environ.get("NODE_RANK", "0"))
    return run_processes(command, here, node=node, nodes=training.num_nodes)


def on_one_process(training: TrainingOptions) -> TrainingOptions:
    """Return the options for one process, of which "auto" may have wanted several.

    Raises
    ------
    UsageError
        When several were asked for.
    """
    here, _ = _processes_here(training)
    if here * training.num_nodes == 1:
        return training
    if training.devices == "auto" and training.num_nodes == 1:
        return replace(training, devices="1", strategy="auto")
    raise UsageError(
        f"--devices {training.devices} --num-nodes {training.num_nodes}: several processes train "
        "through the command nidl-dcl only, or with a team (nidl_dcl.assembly.team_of)."
    )


def team_of(training: TrainingOptions) -> Team:
    """Return the processes of a training, among which this one is.

    Raises
    ------
    UsageError
        When another number of processes was started than the options ask for.
    """
    place = find_place()
    if place.processes == 1:
        return Team(Place())
    (here, device), nodes = _processes_here(training), training.num_nodes
    if here * nodes != place.processes:
        raise UsageError(
            f"{place.starter} started {place.processes} processes, and the options ask for "
            f"{here * nodes} ({here} a node, {nodes} node{'s' * (nodes > 1)}). Make --devices times "
            f"--num-nodes {place.processes}, with --strategy ddp."
        )
    return Team(place, device)


def _processes_here(training: TrainingOptions) -> tuple[int, str]:
    """Return how many processes of this machine train, and on what kind of device each."""
    try:
        trainer = L.Trainer(
            **run_options(training),
            plugins=[LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UsageError(f"--accelerator, --devices, --strategy or --precision: {error}") from error
    spawning = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    parallel = isinstance(trainer.strategy, ParallelStrategy) and not spawning
    return int(trainer.num_devices) if parallel else 1, trainer.strategy.root_device.type


def _encoder_class(name: str) -> Any:
    if name in ENCODERS:
        return ENCODERS[name]
    if ":" not in name:
        raise UsageError(
            f"--encoder takes {', '.join(ENCODERS)} or package.module:Class, got {name!r}."
        )
    return import_module_class(name, trust=trusted_by_name(name))


def trusted_by_name(encoder: str) -> list[str]:
    """Return the package of an encoder of the caller's own: who names it runs it."""
    package, colon, _ = encoder.partition(":")
    return [package.partition(".")[0]] if colon else []


def take_weights(model: DCL, folder: Path) -> None:
    """Start `model` from the weights of a model folder.

    Raises
    ------
    UsageError
        When its architecture is another one.
    """
    known = load_model(folder)
    try:
        model.load_state_dict(known.state_dict())
    except RuntimeError as error:
        raise UsageError(f"--init {folder} has another architecture: {error}") from error
    model.__dict__["_exposure"] = known.exposure


def training_config(
    data: DataOptions,
    training: TrainingOptions,
    run: RunOptions,
    preparation: Preparation,
    group: str | None = None,
) -> dict[str, Any]:
    """Return what decides about the weights; new participants are not part of it."""
    config = {name: getattr(training, name) for name in _MODEL_RESULT}
    config["holdout"] = data.holdout or 0.0
    config["group"] = group if data.holdout else None
    config["chunk_size"] = training.chunk_size
    config["precision"] = training.precision
    config["init"] = None
    if training.init is not None:
        config["init"] = weights_sha256(training.init)
    config["preset"] = data.preset
    config["random_seed"] = run.random_seed
    config["preparation"] = preparation.rules()
    return config


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on in an output that was made with another configuration.

    Raises
    ------
    UsageError
        Naming each differing field with both values.
    """
    differing = [name for name in now if name in before and before[name] != now[name]]
    if differing:
        raise UsageError(
            f"{where} was made with another configuration: "
            + "; ".join(f"{n} was {before[n]!r}, is {now[n]!r}" for n in differing)
            + ". Use the same, another --model-name, or another OUTPUT_DIR."
        )

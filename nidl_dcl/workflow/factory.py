"""Objects made from options: the data module, the model, and what a change of them would spoil."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.data.image_table import ImageTable
from nidl_dcl.data.preprocessed import DERIVATIVE, PreprocessedImages, preset_of
from nidl_dcl.data.samplers import EpochBatches
from nidl_dcl.errors import UsageError
from nidl_dcl.io.console import log_progress
from nidl_dcl.io.formats import read_json
from nidl_dcl.models.dcl import DCL
from nidl_dcl.models.encoders import ENCODERS
from nidl_dcl.models.model_source import ModelSource
from nidl_dcl.models.serialization import (
    import_module_class,
    load_model,
    read_description,
    weights_sha256,
)
from nidl_dcl.volumes.preparation import Preparation
from nidl_dcl.workflow.options import DataOptions, RunOptions, TrainingOptions

_MODEL_RESULT = (
    *("encoder", "views", "max_steps", "max_epochs"),
    *("batch_size", "temperature", "learning_rate"),
)


def image_table(
    bids_dir: Path,
    data: DataOptions,
    *,
    preprocessed: PreprocessedImages | None = None,
    work: Path | None = None,
    max_skipped: float | None = None,
) -> ImageTable:
    """Return the images that the options select, not read yet.

    Parameters
    ----------
    bids_dir : Path
        The dataset.
    data : DataOptions
        Which of its images.
    preprocessed : PreprocessedImages, optional
        Brains that stand for these images.
    work : Path, optional
        The work folder.
    max_skipped : float, optional
        In place of the option.

    Raises
    ------
    UsageError
        For a missing folder, a label or a filter file that cannot be used.
    """
    if not bids_dir.is_dir():
        raise UsageError(f"BIDS_DIR {bids_dir} is not a folder.")
    allowed = 0.0 if data.strict else data.max_skipped
    which: dict[str, Any] = {
        "preset": data.preset,
        "derivatives": data.derivatives,
        "filters": _filters(data.bids_filter_file),
        "select": data.select,
        "mask": data.mask,
        "exclude_participant_label": data.exclude_participant_label or None,
        "exclude": data.exclude,
    }
    if preprocessed is not None:
        which = {
            "preset": preset_of(preprocessed.mode),
            "derivatives": [f"{DERIVATIVE}={preprocessed.folder}"],
            "filters": {"suffix": preprocessed.suffixes},
        }
    return ImageTable(
        bids_dir,
        **which,
        participant_label=data.participant_label or None,
        session_label=data.session_label or None,
        intensity=data.intensity,
        preprocessed=preprocessed,
        phenotypes=data.phenotypes,
        id_column=data.id_column,
        id_map=data.id_map,
        max_skipped=allowed if max_skipped is None else max_skipped,
        work_dir=work,
        progress=log_progress,
    )


def data_module(
    table: ImageTable,
    run: RunOptions,
    *,
    training: TrainingOptions | None = None,
    preparation: Preparation | None = None,
    group: str | None = None,
    work: Path | None = None,
) -> BIDSDataModule:
    """Return the data module of some images.

    Parameters
    ----------
    table : ImageTable
        The images.
    run : RunOptions
        Seed and loading workers.
    training : TrainingOptions, optional
        Voxels, views and batches.
    preparation : Preparation, optional
        A model's input contract; otherwise made from `training` and the images.
    group : str, optional
        Column whose equal values (a family) are of one group.
    work : Path, optional
        The work folder.
    """
    made = training or TrainingOptions()
    return BIDSDataModule(
        table,
        preparation=preparation,
        spacing=made.spacing,
        shape=made.shape or None,
        views=made.views,
        views_on_device=made.views_on_device,
        batch_size=made.batch_size,
        num_workers=run.nprocs or 0,
        group=group,
        random_state=run.random_seed,
        work_dir=work,
        progress=log_progress,
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
    kind = _encoder_class(training.encoder)
    if training.init is None:
        return
    stored = read_description(training.init)["encoder"]["class"].rpartition(":")[2]
    names = {known.__qualname__: name for name, known in ENCODERS.items()}
    if stored in names and kind.__qualname__ in names and stored != kind.__qualname__:
        raise UsageError(
            f"--init {training.init} has another architecture than --encoder {training.encoder}: "
            f"give --encoder {names[stored]}."
        )


def in_epochs(training: TrainingOptions, participants: int) -> TrainingOptions:
    """Return the options with the length in epochs, each a pass over so many participants."""
    if training.max_epochs is not None:
        return training
    batches = len(EpochBatches(participants, training.batch_size, seed=None))
    return replace(training, max_epochs=math.ceil(training.max_steps / batches))


def new_model(training: TrainingOptions, seed: int) -> DCL:
    """Return an untrained estimator.

    Raises
    ------
    UsageError
        For an encoder that cannot be found or does not say how long its embedding is.
    """
    kind = _encoder_class(training.encoder)
    example = kind()
    n_features = getattr(example, "n_features", None)
    if not isinstance(n_features, int):
        raise UsageError(
            f"The encoder {training.encoder} must say the length of its embedding as n_features."
        )
    return DCL(
        kind,
        # Kept with the model, since defaults of the package's own encoders may change.
        getattr(example, "arguments", None) if kind in ENCODERS.values() else None,
        proj_input_dim=n_features,
        proj_hidden_dim=max(256, n_features),
        temperature=training.temperature,
        chunk_size=training.chunk_size,
        learning_rate=training.learning_rate,
        lr_scheduler_kwargs={"warmup_epochs": (training.max_epochs or 1) / 10},
        random_state=seed,
    )


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


def take_weights(model: DCL, folder: ModelSource) -> None:
    """Start `model` from the weights of a model folder.

    Raises
    ------
    UsageError
        When its architecture is another one.
    """
    known = load_model(folder)
    try:
        model.start_from(known)
    except RuntimeError as error:
        raise UsageError(f"--init {folder} has another architecture: {error}") from error


def training_config(
    module: BIDSDataModule, data: DataOptions, training: TrainingOptions
) -> dict[str, Any]:
    """Return what decides about the weights; new participants are not part of it.

    Parameters
    ----------
    module : BIDSDataModule
        Preparation, seed, and who is held out.
    data, training : DataOptions, TrainingOptions
        Options.
    """
    config = {name: getattr(training, name) for name in _MODEL_RESULT}
    config["holdout"] = module.holdout
    config["group"] = module.group if module.holdout else None
    config["chunk_size"] = training.chunk_size
    config["precision"] = training.precision
    config["init"] = None
    if training.init is not None:
        config["init"] = weights_sha256(training.init)
    config["preset"] = data.preset
    config["preprocess"] = module.table.preprocessing
    config["random_seed"] = module.random_state
    config["preparation"] = module.preparation.rules()
    return config


def refuse_changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    where: ModelSource,
    remedy: str = "Use the same, another --model-name, or another OUTPUT_DIR.",
) -> None:
    """Refuse to continue in an output that was made with another configuration.

    Parameters
    ----------
    before, now : mapping
        Configurations; fields that only one of them has do not count.
    where : Path or "builtin"
        What was made, for the message.
    remedy : str
        What to do.

    Raises
    ------
    UsageError
        Naming each differing field with both values, and no other.
    """
    differing = [
        change
        for name in now
        if name in before
        for change in _changes(name, before[name], now[name])
    ]
    if differing:
        raise UsageError(
            f"{where} was made with another configuration: {'; '.join(differing)}. {remedy}"
        )


def _changes(name: str, before: Any, now: Any) -> list[str]:
    """Return what differs between two values, of mappings only the entries that do."""
    if before == now:
        return []
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = dict.fromkeys([*before, *now])
        return [c for n in names for c in _changes(f"{name}.{n}", before.get(n), now.get(n))]
    return [f"{name} was {before!r}, is {now!r}"]

"""The stage `pretrain`: an encoder trained on a dataset, as a model folder."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.data.preprocessed import PreprocessedImages
from nidl_dcl.errors import InputsUnusableError, OnAnotherProcessError, UsageError
from nidl_dcl.io.console import log_progress
from nidl_dcl.models.callbacks import (
    AtomicCheckpointIO,
    CollectiveSigterm,
    Progress,
    StepCheckpoint,
    TrainingCurve,
    latest_valid_checkpoint,
    step_of,
)
from nidl_dcl.models.dcl import DCL
from nidl_dcl.models.model_card import told_by_owner
from nidl_dcl.models.serialization import read_description, save_model
from nidl_dcl.output.description import write_descriptions
from nidl_dcl.randomness import key_seed
from nidl_dcl.report.live import LivePage
from nidl_dcl.workflow.dry_run import choose_workers, measure_cost
from nidl_dcl.workflow.factory import (
    check_training,
    data_module,
    image_table,
    in_epochs,
    new_model,
    take_weights,
    training_config,
)
from nidl_dcl.workflow.figure_data import draw_volumes, write_views
from nidl_dcl.workflow.inputs import Study
from nidl_dcl.workflow.launcher import Rank, Team, on_one_process, run_options
from nidl_dcl.workflow.options import DataOptions, RunOptions, TrainingOptions
from nidl_dcl.workflow.participants import refuse_seen
from nidl_dcl.workflow.preflight import is_trained, known_shape

_LOGGER = logging.getLogger(__name__)


def pretrain(
    study: Study,
    training: TrainingOptions,
    *,
    team: Team | None = None,
    live: LivePage | None = None,
) -> Path:
    """Train an encoder on the dataset and write its model folder.

    Parameters
    ----------
    study : Study
        Dataset, output folder and common options.
    training : TrainingOptions
        How to train.
    team : Team, optional
        The processes that train; this is the first of them.
    live : LivePage, optional
        Written before training and now and then in it.

    Returns
    -------
    Path
        ``models/desc-<model>``.

    Raises
    ------
    UsageError
        For options that cannot be used, or a model trained with others.
    InputsUnusableError
        When too few images are usable.
    """
    if team is None:
        team, training = Team(Rank()), on_one_process(training)
    output, run, folder = study.output, study.run, study.model_folder
    check_training(training)
    with output.stage("pretrain") as entry:
        training = known_shape(training, folder)
        module = study.data_module(folder, training=training)
        if training.init is not None and module.holdout:
            refuse_seen(module.images, read_description(training.init)["exposure"], training.init)
        config = training_config(module, study.data, training)
        # In the output, since a work folder may be one of this machine, and gone on the next.
        checkpoints = output.path / ".work" / f"checkpoints-{run.model_name}"
        if is_trained(folder, config):
            _LOGGER.info(f"{folder.name} is trained already.")
            team.dismiss()
            _remove(checkpoints)  # if a kill left any
            write_descriptions(output.path, run.model_name)
            entry["skipped"] = True
            return folder
        people = len(module.participants("train"))
        if people < 2:
            raise InputsUnusableError(
                f"{output.bids_dir}: contrastive training needs at least 2 participants, "
                f"{people} is left for it."
            )
        training = in_epochs(training, people)
        study.prepare(module)
        draw_volumes(study.figures, module)
        write_views(study.figures, module)
        if live is not None:
            live.write()
        resume = latest_valid_checkpoint(checkpoints, _LOGGER.info)
        if resume is not None:
            entry["resumed_from_step"] = step_of(resume)
            output.save_record()
            _LOGGER.info(f"Training resumes at step {entry['resumed_from_step']}.")
        _LOGGER.info(
            f"Training {training.encoder} on {people} participants, "
            f"{training.max_epochs} epochs, volumes of "
            f"{' x '.join(map(str, module.preparation.shape or ()))} voxels."
        )
        if run.nprocs is None and torch.cuda.is_available():
            module.num_workers = choose_workers(measure_cost(module, training, run), cpu_count())
            _LOGGER.info(f"{module.num_workers} loading workers keep the GPU busy.")
        orders = _Orders(
            training=training,
            holdout=module.holdout,
            group=study.group,
            holdout_group=module.holdout_group,
            num_workers=module.num_workers,
            work=output.work,
            curve=output.path / "logs" / "metrics.csv",
            checkpoints=checkpoints,
            resume=resume,
            preprocessed=study.table.preprocessed,
        )
        team.broadcast(orders)
        model = _train(team, lambda: module, orders, run, live)
        provenance: dict[str, Any] = {"config": config, "source": output.bids_dir.name}
        if training.init is not None:  # whose terms go on to hold
            first = told_by_owner(read_description(training.init)["provenance"] or {})
            provenance |= {"credits": first["credits"]} if "credits" in first else {}
        save_model(
            model,
            folder,
            preparation=module.preparation,
            exposure=model.exposure,
            provenance=provenance,
        )
        _remove(checkpoints)
        write_descriptions(output.path, run.model_name)
    return folder


@dataclass(frozen=True, kw_only=True)
class _Orders:
    """What the first process of a training sends to the others."""

    training: TrainingOptions
    holdout: float
    group: str | None
    holdout_group: str | None
    num_workers: int
    work: Path
    curve: Path
    checkpoints: Path
    resume: Path | None
    preprocessed: PreprocessedImages | None


def join_training(team: Team, bids_dir: Path, data: DataOptions, run: RunOptions) -> None:
    """Take part in a training that another process leads; nothing is written to the output.

    Parameters
    ----------
    team : Team
        The processes that train; this is not the first of them.
    bids_dir : Path
        Dataset.
    data, run
        Options.

    Raises
    ------
    UsageError
        When this process sees other images than the first one.
    LostProcessError
        When another process ends early.
    """
    orders = team.broadcast()
    if not isinstance(orders, _Orders):
        return  # there is nothing to train, or an error that the first process says
    # The work folder may be one of this machine, of another name than on the first.
    work = orders.work if run.work_dir is None else run.work_dir.resolve()

    def make() -> BIDSDataModule:
        table = image_table(bids_dir, data, preprocessed=orders.preprocessed, work=work)
        module = data_module(table, run, training=orders.training, group=orders.group, work=work)
        module.num_workers = orders.num_workers
        module.hold_out(orders.holdout, orders.holdout_group)
        return module

    _train(team, make, orders, run)


def _train(
    team: Team,
    make_module: Callable[[], BIDSDataModule],
    orders: _Orders,
    run: RunOptions,
    live: LivePage | None = None,
) -> DCL:
    """Return the trained model, the same on every process."""

    def prepare() -> BIDSDataModule:
        module = make_module()
        module.check()
        if team.own.local_rank == 0:  # the others find what it prepared
            module.setup()
        return module

    module: Any = team.here(prepare)
    known = team.each(lambda: (socket.gethostname(), _sees(module)))
    for rank, (host, seen) in enumerate(known):
        if seen != known[0][1]:
            problem = (
                f"Process {rank} on {host} sees other images of {module.bids_dir} than the first "
                f"one on {known[0][0]}: {seen} and not {known[0][1]}. Every node must read the same "
                "dataset."
            )
            raise UsageError(problem) if team.rank == 0 else OnAnotherProcessError(problem, 2)
    training = orders.training
    model = new_model(training, run.random_seed)
    if training.init is not None:
        take_weights(model, training.init)
    ending = CollectiveSigterm()
    alone = team.processes == 1
    model.set_params(
        **run_options(training),
        max_epochs=training.max_epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Not Slurm's environment, which would requeue the job by itself.
        plugins=[
            AtomicCheckpointIO(),
            LightningEnvironment() if alone else TorchElasticEnvironment(),
        ],
        callbacks=[
            TrainingCurve(orders.curve),
            StepCheckpoint(orders.checkpoints),
            Progress(log_progress),
            ending,
            *([] if live is None else [live]),
        ],
    )
    team.run(lambda: model.fit(module, ckpt_path=orders.resume))
    team.disband()
    if ending.received:
        raise SystemExit(143)
    return model


def _sees(module: BIDSDataModule) -> dict[str, Any]:
    """Return what must be the same for processes to train on the same images."""
    module.setup()
    assert module.volumes is not None
    names = [module.volumes.name(i) for i in range(len(module.volumes))]
    return {**module.identity(), "images": f"{len(names)} ({key_seed(*names):08x})"}


def _remove(checkpoints: Path) -> None:
    """Remove checkpoints, and the work folder around them when nothing else is kept there."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    with suppress(OSError):
        checkpoints.parent.rmdir()

"""Lightning trainers of a fit and of an encoding, from the arguments of an estimator."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from nidl_dcl.models.arguments import TRAINER_OPTIONS
from nidl_dcl.models.callback_state import callback_list


def training_trainer(module: nn.Module, arguments: Mapping[str, Any]) -> L.Trainer:
    """Return the trainer of a fit, with batch statistics synchronized where that is possible."""
    options = trainer_options(arguments)
    normalized = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    if normalized:
        options.setdefault("sync_batchnorm", torch.cuda.is_available())
    trainer = L.Trainer(**options)
    if normalized and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        if trainer.is_global_zero:
            warnings.warn(
                "Batch normalization cannot be synchronized on the CPU: each process "
                "normalizes by its own part of a batch, so results depend on their number.",
                stacklevel=3,
            )
        if options["sync_batchnorm"]:
            trainer = L.Trainer(**{**options, "sync_batchnorm": False})
    return trainer


def inference_trainer(arguments: Mapping[str, Any], callback: L.Callback) -> L.Trainer:
    """Return the trainer of an encoding, which writes nothing and calls `callback` alone."""
    options = {
        **trainer_options(arguments),
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "callbacks": [callback],
    }
    for name in ("fast_dev_run", "limit_predict_batches", "overfit_batches", "profiler"):
        options.pop(name, None)
    trainer = L.Trainer(**options)
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        # Spawned processes cannot hand rows back; one process gives the same rows.
        trainer = L.Trainer(**{**options, "strategy": "auto", "devices": 1})
    return trainer


def trainer_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that Lightning's Trainer takes, over the defaults of this package."""
    given = {name: value for name, value in arguments.items() if name in TRAINER_OPTIONS}
    callbacks = callback_list(given.get("callbacks"))
    options = {
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        **given,
        "callbacks": callbacks,
        # The loaders are sharded already, and Lightning's sampler would repeat samples to fill up
        # the last batch: they would be negatives of themselves.
        "use_distributed_sampler": False,
    }
    if sys.platform == "darwin" and options.get("accelerator", "auto") == "auto":
        options["accelerator"] = "cpu"  # Apple's GPU, not tried yet, has to be asked for
    return options


def accumulation(trainer: Any) -> int | dict[int, int]:
    """Return how many batches a step takes, or from which epoch on how many."""
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return dict(callback.scheduling)
    return int(trainer.accumulate_grad_batches)


def batches_of_step(accumulated: int | Mapping[int, int], epoch: int) -> int:
    """Return how many batches a step of an epoch takes, of what `accumulation` returned."""
    if isinstance(accumulated, int):
        return accumulated
    return accumulated[max(first for first in accumulated if first <= epoch)]


def count_steps(trainer: Any) -> tuple[float, float]:
    """Return the optimizer steps of a fit and of one of its epochs, on average; infinite if endless."""
    total = trainer.estimated_stepping_batches
    if math.isinf(trainer.num_training_batches):  # steps alone were given: not counted yet
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if not math.isfinite(batches):  # a stream has no length
        return total, total
    accumulated = accumulation(trainer)
    if isinstance(accumulated, int) or not math.isfinite(total):
        return total, math.ceil(batches / batches_of_step(accumulated, 0))
    steps = epochs = 0
    while epochs != trainer.max_epochs and not 0 <= trainer.max_steps <= steps:
        steps += math.ceil(batches / batches_of_step(accumulated, epochs))
        epochs += 1
    per_epoch = steps / max(1, epochs)
    return (steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)), per_epoch

"""The estimator `DCL`: decoupled contrastive learning of an encoder.

Fitting and encoding are in `base` and `transformer`; here are the networks, the steps and the loss.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nidl_dcl.data.batches import describe, finite_rows, first_bad, two_views
from nidl_dcl.data.datasets import LazyViews
from nidl_dcl.distributed import (
    any_process,
    gather_objects,
    gather_rows,
    gather_targets,
    leave_at_exit,
    total,
    world,
)
from nidl_dcl.errors import NonFiniteError, UsageError, did_you_mean
from nidl_dcl.models.base import BaseEstimator
from nidl_dcl.models.collapse import CollapseMonitor
from nidl_dcl.models.encoders import ProjectionHead
from nidl_dcl.models.losses import DCLLoss, DCLWLoss
from nidl_dcl.models.optimization import build_optimizer, build_scheduler
from nidl_dcl.models.serialization import read_weights
from nidl_dcl.models.trainers import accumulation, batches_of_step, count_steps
from nidl_dcl.models.transformer import TransformerMixin
from nidl_dcl.models.wrapped import inner_module, inner_name, inner_names, is_wrapped, match_names
from nidl_dcl.randomness import fresh_seed, key_seed, keyed

_COLLAPSED = -1e-3
"""Uniformity above which embeddings count as one point; 0 is one point."""

_SIZES = ("proj_input_dim", "proj_hidden_dim", "proj_output_dim")


@dataclass
class _Step:
    """What a step computed, until it is known to be finite."""

    stage: str
    batch_idx: int
    views: Sequence[Tensor]
    projections: Tensor
    loss: Tensor
    buffers: list[Tensor]
    """Those of the networks, before the step."""


class DCL(TransformerMixin, BaseEstimator):
    """Decoupled contrastive learning.

    Two views of each sample are encoded and projected; the loss pulls the two together and pushes
    all other samples of the batch away. Unlike InfoNCE (SimCLR), the positive pair is not part of
    the denominator, which is what weakens the gradient of small batches there.

    An encoder may give an embedding of each of several regions. Each region is then told apart from
    the same region of the other samples, and the loss is the mean over regions.

    Parameters
    ----------
    encoder : nn.Module or class of nn.Module
        Maps a batch to embeddings of shape (n, proj_input_dim), or (n, regions, proj_input_dim). An
        instance is copied, a class is built with `encoder_kwargs`, its weights drawn under
        `random_state`. Lazy modules take their shapes from the first batch. If it states its number
        of regions as `n_regions`, a learned vector of each is added before the projection head.
    encoder_kwargs : dict or None, default=None
        Arguments of the encoder's class; ignored for an instance.
    proj_input_dim : int, default=2048
        Length of the embedding, that of one region where there are several.
    proj_hidden_dim : int, default=2048
        Length of the projection head's hidden layer.
    proj_output_dim : int, default=128
        Length of the projection.
    temperature : float, default=0.1
        Temperature of the loss.
    optimizer : {"sgd", "adam", "adamW"}, Optimizer class, callable or Optimizer, default="adamW"
        Names in any case. An instance is copied; parameters it lacks are added as a group of their
        own, with a warning. Any other callable gets the list of parameters and returns an optimizer,
        with the rates and the weight decay that it chooses; a ``functools.partial`` of a class is as
        the class with those options.
    learning_rate : float, default=3e-4
        Initial learning rate.
    weight_decay : float, default=5e-4
        Weight decay.
    exclude_bias_and_norm_wd : bool, default=True
        If true, biases and normalization layers get no weight decay.
    optimizer_kwargs : dict or None, default=None
        Further arguments of the optimizer.
    lr_scheduler : {"warmup_cosine", "none"}, None, callable or instance, default="warmup_cosine"
        Learning-rate schedule. A class or another callable gets the optimizer, as in
        ``lambda optimizer: SequentialLR(optimizer, …)``. An instance is copied onto the optimizer,
        with the schedules in it and the rates of the optimizer that it was made for.
    lr_scheduler_kwargs : dict or None, default=None
        For "warmup_cosine": ``{"warmup_epochs": 10, "warmup_start_lr": 1e-6, "min_lr": 0.0,
        "interval": "step"}`` and what is given here; else arguments of the class.
    **kwargs : dict
        Options of `BaseEstimator`: every option of ``lightning.Trainer``, ``random_state``,
        ``views``, ``batch_size``, ``num_workers``, ``warm_start``, …; ``weighting_sigma``
        (None; a number selects the weighted loss `DCLWLoss` with that sigma); ``chunk_size``
        (None; a number: so many samples of a view are encoded at a time, and once more for their
        gradients: memory is that of a chunk, and negatives are those of the whole batch. The
        gradient is the same, unless the encoder normalizes over its batch); and
        ``monitor_collapse`` (True; False leaves out the measures that are logged each epoch).

    Attributes
    ----------
    encoder : nn.Module
        The trained encoder.
    projection_head : nn.Module
        The projection head, used in training alone; shared by all regions.
    loss : DCLLoss
        The loss.
    optimizer : Optimizer
        The argument; after `fit`, the object used for training.
    lr_scheduler : LRScheduler or None
        The argument; after `fit`, the object used for training.
    fitted : bool
        Whether `fit` has ended.

    References
    ----------
    Yeh, C.-H. et al. Decoupled contrastive learning. ECCV 2022.

    Chen, T. et al. A simple framework for contrastive learning of visual representations. ICML 2020.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from nidl_dcl import DCL
    >>> x = torch.randn(16, 12)
    >>> model = DCL(nn.Linear(12, 4), proj_input_dim=4, max_epochs=1, lr_scheduler=None,
    ...             random_state=0, enable_progress_bar=False, enable_model_summary=False)
    >>> model.fit(x).transform(x).shape
    torch.Size([16, 4])
    """

    _more_options: ClassVar[Mapping[str, Any]] = {
        "weighting_sigma": None,
        "chunk_size": None,
        "monitor_collapse": True,
    }
    _of_fits = (*BaseEstimator._of_fits, "_seen_regions")

    encoder: nn.Module
    projection_head: nn.Module
    loss: DCLLoss
    proj_input_dim: int
    learning_rate: float
    weight_decay: float
    exclude_bias_and_norm_wd: bool
    optimizer_kwargs: dict[str, Any] | None
    lr_scheduler_kwargs: dict[str, Any] | None
    _used: dict[str, Any]
    _weights_seed: int | None
    _monitor: CollapseMonitor | None = None
    _collapse_warned = False
    _outputs_read = True
    _seen_regions: int | None = None
    _configured: tuple[float, float | None] | None = None
    """Learning rate and number of steps that the optimizer and its schedule were made for."""

    def __init__(
        self,
        encoder: nn.Module | type[nn.Module],
        encoder_kwargs: dict[str, Any] | None = None,
        proj_input_dim: int = 2048,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 128,
        temperature: float = 0.1,
        optimizer: Any = "adamW",
        learning_rate: float = 3e-4,
        weight_decay: float = 5e-4,
        exclude_bias_and_norm_wd: bool = True,
        optimizer_kwargs: dict[str, Any] | None = None,
        lr_scheduler: Any = "warmup_cosine",
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        super().__init__(**kwargs)
        self._unchecked: list[_Step] = []
        self._arguments.values.update(given)
        self._arguments_changed(set(self._arguments.values))

    # -- attributes that are arguments before fit and objects after it -------------------------

    @property
    def optimizer(self) -> Any:
        """The argument; after `fit`, the optimizer used for training."""
        return self._used.get("optimizer", self._arguments["optimizer"])

    @property
    def lr_scheduler(self) -> Any:
        """The argument; after `fit`, the schedule used for training."""
        return self._used.get("lr_scheduler", self._arguments["lr_scheduler"])

    @property
    def _n_features_out(self) -> int:
        # scikit-learn names as many outputs; like all it learns, absent before fit.
        if not self.fitted:
            raise AttributeError("not fitted")
        return self.proj_input_dim * (self._n_regions or 1)

    @property
    def _n_regions(self) -> int | None:
        """How many regions the encoder has, as it states or as was seen; None without regions."""
        stated = getattr(inner_module(self.encoder), "n_regions", None)
        return stated if isinstance(stated, int) else self._seen_regions

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """Return names such as ``dcl12``, with regions such as ``dcl_region003_feature012``.

        The features of a region follow one another. `input_features` is without effect.
        """
        names = super().get_feature_names_out(input_features)
        if self._n_regions is None:
            return names
        size = self.proj_input_dim
        prefix = type(self).__name__.lower()
        regional = [
            f"{prefix}_region{i // size:03d}_feature{i % size:03d}" for i in range(len(names))
        ]
        return np.array(regional, dtype=object)

    # -- building ----------------------------------------------------------------------------

    def _arguments_changed(self, names: set[str]) -> None:
        networks = {"encoder", "encoder_kwargs", *_SIZES, "random_state"}
        if names & {"optimizer", "lr_scheduler", *networks}:
            self._used = {}
        if names & {"temperature", "weighting_sigma"}:
            self.loss = _unless_invalid(self._build_loss)
        if names & networks:
            self._first_weights = self._seen_regions = None
            self._fitted = False
            self._weights_seed = _unless_invalid(self._initial_seed)
            with keyed(self._weights_seed, "weights"):
                self._assign("encoder", _unless_invalid(self._build_encoder))
                self.projection_head = _unless_invalid(self._build_head)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder" and is_wrapped(value, vars(self).get("_modules", {}).get("encoder")):
            self._assign(name, value)  # the same network, run in another way
        else:
            super().__setattr__(name, value)

    def _initial_seed(self) -> int:
        # A RandomState is drawn from in fit alone: building must not change the caller's object.
        return fresh_seed(copy.deepcopy(self._arguments["random_state"]))

    def _build_encoder(self) -> nn.Module:
        encoder, options = self._arguments["encoder"], self._arguments["encoder_kwargs"]
        if isinstance(encoder, nn.Module):
            return copy.deepcopy(encoder)
        if inspect.isclass(encoder) and issubclass(encoder, nn.Module):
            _check_names(encoder, options or {})
            built: nn.Module = encoder(**(options or {}))
            return built
        raise TypeError(
            f"encoder must be an nn.Module or a class of nn.Module, got {describe(encoder)}."
        )

    def _build_head(self) -> ProjectionHead:
        sizes = [self._arguments[name] for name in _SIZES]
        for name, size in zip(_SIZES, sizes, strict=True):
            if isinstance(size, bool) or int(size) != size or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}.")
        input_dim, hidden_dim, output_dim = map(int, sizes)
        n_regions = getattr(inner_module(self.encoder), "n_regions", None)
        n_regions = n_regions if isinstance(n_regions, int) else None
        return ProjectionHead(input_dim, hidden_dim, output_dim, n_regions)

    def _built_weights(self) -> dict[str, Tensor]:
        with keyed(self._weights_seed, "weights"):
            parts = {"encoder": self._build_encoder(), "projection_head": self._build_head()}
        return nn.ModuleDict(parts).state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied; `fit` makes optimizer and schedule anew."""
        return {**super().__getstate__(), "_used": {}, "_monitor": None, "_unchecked": []}

    def _build_loss(self) -> DCLLoss:
        temperature, sigma = self._arguments["temperature"], self._arguments["weighting_sigma"]
        for name, value in (("temperature", temperature), ("weighting_sigma", sigma)):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(
                    f"{name} must be a number; to learn one, set the loss before fit: "
                    "model.loss = DCLLoss(nn.Parameter(torch.tensor(0.1)))."
                )
        if sigma is None:
            return DCLLoss(temperature=temperature)
        return DCLWLoss(sigma=sigma, temperature=temperature)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for build, part in (
            (self._build_loss, self.loss),
            (self._build_encoder, self.encoder),
            (self._build_head, self.projection_head),
        ):
            if part is None:
                build()
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a number of 0 or more, got {value!r}.")
        size = self._arguments["chunk_size"]
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"chunk_size must be None or a positive integer, got {size!r}.")
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.encoder.modules()):
                warnings.warn(
                    f"chunk_size={size}: the encoder has batch normalization, which takes the "
                    "statistics of each chunk and not of the whole batch, so the gradient is not "
                    "the one without chunks. Larger chunks are closer to it.",
                    stacklevel=2,
                )
        self._check_fit(getattr(inner_module(self.encoder), "n_features", None))
        self._used = {}

    def _check_fit(self, n_features: Any) -> None:
        if isinstance(n_features, int) and n_features != self.proj_input_dim:
            raise ValueError(
                f"The encoder gives {n_features} features and the projection head takes "
                f"{self.proj_input_dim}. Set proj_input_dim={n_features}."
            )

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the learning-rate schedule, as Lightning takes them."""
        given = self._arguments["encoder"]
        copies = {}
        if isinstance(given, nn.Module):
            own = inner_names(self.encoder.named_parameters(remove_duplicate=False))
            theirs = inner_names(given.named_parameters(remove_duplicate=False))
            copies = {id(p): own[name] for name, p in theirs.items() if name in own}
        optimizer = build_optimizer(
            self._arguments["optimizer"],
            self,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            exclude_bias_and_norm_wd=self.exclude_bias_and_norm_wd,
            optimizer_kwargs=self.optimizer_kwargs,
            copies=copies,
        )
        self._used.update(optimizer=optimizer, lr_scheduler=None)
        self._configured = self.learning_rate, None
        if self._arguments["lr_scheduler"] in (None, "none"):
            return optimizer
        total_steps, steps_per_epoch = count_steps(self.trainer)
        self._configured = self.learning_rate, total_steps
        config = build_scheduler(
            self._arguments["lr_scheduler"],
            optimizer,
            lr_scheduler_kwargs=self.lr_scheduler_kwargs,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
        )
        if config is None:
            return optimizer
        self._used["lr_scheduler"] = config["scheduler"]
        return {"optimizer": optimizer, "lr_scheduler": config}

    # -- steps -------------------------------------------------------------------------------

    def training_outputs(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
        """Return embeddings and projections of both views, and targets or None.

        They have the shapes (n, length), or (n, regions, length).
        """
        (x1, x2), y = self.parse_batch(batch)
        h1, h2 = self._embed(x1), self._embed(x2)
        return h1, h2, self.projection_head(h1), self.projection_head(h2), y

    def parse_batch(self, batch: Any, device: Any = None) -> tuple[list[Tensor], Any]:
        """Return the two views of a training batch, and its targets or None, on a device if given."""
        (x1, x2), y = two_views(batch)
        views = [x if device is None else x.to(device) for x in (x1, x2)]
        return views, y.to(device) if device is not None and isinstance(y, Tensor) else y

    def _embed(self, x: Tensor) -> Tensor:
        size = self._arguments["chunk_size"]
        if size is None or len(x) <= size:
            h = self.encoder(x)
        else:
            # Activations are dropped after each chunk, and computed again in the backward pass.
            parts = [checkpoint(self.encoder, part, use_reentrant=False) for part in x.split(size)]
            self._check_form(parts[0], x[:size])
            h = torch.cat(parts)
        self._check_form(h, x)
        self._check_fit(h.shape[-1])
        return h

    def _check_form(self, h: Any, x: Tensor) -> None:
        """Refuse an output of the encoder of another form; note how many regions it has."""
        if not isinstance(h, Tensor) or h.ndim not in (2, 3) or 0 in h.shape[1:-1]:
            raise ValueError(
                "The encoder must return a matrix (n, features), or (n, regions, features), got "
                f"{describe(h)} for an input {tuple(x.shape)}. A feature map is averaged by "
                "nn.Sequential(encoder, nn.AdaptiveAvgPool3d(1), nn.Flatten()); for several outputs, "
                "wrap the encoder in a module that returns one."
            )
        self._seen_regions = h.shape[1] if h.ndim == 3 else None
        if self._n_regions != self._seen_regions:
            raise ValueError(
                f"The encoder states n_regions={self._n_regions} and returned {describe(h)}; it must "
                "be (n, n_regions, features)."
            )

    def _shared_step(self, batch: Any, batch_idx: int, stage: str) -> dict[str, Any]:
        if isinstance(batch, LazyViews):  # from a caller's loop; else drawn after the transfer
            batch = batch.draw()
        views, _ = self.parse_batch(batch)
        buffers = [buffer.clone() for buffer in self.buffers()] if self.training else []
        h1, h2, z1, z2, y = self.training_outputs(batch)
        n = len(z1)
        both, start = gather_rows(torch.cat([z1, z2], dim=-1))
        z1, z2 = both.chunk(2, dim=-1)
        own = self.loss(z1, z2, rows=slice(start, start + n))
        self._unchecked.append(_Step(stage, batch_idx, views, both.detach(), own.detach(), buffers))
        if stage != "training" or not self._runs:
            self._check_finite()
        share = n / len(z1)
        if self._runs:
            name, value = f"loss/{'train' if stage == 'training' else 'val'}", total(own * share)
            options: dict[str, Any] = {"prog_bar": True, "batch_size": len(z1)}
            self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, **options)
            if stage == "training":  # beside the mean of the epoch, which comes at its end
                self.log(f"{name}_step", value, on_step=True, on_epoch=False, **options)
        if stage == "training" and self._arguments["monitor_collapse"]:
            self._monitor = self._monitor or CollapseMonitor()
            self._monitor.add(h1.detach(), h2.detach(), len(z1))
        return {
            # Averaging gradients over processes divides by their number: each one's part of the
            # global mean is multiplied by it beforehand.
            "loss": own * (share * world()[1]),
            "z1": z1.detach(),
            "z2": z2.detach(),
            "y": gather_targets(y, n) if self._outputs_read or not self._runs else y,
        }

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the loss of one training batch; log it as ``loss/train_step`` and ``loss/train``.

        The latter is the mean of the epoch.

        Parameters
        ----------
        batch : sequence
            ``[X1, X2]`` or ``([X1, X2], y)``, two views of the same samples.
        batch_idx : int
            Number of the batch.
        dataloader_idx : int, default=0
            Ignored.

        Returns
        -------
        dict
            ``loss`` (scalar), ``z1`` and ``z2`` (projections, shape (n, proj_output_dim) or
            (n, regions, proj_output_dim)), ``y`` (the targets or None); on several processes those of
            the global batch, while ``loss`` is this process's part, whose mean over the processes is
            the global loss.

        Raises
        ------
        ValueError, TypeError
            For any other batch.
        NonFiniteError
            When an input or the loss is not finite.
        """
        return self._shared_step(batch, batch_idx, "training")

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Return the loss of one validation batch, and log it as ``loss/val``.

        Parameters
        ----------
        batch : sequence
            As in `training_step`.
        batch_idx : int
            Number of the batch.
        dataloader_idx : int, default=0
            Ignored.

        Returns
        -------
        dict
            As in `training_step`.
        """
        return self._shared_step(batch, batch_idx, "validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: there is no test without labels."""

    def transform_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the embeddings of a batch, without the projection head, regions side by side.

        Parameters
        ----------
        batch : Tensor of shape (n, ...)
            Given to the encoder as it is.
        batch_idx, dataloader_idx : int
            Ignored.

        Returns
        -------
        Tensor of shape (n, n_features) or (n, regions * n_features)
        """
        features: Tensor = self.encoder(batch)
        self._check_form(features, batch)
        return features.flatten(1)

    def _check_finite(self, gradients: Sequence[Tensor] = ()) -> None:
        """Stop where a number of the steps since the last check, or a gradient, is not finite.

        All processes together. What may be wrong is one flag, which is read from the device once;
        only then is it found out what.
        """
        steps, self._unchecked = self._unchecked, []
        if not steps:
            return
        found = [t for step in steps for t in (*step.views, step.loss)]
        if gradients:
            found.append(torch.stack(torch._foreach_norm(list(gradients))))
        if not any_process(~_sums_finite(found), steps[0].loss.device):
            return
        try:
            for step in steps:
                self._check_inputs(step)
                self._check_loss(step)
            if gradients:
                self._check_gradient(found[-1])
        except NonFiniteError:
            with torch.no_grad():  # running means have seen that step
                for buffer, before in zip(self.buffers(), steps[0].buffers, strict=False):
                    buffer.copy_(before)
            raise

    def _check_inputs(self, step: _Step) -> None:
        good = finite_rows(step.views[0]) & finite_rows(step.views[1])
        if not any_process(~good.all(), good.device):
            return
        own = None if bool(good.all()) else first_bad(good)
        before = 0
        for length, bad in gather_objects((len(good), own)):
            if bad is not None:
                break
            before += length
        raise NonFiniteError(
            f"{self._sample(before + bad, step)} of {step.stage} batch {step.batch_idx} has NaN "
            "or infinite values, so training stopped with the weights of the last good step. "
            "Repair or leave out that sample, or look at the views that made it."
        )

    def _check_loss(self, step: _Step) -> None:
        if not any_process(~torch.isfinite(step.loss), step.loss.device):
            return
        good = torch.isfinite(step.projections).flatten(1).all(1)
        which = "" if bool(good.all()) else f"{self._sample(first_bad(good), step)} of "
        raise NonFiniteError(
            f"The loss of {which}{step.stage} batch {step.batch_idx} is not finite, so training "
            "stopped with the weights of the last good step. Lower learning_rate, raise "
            "temperature, or look at the inputs of that batch."
        )

    def _check_gradient(self, norms: Tensor) -> None:
        if any_process(~torch.isfinite(norms).all(), norms.device):
            raise NonFiniteError(
                f"The gradient at step {self.trainer.global_step} is not finite, so training "
                "stopped with the weights of the last good step. Lower learning_rate or raise "
                "temperature."
            )

    def _sample(self, position: int, step: _Step) -> str:
        """Return the position of a sample in the global batch, and its name where it has one."""
        loaders: Any = getattr(self._trainer, "datamodule", None)
        found = None
        if step.stage == "training" and hasattr(loaders, "sample_name"):
            found = loaders.sample_name(self.trainer.current_epoch, step.batch_idx, position)
        return f"Sample {position}" + (f" ({found})" if found else "")

    # -- hooks -------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Start to monitor the embeddings for collapse, and take over what callbacks changed."""
        self._monitor = None  # callbacks may have trained already, to find a rate
        self._collapse_warned = False
        self._unchecked = []
        self._outputs_read = any_process(self._is_read(), self.trainer.strategy.root_device)
        rate, steps = self._configured or (self.learning_rate, None)
        if rate != self.learning_rate or (
            steps is not None and steps != count_steps(self.trainer)[0]
        ):
            # LearningRateFinder sets the rate of the optimizer, but not that of the schedule;
            # BatchSizeFinder changes the number of steps.
            self.trainer.strategy.setup_optimizers(self.trainer)
        if world()[1] > 1:
            leave_at_exit()

    def _is_read(self) -> bool:
        """Return whether anyone but Lightning and this package sees what the steps return."""
        hooks = ("on_train_batch_end", "on_validation_batch_end")
        names = ("training_step", "validation_step", *hooks)
        if any(getattr(type(self), name) is not getattr(DCL, name) for name in names):
            return True
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            kind = type(callback)
            known = kind.__module__.startswith(("lightning.", "nidl_dcl."))
            for hook in hooks:
                own = getattr(kind, hook) is not getattr(L.Callback, hook)
                if hook in vars(callback) or (own and not known):  # the first: a LambdaCallback
                    return True
        return False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what is random in the networks by the step, so that a resumed run is the same."""
        self._check_finite()  # a step whose loss was not used, for instance
        torch.manual_seed(
            key_seed(self._seed, "step", self.trainer.global_step, batch_idx, world()[0])
        )

    def on_train_epoch_end(self) -> None:
        """Log the measures of `collapse`, and warn of a collapse, once."""
        if not self._arguments["monitor_collapse"]:
            return
        monitor, self._monitor = self._monitor or CollapseMonitor(), None
        found = monitor.measure()
        for name, value in found.items():
            self.log(name, value, batch_size=1, sync_dist=True)
        if monitor.kept > 1 and found["uniformity"] > _COLLAPSED and not self._collapse_warned:
            self._collapse_warned = True
            if self.trainer.is_global_zero:
                warnings.warn(
                    f"In epoch {self.trainer.current_epoch + 1} the encoder gave all samples "
                    "nearly the same embedding: it has collapsed. Batch normalization in the "
                    "encoder, weaker views or a lower learning_rate help.",
                    stacklevel=2,
                )

    def on_after_backward(self) -> None:
        """Stop before a number that is not finite reaches the weights."""
        # Mixed precision with a scaler skips steps with such gradients by design.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self._check_finite([] if scaled else grads)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings that a resumed run must share."""
        checkpoint["nidl_dcl"] = {"seed": self._seed, **self._run_identity()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume under another configuration; without random_state, restore the seed."""
        super().on_load_checkpoint(checkpoint)
        saved = dict(checkpoint.get("nidl_dcl") or {})
        seed = saved.pop("seed", self._seed)
        if self._trainer is None or _is_of_tuner(self.trainer.ckpt_path):
            return
        if self._arguments["random_state"] is None:
            self._seed = seed
        now = {"seed": self._seed, **self._run_identity()}
        before = {"seed": seed, **saved}
        differing = sorted(k for k in before if k in now and before[k] != now[k])
        if differing:
            raise UsageError(
                "The checkpoint belongs to another configuration: "
                + "; ".join(f"{k} was {before[k]!r}, is {now[k]!r}" for k in differing)
                + ". Resume with the same one, or start afresh without ckpt_path."
            )
        _begin_step_again(checkpoint)

    def _run_identity(self) -> dict[str, Any]:
        names = ("temperature", "learning_rate", "weight_decay", *_SIZES)
        loaders: Any = getattr(self.trainer, "datamodule", None)
        return {
            **{name: getattr(self, name) for name in names},
            **{n: self._arguments[n] for n in self._more_options if n != "monitor_collapse"},
            "processes": world()[1],
            "accumulate_grad_batches": accumulation(self.trainer),
            **getattr(loaders, "identity", dict)(),
        }

    # -- model folder ------------------------------------------------------------------------

    def baseline_features(self, data: Any) -> dict[str, Any]:
        """Return what embeddings of a `BIDSDataModule` have to beat, one row per row of its images.

        These are the baselines of the command: ``untrained``, the features of three encoders like this
        one before training, and ``voxels``. `predict_phenotype` takes them as ``baselines``.
        """
        from nidl_dcl.models.baselines import default_baselines

        return default_baselines(self, data)

    def load_weights(self, file: str | Path) -> Self:
        """Load weights by state name, such as those of nidl's `DCL`; the estimator is fitted then.

        The file is a Lightning checkpoint, a ``state_dict`` that ``torch.save`` wrote, or
        safetensors. Objects in it are never unpickled.

        Raises
        ------
        UsageError
            When the file cannot be read, or does not fit; names the first states that do not.
        """
        self._check_arguments()
        own = self.state_dict()
        given = match_names(read_weights(file), own)
        missing = [name for name in own if name not in given]
        other = [name for name in own if name in given and given[name].shape != own[name].shape]
        further = [
            name for name in given if name not in own and inner_name(name).startswith("encoder.")
        ]
        for what, names in (("lacks", missing), ("has another shape of", other)):
            if names:
                raise UsageError(f"{file} {what} {', '.join(names[:3])} ({len(names)} in all).")
        if further:
            raise UsageError(
                f"{file} has {', '.join(further[:3])} ({len(further)} in all), which the encoder "
                "does not have."
            )
        self.load_state_dict({name: given[name] for name in own})
        self._restore(preparation=self._preparation, exposure={})
        return self


def _sums_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return a flag on the device: if it holds, all numbers are finite; else a sum may be too large."""
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.isfinite(torch.stack([s.float() for s in sums])).all()


def _check_names(owner: Any, names: Iterable[str]) -> None:
    """Raise a TypeError for a name that a class does not take, with the closest one that it takes."""
    parameters = inspect.signature(owner).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            hint = did_you_mean(name, parameters) or f" It takes {', '.join(parameters)}."
            raise TypeError(f"{owner.__name__} has no argument {name!r} (encoder_kwargs).{hint}")


def _begin_step_again(checkpoint: dict[str, Any]) -> None:
    """Go back to the first batch of a step whose gradient was not complete when a run ended."""
    if "loops" not in checkpoint:  # weights alone were saved
        return
    loops = checkpoint["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]
    current = batches["current"]
    if batches["is_last_batch"] or current["completed"] != current["ready"]:
        return
    epoch = loops["epoch_progress"]["current"]["processed"]
    size = batches_of_step(checkpoint["nidl_dcl"]["accumulate_grad_batches"], epoch)
    current.update(dict.fromkeys(current, current["ready"] - current["ready"] % size))


def _is_of_tuner(checkpoint: Any) -> bool:
    """Return whether Lightning goes back to the start of a fit, in which it tuned something."""
    return Path(checkpoint or "").name.startswith((".lr_find_", ".scale_batch_size_"))


def _unless_invalid(build: Callable[[], Any]) -> Any:
    """Build a part, or return None where arguments are wrong: `fit` raises, not the constructor."""
    try:
        return build()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None

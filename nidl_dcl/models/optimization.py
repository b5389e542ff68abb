"""Optimizers, weight-decay groups and learning-rate schedules, from every form the caller may give.

Numbers of steps come from the caller; no trainer is needed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}

SCHEDULE_DEFAULTS: dict[str, Any] = {
    "warmup_epochs": 10,
    "warmup_start_lr": 1e-6,
    "min_lr": 0.0,
    "interval": "step",
}
"""Defaults of ``lr_scheduler_kwargs`` for ``"warmup_cosine"``."""

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


_OF_GROUPS = (
    *("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs"),
    *("base_momentums", "max_momentums"),
)
"""What schedulers hold for each group of parameters."""


class WarmupCosine(LRScheduler):
    """Linear warm-up to each group's rate, then a cosine to `min_lr`; both in closed form.

    Step t of T with w of warm-up: ``start + (base - start) * t / (w - 1)`` for t < w, then
    ``min + (base - min) * (1 + cos(pi * (t - w) / (T - w))) / 2``.

    Parameters
    ----------
    optimizer : Optimizer
        Its groups' rates are the bases.
    warmup_steps, total_steps : int
        w and T, in calls of `step`.
    warmup_start_lr, min_lr : float
        First and last learning rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        warmup_start_lr: float = 1e-6,
        min_lr: float = 0.0,
    ) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.warmup_start_lr = warmup_start_lr
        self.min_lr = min_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group at the current step."""
        return [self._rate(float(base), self.last_epoch) for base in self.base_lrs]

    def _rate(self, base: float, t: int) -> float:
        w, total = self.warmup_steps, self.total_steps
        if t < w:
            share = t / (w - 1) if w > 1 else 1.0
            return self.warmup_start_lr + (base - self.warmup_start_lr) * share
        share = min(1.0, (t - w) / (total - w)) if total > w else 1.0
        return self.min_lr + (base - self.min_lr) * (1 + math.cos(math.pi * share)) / 2

    def state_dict(self) -> dict[str, Any]:
        """Return the current step alone: a run that loads it has a length of its own."""
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the current step; rates are those of this run's length."""
        self.last_epoch = int(state_dict["last_epoch"])
        self.base_lrs = list(state_dict["base_lrs"])
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Biases, parameters of normalization layers and parameters with fewer than two dimensions do not
    decay. A parameter shared by several layers appears once; it does not decay if it is one of these
    in any of them. Empty groups are left out.
    """
    free: dict[nn.Parameter, bool] = {}
    for owner in module.modules():
        for name, p in owner.named_parameters(recurse=False):
            if p.requires_grad:
                undecayed = isinstance(owner, _NORMS) or name.endswith("bias") or p.ndim <= 1
                free[p] = free.get(p, False) or undecayed
    groups = [
        {"params": [p for p in free if not free[p]], "weight_decay": weight_decay},
        {"params": [p for p in free if free[p]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    optimizer: str | Optimizer | Callable[..., Optimizer],
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    exclude_bias_and_norm_wd: bool,
    optimizer_kwargs: Mapping[str, Any] | None,
    copies: Mapping[int, nn.Parameter],
) -> Optimizer:
    """Return the optimizer that trains `module`.

    Parameters
    ----------
    optimizer : str, Optimizer class, callable or Optimizer
        A name of `OPTIMIZERS` in any case; a class, or a ``functools.partial`` of one; another
        callable, which gets the list of trainable parameters and `optimizer_kwargs` alone; or an
        instance, which is copied: it keeps its groups and state, and trains the module's parameters
        in place of those it was made with.
    module : nn.Module
        What is trained.
    learning_rate, weight_decay, exclude_bias_and_norm_wd, optimizer_kwargs : object
        As in `DCL`; an instance keeps its own, and a callable chooses them.
    copies : mapping
        From the id of a caller's parameter to the module's copy of it.

    Raises
    ------
    ValueError
        For an unknown name, or an instance over parameters that the module does not hold.
    TypeError
        For anything else, or for arguments that the class does not take.
    """
    options = dict(optimizer_kwargs or {})
    kind: Any = optimizer
    if isinstance(optimizer, Optimizer):
        if options:
            warnings.warn("optimizer is an instance, so optimizer_kwargs is ignored.", stacklevel=2)
        return _copy_optimizer(optimizer, module, copies)
    if isinstance(optimizer, str):
        if optimizer.lower() not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)} (any case), a torch.optim class, "
                f"a callable or an instance, got {optimizer!r}."
            )
        kind = OPTIMIZERS[optimizer.lower()]
    if isinstance(kind, functools.partial) and not kind.args and _is_class(kind.func):
        kind, options = kind.func, {**kind.keywords, **options}
    if not _is_class(kind):
        if inspect.isclass(kind) or not callable(kind):
            raise TypeError(
                f"optimizer must be a name, a class, a callable or an instance, got {kind!r}."
            )
        made = kind([p for p in module.parameters() if p.requires_grad], **options)
        if not isinstance(made, Optimizer):
            raise TypeError(
                f"optimizer must be a callable that returns an Optimizer, got {made!r}."
            )
        return made
    if exclude_bias_and_norm_wd:
        groups = weight_decay_groups(module, weight_decay)
    else:
        groups = [{"params": [p for p in module.parameters() if p.requires_grad]}]
    takes = inspect.signature(kind).parameters
    if "weight_decay" in takes:
        options.setdefault("weight_decay", weight_decay)
    else:
        groups = [{"params": [p for group in groups for p in group["params"]]}]
    return kind(groups, **{"lr": learning_rate, **options})


def _is_class(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Optimizer)


def build_scheduler(
    lr_scheduler: Any,
    optimizer: Optimizer,
    *,
    lr_scheduler_kwargs: Mapping[str, Any] | None,
    total_steps: float,
    steps_per_epoch: float,
) -> dict[str, Any] | None:
    """Return Lightning's scheduler configuration, or None for a constant rate.

    Parameters
    ----------
    lr_scheduler : {"warmup_cosine", "none"}, None, class, callable, instance or dict
        A class or callable gets the optimizer and `lr_scheduler_kwargs`; an instance is copied onto
        the optimizer, with the schedulers in it and the rates of the optimizer that it was made for;
        a dict is Lightning's own configuration.
    optimizer : Optimizer
        Whose learning rates it sets.
    lr_scheduler_kwargs : mapping or None
        See `SCHEDULE_DEFAULTS`; ``interval`` ("step" or "epoch") goes to Lightning.
    total_steps, steps_per_epoch : float
        Optimizer steps of the whole run and of one epoch.

    Raises
    ------
    ValueError
        For an unknown name or interval, a cosine over an endless run, or an instance that cannot be
        copied onto the optimizer.
    TypeError
        For anything else.
    """
    options = dict(lr_scheduler_kwargs or {})
    given = dict(lr_scheduler) if isinstance(lr_scheduler, Mapping) else {"scheduler": lr_scheduler}
    lr_scheduler = given.pop("scheduler", None)
    if lr_scheduler is None or (isinstance(lr_scheduler, str) and lr_scheduler.lower() == "none"):
        return None
    if isinstance(lr_scheduler, str):
        if lr_scheduler.lower() != "warmup_cosine":
            raise ValueError(
                f"lr_scheduler must be 'warmup_cosine', 'none', None, a class or an instance, got "
                f"{lr_scheduler!r}."
            )
        return {**_warmup_cosine(optimizer, options, total_steps, steps_per_epoch), **given}
    interval = _interval(options.pop("interval", "epoch"))
    if isinstance(lr_scheduler, LRScheduler | ReduceLROnPlateau):
        scheduler = _copy_scheduler(lr_scheduler, optimizer)
    elif callable(lr_scheduler):
        scheduler = lr_scheduler(optimizer, **options)
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError(
                "lr_scheduler must make a scheduler for the optimizer that it gets, such as "
                "lambda optimizer: StepLR(optimizer, 10); this one is for another optimizer."
            )
    else:
        raise TypeError(f"lr_scheduler must be a name, class or instance, got {lr_scheduler!r}.")
    config = {"scheduler": scheduler, "interval": interval, "frequency": 1}
    if isinstance(scheduler, ReduceLROnPlateau):
        config["monitor"] = "loss/train"
    return {**config, **given}


def _warmup_cosine(
    optimizer: Optimizer, options: dict[str, Any], total_steps: float, steps_per_epoch: float
) -> dict[str, Any]:
    unknown = set(options) - set(SCHEDULE_DEFAULTS)
    if unknown:
        raise ValueError(
            f"lr_scheduler_kwargs has unknown names {sorted(unknown)}; warmup_cosine takes "
            f"{', '.join(SCHEDULE_DEFAULTS)}."
        )
    options = {**SCHEDULE_DEFAULTS, **options}
    interval = _interval(options["interval"])
    if not math.isfinite(total_steps):
        raise ValueError(
            "warmup_cosine needs an end: set max_epochs or max_steps, or lr_scheduler=None."
        )
    unit = steps_per_epoch if interval == "step" else 1
    total = round(total_steps if interval == "step" else total_steps / steps_per_epoch)
    warmup = round(options["warmup_epochs"] * unit)
    if warmup >= total:
        warnings.warn(
            f"The warm-up of {options['warmup_epochs']} epochs ({warmup} {interval}s) is as long as "
            f"the run ({total} {interval}s): the learning rate only rises. Set "
            "lr_scheduler_kwargs={'warmup_epochs': …}.",
            stacklevel=2,
        )
    scheduler = WarmupCosine(
        optimizer, warmup, total, float(options["warmup_start_lr"]), float(options["min_lr"])
    )
    return {"scheduler": scheduler, "interval": interval, "frequency": 1}


def _interval(value: Any) -> str:
    if value not in ("step", "epoch"):
        raise ValueError(f"interval must be 'step' or 'epoch', got {value!r}.")
    return str(value)


def _copy_scheduler(given: Any, optimizer: Optimizer) -> Any:
    """Copy a scheduler, and those in it, onto an optimizer; the caller's, and its, stay as they are."""
    theirs = given.optimizer.param_groups
    LambdaLR(optimizer, lambda _: 1.0)  # prepares optimizer.step, as every scheduler does
    for group, source in zip(
        optimizer.param_groups, itertools.chain(theirs, itertools.repeat(theirs[-1])), strict=False
    ):
        # Beside the rate, what schedulers such as OneCycleLR note in a group.
        noted = source.keys() - given.optimizer.defaults.keys() - {"params"}
        group.update({name: copy.deepcopy(source[name]) for name in {"lr", *noted}})
    try:
        scheduler = copy.deepcopy(given, {id(given.optimizer): optimizer})
        if len(optimizer.param_groups) != len(theirs):
            _fit_groups(scheduler, len(theirs), len(optimizer.param_groups))
            trial = copy.copy(optimizer)
            trial.param_groups = [{**group} for group in optimizer.param_groups]
            arguments = [0.0] if isinstance(given, ReduceLROnPlateau) else []
            with warnings.catch_warnings(action="ignore"):  # no step of the optimizer before it
                copy.deepcopy(scheduler, {id(optimizer): trial}).step(*arguments)
    except Exception as error:
        raise ValueError(
            f"The {type(given).__name__} given as lr_scheduler was made for an optimizer with "
            f"{len(theirs)} group(s) of parameters and cannot be copied onto the one in use, with "
            f"{len(optimizer.param_groups)} ({error}). Let it be made for that one: "
            f"lr_scheduler=lambda optimizer: {type(given).__name__}(optimizer, …)."
        ) from error
    return scheduler


def _fit_groups(scheduler: Any, given: int, wanted: int) -> None:
    """Repeat what a scheduler, or one in it, holds for the last group, for groups that were added."""
    for name, values in vars(scheduler).items():
        if name in _OF_GROUPS and isinstance(values, list) and len(values) == given:
            if given > wanted:
                raise ValueError("it has fewer")
            values.extend(copy.deepcopy(values[-1:]) * (wanted - given))
            continue
        for part in values if isinstance(values, list | tuple) else [values]:
            if isinstance(part, LRScheduler | ReduceLROnPlateau):
                _fit_groups(part, given, wanted)


def _copy_optimizer(
    given: Optimizer, module: nn.Module, copies: Mapping[int, nn.Parameter]
) -> Optimizer:
    """Copy an optimizer onto the module's parameters; the caller's stays as it is."""
    own = {**copies, **{id(p): p for p in module.parameters()}}
    groups, seen = [], set()
    for group in given.param_groups:
        swapped = [own.get(id(p)) for p in group["params"]]
        if any(p is None for p in swapped):
            raise ValueError(
                "The optimizer holds parameters that belong neither to the encoder nor to the "
                "estimator. Make it over encoder.parameters(), or pass its class."
            )
        groups.append({**group, "params": swapped})
        seen |= {id(p) for p in swapped}
    optimizer = copy.copy(given)
    optimizer.param_groups = groups
    optimizer.state = defaultdict(
        dict, {own[id(p)]: copy.deepcopy(s) for p, s in given.state.items() if id(p) in own}
    )
    missing = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
    if missing:
        warnings.warn(
            f"The optimizer lacks {len(missing)} parameters of the estimator (the projection head, "
            "if it was made over the encoder): they are added as a group of their own.",
            stacklevel=3,
        )
        optimizer.add_param_group({"params": missing})
    return optimizer

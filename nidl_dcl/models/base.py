"""The class below every estimator: a Lightning module and a scikit-learn estimator in one object.

It keeps the caller's arguments, builds trainers, turns any input into loaders, and gathers results.
What is computed in a step belongs to its subclasses.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import os
import random
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import lightning as L
import numpy as np
import pandas as pd
import sklearn.base
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from nibabel.spatialimages import SpatialImage
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from nidl_dcl.data.batches import first_bad_sample, single_view
from nidl_dcl.data.datasets import ArraySamples, ImageSamples, JitterTransform, TwoViewSamples
from nidl_dcl.data.exposure import after
from nidl_dcl.data.loaders import Loaders, PredictShards, shard_loader
from nidl_dcl.data.views import volume_views
from nidl_dcl.distributed import (
    by_itself,
    first_value,
    gather_objects,
    share_buffers,
    world,
)
from nidl_dcl.errors import NonFiniteError
from nidl_dcl.randomness import fresh_seed, key_seed, keyed
from nidl_dcl.volumes.preparation import Preparation, common_shape

__all__ = ["BaseEstimator", "TransformerMixin"]

_TRAINER_OPTIONS = tuple(inspect.signature(L.Trainer.__init__).parameters)[1:]


_TRAINER_DEFAULTS = {"logger": False, "enable_checkpointing": False}


_OWN_OPTIONS = {
    "random_state": None,
    "ignore": None,
    "save_hparams": True,
    "views": None,
    "batch_size": 32,
    "num_workers": 0,
    "warm_start": False,
}


class BaseEstimator(sklearn.base.BaseEstimator, L.LightningModule):
    """Base of estimators that train with Lightning and behave as scikit-learn's do.

    Parameters
    ----------
    **kwargs : dict
        Every option of ``lightning.Trainer`` (``max_epochs``, ``callbacks``, ``devices``, …;
        ``logger`` and ``enable_checkpointing`` are off by default, and ``accelerator="auto"`` is
        the CPU on macOS), and

        random_state : int, RandomState or None, default=None
            Seed of weights, order and views; None draws a new one at each fit.
        views : callable, optional
            From one float32 sample without batch axis to one view of it. Default: the views for
            volumes where samples have three spatial axes, else `JitterTransform`.
        batch_size : int, default=32
            Samples of a batch in loaders made here, all processes together.
        num_workers : int, default=0
            Loading workers of loaders made here.
        warm_start : bool, default=False
            Whether a second fit goes on from the weights it finds.
        save_hparams : bool, default=True
            Whether plain arguments are kept in ``hparams``, hence in checkpoints.
        ignore : list of str, optional
            Arguments that ``hparams`` leaves out.

    Raises
    ------
    TypeError
        For an unknown option, naming the closest known one.
    """

    _more_options: ClassVar[Mapping[str, Any]] = {}

    _arguments: dict[str, Any]
    _fitted: bool
    _first_weights: dict[str, Any] | None
    _preparation: Preparation | None
    _exposure: dict[str, Any] | None
    _first_exposure: dict[str, Any] | None
    _seed: int

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.__dict__["_arguments"] = {}
        known = self._known_options()
        for name in kwargs:
            # scikit-learn's checks pass the name in the signature; `fit` refuses it.
            if name not in known and name != "kwargs":
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"{type(self).__name__} got an unknown option {name!r}.{hint}")
        self._arguments.update(kwargs)
        self.__dict__["_fitted"] = False
        self.__dict__["_first_weights"] = None
        self.__dict__["_preparation"] = None
        self.__dict__["_exposure"] = None
        self.__dict__["_first_exposure"] = None
        self.__dict__["_seed"] = None

    # -- arguments ---------------------------------------------------------------------------

    @classmethod
    def _known_options(cls) -> list[str]:
        return [*_OWN_OPTIONS, *cls._more_options, *_TRAINER_OPTIONS]

    @classmethod
    def _named_arguments(cls) -> list[str]:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]

    def _set_arguments(self, **named: Any) -> None:
        """Keep the caller's named arguments as they are; called once, by the constructor."""
        options = self._arguments
        self.__dict__["_arguments"] = {**named, **options}
        if self._option("save_hparams"):
            ignored = {"callbacks", *(self._option("ignore") or ())}
            self._set_hparams(
                {
                    name: value
                    for name, value in self._arguments.items()
                    if name not in ignored and _is_plain(value)
                }
            )
            self._hparams_initial = copy.deepcopy(self._hparams)

    def _option(self, name: str) -> Any:
        defaults = {**_OWN_OPTIONS, **self._more_options, **_TRAINER_DEFAULTS}
        return self._arguments.get(name, defaults.get(name))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments as they were given, ``**kwargs`` included.

        Parameters
        ----------
        deep : bool, default=True
            Without effect: arguments are not estimators.
        """
        return dict(self._arguments)

    def set_params(self, **params: Any) -> Self:
        """Set arguments or options by name.

        Raises
        ------
        ValueError
            For an unknown name.
        """
        known = [*self._named_arguments(), *self._known_options()]
        for name in params:
            if name not in known and name != "kwargs":
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {type(self).__name__}. Valid "
                    f"parameters are: {known!r}."
                )
        self._arguments.update(params)
        self._arguments_changed(set(params))
        return self

    def _arguments_changed(self, names: set[str]) -> None:
        """Follow changed arguments; subclasses rebuild what depends on them."""

    @property
    def preparation(self) -> Preparation | None:
        """The input contract: how images become what the encoder takes; None without images."""
        return self._preparation

    @property
    def exposure(self) -> dict[str, Any]:
        """Whom training has seen, as salted hashes (see `nidl_dcl.data.exposure`); empty if not known."""
        return dict(self._exposure or {})

    @property
    def fitted(self) -> bool:
        """Whether the estimator has been fitted or loaded."""
        return self._fitted

    def __sklearn_is_fitted__(self) -> bool:
        return self.fitted

    def __sklearn_clone__(self) -> Self:
        # All arguments in one copy: an optimizer keeps pointing at the encoder it was made for.
        twin = type(self)(**copy.deepcopy(self._arguments))
        for name in ("_metadata_request", "_sklearn_output_config"):
            if name in self.__dict__:
                twin.__dict__[name] = copy.deepcopy(self.__dict__[name])
        return twin

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _get_fitted_attr_html(self, *args: Any, **kwargs: Any) -> str:
        # scikit-learn would read every public attribute; Lightning's raise without a trainer.
        return ""

    # -- fitting -----------------------------------------------------------------------------

    def fit(
        self,
        X: Any,
        y: Any = None,
        val_dataloader: Any = None,
        ckpt_path: Any = None,
    ) -> Self:
        """Train.

        Parameters
        ----------
        X : DataLoader, LightningDataModule, Dataset, array, Tensor or list
            A loader of two-view batches; or samples, of which two views are made: an array of
            shape (n, c, d, h, w), (n, d, h, w) or whatever the encoder takes, a dataset of such
            samples, image paths or nibabel images.
        y : ignored, or DataLoader
            A loader here is the validation loader.
        val_dataloader : DataLoader or samples, optional
            Validation data of any kind that `X` may be.
        ckpt_path : path, optional
            Checkpoint to resume from, read without unpickling objects.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For arguments or data that cannot be used.
        NonFiniteError
            When an input or the loss is not finite; the weights are those of the last good step
            (where processes are spawned: those before the fit).

        Notes
        -----
        On several processes, ``batch_size`` counts the samples of all of them; of a loader, as many
        batches as there are processes make one, which they share out. Batch statistics are
        synchronized on GPUs; on the CPU they cannot be, and a warning says so.
        """
        if isinstance(y, DataLoader) and val_dataloader is None:
            val_dataloader, y = y, None
        self._check_arguments()
        self.__dict__["_seed"] = fresh_seed(self._option("random_state"))
        data = self._training_data(X, val_dataloader)
        with _seeded(self._seed, "fit"), _without_noise(), _interruptible():
            if getattr(data, "identity", dict)():
                # Keyed loaders follow the optimizer's steps, so they do resume in mid-epoch.
                warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
            trainer = self._training_trainer()
            with by_itself(trainer.world_size == 1), shard_loader(data, trainer.world_size):
                self._prepare_weights(data)
                seen: dict[str, Any] = getattr(data, "exposure", dict)()
                self.__dict__["_exposure"] = after(self._exposure, seen)
                self.__dict__["_fitted"] = False
                try:
                    trainer.fit(self, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
                except ProcessRaisedException as error:
                    raise _as_raised(error) from error
                finally:
                    self._drop_trainer()
        self.__dict__["_fitted"] = True
        return self

    def _training_trainer(self) -> L.Trainer:
        """Return the trainer of a fit, with batch statistics synchronized where that is possible."""
        options = self._trainer_options()
        normalized = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())
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

    def setup(self, stage: str) -> None:
        """Agree with the other processes on the seed, and give each one randomness of its own.

        Parameters
        ----------
        stage : str
            As Lightning passes it.
        """
        if self._seed is None:
            self.__dict__["_seed"] = fresh_seed(self._option("random_state"))
        rank, processes = world()
        if stage == "fit" and processes > 1:
            self.__dict__["_seed"] = first_value(self._seed)
            own = key_seed(self._seed, "process", rank)
            torch.manual_seed(own)
            np.random.seed(own)  # noqa: NPY002
            random.seed(own)

    def on_validation_start(self) -> None:
        """Validate the same network on every process."""
        share_buffers(self)

    def on_train_end(self) -> None:
        """End with the same network on every process."""
        share_buffers(self)

    def on_fit_end(self) -> None:
        """Note that there is something to encode with, also after a trainer of the caller's own."""
        self.__dict__["_fitted"] = True

    def _trainer_options(self) -> dict[str, Any]:
        options = {k: v for k, v in self._arguments.items() if k in _TRAINER_OPTIONS}
        # Loaders are dealt out here: a padded sampler would make samples negatives of themselves.
        options = {**_TRAINER_DEFAULTS, **options, "use_distributed_sampler": False}
        callbacks = options.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        options["callbacks"] = callbacks
        if sys.platform == "darwin" and options.get("accelerator", "auto") == "auto":
            options["accelerator"] = "cpu"  # Apple's GPU, not tried yet, has to be asked for
        if any(isinstance(callback, Checkpoint) for callback in callbacks):
            options["enable_checkpointing"] = self._arguments.get("enable_checkpointing", True)
        return options

    def _check_arguments(self) -> None:
        if "kwargs" in self._arguments:
            raise TypeError("kwargs is not an option: unpack it, DCL(..., **kwargs).")
        batch_size, num_workers = self._option("batch_size"), self._option("num_workers")
        if not _is_int(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        if not _is_int(num_workers) or num_workers < 0:
            raise ValueError(f"num_workers must be an integer of 0 or more, got {num_workers!r}.")
        try:
            fresh_seed(copy.deepcopy(self._option("random_state")))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"random_state must be an integer or None, got {self._option('random_state')!r}."
            ) from error
        views = self._option("views")
        if views is not None and not callable(views):
            raise TypeError(f"views must be callable, got {type(views).__name__}.")

    def _prepare_weights(self, data: L.LightningDataModule) -> None:
        """Restore the weights of the first fit, or remember them if this is the first."""
        if any(nn.parameter.is_lazy(p) for p in self.parameters()):
            self._materialize(data)
        if self._first_weights is None:
            self.__dict__["_first_weights"] = copy.deepcopy(self.state_dict())
            self.__dict__["_first_exposure"] = self._exposure
        elif not self._option("warm_start"):
            self.load_state_dict(self._first_weights)
            self.__dict__["_exposure"] = self._first_exposure

    def _materialize(self, data: L.LightningDataModule) -> None:
        """Run the first training batch once, so that lazy modules learn their shapes."""
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        with torch.no_grad():
            self.training_outputs(batch)

    def training_outputs(self, batch: Any) -> Any:
        """Run the networks on a training batch; subclasses say how."""
        raise NotImplementedError

    def _training_data(self, X: Any, validation: Any) -> L.LightningDataModule:
        if isinstance(X, L.LightningDataModule):
            if validation is not None:
                raise ValueError("A data module brings its own validation data.")
            self.__dict__["_preparation"] = getattr(X, "preparation", self._preparation)
            return X
        return Loaders(
            self._two_views(X, reset=True),
            None if validation is None else self._two_views(validation, reset=False),
            seed=self._seed,
            batch_size=self._option("batch_size"),
            num_workers=self._option("num_workers"),
        )

    def _two_views(self, X: Any, *, reset: bool) -> Any:
        if isinstance(X, DataLoader):
            return X
        samples, _ = self._samples(X, reset=reset)
        if len(samples) == 0:
            raise ValueError("There is nothing to fit: X has no sample.")
        views = self._option("views") or _default_views(samples[0])
        return TwoViewSamples(samples, views, seed=self._seed)

    def _samples(self, X: Any, *, reset: bool) -> tuple[Any, bool]:
        """Return X as a dataset of samples, and whether it was a tensor."""
        if isinstance(X, Dataset):
            return X, False
        if isinstance(X, Tensor):
            self._check_finite_rows(X)
            return ArraySamples(self._with_channel(X.detach())), True
        images = _image_table(X)
        if images is not None:
            if reset or self._preparation is None:
                spacing = Preparation().spacing
                masked = bool(images["mask_path"].notna().all())
                shape = common_shape(list(images["path"]), spacing, masked)
                self.__dict__["_preparation"] = Preparation(
                    spacing=spacing, shape=shape, masked=masked
                )
            assert self._preparation is not None
            return ImageSamples(
                list(images["path"]), self._preparation, list(images["mask_path"])
            ), False
        if getattr(X, "ndim", None) is not None and not isinstance(X, pd.DataFrame) and X.ndim > 2:
            array = np.asarray(X)
            if array.dtype == object or not np.issubdtype(array.dtype, np.number):
                raise ValueError(f"X must hold numbers, got an array of dtype {array.dtype}.")
            if np.iscomplexobj(array):
                raise ValueError("Complex data not supported.")
            self._check_finite_rows(torch.as_tensor(array))
            return ArraySamples(self._with_channel(array)), False
        array = validate_data(self, X, reset=reset, dtype=np.float32)
        return ArraySamples(array), False

    def _with_channel(self, array: Any) -> Any:
        """Give volumes without channel axis one, where the networks are three-dimensional."""
        if array.ndim == 4 and any(_is_volumetric(m) for m in self.modules()):
            return array[:, None]
        return array

    @staticmethod
    def _check_finite_rows(array: Tensor) -> None:
        if array.is_floating_point():
            for row, x in enumerate(array):
                if not bool(torch.isfinite(x).all()):
                    raise NonFiniteError(f"Sample {row} of X has NaN or infinite values.")

    def _drop_trainer(self) -> None:
        self.trainer = None
        self._fabric = None


class TransformerMixin(sklearn.base.ClassNamePrefixFeaturesOutMixin, sklearn.base.TransformerMixin):
    """Gives an estimator `transform` and `transform_with_targets`, rows in input order."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def transform(self: Any, X: Any) -> Any:
        """Return the encoder's output, one row per input in input order.

        Parameters
        ----------
        X : DataLoader, Tensor, array, Dataset, LightningDataModule, list of paths or DataFrame
            Batches of a loader are ``x``, ``(x,)`` or ``(x, y)``. Paths (also a DataFrame with a
            ``path`` and perhaps a ``mask_path`` column) are prepared by the model's input contract.

        Returns
        -------
        Tensor or ndarray of shape (n, n_features), float32
            A tensor (on the CPU) for a loader or a tensor, else an array; whole on every process.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError, TypeError
            For two-view batches or anything else that cannot be encoded.
        """
        check_is_fitted(self)
        features, _, as_tensor = self._encode(X, targets=False)
        return torch.from_numpy(features) if as_tensor else features

    def transform_with_targets(self: Any, X: Any) -> tuple[Any, Any]:
        """Return (features, targets) of a loader whose batches are ``(x, y)``, in input order.

        Parameters
        ----------
        X : DataLoader, Dataset or LightningDataModule
            Items are ``(x, y)``; y may be a string.

        Returns
        -------
        features, targets
            As in `transform`; targets are a tensor or, for strings and objects, an array.
        """
        check_is_fitted(self)
        features, targets, as_tensor = self._encode(X, targets=True)
        if targets and all(isinstance(t, Tensor) for t in targets):
            joined: Any = torch.cat(targets)
            joined = joined if as_tensor else joined.numpy()
        else:
            joined = np.array([t for part in targets for t in part])
        return (torch.from_numpy(features) if as_tensor else features), joined

    def _encode(self: Any, X: Any, *, targets: bool) -> tuple[np.ndarray, list[Any], bool]:
        loader, as_tensor = self._inference_loader(X)
        _warn_of_order(loader)
        options = {
            **self._trainer_options(),
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "callbacks": None,
        }
        for name in ("fast_dev_run", "limit_predict_batches", "overfit_batches", "profiler"):
            options.pop(name, None)
        self.__dict__["_pieces"] = []
        with _quiet(), _interruptible():
            trainer = L.Trainer(**options)
            if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
                # Spawned processes cannot hand rows back; one process gives the same rows.
                trainer = L.Trainer(**{**options, "strategy": "auto", "devices": 1})
            with by_itself(trainer.world_size == 1):
                failure: Exception | None = None
                try:
                    trainer.predict(
                        self,
                        datamodule=PredictShards(loader),
                        return_predictions=False,
                        weights_only=True,
                    )
                except Exception as error:
                    if trainer.world_size == 1:
                        raise
                    failure = error
                finally:
                    self._drop_trainer()
                    own = self.__dict__.pop("_pieces")
                _raise_together(failure)
                parts = gather_objects(own)
        pieces = sorted((piece for part in parts for piece in part), key=lambda piece: piece[0])
        if not pieces:
            raise ValueError("There is nothing to transform: X has no sample.")
        if targets and any(piece[2] is None for piece in pieces):
            raise ValueError("transform_with_targets needs batches (x, y); these have no target.")
        features = np.concatenate([piece[1] for piece in pieces])
        return features, [piece[2] for piece in pieces], as_tensor

    def predict_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Encode one batch; within `transform`, keep its rows with their place in the input."""
        x, y = single_view(batch)
        rank, processes = world()
        place = rank + batch_idx * processes
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"{first_bad_sample(x)} of batch {place} has NaN or infinite values; it cannot be "
                "encoded."
            )
        features: Tensor = self.transform_step(x, batch_idx, dataloader_idx)
        if "_pieces" not in self.__dict__:
            return features
        rows = features.detach().to("cpu", torch.float32).numpy().copy()
        if isinstance(y, Tensor):
            y = y.detach().cpu().clone()
        self._pieces.append((place, rows, y))
        return features

    def _inference_loader(self: Any, X: Any) -> tuple[Any, bool]:
        if isinstance(X, DataLoader):
            return X, True
        if isinstance(X, L.LightningDataModule):
            X.prepare_data()
            X.setup("predict")
            return X.predict_dataloader(), False
        samples, as_tensor = self._samples(X, reset=False)
        # Images one at a time, so that a row never depends on its neighbors' rounding.
        size = 1 if isinstance(samples, ImageSamples) else self._option("batch_size")
        return DataLoader(
            samples, batch_size=size, num_workers=self._option("num_workers")
        ), as_tensor


def _raise_together(failure: Exception | None) -> None:
    """Raise on every process what was raised on one, so that none waits for it."""
    said = gather_objects(failure and (isinstance(failure, NonFiniteError), str(failure)))
    if failure is not None:
        raise failure
    for not_finite, text in filter(None, said):
        raise (NonFiniteError if not_finite else RuntimeError)(f"On another process: {text}")


def _as_raised(error: ProcessRaisedException) -> Exception:
    """Return what a spawned process raised, where it is an error of ours."""
    found = re.search(r"NonFiniteError: (.+)", str(error))
    return NonFiniteError(found[1]) if found else error


def _warn_of_order(loader: Any) -> None:
    sampler: Any = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        warnings.warn(
            "The loader shuffles, so rows come in its random order. Use shuffle=False.",
            stacklevel=5,
        )
    if sampler is not None and loader.drop_last and len(sampler) % loader.batch_size:
        warnings.warn(
            "The loader drops its last batch, so some rows are missing. Use drop_last=False.",
            stacklevel=5,
        )


@contextmanager
def _seeded(*key: object) -> Iterator[None]:
    """Seed every generator by `key`, devices' included; restore them afterwards."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), keyed(*key) as seed:
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def _without_noise() -> Iterator[None]:
    """Hide warnings that say nothing to the caller of this package."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*Total length of .* is zero.*",
            ".*available but not used.*",
            ".*treespec, LeafSpec.*",
            ".*smaller than the logging interval.*",
            ".*sampler has shuffling enabled.*",
            ".*callbacks used to create the checkpoint.*",
            ".*local rank has zero length.*",
            ".*sync_dist=True.*",
            ".*srun. command is available.*",
        ):
            warnings.filterwarnings("ignore", message)
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn Lightning's exit at Ctrl-C back into KeyboardInterrupt, and keep the caller's handler."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says of every new trainer."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with _without_noise():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _default_views(item: Any) -> Any:
    x = item[0] if isinstance(item, tuple | list) else item
    return volume_views() if getattr(x, "ndim", 0) == 4 else JitterTransform()


def _is_volumetric(module: nn.Module) -> bool:
    return type(module).__name__.endswith("3d")


def _image_table(X: Any) -> pd.DataFrame | None:
    """Return paths (or nibabel images) and masks, where X holds such; else None."""
    if isinstance(X, pd.DataFrame):
        if "path" not in X.columns:
            return None
        masks = X["mask_path"] if "mask_path" in X.columns else [None] * len(X)
        return pd.DataFrame({"path": list(X["path"]), "mask_path": list(masks)}, dtype=object)
    if isinstance(X, pd.Series | np.ndarray):
        values = list(np.asarray(X, dtype=object).ravel()) if X.dtype.kind not in "biufc" else []
    else:
        values = list(X) if isinstance(X, list | tuple) else []
    if not values or not all(isinstance(v, str | os.PathLike | SpatialImage) for v in values):
        return None
    return pd.DataFrame({"path": values, "mask_path": [None] * len(values)}, dtype=object)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)

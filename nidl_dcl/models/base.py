"""The base class of estimators: a Lightning module and a scikit-learn estimator in one object.

It fits, and keeps the state of what was fitted. Arguments are checked in `arguments`, data becomes
samples in `inputs`, trainers are built in `trainers`, `transformer` encodes; steps are left to
subclasses.
"""

from __future__ import annotations

import copy
import inspect
import random
import re
import warnings
from abc import ABCMeta
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning as L
import numpy as np
import sklearn.base
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerStatus
from sklearn.utils.validation import validate_data
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset, IterableDataset

from nidl_dcl.data.batches import describe
from nidl_dcl.data.datasets import ArraySamples, ImageSamples, LazyViews, TwoViewSamples, read_item
from nidl_dcl.data.exposure import after
from nidl_dcl.data.loaders import Loaders, shard_loader
from nidl_dcl.distributed import by_itself, first_value, share_buffers, world
from nidl_dcl.errors import NonFiniteError
from nidl_dcl.models.arguments import Arguments, keywords
from nidl_dcl.models.callback_state import as_given, copied_as_given, restored
from nidl_dcl.models.context_managers import (
    ignore_warnings,
    isolate_rng,
    keyboard_interrupt,
    lightning_messages,
    was_interrupted,
    without_cuda,
)
from nidl_dcl.models.inputs import (
    ACCEPTED,
    array_samples,
    choose_preparation,
    default_views,
    find_images,
    is_array,
    is_table,
    stacked,
    warn_of_pairs,
)
from nidl_dcl.models.serialization import is_plain, save_model
from nidl_dcl.models.trainers import trainer_options, training_trainer
from nidl_dcl.models.transformer import TransformerMixin
from nidl_dcl.models.wrapped import inner_names, match_names
from nidl_dcl.randomness import fresh_seed, key_seed
from nidl_dcl.volumes.preparation import Preparation


class EstimatorType(ABCMeta):
    """The class of estimator classes: keeps the call of a constructor, and knows encoders.

    What subclasses do in their constructors is theirs: the call itself is what a copy is made of. A
    class with a ``transform_step`` is a transformer.
    """

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Make a class, with `TransformerMixin` among its bases if it encodes."""
        encodes = "transform_step" in namespace or any(hasattr(b, "transform_step") for b in bases)
        if encodes and not any(issubclass(base, TransformerMixin) for base in bases):
            bases = (TransformerMixin, *bases)
        return super().__new__(cls, name, bases, namespace, **kwargs)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an estimator."""
        estimator = super().__call__(*args, **kwargs)
        estimator._arguments.record(cls.__init__, args, kwargs)  # type: ignore[misc]
        estimator._update_hparams()
        return estimator

    @property
    def __signature__(cls) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class BaseEstimator(sklearn.base.BaseEstimator, L.LightningModule, metaclass=EstimatorType):
    """Base of estimators that train with Lightning and behave as scikit-learn's do.

    Parameters
    ----------
    **kwargs : dict
        Every option of ``lightning.Trainer`` (``max_epochs``, ``callbacks``, ``devices``, …;
        ``logger`` and ``enable_checkpointing`` are off by default, and ``accelerator="auto"`` is
        the CPU on macOS), and

        random_state : int, RandomState or None, default=None
            Seed of weights, order and views. None draws one at each fit, from NumPy's global
            generator, as in scikit-learn.
        views : callable, optional
            From one float32 sample without batch axis to one view of it. Default: the views for
            volumes where samples have three spatial axes, else `JitterTransform`.
        views_on_device : bool, default=False
            Draw the views of samples given to `fit` where the encoder is, on a GPU, rather than in
            the loading workers.
        batch_size : int, default=32
            Samples of a batch in loaders made here, all processes together.
        num_workers : int, default=0
            Loading workers of loaders made here.
        warm_start : bool, default=False
            Whether a second fit continues from the weights of the first.
        save_hparams : bool, default=True
            Whether plain arguments are kept in ``hparams``, hence in checkpoints.
        ignore : list of str, optional
            Arguments that ``hparams`` leaves out.

    Raises
    ------
    TypeError
        For an unknown option, naming the closest known one.

    Notes
    -----
    A subclass defines ``training_step`` and ``configure_optimizers``, perhaps ``validation_step``,
    and ``transform_step`` for ``transform``. Its constructor takes what it likes and hands
    ``**kwargs`` on. Arguments are those of the call: `get_params`, copies, ``hparams`` and model
    folders know them, and `set_params` calls the constructor again, keeping weights whose shapes do
    not change.

    Examples
    --------
    An autoencoder, trained to give back one view from the other:

    >>> import torch
    >>> from torch import nn
    >>> from nidl_dcl import BaseEstimator
    >>> class Autoencoder(BaseEstimator):
    ...     def __init__(self, size=8, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.layers = nn.Sequential(nn.Linear(size, 2), nn.Linear(2, size))
    ...     def training_step(self, batch, batch_idx):
    ...         x1, x2 = batch
    ...         return nn.functional.mse_loss(self.layers(x1), x2)
    ...     def transform_step(self, batch, batch_idx, dataloader_idx=0):
    ...         return self.layers[0](batch)
    ...     def configure_optimizers(self):
    ...         return torch.optim.Adam(self.parameters())
    >>> model = Autoencoder(max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
    >>> model.fit(torch.randn(16, 8)).transform(torch.randn(3, 8)).shape
    torch.Size([3, 2])
    >>> model.get_params()["size"]
    8
    """

    _more_options: ClassVar[Mapping[str, Any]] = {}
    """Further options of a subclass, and their defaults."""

    _of_fits: ClassVar[tuple[str, ...]] = (
        *("_seed", "_fitted", "_preparation", "_exposure", "_first_weights", "_first_exposure"),
        "_trainer",
    )
    """Attributes that fits set."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._arguments = Arguments(type(self), BaseEstimator, kwargs)
        self._seed: int | None = None
        self._fitted = False
        self._preparation: Preparation | None = None
        self._exposure: dict[str, Any] | None = None
        # A second fit starts from the weights that the first one started from.
        self._first_weights: dict[str, Any] | None = None
        self._first_exposure: dict[str, Any] | None = None

    # -- fitting -----------------------------------------------------------------------------

    @keywords(train_dataloader="X", datamodule="X")
    def fit(self, X: Any, y: Any = None, val_dataloader: Any = None, ckpt_path: Any = None) -> Self:
        """Train on two views of each sample.

        Parameters
        ----------
        X : DataLoader, LightningDataModule, Dataset, array, Tensor or list
            A loader of two-view batches; or samples, of which two views are made: an array of
            shape (n, c, d, h, w), (n, d, h, w) or whatever the encoder takes, a dataset of such
            samples, image paths or nibabel images.
        y : ignored, or DataLoader, Dataset or list of such
            Loaders or datasets here are the validation data. Anything else is without effect.
        val_dataloader : DataLoader or samples, optional
            Validation data of any kind that `X` may be, or a list of loaders or datasets, each of
            which is logged by itself (``loss/val/dataloader_idx_0``, …).
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

        Callbacks begin each fit in the state in which they were given. ``trainer`` is the last fit's
        afterwards. `X` may also be called ``train_dataloader`` or ``datamodule``.
        """
        if val_dataloader is None and _is_data(y):
            val_dataloader = y
        self._check_arguments()
        self._seed = seed = fresh_seed(self._arguments["random_state"])
        data = self._training_data(X, val_dataloader, seed)
        shown = bool(self._arguments.values.get("enable_progress_bar", True))
        with (
            isolate_rng(seed, "fit"),
            ignore_warnings(),
            lightning_messages(shown),
            keyboard_interrupt(),
        ):
            # A subclass need not have such a step; every DCL has one.
            if isinstance(data, Loaders) and data.validation is None:
                warnings.filterwarnings("ignore", ".*passed in a `val_dataloader` but have no.*")
            warnings.filterwarnings("ignore", ".*defined a `validation_step` but have no.*")
            if getattr(data, "identity", dict)():
                # Keyed loaders follow the trainer's progress, so they do resume in mid-epoch.
                warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
            trainer = training_trainer(self, self._arguments.values)
            self._update_hparams(but=getattr(data, "hparams", ()))
            callbacks = restored(
                self._arguments.values.get("callbacks"), [self, *self._arguments.values.values()]
            )
            with (
                by_itself(trainer.world_size == 1),
                shard_loader(data, trainer.world_size),
                callbacks,
            ):
                self._prepare_weights(data)
                seen: dict[str, Any] = getattr(data, "exposure", dict)()
                self._exposure = after(self._exposure, seen)
                self._fitted = False
                try:
                    with without_cuda(trainer.strategy.root_device):
                        trainer.fit(self, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
                except ProcessRaisedException as error:
                    raise _error_of_process(error) from error
                except (KeyboardInterrupt, SystemExit) as error:
                    if was_interrupted(error) and trainer.global_step > 0:
                        self._fitted = True
                        warnings.warn(
                            f"Training was interrupted after {trainer.global_step} steps. The "
                            "estimator is fitted, with the weights of that step.",
                            stacklevel=2,
                        )
                    raise
        self._fitted = True
        return self

    def _prepare_weights(self, data: L.LightningDataModule) -> None:
        """Restore the weights of the first fit, or remember them if this is the first."""
        if any(nn.parameter.is_lazy(p) for p in self.parameters()):
            self._materialize(data)
        if self._first_weights is None:
            self._first_weights = copy.deepcopy(self.state_dict())
            self._first_exposure = self._exposure
        elif not self._arguments["warm_start"]:
            self.load_state_dict(self._starting_weights())
            self._exposure = self._first_exposure

    def _materialize(self, data: L.LightningDataModule) -> None:
        """Run the first training batch once, so that lazy modules learn their shapes."""
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        batch = batch.draw() if isinstance(batch, LazyViews) else batch
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*trying to `self.log.*")
            self.training_outputs(batch)

    def training_outputs(self, batch: Any) -> Any:
        """Run the networks on a training batch, outside of a trainer."""
        return self.training_step(batch, 0)

    @property
    def _runs(self) -> bool:
        """Whether a trainer runs, so that there is somebody to log to."""
        running = self._trainer is not None and self._trainer.state.status == TrainerStatus.RUNNING
        return running or self._fabric is not None

    # -- data --------------------------------------------------------------------------------

    def _training_data(self, X: Any, validation: Any, seed: int) -> L.LightningDataModule:
        if isinstance(X, L.LightningDataModule):
            if validation is not None:
                raise ValueError("A data module brings its own validation data.")
            self._preparation = getattr(X, "preparation", self._preparation)
            return X
        train = self._two_views(X, seed, reset=True)
        if isinstance(validation, list | tuple) and _is_data(validation):
            held_out: Any = [self._two_views(part, seed, reset=False) for part in validation]
        else:
            held_out = (
                None if validation is None else self._two_views(validation, seed, reset=False)
            )
        return Loaders(
            train,
            held_out,
            seed=seed,
            batch_size=self._arguments["batch_size"],
            num_workers=self._arguments["num_workers"],
        )

    def _two_views(self, X: Any, seed: int, *, reset: bool) -> Any:
        if isinstance(X, DataLoader):
            return X
        samples = self._samples(X, reset=reset)
        if isinstance(samples, IterableDataset):
            raise TypeError(
                "fit takes an IterableDataset in a DataLoader of two-view batches only."
            )
        if len(samples) == 0:
            raise ValueError("There is nothing to fit: X has no sample.")
        views = self._arguments["views"]
        if samples is X or not views:  # else no image is read before it is needed
            first = samples[0]
            if samples is X:
                warn_of_pairs(first)
            views = views or default_views(read_item(first)[0])
        lazy = self._arguments["views_on_device"]
        return TwoViewSamples(samples, views, seed=seed, lazy=lazy)

    def _samples(self, X: Any, *, reset: bool) -> Any:
        """Return X as a dataset of samples; with `reset`, learn the form of samples from it."""
        if isinstance(X, Dataset):
            return X
        images = find_images(X)
        if images is not None:
            if reset or self._preparation is None:
                self._preparation = choose_preparation(images)
            return ImageSamples(images, self._preparation)
        X = stacked(X)
        if is_array(X):
            volumetric = any(type(module).__name__.endswith("3d") for module in self.modules())
            return array_samples(X, volumetric=volumetric)
        if not is_table(X):
            raise TypeError(f"X must be {ACCEPTED}; got {describe(X)}.")
        return ArraySamples(validate_data(self, X, reset=reset, dtype=np.float32))

    # -- state -------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether the estimator has been fitted or loaded; set it to encode with untrained weights."""
        return self._fitted

    @fitted.setter
    def fitted(self, value: bool) -> None:
        self._fitted = value

    fitted_ = fitted
    """`fitted`, by nidl's name."""

    @property
    def trainer_params(self) -> dict[str, Any]:
        """The options of ``lightning.Trainer`` that a fit uses, over Lightning's own defaults."""
        return trainer_options(self._arguments.values)

    @property
    def preparation(self) -> Preparation | None:
        """The input contract: how images become what the encoder takes; None without images."""
        return self._preparation

    @property
    def exposure(self) -> dict[str, Any]:
        """Participants and images seen in training, as salted hashes; empty if not known."""
        return dict(self._exposure or {})

    def start_from(self, other: BaseEstimator) -> Self:
        """Begin training with the weights of another estimator, and with its `exposure`.

        A RuntimeError names the weights when its architecture differs.
        """
        self.load_state_dict(match_names(other.state_dict(), self.state_dict()))
        self._first_weights = None
        self._exposure = other.exposure
        return self

    def _restore(
        self,
        *,
        preparation: Preparation | None,
        exposure: Mapping[str, Any] | None,
        fitted: bool = True,
    ) -> None:
        """Set what files hold beside arguments; the next `fit` starts from the weights there are."""
        self._preparation = preparation
        self._exposure = None if exposure is None else dict(exposure)
        self._fitted = fitted
        self._first_weights = None

    def _built_weights(self) -> dict[str, Any]:
        """Return the weights that the constructor drew, as far as they can be drawn again."""
        return {}

    def _starting_weights(self) -> dict[str, Any]:
        """Return the weights at the start of the first fit, those that a pickle leaves out too."""
        first, own = inner_names((self._first_weights or {}).items()), self.state_dict()
        if len(first) < len(own):
            first = {**inner_names(self._built_weights().items()), **first}
        return match_names(first, own)

    # -- arguments, as scikit-learn asks for them --------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments as given, ``**kwargs`` included; `deep` is without effect."""
        return self._arguments.params()

    def set_params(self, **params: Any) -> Self:
        """Set arguments or options by name; a ValueError refuses an unknown one.

        Assigning to an attribute of that name is the same.
        """
        self._arguments.refuse_unknown(params)
        if not self._arguments.rebuilding & params.keys():
            self._arguments.update(params)
            self._arguments_changed(set(params))
        elif self._runs:  # a callback sets it: the networks under the trainer must stay
            self._arguments.update(params)
            for name in self._arguments.rebuilding & params.keys():
                self._assign(name, params[name])
        else:
            self._rebuild(params)
        self._update_hparams()
        return self

    def _rebuild(self, params: Mapping[str, Any]) -> None:
        """Call the constructor again; keep the weights, and what was fitted, where they still fit."""
        new = type(self)(**{**self._arguments.given, **params})
        before, weights = dict(vars(self)), self.state_dict()
        networks = any(isinstance(value, nn.Module | type) for value in params.values())
        self.__dict__.update(vars(new))
        shapes = {
            name: None if nn.parameter.is_lazy(value) else value.shape
            for name, value in self.state_dict().items()
        }
        fit = weights.keys() == shapes.keys() and all(
            shapes[name] in (None, value.shape)
            for name, value in weights.items()
            if not nn.parameter.is_lazy(value)
        )
        if fit and not networks:  # another network brings its own
            self.load_state_dict(weights)
            self.__dict__.update({name: before[name] for name in self._of_fits})

    def __setattr__(self, name: str, value: Any) -> None:
        arguments = vars(self).get("_arguments")
        if arguments is not None and arguments.complete and name in arguments.known:
            self.set_params(**{name: value})
        else:
            self._assign(name, value)

    def _assign(self, name: str, value: Any) -> None:
        """Set an attribute, also one with the name of an argument."""
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            try:
                return vars(self)["_arguments"].find(name)
            except KeyError:
                pass
            raise

    def _update_hparams(self, but: Iterable[str] = ()) -> None:
        """Give loggers and checkpoints the plain arguments of now, less those of a data module."""
        if not self._arguments["save_hparams"]:
            return
        plain = self._arguments.plain()
        for name in [k for k, v in self.hparams.items() if is_plain(v)]:
            if name in self._arguments.known and name not in plain:
                del self.hparams[name]
        self._set_hparams(plain)
        # What loggers get. A data module logs its own, and one name with two values is an error.
        self._hparams_initial = copy.deepcopy(self._hparams)
        for name in but:
            self._hparams_initial.pop(name, None)
        self._log_hyperparams = True

    @classmethod
    def _argument_names(cls) -> list[str]:
        """Return the names that constructors take, apart from options."""
        return Arguments(cls, BaseEstimator, {}).named

    def _arguments_changed(self, names: set[str]) -> None:
        """Rebuild what depends on the arguments of these names; for subclasses."""

    def _check_arguments(self) -> None:
        """Raise for values of arguments that cannot be used; called by `fit`."""
        self._arguments.check()

    def __sklearn_is_fitted__(self) -> bool:
        return self.fitted

    def __sklearn_clone__(self) -> Self:
        # All arguments in one copy: an optimizer keeps pointing at the encoder it was made for.
        memo: dict[int, Any] = {}
        given = dict(self._arguments.given)
        callbacks = {"callbacks": given.pop("callbacks")} if "callbacks" in given else {}
        given = copy.deepcopy(given, memo)
        clone = type(self)(
            **given, **{name: copied_as_given(v, memo) for name, v in callbacks.items()}
        )
        own = {id(module) for module in self.modules()}
        if self._first_weights and any(id(v) in own for v in self._arguments.given.values()):
            # A network that was given is trained itself, not a copy of it.
            clone.load_state_dict(match_names(self._starting_weights(), clone.state_dict()))
        for name in ("_metadata_request", "_sklearn_output_config"):
            if hasattr(self, name):
                setattr(clone, name, copy.deepcopy(getattr(self, name)))
        return clone

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied: of the first weights, those that cannot be drawn again."""
        state = dict(super().__getstate__())  # without the trainer
        if self._first_weights:
            built = inner_names(self._built_weights().items())
            state["_first_weights"] = {
                name: value
                for name, value in inner_names(self._first_weights.items()).items()
                if not _same_tensor(value, built.get(name))
            }
        arguments = state["_arguments"] = copy.copy(self._arguments)
        arguments.given, arguments.values = dict(arguments.given), dict(arguments.values)
        if "callbacks" in arguments.values:
            # Those that ran hold the trainer, progress bars, …
            callbacks = as_given(arguments.values["callbacks"])
            arguments.values["callbacks"] = callbacks
            if "callbacks" in arguments.given:
                arguments.given["callbacks"] = callbacks
        return state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _get_fitted_attr_html(self, *args: Any, **kwargs: Any) -> str:
        # scikit-learn would read every public attribute; Lightning's raise without a trainer.
        return ""

    # -- model folder ------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the model to a folder of safetensors and JSON, and return it; see `load_model`."""
        return save_model(self, folder, preparation=self._preparation, exposure=self.exposure)

    # -- hooks of Lightning ------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Share the seed with the other processes, and seed the generators of each by its rank."""
        if self._seed is None:
            self._seed = fresh_seed(self._arguments["random_state"])
        rank, processes = world()
        if stage == "fit" and processes > 1:
            self._seed = first_value(self._seed)
            own = key_seed(self._seed, "process", rank)
            torch.manual_seed(own)
            np.random.seed(own)  # noqa: NPY002
            random.seed(own)

    def on_train_start(self) -> None:
        """Accumulate as the epoch at hand does, which a resume would begin too late to be told."""
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(trainer)

    def on_validation_start(self) -> None:
        """Validate the same network on every process."""
        share_buffers(self)

    def on_train_end(self) -> None:
        """End with the same network on every process."""
        share_buffers(self)

    def on_fit_end(self) -> None:
        """Mark the estimator as fitted, also by a trainer of the caller's own; refuse a fit of nothing."""
        loop = self.trainer.fit_loop
        asked = self.trainer.max_epochs != 0 and self.trainer.max_steps != 0
        if asked and loop.epoch_loop.batch_progress.total.ready == 0:
            raise ValueError(
                "Nothing was trained: the training loader gave no batch. With drop_last=True it needs "
                "batch_size samples; limit_train_batches must not be 0."
            )
        self._fitted = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Mark an estimator of ``load_from_checkpoint`` as fitted; match the names of wrapped parts."""
        checkpoint["state_dict"] = match_names(checkpoint["state_dict"], self.state_dict())
        if self._trainer is None:
            self._fitted = True


def _same_tensor(a: Any, b: Any) -> bool:
    if not isinstance(b, Tensor) or nn.parameter.is_lazy(b) or a.dtype != b.dtype:
        return False
    return torch.equal(a.cpu(), b.cpu())


def _is_data(value: Any) -> bool:
    """Return whether a value is a loader or a dataset, or a list of such."""
    parts = value if isinstance(value, list | tuple) and value else [value]
    return all(isinstance(part, DataLoader | Dataset) for part in parts)


def _error_of_process(error: ProcessRaisedException) -> Exception:
    """Return what a spawned process raised, where it is an error of ours."""
    found = re.search(r"NonFiniteError: (.+)", str(error))
    return NonFiniteError(found[1]) if found else error

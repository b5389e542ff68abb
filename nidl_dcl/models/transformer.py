"""Encoding: what makes an estimator a scikit-learn transformer, with rows in input order.

A mixin for `base.BaseEstimator`; the encoder itself is left to its ``transform_step``.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import numpy as np
import sklearn.base
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from nidl_dcl.data.batches import describe, finite_rows, first_bad, single_view
from nidl_dcl.data.datasets import ImageSamples, OneViewSamples
from nidl_dcl.data.loaders import PredictShards, count_rows, image_loader
from nidl_dcl.distributed import by_itself, gather_objects, world
from nidl_dcl.errors import NonFiniteError
from nidl_dcl.models.arguments import keywords
from nidl_dcl.models.context_managers import keyboard_interrupt, silence_lightning
from nidl_dcl.models.trainers import inference_trainer
from nidl_dcl.volumes.cache import PreparedVolumes


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
        features, _ = self._encode(X)
        return torch.from_numpy(features) if isinstance(X, DataLoader | Tensor) else features

    @keywords(test_dataloader="X")
    def transform_with_targets(self: Any, X: Any) -> tuple[Any, Any]:
        """Return (features, targets) of a loader, dataset or data module with items ``(x, y)``.

        Both are in input order, features as in `transform`; targets are a tensor or, for strings
        and objects, an array.
        """
        check_is_fitted(self)
        features, targets = self._encode(X)
        if any(y is None for y in targets):
            raise ValueError("transform_with_targets needs batches (x, y); these have no target.")
        as_tensor = isinstance(X, DataLoader | Tensor)
        if all(isinstance(y, Tensor) for y in targets):
            joined: Any = torch.cat(targets)
            joined = joined if as_tensor else joined.numpy()
        else:
            joined = np.array([value for y in targets for value in y])
        return (torch.from_numpy(features) if as_tensor else features), joined

    def transform_step_with_targets(
        self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Return the embeddings and targets of one batch ``(x, y)``, for callbacks that probe.

        Parameters
        ----------
        batch : tuple or list
            Inputs, given to `transform_step` as they are, and targets.
        batch_idx, dataloader_idx : int
            Given to `transform_step`.

        Returns
        -------
        dict
            ``features`` and ``targets``.
        """
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(f"transform_step_with_targets needs (x, y), got {describe(batch)}.")
        features = self.transform_step(batch[0], batch_idx, dataloader_idx)
        return {"features": features, "targets": batch[1]}

    def predict_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the encoder's output for one batch of a trainer's ``predict``.

        Parameters
        ----------
        batch : Tensor or sequence
            ``x``, ``(x,)`` or ``(x, y)``.
        batch_idx : int
            Number of the batch, on this process.
        dataloader_idx : int, default=0
            Ignored.

        Raises
        ------
        NonFiniteError
            Naming the first sample with NaN or infinite values.
        """
        x, _ = single_view(batch)
        good = finite_rows(x)
        if not bool(good.all()):
            raise NonFiniteError(
                f"Sample {first_bad(good)} of batch {_global_number(batch_idx)} has NaN or "
                "infinite values; it cannot be encoded."
            )
        features: Tensor = self.transform_step(x, batch_idx, dataloader_idx)
        return features

    def _encode(self: Any, X: Any) -> tuple[np.ndarray, list[Any]]:
        """Return the embeddings of X, and the targets of each batch."""
        loader = self._inference_loader(X)
        _warn_of_order(loader)
        rows = _Rows()
        with silence_lightning(), keyboard_interrupt():
            trainer = inference_trainer(self._arguments.values, rows)
            of_fit = self._trainer
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
                    self.trainer = of_fit
                _raise_together(failure)
                pieces = gather_in_order(rows.pieces)
        if not pieces:
            raise ValueError("There is nothing to transform: X has no sample.")
        features = np.concatenate([features for _, features, _ in pieces])
        return features[: count_rows(loader)], [y for *_, y in pieces]

    def _inference_loader(self: Any, X: Any) -> Any:
        if isinstance(X, DataLoader):
            return X
        if isinstance(X, L.LightningDataModule):
            if not is_overridden("predict_dataloader", X):
                raise TypeError(
                    f"{type(X).__name__} has no predict_dataloader, which transform reads. Define "
                    "one, or give a loader of single views."
                )
            X.prepare_data()
            X.setup("predict")
            loader = X.predict_dataloader()
            if isinstance(getattr(loader, "dataset", None), PreparedVolumes):
                loader = image_loader(loader.dataset, loader.num_workers)
            return loader
        samples = self._samples(X, reset=False)
        if samples is X and not isinstance(X, IterableDataset):
            samples = OneViewSamples(X)
        workers = self._arguments["num_workers"]
        if isinstance(samples, ImageSamples):
            return image_loader(samples, workers)
        return DataLoader(samples, batch_size=self._arguments["batch_size"], num_workers=workers)


# Outside of what scikit-learn wraps around it for `set_output`, which needs X by position.
TransformerMixin.transform = keywords(test_dataloader="X")(  # type: ignore[method-assign]
    TransformerMixin.transform
)


class _Rows(L.Callback):
    """Keeps the embeddings and targets of each batch, with the number of the batch in the input."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, np.ndarray, Any]] = []

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        _, y = single_view(batch)
        features = outputs.detach().to("cpu", torch.float32).numpy().copy()
        y = y.detach().cpu().clone() if isinstance(y, Tensor) else y
        self.pieces.append((_global_number(batch_idx), features, y))


def gather_in_order(pieces: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return the pieces of all processes, by the number that stands first in each."""
    return sorted(
        (piece for part in gather_objects(pieces) for piece in part), key=lambda piece: piece[0]
    )


def _global_number(batch_idx: int) -> int:
    """Return which batch of the input a process's batch is: `PredictShards` gives it every n-th."""
    rank, processes = world()
    return rank + batch_idx * processes


def _raise_together(failure: Exception | None) -> None:
    """Raise on every process what was raised on one, so that none waits for it."""
    messages = gather_objects(failure and (isinstance(failure, NonFiniteError), str(failure)))
    if failure is not None:
        raise failure
    for not_finite, message in filter(None, messages):
        raise (NonFiniteError if not_finite else RuntimeError)(f"On another process: {message}")


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

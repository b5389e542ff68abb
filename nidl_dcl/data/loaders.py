"""The data modules of `fit` and of `transform`: which process loads which part of the data.

Samples are left to `datasets`, their order to `samplers`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from nidl_dcl.data.datasets import TwoViewSamples
from nidl_dcl.data.samplers import outlast_sigterm, sharded, two_view_loader, with_batches
from nidl_dcl.distributed import first_value, world


class Loaders(L.LightningDataModule):
    """The loaders of a fit: the caller's own, or those of `two_view_loader`.

    Parameters
    ----------
    train : DataLoader or TwoViewSamples
        Training data.
    validation : DataLoader, TwoViewSamples, list of such or None
        Validation data.
    seed : int
        First part of every key, until the processes have agreed on one.
    batch_size : int
        Samples of a batch, all processes together; not for loaders of the caller.
    num_workers : int
        Loading workers; not for loaders of the caller.
    """

    def __init__(
        self, train: Any, validation: Any, *, seed: int, batch_size: int, num_workers: int
    ) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.seed = seed
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> Any:
        """Return the loader of training batches."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> Any:
        """Return the loader of validation batches, none without such data."""
        if isinstance(self.validation, list):
            return [self._loader(part, shuffle=False) for part in self.validation]
        return [] if self.validation is None else self._loader(self.validation, shuffle=False)

    def _loader(self, data: Any, *, shuffle: bool) -> Any:
        if not isinstance(data, TwoViewSamples):
            return sharded(data)
        # A run that resumes, or has several processes, agrees on the seed after it was set up.
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        data.seed = self.seed if module is None else module._seed
        return two_view_loader(
            data,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            trainer=self.trainer,
        )

    def sample_name(self, epoch: int, batch: int, position: int) -> str | None:
        """Return the name of a sample of a training batch, None for a loader of the caller.

        Parameters
        ----------
        epoch, batch : int
            Which batch.
        position : int
            Of the sample, in the batch of all processes together.
        """
        if not isinstance(self.train, TwoViewSamples):
            return None
        loader = self.train_dataloader()
        return self.train.key(loader.batch_sampler.batch(epoch, batch)[position])

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a resumed run to equal an uninterrupted one."""
        if not isinstance(self.train, TwoViewSamples):
            return {}
        return {"samples": len(self.train), "batch_size": self.batch_size}


def image_loader(images: Any, num_workers: int = 0) -> DataLoader[Any]:
    """Return a loader of images to encode, in their order, in batches that all have one size.

    What a network gives for an image depends, in the last digit, on how many it is given at a time.
    In batches of one size it depends on nothing else.
    """
    return DataLoader(
        images,
        batch_size=_IMAGES,
        collate_fn=_fill_up,
        num_workers=num_workers,
        worker_init_fn=outlast_sigterm,
    )


_IMAGES = 4
"""Images that are encoded at a time: twice as fast as one, on a CPU as fast as more."""


def _fill_up(images: list[Tensor]) -> Tensor:
    return torch.stack(images + images[-1:] * (_IMAGES - len(images)))


def count_rows(loader: Any) -> int | None:
    """Return how many rows of a loader's batches are samples; None for all of them."""
    return len(loader.dataset) if getattr(loader, "collate_fn", None) is _fill_up else None


class PredictShards(L.LightningDataModule):
    """Every process's part of the batches to encode, from a caller's loader."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.loader = loader

    def predict_dataloader(self) -> Any:
        """Return every n-th batch of the loader, n being the number of processes."""
        rank, processes = world()
        loader, batches = self.loader, self.loader.batch_sampler
        stream = batches is None or isinstance(loader.dataset, IterableDataset)
        if not stream and isinstance(getattr(batches, "sampler", None), DistributedSampler):
            # Undo the caller's own division: every row once, in the order of the data.
            batches = BatchSampler(range(len(loader.dataset)), batches.batch_size, drop_last=False)
            loader = with_batches(loader, list(batches))
        elif not stream and processes > 1:
            batches = first_value([list(batch) for batch in batches] if rank == 0 else None)
        if processes == 1:
            return _Batches(loader)
        if stream:
            return _Batches(loader, rank, processes)
        return _Batches(with_batches(loader, list(batches)[rank::processes]))


class _Batches:
    """One of every `step` batches of a loader, in a form that the trainer does not divide again."""

    def __init__(self, loader: Any, start: int = 0, step: int = 1) -> None:
        self.loader = loader
        self.start = start
        self.step = step

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), self.start, None, self.step)

    def __len__(self) -> int:
        return len(range(self.start, len(self.loader), self.step))


@contextmanager
def shard_loader(data: Any, processes: int) -> Iterator[None]:
    """Divide a data module's batches among the processes in the block; `Loaders` do already."""
    divided = isinstance(data, Loaders) or processes == 1
    names = [
        name
        for name in ("train_dataloader", "val_dataloader")
        if not divided and getattr(type(data), name) is not getattr(L.LightningDataModule, name)
    ]
    for name in names:
        setattr(data, name, functools.partial(_sharded_loaders, data, name))
    try:
        yield
    finally:
        for name in names:
            delattr(data, name)


def _sharded_loaders(data: Any, name: str) -> Any:
    loaders = getattr(type(data), name)(data)
    return [sharded(x) for x in loaders] if isinstance(loaders, list | tuple) else sharded(loaders)

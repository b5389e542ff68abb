"""Datasets of samples, and of two views of each.

The order in which they are loaded is left to `samplers`, what a view is to `views`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nidl_dcl.data.batched_views import draw_pairs, is_batched
from nidl_dcl.data.batches import TWO_VIEWS_TO_ENCODE, describe
from nidl_dcl.data.views import KeyCheck, draw_pair, one_view_each
from nidl_dcl.randomness import key_seed
from nidl_dcl.volumes.preparation import Preparation, prepare_volume


class ArraySamples(Dataset[Tensor]):
    """The rows of an array or tensor of shape (n, ...) as float32 tensors."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        return as_sample(self.array[index])


def as_sample(x: Any) -> Tensor:
    """Return numbers of any type and memory layout as a float32 tensor."""
    if isinstance(x, Tensor):
        return x.to(torch.float32)
    # A copy: arrays that several processes share are not writable.
    return torch.from_numpy(np.array(x, dtype=np.float32, order="C"))


class Labeled(NamedTuple):
    """A sample and its target; by the type, they are not taken for two views of one shape."""

    x: Any
    y: Any


def read_item(item: Any) -> tuple[Any, Any]:
    """Return the sample and the target of an item of a dataset, the target being None without.

    Parameters
    ----------
    item : Tensor, array, tuple or list
        A sample ``x`` or ``(x,)``; a sample and its target, ``(x, y)``; or two views that are drawn
        already in place of x, as a list of two tensors of one shape. So a tuple of two tensors is
        a sample and its target, whatever their shapes.

    Returns
    -------
    x : Tensor or list of two Tensor
        A float32 sample, or two views.
    y : object
        The target.

    Raises
    ------
    TypeError
        When the item is of another form.
    """
    x, y = item, None
    if isinstance(item, tuple | list) and not _are_views(item) and len(item) in (1, 2):
        x, y = item[0], (item[1] if len(item) == 2 else None)
    if _are_views(x) or (isinstance(x, tuple) and _are_views(list(x))):
        return list(x), y
    try:
        if isinstance(x, Tensor) or not isinstance(x, tuple | list):
            return as_sample(x), y
    except (TypeError, ValueError):
        pass
    raise TypeError(
        "An item of a dataset must be a sample x, (x,) or (x, y), or [x1, x2] or ([x1, x2], y) with "
        f"two views, all tensors or arrays; got {describe(item)}. Use a dataset (in MONAI: a last "
        "transform) that returns such items."
    )


def _are_views(item: Any) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 2
        and all(isinstance(part, Tensor) and part.is_floating_point() for part in item)
        and item[0].ndim > 0
        and item[0].shape == item[1].shape
    )


class OneViewSamples(Dataset[Any]):
    """The samples of a caller's dataset as they are, with their targets, to be encoded."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        x, y = read_item(self.samples[index])
        if isinstance(x, list):
            raise ValueError(TWO_VIEWS_TO_ENCODE)
        return x if y is None else Labeled(x, y)


class ImageSamples(Dataset[Tensor]):
    """Images prepared by an input contract: `path` (or nibabel image) and `mask_path` of each."""

    def __init__(self, images: pd.DataFrame, preparation: Preparation) -> None:
        self.images = list(images["path"])
        self.preparation = preparation
        self.masks = list(images["mask_path"])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        mask = self.masks[index]
        mask = mask if isinstance(mask, str | os.PathLike) else None
        return torch.from_numpy(prepare_volume(self.images[index], self.preparation, mask))


class JitterTransform:
    """A view of a sample that is no volume: noise (a share of its spread), some values dropped."""

    def __init__(self, noise: float = 0.1, drop: float = 0.1) -> None:
        self.noise = noise
        self.drop = drop

    def __call__(self, x: Tensor) -> Tensor:
        """Return one view of `x`, any shape."""
        spread = x.std(correction=0) if x.numel() > 1 else x.abs().max()
        # Drawn on the CPU, whose generators obey the key of a view, wherever x is.
        kept = torch.rand(x.shape, dtype=x.dtype).to(x.device) >= self.drop
        noise = torch.randn(x.shape, dtype=x.dtype).to(x.device)
        return (x + self.noise * spread * noise) * kept


class TwoViewSamples(Dataset[Any]):
    """One sample per participant and epoch, as two views of a random one of their images.

    Parameters
    ----------
    samples : Dataset
        Items as `read_item` takes them, without batch axis.
    views : callable
        From one sample to one view of it.
    seed : int
        First part of every key.
    groups : sequence of (str, sequence of int), optional
        Participants with the indices of their images; every sample is its own by default.
    lazy : bool, default=False
        Leave the drawing to `LazyViews.draw`, on the device where the batch will be.

    Attributes
    ----------
    check : KeyCheck or None
        Whether the views obey their key, where a loader asked for it.
    """

    def __init__(
        self,
        samples: Any,
        views: Callable[[Tensor], Tensor],
        *,
        seed: int,
        groups: Sequence[tuple[str, Sequence[int]]] | None = None,
        lazy: bool = False,
    ) -> None:
        self.samples = samples
        self.views = views
        self.seed = seed
        self.groups = groups
        self.lazy = lazy
        self.check: KeyCheck | None = None

    def __len__(self) -> int:
        return len(self.samples) if self.groups is None else len(self.groups)

    def key(self, index: int) -> str:
        """Return the participant's name, or the number of the sample where there are no groups."""
        return str(index) if self.groups is None else self.groups[index][0]

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> Any:
        epoch, index = epoch_and_index
        key = self.key(index)
        if self.groups is not None:
            own = self.groups[index][1]
            index = own[key_seed(self.seed, epoch, key, "image") % len(own)]
        x, y = read_item(self.samples[index])
        if isinstance(x, list):
            return x if y is None else (x, y)
        if self.lazy:
            return _Undrawn(x, (self.seed, epoch, key), y)
        pair = one_view_each(draw_pair(self.views, x, self.seed, epoch, key), self.views)
        if self.check is not None:
            self.check.compare(pair, x, self.seed, epoch, key)
        return pair if y is None else (pair, y)


class LazyViews:
    """A batch of samples whose views are drawn where it is sent to; the same views as in a loader.

    On a GPU the built-in views are drawn of the whole batch at once, and are the same up to rounding.

    Parameters
    ----------
    x : Tensor of shape (n, ...)
        The samples.
    keys : list of tuple
        Seed, epoch and participant of each.
    y : object
        Their targets, None where there are none.
    views : callable, optional
        As in `TwoViewSamples`; it must take what is on the device. A loader gives it once the batch
        has left the loading worker.
    check : KeyCheck, optional
        Whether the views obey their key.
    """

    def __init__(
        self,
        x: Tensor,
        keys: list[tuple[Any, ...]],
        y: Any,
        views: Callable[[Tensor], Tensor] | None = None,
        check: KeyCheck | None = None,
    ) -> None:
        self.x, self.keys, self.y, self.views, self.check = x, keys, y, views, check

    def to(self, device: Any, **options: Any) -> LazyViews:
        """Send the samples to a device, as Lightning does with every batch."""
        y = self.y.to(device) if isinstance(self.y, Tensor) else self.y
        return LazyViews(self.x.to(device, **options), self.keys, y, self.views, self.check)

    def pin_memory(self) -> LazyViews:
        """Pin the samples, as a loader does for a GPU."""
        return LazyViews(self.x.pin_memory(), self.keys, self.y, self.views, self.check)

    def draw(self) -> Any:
        """Return ``[X1, X2]`` or ``([X1, X2], y)``."""
        assert self.views is not None
        if self.x.device.type != "cpu" and is_batched(self.views):
            pair = draw_pairs(self.views, self.x, self.keys)
            return pair if self.y is None else (pair, self.y)
        drawn = [
            one_view_each(draw_pair(self.views, x, *key), self.views)
            for x, key in zip(self.x, self.keys, strict=True)
        ]
        pair = [torch.stack(views) for views in zip(*drawn, strict=True)]
        if self.check is not None:
            self.check.compare(drawn[0], self.x[0], *self.keys[0])
            self.check.warn()
        return pair if self.y is None else (pair, self.y)


def draw_lazy_views(batch: Any, trainer: Any) -> Any:
    """Return a batch with its views drawn, if it has none yet, in the precision of a trainer.

    They are drawn in single precision, as in a loading worker, and converted afterwards. The trainer
    has done that with the batch already, but does not look into `LazyViews`.
    """
    if not isinstance(batch, LazyViews):
        return batch
    return trainer.precision_plugin.convert_input(batch.draw())


class _Undrawn(NamedTuple):
    x: Tensor
    key: tuple[int, int, str]
    y: Any


def collate_lazy_views(items: list[Any]) -> Any:
    """Return the batch of `items`; those that had two views from the start are left as they are."""
    if not isinstance(items[0], _Undrawn):
        return default_collate(items)
    x, keys, y = zip(*items, strict=True)
    targets = None if y[0] is None else default_collate(list(y))
    return LazyViews(torch.stack(x), list(keys), targets)

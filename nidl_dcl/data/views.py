"""Random views of a volume: how one is drawn under a key, and what it may change in a brain.

Views are MONAI transforms or any callables. Which samples are drawn, and when, is left to `samplers`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Compose, Randomizable, RandomizableTransform
from torch import Tensor
from torch.utils.data import get_worker_info

from nidl_dcl.data.transforms import (
    RandBiasField,
    RandBlur,
    RandContrast,
    RandCutout,
    RandForegroundNoise,
    RandSpatial,
)
from nidl_dcl.errors import UsageError
from nidl_dcl.randomness import key_seed, keyed

STRENGTHS: dict[str, dict[str, dict[str, Any]]] = {
    "light": {
        "placement": {"prob": 0.7, "degrees": 2.5, "scale": 0.02, "crop": 0.04, "shift": 0.01},
        "blur": {"prob": 0.25, "sigma": 0.4},
        "contrast": {"prob": 0.5, "gain": 0.05, "gamma": 0.05},
        "bias": {"prob": 0.3, "amplitude": 0.1},
        "noise": {"prob": 0.3, "std": 0.03},
        "cutout": {"prob": 0.3, "boxes": 1, "side": 0.2},
    },
    "default": {
        "placement": {"prob": 0.9, "degrees": 5.0, "scale": 0.04, "crop": 0.08, "shift": 0.02},
        "blur": {"prob": 0.5, "sigma": 0.6},
        "contrast": {"prob": 0.8, "gain": 0.1, "gamma": 0.1},
        "bias": {"prob": 0.5, "amplitude": 0.2},
        "noise": {"prob": 0.5, "std": 0.06},
        "cutout": {"prob": 0.5, "boxes": 2, "side": 0.25},
    },
    "strong": {
        "placement": {"prob": 1.0, "degrees": 9.0, "scale": 0.08, "crop": 0.15, "shift": 0.04},
        "blur": {"prob": 0.7, "sigma": 0.8},
        "contrast": {"prob": 0.9, "gain": 0.2, "gamma": 0.2},
        "bias": {"prob": 0.7, "amplitude": 0.35},
        "noise": {"prob": 0.7, "std": 0.12},
        "cutout": {"prob": 0.7, "boxes": 4, "side": 0.3},
    },
}
"""Limits of each change by strength: twice "light" is "default", about twice that is "strong"."""


class MultiViewsTransform:
    """Several views of one input, as a list.

    Parameters
    ----------
    transforms : callable or sequence of callables
        One callable is applied `n_views` times, several are applied once each.
    n_views : int, optional
        How often one callable is applied, 0 or more; None means 1. With a sequence: None or 1.

    Raises
    ------
    TypeError
        A transform is not callable, or `n_views` is not an int.
    ValueError
        `n_views` is negative, or not 1 beside a sequence.

    Examples
    --------
    >>> from nidl_dcl import MultiViewsTransform
    >>> MultiViewsTransform(str.upper, n_views=2)("mri")
    ['MRI', 'MRI']
    >>> MultiViewsTransform([str.upper, str.capitalize])("mri")
    ['MRI', 'Mri']
    """

    def __init__(
        self,
        transforms: Callable[[Any], Any] | Sequence[Callable[[Any], Any]],
        n_views: int | None = None,
    ) -> None:
        if n_views is not None:
            if isinstance(n_views, bool) or not isinstance(n_views, Integral):
                raise TypeError(f"n_views must be an int or None, got {type(n_views).__name__}.")
            if n_views < 0:
                raise ValueError(f"n_views must be 0 or more, got {n_views}.")
        if callable(transforms):
            self.transforms = [transforms] * (1 if n_views is None else int(n_views))
            return
        if isinstance(transforms, str) or not isinstance(transforms, Sequence):
            raise TypeError(
                "transforms must be a callable or a sequence of callables, "
                f"got {type(transforms).__name__}."
            )
        for transform in transforms:
            if not callable(transform):
                raise TypeError(f"Each transform must be callable, got {transform!r}.")
        if n_views not in (None, 1):
            raise ValueError(
                f"n_views must be None or 1 beside a sequence of transforms, got {n_views}: "
                "each transform gives one view."
            )
        self.transforms = list(transforms)

    def __call__(self, x: Any) -> list[Any]:
        """Return one view of `x` per transform."""
        return [transform(x) for transform in self.transforms]


class TwoViews:
    """Two random views of one input: what a contrastive loss compares.

    Parameters
    ----------
    views : callable, optional
        One input in, one view out: a MONAI transform or Compose, or any function. Default:
        `volume_views()`.

    Examples
    --------
    >>> import torch
    >>> from nidl_dcl import TwoViews
    >>> x = torch.rand(1, 16, 16, 16)
    >>> first, second = TwoViews()(x, key=(0, "sub-01"))
    >>> first.shape, torch.equal(first, second)
    (torch.Size([1, 16, 16, 16]), False)
    >>> torch.equal(TwoViews()(x, key=(0, "sub-01"))[0], first)
    True

    Notes
    -----
    A view depends on its key alone (see `draw_view`). Without a key one is drawn from torch's
    global generator, which a DataLoader seeds differently in each worker. The first sample is drawn
    twice, and a warning given if the results differ (see `KeyCheck`); of several loading workers,
    the first one does that.
    """

    def __init__(self, views: Callable[[Any], Any] | None = None) -> None:
        if views is not None and not callable(views):
            raise TypeError(f"views must be callable, got {type(views).__name__}.")
        self.views = volume_views() if views is None else views
        self._check = KeyCheck(self.views)

    def __call__(self, x: Any, key: Any = None) -> list[Any]:
        """Return views 1 and 2 of `x`, drawn under ``(*key, 1)`` and ``(*key, 2)``.

        Parameters
        ----------
        x : Tensor
            As the views take it; `volume_views` take float32 (c, d, h, w).
        key : tuple or scalar, optional
            For instance (seed, epoch, participant).
        """
        if key is None:
            key = int(torch.randint(2**62, ()).item())
        parts = key if isinstance(key, tuple) else (key,)
        pair = draw_pair(self.views, x, *parts)
        self._check.compare(pair, x, *parts)
        self._check.warn()
        return pair


class KeyCheck:
    """Whether views are the same again under one key, found out once, on the first sample drawn.

    This sees whatever is random in a function, in a transform of any package, or on a device. It does
    not see a change that happened to be absent, or alike, in both drawings, such as one that acts
    rarely. The generators of torch, numpy and `random` are left as they were; one that belongs to
    `views` moves on by one drawing.
    """

    def __init__(self, views: Callable[[Any], Any]) -> None:
        self.views = views
        # Whether the comparison is due, and whether it found a difference: a tensor, because that
        # can be shared with loading workers, whose own warnings nobody could catch.
        self._state = torch.tensor([True, False])

    def share(self) -> None:
        """Let loading workers that start from now on compare for this process."""
        self._state.share_memory_()

    def compare(self, pair: list[Any], x: Any, *key: object) -> None:
        """Draw both views of `x` again, if none were before, and note whether they differ.

        Parameters
        ----------
        pair : list
            The views of `x` under `key`.
        x : Tensor
            As the views take it.
        *key : object
            As in `draw_pair`.
        """
        worker = get_worker_info()
        if self._state[0] and (worker is None or worker.id == 0):
            self._state[0] = False
            self._state[1] = not _equal(pair, draw_pair(self.views, x, *key))

    def warn(self) -> None:
        """Warn if a difference was found, once."""
        if self._state[1]:
            self._state[1] = False
            warnings.warn(
                f"The views {_name(self.views)} gave two different results for one sample under one "
                "key, so they may depend on the number of workers and differ from run to run. Let "
                "them draw from the global generators of torch (on the CPU), numpy or random; in a "
                "MONAI transform of your own, from self.R. Give MONAI's transforms in a Compose, not "
                "inside a function.",
                stacklevel=3,
            )


def _equal(first: Any, second: Any) -> bool:
    try:
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    except TypeError:  # not made of numbers: whoever takes the views says so
        return True
    return True


def _name(views: Any) -> str:
    """Return the name of a callable, with those of the transforms that it is composed of."""
    name = getattr(views, "__qualname__", type(views).__name__)
    parts = getattr(views, "transforms", None)
    if isinstance(parts, list | tuple):
        name += f"({', '.join(map(_name, parts))})"
    return str(name)


def draw_pair(views: Callable[[Any], Any], x: Any, *key: object) -> list[Any]:
    """Return views 1 and 2 of `x`, drawn under ``(*key, 1)`` and ``(*key, 2)``.

    Parameters
    ----------
    views : callable
        As in `draw_view`. What `PairedViews` share is drawn before, under ``(*key, "both")``.
    x : Tensor
        As `views` takes it.
    *key : object
        For instance seed, epoch, participant.
    """
    if isinstance(views, PairedViews):
        x, views = draw_view(views.shared, x, *key, "both"), views.each
    return [draw_view(views, x, *key, view) for view in (1, 2)]


def one_view_each(pair: list[Any], views: Callable[[Any], Any]) -> list[Any]:
    """Return the two views of a sample; a TypeError where one is not a tensor but, say, a list."""
    for view in pair:
        if not isinstance(view, Tensor | np.ndarray):
            raise TypeError(
                f"The views {_name(views)} returned a {type(view).__name__}. views makes one view "
                "of a sample, and is called twice: give the transform itself in place of TwoViews "
                "or MultiViewsTransform, or one that returns a tensor."
            )
    return pair


class PairedViews(Compose):
    """Two changes, of which the first is drawn once for both views of a pair, as a MONAI Compose.

    `DCL`, `BIDSDataModule` and `TwoViews` do so. Called by itself, it draws both changes.

    Parameters
    ----------
    shared : callable
        From the input to what both views are made from: a flip that mirrors both or none.
    each : callable
        From that to one view.
    """

    def __init__(self, shared: Callable[[Any], Any], each: Callable[[Any], Any]) -> None:
        super().__init__((shared, each))
        self.shared, self.each = shared, each


def draw_view(views: Callable[[Any], Any], x: Any, *key: object) -> Any:
    """Return one view of `x` that depends on `x` and `key` alone, without MONAI's metadata.

    Parameters
    ----------
    views : callable
        One input in, one view out. It runs under generators of torch, numpy and `random` seeded
        by `key`; MONAI transforms, inside composes too, get their own by ``set_random_state``.
    x : Tensor
        As `views` takes it; they get a copy, since some of MONAI's transforms write into their
        input.
    *key : object
        For instance seed, epoch, participant, view.

    Notes
    -----
    The caller's generators are left as they were. The view is computed on one thread, as it is
    in a loader's worker, so that no bit depends on who computes it. A MONAI transform hidden in
    a function is beyond reach: pass it in a Compose.
    """
    with _one_thread(), keyed(*key):
        seed_transforms(views, key)
        if isinstance(x, Tensor):
            view = views(x.clone(memory_format=torch.contiguous_format))
        else:
            view = views(copy.copy(x))
    return view.as_tensor() if isinstance(view, MetaTensor) else view


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def seed_transforms(views: Any, key: tuple[object, ...]) -> None:
    """Give MONAI's transforms one generator, from which they draw in turn; one each takes longer."""
    if isinstance(views, Randomizable):
        _share(views, np.random.RandomState(key_seed(*key, "monai")))
        return
    parts = getattr(views, "transforms", ())
    for i, part in enumerate(parts if isinstance(parts, list | tuple) else ()):
        seed_transforms(part, (*key, i))


def _share(views: Any, generator: np.random.RandomState) -> None:
    if isinstance(views, Compose):
        Randomizable.set_random_state(views, state=generator)
        for part in views.transforms:
            _share(part, generator)
    elif isinstance(views, Randomizable):
        views.set_random_state(state=generator)


def volume_views(strength: str = "default", kind: str = "intensity", flip: str = "view") -> Compose:
    """Return the random changes that a brain keeps its identity under, as a MONAI Compose.

    Parameters
    ----------
    strength : {"light", "default", "strong"}
        How far and how often, see the table.
    kind : {"intensity", "probability", "signed"}
        What the numbers are. Tissue maps and signed maps get no gamma and no bias field.
    flip : {"view", "pair", "none"}
        Whether left and right are flipped in each view by itself, in both views of a pair or in
        none (see `PairedViews`), or never. A flip of one view sets left regions against right ones.

    Returns
    -------
    monai.transforms.Compose
        Takes and gives float32 (c, d, h, w) or (d, h, w), the first spatial axis left to right
        (RAS), voxels of about equal sides. Voxels that are exactly 0 count as background.

    Notes
    -----
    In this order; magnitudes are drawn uniformly up to the limit given:

    ============  ==========================================  ======  =======  ======
    change        limit                                       light   default  strong
    ============  ==========================================  ======  =======  ======
    flip          left-right only, probability                0.5     0.5      0.5
    placement     probability                                 0.7     0.9      1.0
    .             rotation about each axis, ± degrees         2.5     5        9
    .             scaling, ±                                  2 %     4 %      8 %
    .             resized crop: cut off each side length      4 %     8 %      15 %
    .             shift, ± of each side length                1 %     2 %      4 %
    blur          probability                                 0.25    0.5      0.7
    .             sigma in voxels                             0.4     0.6      0.8
    contrast      probability                                 0.5     0.8      0.9
    .             gain, ±                                     5 %     10 %     20 %
    .             gamma, ± of its logarithm                   0.05    0.1      0.2
    bias field    probability                                 0.3     0.5      0.7
    .             largest ± of the logarithm                  0.1     0.2      0.35
    noise         probability                                 0.3     0.5      0.7
    .             of the foreground's standard deviation      3 %     6 %      12 %
    cutout        probability                                 0.3     0.5      0.7
    .             boxes                                       1       2        4
    .             side of a box, of each side length          20 %    25 %     30 %
    ============  ==========================================  ======  =======  ======

    Background outside a brain mask stays exactly 0, save that placement moves it and cutout adds
    to it. Flip, rotation, scaling, crop and shift are one step (see `RandSpatial`).
    """
    if strength not in STRENGTHS:
        raise UsageError(f"strength is one of {', '.join(STRENGTHS)}; got {strength!r}.")
    if kind not in ("intensity", "probability", "signed"):
        raise UsageError(f"kind is one of intensity, probability, signed; got {kind!r}.")
    if flip not in ("view", "pair", "none"):
        raise UsageError(f"flip is one of view, pair, none; got {flip!r}.")
    limits = STRENGTHS[strength]
    plain = kind == "intensity"
    steps: list[RandomizableTransform] = [
        RandSpatial(**limits["placement"], flip=0.5 if flip == "view" else 0.0),
        RandBlur(**limits["blur"], keep_zero=plain),
        RandContrast(**limits["contrast"] | ({} if plain else {"gamma": 0.0})),
        *([RandBiasField(**limits["bias"])] if plain else []),
        RandForegroundNoise(**limits["noise"]),
        RandCutout(**limits["cutout"]),
    ]
    views = Compose(steps)
    return PairedViews(RandSpatial(prob=0, flip=0.5), views) if flip == "pair" else views

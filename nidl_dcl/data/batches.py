"""Batches as the estimator takes them: two views of each sample, or one. Anything else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

TWO_VIEWS_TO_ENCODE = (
    "transform got two views of each sample; it takes batches x, (x,) or (x, y). A target of the "
    "shape of its sample, such as a mask, is told from a view in a Dataset of tuples (x, y) only."
)


def two_views(batch: Any) -> tuple[tuple[Tensor, Tensor], Any]:
    """Return ((X1, X2), y) of a batch ``[X1, X2]`` or ``([X1, X2], y)``, y being None in the first.

    Raises
    ------
    ValueError
        When a sequence is not of that form, or its views differ in shape or dtype.
    TypeError
        When the batch or a view is of another type.
    """
    if not isinstance(batch, tuple | list):
        raise TypeError(f"A batch must be [X1, X2] or ([X1, X2], y), got {describe(batch)}.")
    views, y = batch, None
    if len(batch) in (1, 2) and isinstance(batch[0], tuple | list):
        views, y = batch[0], (batch[1] if len(batch) == 2 else None)
    if len(views) != 2:
        raise ValueError(f"A batch must be [X1, X2] or ([X1, X2], y), got {describe(batch)}.")
    x1, x2 = views
    if not (isinstance(x1, Tensor) and isinstance(x2, Tensor)):
        raise TypeError(f"Both views must be tensors, got {describe(batch)}.")
    if x1.ndim == 0 or x1.shape != x2.shape:
        raise ValueError(f"Both views must have one shape (n, ...), got {describe(batch)}.")
    if x1.dtype != x2.dtype:
        raise ValueError(
            f"Both views must have one dtype, got {x1.dtype} and {x2.dtype}. If the second tensor "
            "is a target or a mask, give fit the dataset, with items (x, y), in place of a loader."
        )
    return (_plain(x1), _plain(x2)), y


def single_view(batch: Any) -> tuple[Tensor, Any]:
    """Return (x, y) of a batch ``x``, ``(x,)`` or ``(x, y)``, y being None in the first two.

    Raises
    ------
    ValueError
        When the batch has two views of each sample.
    TypeError
        When the batch is of another type.
    """
    if isinstance(batch, Tensor):
        return _plain(batch), None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2) and isinstance(batch[0], Tensor):
        x = batch[0]
        y = batch[1] if len(batch) == 2 else None
        labeled = hasattr(batch, "_fields")  # a named tuple: `Labeled`, or a caller's own
        if (
            not labeled
            and isinstance(y, Tensor)
            and y.is_floating_point()
            and y.ndim > 1
            and y.shape == x.shape
        ):
            raise ValueError(TWO_VIEWS_TO_ENCODE)
        return _plain(x), y
    raise TypeError(f"transform takes batches x, (x,) or (x, y) of tensors, got {describe(batch)}.")


def _plain(x: Tensor) -> Tensor:
    """Return a tensor without MONAI's metadata, which few operations of a network support."""
    return x.as_tensor() if hasattr(x, "as_tensor") else x


def describe(value: Any, depth: int = 0) -> str:
    """Return in a few words what a value (at a depth of a batch) is made of; three levels of it."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"ndarray{value.shape}"
    if isinstance(value, tuple | list) and depth < 3:
        inside = ", ".join(describe(v, depth + 1) for v in value[:4])
        more = ", …" if len(value) > 4 else ""
        return f"{type(value).__name__}({inside}{more})"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)[:4]}"
    return type(value).__name__


def finite_rows(x: Tensor) -> Tensor:
    """Return which samples hold only finite numbers."""
    # The sum takes a tenth of the time, and is nearly always finite.
    if len(x) == 0 or bool(torch.isfinite(x.sum())):
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    return torch.isfinite(x).flatten(1).all(1)


def first_bad(good: Tensor) -> int:
    """Return the number of the first sample that is not good."""
    return int((~good).int().argmax())

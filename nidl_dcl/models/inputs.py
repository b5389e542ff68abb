"""Datasets of samples from what a caller gives to `fit` and `transform`: arrays and images.

Tables of two axes are scikit-learn's to check, and are left to `base`; loaders are taken as they are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd
import torch
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from nidl_dcl.data.batches import describe, finite_rows, first_bad
from nidl_dcl.data.datasets import ArraySamples, JitterTransform, read_item
from nidl_dcl.data.views import volume_views
from nidl_dcl.errors import NonFiniteError
from nidl_dcl.volumes.preparation import Preparation, common_shape

ACCEPTED = (
    "a DataLoader, a LightningDataModule, a Dataset, an array or tensor (n, ...), a list of arrays "
    "of one shape, image paths or nibabel images, or a table with a column path"
)
"""What `fit` and `transform` take."""


def stacked(X: Any) -> Any:
    """Return a list of arrays or tensors of two axes or more as one array, else X as it is."""
    if not isinstance(X, list | tuple) or not X:
        return X
    if not all(isinstance(x, np.ndarray | Tensor) and x.ndim > 1 for x in X):
        return X
    shapes = {tuple(x.shape) for x in X}
    if len(shapes) > 1:
        raise ValueError(f"The arrays of a list must have one shape, got {sorted(shapes)[:3]}.")
    return torch.stack(list(X)) if all(isinstance(x, Tensor) for x in X) else np.stack(X)


def is_array(X: Any) -> bool:
    """Return whether X is a tensor, or an array of more than two axes."""
    if isinstance(X, Tensor):
        return True
    return getattr(X, "ndim", None) is not None and not isinstance(X, pd.DataFrame) and X.ndim > 2


def is_table(X: Any) -> bool:
    """Return whether X is for scikit-learn to check: an array, a table or a list of rows."""
    if isinstance(X, list | tuple):
        return all(isinstance(x, Number | list | tuple) or hasattr(x, "__array__") for x in X)
    return hasattr(X, "__array__") or hasattr(X, "toarray")


def array_samples(X: Any, *, volumetric: bool) -> ArraySamples:
    """Return the samples of an array that `is_array`; volumes without channel axis get one.

    A ValueError refuses what is not real numbers, a NonFiniteError names the first bad sample.
    """
    array: Any = X.detach() if isinstance(X, Tensor) else np.asarray(X)
    good = None
    if isinstance(array, np.ndarray):
        if array.dtype == object or not np.issubdtype(array.dtype, np.number):
            raise ValueError(f"X must hold numbers, got an array of dtype {array.dtype}.")
        if np.iscomplexobj(array):
            raise ValueError("Complex data not supported.")
        if np.issubdtype(array.dtype, np.floating):
            good = torch.tensor([bool(np.isfinite(x).all()) for x in array], dtype=torch.bool)
    elif array.is_floating_point():
        good = finite_rows(array)
    if good is not None and not bool(good.all()):
        raise NonFiniteError(f"Sample {first_bad(good)} of X has NaN or infinite values.")
    if volumetric and array.ndim == 3:
        raise ValueError(
            f"X has the shape {tuple(array.shape)}; volumes have (n, d, h, w) or (n, c, d, h, w). "
            "Give a single volume as X[None]."
        )
    return ArraySamples(array[:, None] if volumetric and array.ndim == 4 else array)


def find_images(X: Any) -> pd.DataFrame | None:
    """Return paths (or nibabel images) and masks, where X is or holds such; else None."""
    if isinstance(X, str | os.PathLike | SpatialImage):
        X = [X]
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


def choose_preparation(images: pd.DataFrame) -> Preparation:
    """Return an input contract that suits the images found: one shape that holds all of them."""
    spacing = Preparation().spacing
    masked = bool(images["mask_path"].notna().all())
    shape = common_shape(list(images["path"]), spacing, masked)
    return Preparation(spacing=spacing, shape=shape, masked=masked)


def default_views(x: Any) -> Callable[[Tensor], Tensor]:
    """Return the views of samples like `x`: of a volume, or of anything else."""
    return volume_views() if getattr(x, "ndim", 0) == 4 else JitterTransform()


def warn_of_pairs(item: Any) -> None:
    """Say of a dataset's item that could be two views, and is not, what it is taken for."""
    if isinstance(item, tuple):
        x, y = read_item(item)
        if (
            isinstance(y, Tensor)
            and y.is_floating_point()
            and y.ndim
            and y.shape == getattr(x, "shape", None)
        ):
            warnings.warn(
                f"Items of the dataset, {describe(item)}, are taken for a sample and its target, "
                "because they are tuples. Two views that are drawn already are a list: [x1, x2].",
                stacklevel=4,
            )

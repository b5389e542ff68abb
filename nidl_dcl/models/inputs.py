"""Datasets of samples from what a caller gives to `fit` and `transform`: arrays and images.

Tables of two axes are scikit-learn's to check, and are left to `base`; loaders are taken as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from nidl_dcl.data.batches import finite_rows, first_bad
from nidl_dcl.data.datasets import ArraySamples, JitterTransform
from nidl_dcl.data.views import volume_views
from nidl_dcl.errors import NonFiniteError
from nidl_dcl.volumes.preparation import Preparation, common_shape


def is_array(X: Any) -> bool:
    """Return whether X is a tensor, or an array of more than two axes."""
    if isinstance(X, Tensor):
        return True
    return getattr(X, "ndim", None) is not None and not isinstance(X, pd.DataFrame) and X.ndim > 2


def array_samples(X: Any, *, volumetric: bool) -> ArraySamples:
    """Return the samples of an array that `is_array`; volumes without channel axis get one.

    A ValueError refuses what is not real numbers, a NonFiniteError names the first bad sample.
    """
    if isinstance(X, Tensor):
        array: Any = X.detach()
    else:
        array = np.asarray(X)
        if array.dtype == object or not np.issubdtype(array.dtype, np.number):
            raise ValueError(f"X must hold numbers, got an array of dtype {array.dtype}.")
        if np.iscomplexobj(array):
            raise ValueError("Complex data not supported.")
    tensor = torch.as_tensor(array)
    if tensor.is_floating_point():
        good = finite_rows(tensor)
        if not bool(good.all()):
            raise NonFiniteError(f"Sample {first_bad(good)} of X has NaN or infinite values.")
    return ArraySamples(array[:, None] if volumetric and array.ndim == 4 else array)


def find_images(X: Any) -> pd.DataFrame | None:
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


def choose_preparation(images: pd.DataFrame) -> Preparation:
    """Return an input contract that suits the images found: one shape that holds all of them."""
    spacing = Preparation().spacing
    masked = bool(images["mask_path"].notna().all())
    shape = common_shape(list(images["path"]), spacing, masked)
    return Preparation(spacing=spacing, shape=shape, masked=masked)


def default_views(item: Any) -> Callable[[Tensor], Tensor]:
    """Return the views of samples like one item of a dataset: of a volume, or of anything else."""
    x = item[0] if isinstance(item, tuple | list) else item
    return volume_views() if getattr(x, "ndim", 0) == 4 else JitterTransform()

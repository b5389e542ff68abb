"""From a BIDS dataset of 3D brain MRI to subject embeddings and phenotype predictions.

Importing this package is cheap: torch, lightning, monai and bids load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nidl_dcl._version import __version__

_HOME = {
    "BIDSDataModule": "data.datamodule",
    "BaseEstimator": "models.base",
    "DCL": "models.dcl",
    "DCLLoss": "models.losses",
    "DCLWLoss": "models.losses",
    "MultiViewsTransform": "data.views",
    "TwoViews": "data.views",
    "index_bids": "bids.index",
    "load_embeddings": "output.load",
    "load_model": "models.serialization",
    "predict_phenotype": "evaluation.prediction",
}

__all__ = [
    "DCL",
    "BIDSDataModule",
    "BaseEstimator",
    "DCLLoss",
    "DCLWLoss",
    "MultiViewsTransform",
    "TwoViews",
    "__version__",
    "index_bids",
    "load_embeddings",
    "load_model",
    "predict_phenotype",
]

if TYPE_CHECKING:
    from nidl_dcl.bids.index import index_bids
    from nidl_dcl.data.datamodule import BIDSDataModule
    from nidl_dcl.data.views import MultiViewsTransform, TwoViews
    from nidl_dcl.evaluation.prediction import predict_phenotype
    from nidl_dcl.models.base import BaseEstimator
    from nidl_dcl.models.dcl import DCL
    from nidl_dcl.models.losses import DCLLoss, DCLWLoss
    from nidl_dcl.models.serialization import load_model
    from nidl_dcl.output.load import load_embeddings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nidl_dcl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"nidl_dcl.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

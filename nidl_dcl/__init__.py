"""From a BIDS dataset of 3D brain MRI to subject embeddings and phenotype predictions.

Importing this package is cheap: torch, lightning, monai and bids load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BIDSDataModule": "datamodule",
    "BaseEstimator": "estimator",
    "DCL": "dcl",
    "DCLLoss": "loss",
    "DCLWLoss": "loss",
    "MultiViewsTransform": "views",
    "TwoViews": "views",
    "index_bids": "bids_index",
    "load_embeddings": "embedding_table",
    "load_model": "model_folder",
    "predict_phenotype": "prediction",
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
    from nidl_dcl.bids_index import index_bids
    from nidl_dcl.datamodule import BIDSDataModule
    from nidl_dcl.dcl import DCL
    from nidl_dcl.embedding_table import load_embeddings
    from nidl_dcl.estimator import BaseEstimator
    from nidl_dcl.loss import DCLLoss, DCLWLoss
    from nidl_dcl.model_folder import load_model
    from nidl_dcl.prediction import predict_phenotype
    from nidl_dcl.views import MultiViewsTransform, TwoViews


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nidl_dcl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"nidl_dcl.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

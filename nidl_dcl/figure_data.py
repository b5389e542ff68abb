"""What the report draws and no other stage writes: example views, embeddings in two dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA

from nidl_dcl.datamodule import BIDSDataModule
from nidl_dcl.randomness import key_seed
from nidl_dcl.writing import write_json, write_npy, write_tsv

__all__ = ["write_plane", "write_views"]

_SHOWN = 4


def write_views(figures: Path, module: BIDSDataModule) -> None:
    """Write a few prepared volumes with their two views of the first epoch, for the report."""
    samples = module.two_views("train")
    count = min(_SHOWN, len(samples))
    chosen = np.linspace(0, len(samples) - 1, count).round().astype(int)
    rows, arrays = [], []
    for number in chosen:
        who, images = module.participants("train")[number]
        pair = samples[0, int(number)]
        image = images[key_seed(samples.seed, 0, who, "image") % len(images)]
        arrays.append(torch.stack([samples.samples[image][0], pair[0][0], pair[1][0]]).numpy())
        rows.append({"participant_id": who, "path": module.images["path"].iloc[image]})
    write_npy(figures / "views.npy", np.stack(arrays).astype(np.float32))
    write_tsv(figures / "views.tsv", pd.DataFrame(rows))
    write_json(figures / "views.json", {"spacing": list(module.preparation.spacing)})


def write_plane(figures: Path, module: BIDSDataModule, matrix: np.ndarray) -> None:
    """Write the embeddings' first two principal components, with phenotypes, for the report."""
    if min(matrix.shape) < 2:
        return
    pca = PCA(n_components=2, svd_solver="full").fit(matrix)
    plane = pca.transform(matrix)
    table = module.images[["participant_id", "session_id"]].copy()
    table["x"], table["y"] = plane[:, 0], plane[:, 1]
    for column in module.phenotype_columns:
        if column not in table:
            table[column] = module.images[column]
    write_tsv(figures / "embedding_2d.tsv", table)
    write_json(
        figures / "embedding_2d.json",
        {
            "method": "principal components",
            "explained_variance": [float(v) for v in pca.explained_variance_ratio_],
        },
    )

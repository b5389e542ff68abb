"""What is written for the eye alone: example views, prepared volumes, embeddings in a plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA

from nidl_dcl.datamodule import BIDSDataModule
from nidl_dcl.figures import draw_mosaic
from nidl_dcl.randomness import key_seed
from nidl_dcl.writing import to_tsv, write_bytes, write_json, write_npy, write_tsv

__all__ = ["shows_plane", "write_mosaic", "write_plane", "write_views"]

_SHOWN = 4
_TILES = 24


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


def write_mosaic(figures: Path, module: BIDSDataModule) -> None:
    """Write slices of prepared volumes, evenly chosen, as one picture; nothing if it is there."""
    assert module.volumes is not None
    count = min(_TILES, len(module.volumes))
    chosen = np.linspace(0, len(module.volumes) - 1, count).round().astype(int)
    table = module.images.iloc[chosen][["participant_id", "session_id", "path"]].assign(
        prepared=[module.volumes.name(int(i)) for i in chosen]
    )
    listing, picture = figures / "volumes.tsv", figures / "volumes.png"
    if picture.is_file() and listing.is_file() and listing.read_text("utf-8") == to_tsv(table):
        return
    names = [
        " ".join(str(part) for part in row if not pd.isna(part))
        for row in table[["participant_id", "session_id"]].itertuples(index=False)
    ]
    volumes = [module.volumes[int(i)][0].numpy() for i in chosen]
    write_bytes(picture, draw_mosaic(volumes, names, module.preparation.spacing))
    write_tsv(listing, table)


def shows_plane(figures: Path, module: BIDSDataModule) -> bool:
    """Return whether the plane that is there shows the module's images."""
    if len(module.images) < 2:
        return True
    try:
        text = (figures / "embedding_2d.tsv").read_text("utf-8")
    except OSError:
        return False
    ids = module.images[["participant_id", "session_id"]]
    shown = ["\t".join(line.split("\t")[:2]) for line in text.splitlines()]
    return shown == to_tsv(ids).splitlines()


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

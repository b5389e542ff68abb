"""Figures and their data: volumes, their average, outliers, embeddings in a plane, retrieval.

Each function leaves files that are right already as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.evaluation.outliers import OUTLIER_MEASURES, rank_outliers
from nidl_dcl.evaluation.retrieval import distance_to_others, retrieve_participants
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.console import log_progress
from nidl_dcl.io.formats import keep_tsv, to_tsv, write_json, write_npy, write_tsv
from nidl_dcl.randomness import key_seed
from nidl_dcl.report.plots import draw_mosaic, draw_slices, slice_indices
from nidl_dcl.volumes.average import average_volumes

_SHOWN = 4

_TILES = 24

_THUMBNAILS = 8

_IDS = ["participant_id", "session_id", "run", "source"]


def draw_volumes(figures: Path, module: BIDSDataModule) -> None:
    """Write what prepared volumes look like: some of them, their average, those far from it."""
    write_mosaic(figures, module)
    write_average(figures, module)


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
    """Write the embeddings' first two principal components, with phenotypes, for the report.

    Parameters
    ----------
    figures : Path
        The folder ``figures/``.
    module : BIDSDataModule
        Set up.
    matrix : ndarray of shape (n_images, d)
        The embeddings.
    """
    if min(matrix.shape) < 2:
        return
    pca = PCA(n_components=2, svd_solver="full").fit(matrix)
    plane = pca.transform(matrix)
    table = module.images[["participant_id", "session_id"]].copy()
    table["x"], table["y"] = plane[:, 0], plane[:, 1]
    for column in module.table.phenotype_columns:
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


def write_average(figures: Path, module: BIDSDataModule) -> None:
    """Write the mean and the spread of all prepared volumes, and how far each is from the mean.

    The prepared volumes are read once, one at a time. Nothing is done if it was done for them.

    Parameters
    ----------
    figures : Path
        The folder ``figures/``.
    module : BIDSDataModule
        Set up.
    """
    volumes = module.volumes
    assert volumes is not None
    names = "\n".join(volumes.name(i) for i in range(len(volumes)))
    made_of = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()
    note = figures / "average.json"
    others = (figures / "average.npy", figures / "average.tsv", figures / "odd_pictures.tsv")
    if _made_of(note) == made_of and all(file.is_file() for file in others):
        return

    def each() -> Iterator[NDArray[np.float32]]:
        for i in range(len(volumes)):
            yield volumes[i][0].numpy()
            log_progress("average brain", i + 1, len(volumes))

    found = average_volumes(each(), volumes.shape[1:])
    table = module.images[_IDS].assign(distance=found.distance)
    rank = table["distance"].rank(ascending=False, method="first").astype(int)
    table.insert(len(_IDS), "rank", rank)
    write_npy(figures / "average.npy", np.stack([found.mean, found.sd]))
    write_tsv(figures / "average.tsv", table)
    _write_thumbnails(figures, "odd", module, rank.sort_values().index[:_SHOWN].tolist())
    spacing = module.preparation.spacing
    inside = found.mean > 0.1 * np.percentile(np.abs(found.mean), 99)
    write_json(
        note,
        {
            "n_images": len(table),
            "n_participants": int(table["participant_id"].nunique()),
            "spacing": list(spacing),
            "block_mm": [edge * mm for edge, mm in zip(found.block, spacing, strict=True)],
            "mean_inside": float(found.mean[inside].mean()) if inside.any() else None,
            "sd_inside": float(found.sd[inside].mean()) if inside.any() else None,
            "distance_median": float(np.median(found.distance)),
            "of": made_of,
        },
    )


def write_outliers(
    figures: Path, module: BIDSDataModule, rows: Sequence[int], matrix: NDArray[np.float32]
) -> None:
    """Write which images stand out, by embedding, average brain and quality, and pictures of some.

    Distances from the average brain and measures of quality are those that stand in
    ``average.tsv`` and ``logs/quality.tsv`` so far.

    Parameters
    ----------
    figures : Path
        The folder ``figures/``.
    module : BIDSDataModule
        Set up.
    rows : sequence of int
        Of its images.
    matrix : ndarray of shape (n_rows, d)
        Their embeddings.
    """
    table = module.images.iloc[list(rows)][_IDS].reset_index(drop=True)
    people = module.images["person_id"].iloc[list(rows)].tolist()
    table["embedding_distance"] = distance_to_others(matrix, people)
    for file, columns in (
        (figures / "average.tsv", {"distance": "brain_distance"}),
        (figures.parent / "logs" / "quality.tsv", {name: name for name in OUTLIER_MEASURES}),
    ):
        if file.is_file():
            known = pd.read_csv(file, sep="\t", na_values=["n/a"], keep_default_na=False, quoting=3)
            known = known.drop_duplicates("source").set_index("source").rename(columns=columns)
            for name in (c for c in columns.values() if c in known):
                table[name] = known[name].reindex(table["source"]).to_numpy()
    ranked = rank_outliers(table.assign(row=list(rows)))
    shown = ranked["row"].tolist()[:_THUMBNAILS]
    keep_tsv(figures / "outliers.tsv", ranked.drop(columns="row"))
    _write_thumbnails(figures, "outlier", module, shown)


def write_retrieval(
    figures: Path,
    module: BIDSDataModule,
    rows: Sequence[int],
    features: Mapping[str, Sequence[NDArray[np.float32]]],
    seed: int,
) -> None:
    """Write how often the nearest neighbor of an image is of the same participant.

    Nothing is done if it was done for these images and features, or for them and others.

    Parameters
    ----------
    figures : Path
        The folder ``figures/``.
    module : BIDSDataModule
        Set up.
    rows : sequence of int
        Of its images.
    features : mapping of str to sequence of ndarray of shape (n_rows, d)
        Kinds of features, one or several arrays each.
    seed : int
        Of the interval.
    """
    images = module.images.iloc[list(rows)]
    sessions = [None if pd.isna(s) else str(s) for s in images["session_id"]]
    contents, people = images["content"].tolist(), images["person_id"].tolist()
    digest = hashlib.blake2b(repr([people, sessions, contents, seed]).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(next(iter(features.values()))[0]).tobytes())
    files, made_of = (figures / "retrieval.tsv", figures / "retrieval.json"), digest.hexdigest()
    if files[0].is_file() and _made_of(files[1]) == made_of:
        known = json.loads(files[1].read_text("utf-8")).get("features")
        if isinstance(known, list) and set(features) <= set(known):
            return
    table, words = retrieve_participants(features, people, sessions, contents, seed=seed)
    write_tsv(files[0], table)
    write_json(files[1], {**words, "features": list(features), "of": made_of})


def _made_of(note: Path) -> str | None:
    try:
        return str(json.loads(note.read_text("utf-8"))["of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_thumbnails(
    figures: Path, label: str, module: BIDSDataModule, rows: Sequence[int]
) -> None:
    """Write slices of some prepared volumes, ``<label>_1.png`` and so on; older ones are removed."""
    assert module.volumes is not None
    table = module.images.iloc[list(rows)][_IDS].assign(
        picture=[f"{label}_{number}.png" for number in range(1, len(rows) + 1)],
        prepared=[module.volumes.name(int(i)) for i in rows],
    )
    listing = figures / f"{label}_pictures.tsv"
    files = [figures / name for name in table["picture"]]
    if (
        listing.is_file()
        and listing.read_text("utf-8") == to_tsv(table)
        and all(file.is_file() for file in files)
    ):
        return
    for old in figures.glob(f"{label}_*.png"):
        if old not in files:
            old.unlink()
    spacing = module.preparation.spacing
    for i, file in zip(rows, files, strict=True):
        volume = module.volumes[int(i)][0].numpy()
        low, high = np.percentile(volume, [0.5, 99.7])
        at = slice_indices(volume, spacing)
        drawn = draw_slices(volume, spacing, at=at, window=(low, high), width=3.2)
        write_bytes(file, drawn)
    write_tsv(listing, table)

"""The features that embeddings have to beat: untrained encoders, and the voxels themselves.

Reads each prepared volume once, so it measures image quality, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.io.console import log_progress
from nidl_dcl.models.inference import embed_volumes
from nidl_dcl.randomness import key_seed
from nidl_dcl.volumes.quality import QUALITY_METRICS, measure_quality

UNTRAINED_SEEDS = 3
"""Untrained encoders, whose scores are averaged."""


def read_voxels(module: BIDSDataModule, rows: Sequence[int]) -> tuple[np.ndarray, pd.DataFrame]:
    """Read each prepared volume once.

    Parameters
    ----------
    module : BIDSDataModule
        Set up.
    rows : sequence of int
        Of its images.

    Returns
    -------
    voxels : ndarray, shape (n_rows, n_voxels)
        Averaged over blocks of about 8 mm.
    quality : DataFrame
        ``participant_id session_id run source`` and the columns of `QUALITY_METRICS`.
    """
    volumes = module.volumes
    assert volumes is not None
    images = module.images.iloc[list(rows)].reset_index(drop=True)
    spacing = volumes.preparation.spacing
    coarse, measured = [], []
    for done, (i, voxel_mm) in enumerate(zip(rows, images["voxel_mm"], strict=True), 1):
        volume = volumes[i][0].numpy()
        coarse.append(average_blocks(volume, spacing))
        measured.append({"voxel_mm": voxel_mm, **measure_quality(volume, spacing)})
        log_progress("voxels and image quality", done, len(rows))
    quality = pd.DataFrame(measured, columns=list(QUALITY_METRICS))
    ids = images[["participant_id", "session_id", "run", "source"]]
    return np.stack(coarse), pd.concat([ids, quality], axis=1)


def baseline_features(
    module: BIDSDataModule, rows: Sequence[int], voxels: np.ndarray, model: Any
) -> dict[str, Any]:
    """Return the features that the embeddings have to beat: untrained encoders, and voxels.

    Parameters
    ----------
    module : BIDSDataModule
        Set up; gives volumes and seed.
    rows : sequence of int
        Of its images.
    voxels : ndarray, shape (n_rows, n_voxels)
        As `read_voxels` returned them.
    model : DCL
        What gave the embeddings.
    """
    untrained = []
    for number in range(UNTRAINED_SEEDS):
        fresh = untrained_encoder(model, module.random_state, number)
        untrained.append(embed_untrained(fresh, module, rows, f"untrained encoder {number + 1}"))
    return {"untrained": untrained, "voxels": Baseline(voxels, pca=True)}


def default_baselines(model: Any, data: BIDSDataModule) -> dict[str, Any]:
    """Return the baselines of the command, for all images of a data module.

    Parameters
    ----------
    model : DCL
        What gave the embeddings.
    data : BIDSDataModule
        Set up here, if it is not; its images must be prepared as the model's were.

    Raises
    ------
    UsageError
        For other data than a `BIDSDataModule`.
    """
    if not isinstance(data, BIDSDataModule):
        raise UsageError(
            f"baselines='default' reads voxels from a BIDSDataModule; data is a {type(data).__name__}. "
            "Compute the baselines yourself, and give them as a dict."
        )
    data.setup()
    rows = range(len(data.images))
    return baseline_features(data, rows, read_voxels(data, rows)[0], model)


def embed_untrained(
    model: Any, module: BIDSDataModule, rows: Sequence[int], title: str
) -> np.ndarray:
    """Return the embeddings of some images by a model that is kept nowhere.

    Parameters
    ----------
    model : DCL
        From `untrained_encoder`.
    module : BIDSDataModule
        Set up.
    rows : sequence of int
        Of its images.
    title : str
        Of the progress.
    """
    assert module.volumes is not None
    matrix, _ = embed_volumes(
        model,
        module.volumes,
        digest="untrained",
        num_workers=module.num_workers,
        progress=lambda what, done, total: log_progress(f"{title}: {what}", done, total),
    )
    return matrix[list(rows)]


def untrained_encoder(known: Any, seed: int, number: int = 0) -> Any:
    """Return a model like another before training, one of several by its number.

    It leaves out the same regions: which are covered by the images is no matter of weights.

    Parameters
    ----------
    known : DCL
        Gives the arguments.
    seed, number : int
        Which weights.

    Returns
    -------
    DCL
    """
    own = {"random_state": key_seed(seed, "untrained", number), "devices": 1}
    fresh = type(known)(**{**known.get_params(), **own})
    fresh.fitted = True
    buffers = dict(known.encoder.named_buffers())
    kept = {name: buffers[name] for name in buffers if name.rpartition(".")[2] == "coverage"}
    fresh.encoder.load_state_dict(kept, strict=False)
    return fresh


def average_blocks(volume: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return a volume of voxels of `spacing` mm averaged over blocks of about 8 mm, as a vector."""
    factor = [max(1, round(8 / s)) for s in spacing]
    shape = [n // f for n, f in zip(volume.shape, factor, strict=True)]
    cut = volume[tuple(slice(0, n * f) for n, f in zip(shape, factor, strict=True))]
    blocks = cut.reshape(shape[0], factor[0], shape[1], factor[1], shape[2], factor[2])
    return blocks.mean(axis=(1, 3, 5)).ravel()

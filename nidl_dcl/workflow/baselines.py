"""The features that embeddings have to beat: untrained encoders, and the voxels themselves.

Reads each prepared volume once, so it measures image quality, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.evaluation.features import Baseline
from nidl_dcl.io.console import NullReporter
from nidl_dcl.models.dcl import DCL
from nidl_dcl.models.inference import embed_volumes
from nidl_dcl.models.serialization import load_model
from nidl_dcl.randomness import key_seed
from nidl_dcl.volumes.quality import QUALITY_METRICS, measure_quality
from nidl_dcl.workflow.options import RunOptions

__all__ = ["baseline_features", "read_voxels", "untrained_encoder"]

_UNTRAINED_SEEDS = 3


def read_voxels(
    module: BIDSDataModule, rows: Sequence[int], console: NullReporter
) -> tuple[np.ndarray, pd.DataFrame]:
    """Read each prepared volume once.

    Parameters
    ----------
    module : BIDSDataModule
        Set up.
    rows : sequence of int
        Of its images.
    console : Quiet
        Told of progress.

    Returns
    -------
    voxels : ndarray, shape (n_rows, n_voxels)
        Averaged over blocks of about 8 mm.
    quality : DataFrame
        ``participant_id session_id run source`` and the columns of `MEASURES`.
    """
    volumes = module.volumes
    assert volumes is not None
    spacing = volumes.preparation.spacing
    factor = [max(1, round(8 / s)) for s in spacing]
    coarse, measured = [], []
    for done, i in enumerate(rows, 1):
        volume = volumes[i][0].numpy()
        coarse.append(_coarse(volume, factor))
        measured.append({"voxel_mm": module.voxels[i], **measure_quality(volume, spacing)})
        console.progress("voxels and image quality", done, len(rows))
    ids = module.images.iloc[list(rows)][["participant_id", "session_id", "run", "source"]]
    quality = pd.DataFrame(measured, columns=list(QUALITY_METRICS))
    return np.stack(coarse), pd.concat([ids.reset_index(drop=True), quality], axis=1)


def baseline_features(
    module: BIDSDataModule,
    rows: Sequence[int],
    voxels: np.ndarray,
    folder: Path,
    run: RunOptions,
    trust: Sequence[str],
    console: NullReporter,
) -> dict[str, Any]:
    """Return the features that the embeddings have to beat: untrained encoders, and voxels."""
    volumes = module.volumes
    assert volumes is not None
    known = load_model(folder, trust=trust)
    untrained = []
    for number in range(_UNTRAINED_SEEDS):
        fresh = untrained_encoder(known, run.random_seed, number)
        matrix, _ = embed_volumes(
            fresh,
            volumes,
            digest="untrained",
            num_workers=run.nprocs or 0,
            progress=partial(_retitled, console, f"untrained encoder {number + 1}"),
        )
        untrained.append(matrix[list(rows)])
    return {"untrained": untrained, "voxels": Baseline(voxels, pca=True)}


def untrained_encoder(known: DCL, seed: int, number: int = 0) -> DCL:
    """Return a model like `known` before training, one of several by its number."""
    own = {"random_state": key_seed(seed, "untrained", number), "devices": 1}
    fresh = DCL(**{**known.get_params(), **own})
    fresh.fitted = True
    return fresh


def _coarse(volume: np.ndarray, factor: Sequence[int]) -> np.ndarray:
    """Return a volume averaged over blocks of about 8 mm, as a vector."""
    shape = [n // f for n, f in zip(volume.shape, factor, strict=True)]
    cut = volume[tuple(slice(0, n * f) for n, f in zip(shape, factor, strict=True))]
    blocks = cut.reshape(shape[0], factor[0], shape[1], factor[1], shape[2], factor[2])
    return blocks.mean(axis=(1, 3, 5)).ravel()


def _retitled(console: NullReporter, title: str, what: str, done: int, total: int) -> None:
    console.progress(f"{title}: {what}", done, total)

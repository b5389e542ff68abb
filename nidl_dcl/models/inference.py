"""Embeddings of prepared volumes, cached by content, so that interrupted runs resume.

Preparing volumes is left to `nidl_dcl.volumes`, writing tables to `nidl_dcl.output`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

from nidl_dcl.data.loaders import image_loader
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.volumes.cache import PreparedVolumes

_CHUNK = 64


def embed_volumes(
    model: Any,
    volumes: PreparedVolumes,
    *,
    digest: str,
    memory: Path | None = None,
    num_workers: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[np.ndarray, int]:
    """Compute the embeddings of all volumes that are not in the cache.

    Parameters
    ----------
    model : DCL
        Fitted.
    volumes : PreparedVolumes
        Embedded in batches of one size, so that a row never depends on the others.
    digest : str
        Name of the model in `memory`, such as a checksum of its weights.
    memory : Path, optional
        Cache folder.
    num_workers : int
        Loading workers.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    matrix : ndarray of shape (n, d), float32
        All embeddings.
    computed : int
        How many were not in the cache.
    """
    rows: dict[int, np.ndarray] = {}
    files: dict[int, Path] = {}
    if memory is not None:
        for i in range(len(volumes)):
            files[i] = memory / digest[:16] / f"{volumes.name(i)}.f4"
            if (known := _read_cached(files[i])) is not None:
                rows[i] = known
    missing = [i for i in range(len(volumes)) if i not in rows]
    for start in range(0, len(missing), _CHUNK):
        chunk = missing[start : start + _CHUNK]
        features = model.transform(image_loader(Subset(volumes, chunk), num_workers)).numpy()
        for i, row in zip(chunk, features, strict=True):
            rows[i] = row
            if memory is not None:
                body = row.astype("<f4").tobytes()
                checksum = hashlib.blake2b(body, digest_size=16).digest()
                write_bytes(files[i], body + checksum, lasting=False)
        if progress is not None:
            progress("embedding", start + len(chunk), len(missing))
    return np.stack([rows[i] for i in range(len(volumes))]).astype(np.float32), len(missing)


def _read_cached(file: Path) -> np.ndarray | None:
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return None
    body, digest = raw[:-16], raw[-16:]
    if not body or hashlib.blake2b(body, digest_size=16).digest() != digest:
        return None
    return np.frombuffer(body, "<f4")

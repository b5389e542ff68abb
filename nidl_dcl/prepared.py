"""Prepared volumes on disk: written once, read in every epoch, rebuilt when stale or damaged.

An entry is named by the image's and the mask's own file status and the preparation, holds half
precision (to which preparation rounds anyway) and ends with a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nidl_dcl.image_file import Check, check_volume
from nidl_dcl.volumes import Preparation, prepare_volume
from nidl_dcl.writing import write_bytes, write_json

__all__ = ["PreparedVolumes", "check_files", "in_threads"]

_DIGEST = 16


class PreparedVolumes(Dataset[Tensor]):
    """Prepared volumes by number, as float32 tensors of shape (1, d, h, w).

    Parameters
    ----------
    images : sequence of Path
        Image files.
    masks : sequence of Path or None
        Their brain masks, None where there is none.
    preparation : Preparation
        The input contract; its shape is set.
    folder : Path or None
        Where entries are kept; None prepares anew at each access.
    """

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path | None],
        preparation: Preparation,
        folder: Path | None,
    ) -> None:
        if preparation.shape is None:
            raise ValueError("PreparedVolumes needs a preparation with a shape.")
        self.images = list(images)
        self.masks = list(masks)
        self.preparation = preparation
        self.folder = folder

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image, mask = self.images[index], self.masks[index]
        if self.folder is None:
            return torch.from_numpy(prepare_volume(image, self.preparation, mask))
        entry = self._entry(index)
        volume = self._read(entry)
        if volume is None:
            prepared = prepare_volume(image, self.preparation, mask)
            raw = np.ascontiguousarray(prepared, dtype="<f2").tobytes()
            write_bytes(entry, raw + hashlib.blake2b(raw, digest_size=_DIGEST).digest())
            return torch.from_numpy(prepared)
        return volume

    def fill(self, workers: int = 1) -> Iterator[int]:
        """Write the entries that are missing; yield the number of each volume when it is ready."""
        yield from in_threads(lambda i: (self[i], i)[1], range(len(self)), workers)

    def name(self, index: int) -> str:
        """Return a name that changes with the image, its mask or the preparation."""
        mask = self.masks[index]
        key = [file_key(self.images[index]), mask and file_key(mask), self.preparation.to_dict()]
        return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()

    def _entry(self, index: int) -> Path:
        assert self.folder is not None
        name = self.name(index)
        return self.folder / name[:2] / f"{name}.f2"

    def _read(self, entry: Path) -> Tensor | None:
        try:
            raw = entry.read_bytes()
        except FileNotFoundError:
            return None
        body, digest = raw[:-_DIGEST], raw[-_DIGEST:]
        shape = (1, *(self.preparation.shape or ()))
        whole = len(body) == 2 * int(np.prod(shape))
        if not whole or hashlib.blake2b(body, digest_size=_DIGEST).digest() != digest:
            warnings.warn(f"{entry} is damaged; it is made again.", stacklevel=2)
            return None
        return torch.from_numpy(np.frombuffer(body, "<f2").reshape(shape).astype(np.float32))


def file_key(path: Path) -> list[Any]:
    """Return what changes when a file changes: path, size, times and inode."""
    status = path.stat()
    return [
        os.fspath(path),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
    ]


def check_files(
    paths: Sequence[Path], memory: Path | None, *, intensity: str, workers: int = 1
) -> Iterator[tuple[int, Check]]:
    """Open every file once and yield (number, what was found).

    Parameters
    ----------
    paths : sequence of Path
        Images.
    memory : Path or None
        JSON file of earlier results; files that have not changed since are not opened again.
    intensity : str
        Rule that the values must suit.
    workers : int
        Threads.
    """
    known: dict[str, list[str]] = {}
    if memory is not None and memory.is_file():
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
    found: dict[str, list[str]] = {}

    def check(number: int) -> tuple[int, Check]:
        try:
            key = json.dumps([*file_key(paths[number]), intensity])
        except OSError:
            return number, check_volume(paths[number], intensity=intensity)
        entry = known.get(key)
        if isinstance(entry, list) and len(entry) == 3:
            result = Check(*map(str, entry))
        else:
            result = check_volume(paths[number], intensity=intensity)
        found[key] = [result.status, result.code, result.message]
        return number, result

    yield from in_threads(check, range(len(paths)), workers)
    if memory is not None and {**known, **found} != known:
        write_json(memory, {**known, **found})


def in_threads(work: Callable[[int], Any], numbers: Iterable[int], workers: int) -> Iterator[Any]:
    """Yield ``work(number)`` in order, from `workers` threads when there is more than one."""
    if workers <= 1:
        for number in numbers:
            yield work(number)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(work, numbers)

"""Keep prepared volumes on disk: written once, read in every epoch, prepared again when damaged.

An entry is named by the content of the image and its mask and by the rules of preparation, so that it
is never stale. It holds half precision, to which preparation rounds anyway, and ends with a checksum.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nidl_dcl.errors import NoRoomError
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.file_cache import FileMemory, file_status
from nidl_dcl.status import Check, UnreadableVolumeError
from nidl_dcl.volumes.preparation import Preparation, prepare_volume
from nidl_dcl.volumes.reading import Sample, look_at

_crc32: Any = zlib.crc32

with suppress(ImportError):  # ten times as fast, the same numbers
    from isal import isal_zlib

    _crc32 = isal_zlib.crc32

FORMAT = 4
"""Number that grows whenever the entries, or the values that preparation gives, change."""

_DIGEST = 4
T = TypeVar("T")
R = TypeVar("R")


class PreparedVolumes(Dataset[Tensor]):
    """Prepared volumes by number, as float32 tensors of shape (1, d, h, w).

    Several processes may share a folder: entries appear whole, and all processes that write an entry
    write the same.

    Parameters
    ----------
    images : sequence of Path
        Image files.
    masks : sequence of Path or None
        Their brain masks, None where there is none.
    preparation : Preparation
        The input contract, with a shape.
    folder : Path or None
        Where entries are kept; None prepares the volume at each access.
    memory : FileMemory, optional
        Checksums of files read before.
    """

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path | None],
        preparation: Preparation,
        folder: Path | None,
        memory: FileMemory | None = None,
    ) -> None:
        if preparation.shape is None:
            raise ValueError("PreparedVolumes needs a preparation with a shape.")
        self.images = list(images)
        self.masks = list(masks)
        self.preparation = preparation
        self.folder = folder
        self.memory = memory or FileMemory()
        self.shape = (1, *preparation.shape)
        self._rules = preparation.rules()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if self.folder is None:
            return self._prepare(index)
        entry = self._entry(index)
        volume = self._read(entry)
        return self._write(entry, index) if volume is None else volume

    def _prepare(self, index: int) -> Tensor:
        image, mask = self.images[index], self.masks[index]
        return torch.from_numpy(prepare_volume(image, self.preparation, mask))

    @property
    def entry_bytes(self) -> int:
        """Size of one entry on disk."""
        return 2 * math.prod(self.shape) + _DIGEST

    def missing(self) -> list[int]:
        """Return the numbers of the volumes that have no entry of the right size yet."""
        if self.folder is None:
            return []
        return [i for i in range(len(self)) if not self._is_there(self._entry(i))]

    def fill(
        self, workers: int = 1, faults: dict[int, UnreadableVolumeError] | None = None
    ) -> Generator[tuple[int, int], None, None]:
        """Write the missing entries in several threads; yield (written, to be written) after each.

        The errors of volumes that cannot be prepared go to `faults`; without it they are raised.

        Raises
        ------
        UnreadableVolumeError
        NoRoomError
            Before the first one when the disk has no room for all, or when it runs full.
        """
        missing = self.missing()
        if not missing:
            return
        assert self.folder is not None
        free = _free(self.folder)
        if len(missing) * self.entry_bytes > free:
            raise NoRoomError(self._no_room(len(missing), free))

        def write(number: int) -> None:
            try:
                self._write(self._entry(number), number)
            except UnreadableVolumeError as error:
                if faults is None:
                    raise
                faults[number] = error

        for done, _ in enumerate(thread_map(write, missing, workers), 1):
            yield done, len(missing)
        self.memory.save()

    def name(self, index: int) -> str:
        """Return a name that changes with the content of image and mask, and with the rules."""
        mask = self.masks[index]
        image_sum = self.memory.sha256(self.images[index])
        # The mask of another model's preparation changes nothing in this one.
        mask_sum = mask and self.preparation.masked and self.memory.sha256(mask)
        key = [FORMAT, image_sum, mask_sum, self._rules]
        return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()

    def _entry(self, index: int) -> Path:
        assert self.folder is not None
        name = self.name(index)
        return self.folder / name[:2] / f"{name}.f2"

    def _is_there(self, entry: Path) -> bool:
        try:
            return entry.stat().st_size == self.entry_bytes
        except OSError:
            return False

    def _write(self, entry: Path, index: int) -> Tensor:
        prepared = self._prepare(index)
        raw = prepared.half().numpy().astype("<f2", copy=False).tobytes()
        try:
            write_bytes(entry, raw + _crc32(raw).to_bytes(_DIGEST, "little"), lasting=False)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            assert self.folder is not None
            raise NoRoomError(self._no_room(len(self.missing()), 0)) from error
        return prepared

    def _no_room(self, count: int, free: int) -> str:
        return (
            f"{self.folder}: {count} prepared volumes of {self.entry_bytes / 1e6:.1f} MB need "
            f"{count * self.entry_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. What is "
            "there stays usable. Make room and run the same command again, name a larger disk with "
            "--work-dir, or take a coarser --spacing."
        )

    def _read(self, entry: Path) -> Tensor | None:
        """Return the entry's volume; None when there is none, or a damaged one (with a warning)."""
        try:
            with entry.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                # Copy on write, since torch takes no memory that must not be written.
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
        except FileNotFoundError:
            return None
        body, digest = memoryview(content)[:-_DIGEST], content[-_DIGEST:]
        if size == self.entry_bytes and _crc32(body) == int.from_bytes(digest, "little"):
            if sys.byteorder == "big":
                values = torch.from_numpy(np.frombuffer(body, "<f2").astype(np.float32))
            else:
                values = torch.frombuffer(body, dtype=torch.float16).to(torch.float32)
            return values.view(self.shape)
        warnings.warn(f"{entry} is damaged; it is made again.", stacklevel=2)
        return None


def check_files(
    paths: Sequence[Path],
    memory: FileMemory,
    *,
    intensity: str,
    workers: int = 1,
    opened: Callable[[Path, Sample], None] | None = None,
) -> Generator[Check, None, None]:
    """Open every file once and yield the result of `check_volume`, in order.

    Parameters
    ----------
    paths : sequence of Path
        Images.
    memory : FileMemory
        Earlier results; files that have not changed since are not opened again.
    intensity : str
        As in `reading.check_volume`.
    workers : int
        Threads.
    opened : callable, optional
        Called with each file that is opened and can be used, and a sample of its values.
    """

    def check(path: Path) -> Check:
        fact = f"check {FORMAT} {intensity}"
        try:
            known = memory.recall(path, fact)
            if known is not None:
                return Check(**known)
            status = file_status(path)
        except (OSError, TypeError):
            return look_at(path, intensity=intensity)[0]
        found, sample = look_at(path, intensity=intensity)
        if opened is not None and sample is not None:
            opened(path, sample)
        memory.note(path, status, fact, dataclasses.asdict(found))
        if found.status != "skip":
            memory.sha256(path)  # its cache entry's name, while the file is at hand
        return found

    try:
        yield from thread_map(check, paths, workers)
    finally:
        memory.save()


def thread_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield ``function(item)`` in order, computed in several threads.

    Calls that have not begun are canceled when the caller stops or is interrupted.

    Parameters
    ----------
    function : callable
        Called with each item.
    items : iterable
        Arguments.
    workers : int
        Threads; with one or none, the caller's own thread computes.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _free(folder: Path) -> int:
    """Return the free bytes on the disk where `folder` is, or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free

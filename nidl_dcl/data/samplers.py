"""The order of samples and their batches, on one process or several."""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from nidl_dcl.data.datasets import LazyViews, TwoViewSamples, collate_lazy_views
from nidl_dcl.data.views import KeyCheck
from nidl_dcl.distributed import first_value, gather_objects, world
from nidl_dcl.randomness import permutation


class EpochBatches(BatchSampler):
    """Batches of ``(epoch, index)`` in an order keyed by (seed, epoch), shared by all processes.

    An epoch is cut into batches of nearly equal size, at most `batch_size`, except that no batch
    has fewer than two samples if it can be helped (one alone has no negatives), nor fewer than
    there are processes. Each process takes its part of every batch.

    Parameters
    ----------
    n : int
        Samples.
    batch_size : int
        Samples of a batch, all processes together.
    seed : int
        With the epoch, the key of the order; None keeps the given order and epoch 0, hence the
        same views at each pass (validation).
    rank, processes : int
        This process and how many there are.

    Raises
    ------
    ValueError
        When there are fewer samples than processes.
    """

    def __init__(
        self, n: int, batch_size: int, *, seed: int | None, rank: int = 0, processes: int = 1
    ) -> None:
        self.n = n
        self.seed = seed
        self.rank = rank
        self.processes = processes
        _check_enough(n, processes)
        wanted = -(-n // batch_size)
        self.count = max(1, min(wanted, n // max(2, processes))) if n else 0
        self.epoch = -1
        self.position: Callable[[], tuple[int, int]] = self._next_epoch

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, number: int) -> list[int]:
        """Return the indices of the samples of one batch, all processes together."""
        return [int(i) for i in self._batches(epoch)[number]]

    def _batches(self, epoch: int) -> list[Any]:
        if self.count == 0:
            return []
        order = np.arange(self.n) if self.seed is None else permutation(self.n, self.seed, epoch)
        return np.array_split(order, self.count)

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, start = self.position()
        for whole in self._batches(epoch)[start:]:
            part = np.array_split(whole, self.processes)[self.rank]
            yield [(epoch, int(i)) for i in part]

    def _next_epoch(self) -> tuple[int, int]:
        """Return the epoch and batch of the next pass of a loader that no trainer positions."""
        self.epoch = 0 if self.seed is None else self.epoch + 1
        return self.epoch, 0


def two_view_loader(
    samples: TwoViewSamples,
    batch_size: int,
    *,
    shuffle: bool = True,
    num_workers: int = 0,
    trainer: Any = None,
) -> DataLoader[Any]:
    """Return a loader of this process's part of batches ``[X1, X2]`` or ``([X1, X2], y)``.

    Parameters
    ----------
    samples : TwoViewSamples
        What is loaded.
    batch_size : int
        Samples of a batch, all processes together.
    shuffle : bool, default=True
        For training: another keyed order in each epoch, and a warning if views do not obey their
        key (`KeyCheck`). Otherwise the given order.
    num_workers : int, default=0
        Loading workers; they change no result.
    trainer : lightning.Trainer, optional
        For training: its progress says which epoch and batch come next, in mid-epoch too.
    """
    seed, (rank, processes) = samples.seed if shuffle else None, world()
    batches = EpochBatches(len(samples), batch_size, seed=seed, rank=rank, processes=processes)
    if shuffle and trainer is not None:
        batches.position = functools.partial(_position, trainer)
    if shuffle and rank == 0:
        samples.check = samples.check or KeyCheck(samples.views)
        if num_workers > 0:
            samples.check.share()
    return _TwoViewLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate_lazy_views if samples.lazy else None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=_goes_to_cuda(trainer),
        worker_init_fn=outlast_sigterm,
        generator=torch.Generator().manual_seed(0),
    )


def _goes_to_cuda(trainer: Any) -> bool:
    # Pinning memory initializes CUDA, which a training on the CPU must not.
    return trainer is not None and trainer.strategy.root_device.type == "cuda"


def outlast_sigterm(worker: int) -> None:
    """Let a loading worker ignore SIGTERM, which a cluster sends to every process of a job.

    The main process ends the step under way, for which it needs its workers, and then ends them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _TwoViewLoader(DataLoader[Any]):
    """A loader of two-view samples that starts its workers at the first batch.

    Not when an iterator is made: a trainer that resumes makes one before it has restored its step,
    which decides the order.
    """

    def __iter__(self) -> Any:
        samples: Any = self.dataset
        others = set(multiprocessing.active_children())
        batches = super().__iter__()
        if workers := set(multiprocessing.active_children()) - others:
            atexit.register(_kill, list(workers))
        for batch in batches:
            if isinstance(batch, LazyViews):
                batch.views, batch.check = samples.views, samples.check
            if samples.check is not None:
                samples.check.warn()
            yield batch


def _kill(workers: Sequence[Any]) -> None:
    """End workers as the program ends, which would send SIGTERM and wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch calls each death an error
    for worker in workers:
        worker.kill()


def _position(trainer: Any) -> tuple[int, int]:
    """Return the epoch that a trainer is in and the batch that comes next, also after a resume."""
    loop = trainer.fit_loop
    return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready


def with_batches(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    """Return a loader like `loader` that draws the given batches of indices."""
    names = (
        *("num_workers", "collate_fn", "pin_memory", "timeout", "generator", "worker_init_fn"),
        *("multiprocessing_context", "prefetch_factor", "persistent_workers"),
    )
    options: Any = {name: getattr(loader, name) for name in names}
    return DataLoader(loader.dataset, batch_sampler=batches, **options)


class JoinedBatches(BatchSampler):
    """The batches of a caller's sampler, joined over the processes and divided evenly among them.

    As many batches as there are processes make one global batch; each process takes a nearly equal
    part, so that no sample is padded or repeated. The order is that of the first process. A rest
    with fewer samples than processes shares the samples of the batch before it. Of a sampler that
    drops incomplete batches, incomplete global ones are dropped too. When iterated, fewer samples
    than processes are a ValueError.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        # Trainers look here for a sampler whose set_epoch is to be called.
        self.sampler: Any = getattr(batches, "sampler", None)
        self.rank, self.processes = world()

    def __len__(self) -> int:
        count = -(-self._used(len(self.batches)) // self.processes)
        if not getattr(self.batches, "drop_last", True):
            count = min(count, len(self.sampler) // self.processes)
        return max(1, count)

    def _used(self, given: int) -> int:
        rest = given % self.processes
        drops = getattr(self.batches, "drop_last", False) and given > self.processes
        return given - rest if drops else given

    def __iter__(self) -> Iterator[list[Any]]:
        given = first_value([list(b) for b in self.batches] if self.rank == 0 else None)
        given = given[: self._used(len(given))]
        joined = [
            [i for batch in given[k : k + self.processes] for i in batch]
            for k in range(0, len(given), self.processes)
        ]
        _check_enough(sum(len(batch) for batch in joined), self.processes)
        if len(joined) > 1 and len(joined[-1]) < self.processes:
            rest = joined[-2] + joined[-1]
            joined[-2:] = _parts(rest, min(2, len(rest) // self.processes))
        for batch in joined:
            yield _parts(batch, self.processes)[self.rank]


def sharded(loader: Any) -> Any:
    """Return a caller's loader with which every process gets its own part of each batch.

    Loaders that divide already are returned as they are: those of `two_view_loader`, and those with
    a ``DistributedSampler``. A stream is left for the caller to divide; it ends on all processes
    together. A loader without batch size cannot be divided: a ValueError.
    """
    _, processes = world()
    if processes == 1 or not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader.dataset, IterableDataset):
        warnings.warn(
            "The loader reads a stream, which cannot be divided here: each of the "
            f"{processes} processes must yield samples of its own, or they count as each other's "
            "negatives.",
            stacklevel=2,
        )
        return _InStep(loader)
    batches = loader.batch_sampler
    if isinstance(batches, EpochBatches | JoinedBatches) or isinstance(
        getattr(batches, "sampler", loader.sampler), DistributedSampler
    ):
        return loader
    if batches is None:
        raise ValueError(
            "On several processes a loader needs a batch size: batch_size=None cannot be divided."
        )
    return with_batches(loader, JoinedBatches(batches))


class _InStep:
    """A loader that ends on all processes as soon as it ends on one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            batch = next(batches, self)
            if any(gather_objects(batch is self)):
                return
            yield batch


def _parts(values: list[Any], n: int) -> list[list[Any]]:
    """Return `n` parts whose lengths differ by one at most, the longer ones first."""
    size, longer = divmod(len(values), n)
    cuts = [k * size + min(k, longer) for k in range(n + 1)]
    return [values[a:b] for a, b in itertools.pairwise(cuts)]


def _check_enough(samples: int, processes: int) -> None:
    if 0 < samples < processes:
        raise ValueError(
            f"There are fewer samples ({samples}) than processes ({processes}). Use fewer devices."
        )

"""The order of samples and their batches, on one process or several."""

from __future__ import annotations

import atexit
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
        self.position: Callable[[], tuple[int, int]] = _first if seed is None else _NextEpoch()

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, number: int) -> list[int]:
        """Return the indices of the samples of one batch, all processes together."""
        order = np.arange(self.n) if self.seed is None else permutation(self.n, self.seed, epoch)
        return [int(i) for i in np.array_split(order, self.count)[number]]

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, start = self.position()
        for number in range(start, self.count):
            whole = np.array(self.batch(epoch, number))
            part = np.array_split(whole, self.processes)[self.rank]
            yield [(epoch, int(i)) for i in part]


def _first() -> tuple[int, int]:
    return 0, 0


class _NextEpoch:
    """The position of a loader without a trainer: the start of the next epoch at each pass."""

    def __init__(self) -> None:
        self.epoch = -1

    def __call__(self) -> tuple[int, int]:
        self.epoch += 1
        return self.epoch, 0


def two_view_loader(
    samples: TwoViewSamples,
    batch_size: int,
    *,
    shuffle: bool = True,
    num_workers: int = 0,
    rank: int = 0,
    processes: int = 1,
    pin_memory: bool | None = None,
) -> DataLoader[Any]:
    """Return a loader of batches ``[X1, X2]`` or ``([X1, X2], y)`` over `samples`.

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
    rank, processes : int
        This process and how many there are.
    pin_memory : bool, optional
        Whether batches are pinned; default: where there is a GPU.
    """
    batches = EpochBatches(
        len(samples),
        batch_size,
        seed=samples.seed if shuffle else None,
        rank=rank,
        processes=processes,
    )
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
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        worker_init_fn=outlast_sigterm,
        generator=torch.Generator().manual_seed(0),
    )


def outlast_sigterm(worker: int) -> None:
    """Let a loading worker ignore SIGTERM, which a cluster sends to every process of a job.

    The main process ends the step under way, for which it needs its workers, and then ends them.

    Parameters
    ----------
    worker : int
        Ignored.
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


def sync_with_trainer(trainer: Any, loader: DataLoader[Any]) -> None:
    """Take a loader's epoch and batch from the trainer's optimizer steps, in mid-epoch too.

    Parameters
    ----------
    trainer : lightning.Trainer
        Its ``global_step`` says which epoch and batch come next, also right after a resume.
    loader : DataLoader
        From `two_view_loader`.
    """
    batches = loader.batch_sampler
    if not isinstance(batches, EpochBatches):
        raise TypeError("Only loaders of two_view_loader can be synchronized.")

    def position() -> tuple[int, int]:
        limit, whole = trainer.limit_train_batches, len(batches)
        used = min(limit, whole) if isinstance(limit, int) else int(limit * whole)
        accumulated = trainer.accumulate_grad_batches
        epoch, done = divmod(trainer.global_step, max(1, -(-used // accumulated)))
        return epoch, done * accumulated

    batches.position = position


def with_batches(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    """Return a loader like `loader` that draws the given batches of indices."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        generator=loader.generator,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class JoinedBatches(BatchSampler):
    """The batches of a caller's sampler, joined over the processes and divided evenly among them.

    As many batches as there are processes make one global batch; each process takes a nearly equal
    part, so that no sample is padded or repeated. The order is that of the first process. A rest
    with fewer samples than processes shares the samples of the batch before it. Of a sampler that
    drops incomplete batches, incomplete global ones are dropped too.

    Parameters
    ----------
    batches : iterable of list
        The caller's batch sampler.
    rank, processes : int
        This process and how many there are.
    share : callable
        Returns the first process's value on every process.

    Raises
    ------
    ValueError
        When iterated, if there are fewer samples than processes.
    """

    def __init__(
        self, batches: Any, rank: int, processes: int, share: Callable[[Any], Any]
    ) -> None:
        self.batches = batches
        # Trainers look here for a sampler whose set_epoch is to be called.
        self.sampler: Any = getattr(batches, "sampler", None)
        self.rank = rank
        self.processes = processes
        self.share = share

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
        given = self.share([list(b) for b in self.batches] if self.rank == 0 else None)
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
    together.

    Parameters
    ----------
    loader : DataLoader
        Or anything else, which is returned.

    Raises
    ------
    ValueError
        For a loader without batch size, whose batches cannot be divided.
    """
    rank, processes = world()
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
    return with_batches(loader, JoinedBatches(batches, rank, processes, first_value))


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

"""What the processes of a training exchange: rows with their gradients, objects, sums.

With one process nothing is exchanged.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

_BY_ITSELF: ContextVar[bool] = ContextVar("by_itself", default=False)


def leave_at_exit() -> None:
    """Make this process leave its group before it ends; threads of the group may abort it otherwise."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """Return (rank, number of processes) of the default group, (0, 1) where there is none."""
    if dist.is_available() and dist.is_initialized() and not _BY_ITSELF.get():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def by_itself(alone: bool = True) -> Iterator[None]:
    """Let this process count as the only one inside the block, whatever group it belongs to.

    A group may be running while a trainer uses one device: gathering would otherwise wait for
    processes that do something else. `alone` says whether it does.
    """
    token = _BY_ITSELF.set(alone)
    try:
        yield
    finally:
        _BY_ITSELF.reset(token)


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes in rank order, and the index of this process's first row.

    Processes may hold different numbers of rows. The gradient of the result is summed over the
    processes before each takes its own part.
    """
    rank, processes = world()
    if processes == 1:
        return x, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(processes)]
    dist.all_gather(counts, torch.tensor([len(x)], dtype=torch.int64, device=x.device))
    sizes = torch.cat(counts).tolist()  # read from the device once
    return _GatherRows.apply(x, sizes, rank), sum(sizes[:rank])


def gather_objects(value: Any) -> list[Any]:
    """Return the value of every process, in rank order."""
    _, processes = world()
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)
    return values


def first_value(value: Any) -> Any:
    """Return the first process's value on every process."""
    return gather_objects(value)[0]


def gather_targets(y: Any, n: int) -> Any:
    """Return the targets of all processes, of `n` samples on this one, as those of one batch.

    They are as a loader collates them: one per sample, or a mapping or sequence of such. The result
    has the same form, in rank order; what is not one value per sample gives a list of one each.
    """
    if world()[1] == 1 or y is None:
        return y
    if isinstance(y, Mapping):
        return {name: gather_targets(part, n) for name, part in y.items()}
    if isinstance(y, Tensor) and y.ndim > 0:
        return torch.cat(gather_objects(y.detach().cpu())).to(y.device)
    if isinstance(y, np.ndarray):
        return np.concatenate(gather_objects(y))
    if isinstance(y, list | tuple):
        if y and all(isinstance(part, Tensor) and part.shape[:1] == (n,) for part in y):
            return [gather_targets(part, n) for part in y]
        values = [value for part in gather_objects(list(y)) for value in part]
        return tuple(values) if isinstance(y, tuple) else values
    return gather_objects(y)


def share_buffers(module: nn.Module) -> None:
    """Copy the first process's buffers to all: running means, for instance, are not averaged."""
    if world()[1] > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def total(x: Tensor) -> Tensor:
    """Return the sum of `x` over the processes, without gradient."""
    x = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def any_process(flag: bool | Tensor, device: torch.device) -> bool:
    """Return whether `flag` holds on at least one process; all processes must ask.

    A tensor of one value is read once, after the processes have exchanged theirs.
    """
    if world()[1] == 1:
        return bool(flag)
    return bool(total(torch.as_tensor(flag, dtype=torch.float32, device=device)) > 0)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:n] for piece, n in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.own], None, None

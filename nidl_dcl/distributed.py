"""Rows gathered from all processes, with the gradient of the sum; one process needs none of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["any_process", "gather_objects", "gather_rows", "total", "world"]


def world() -> tuple[int, int]:
    """Return (rank, number of processes) of the default group, (0, 1) where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes in rank order, and where this process's rows start.

    Processes may hold different numbers of rows. The gradient of the result is summed over the
    processes before each takes its own part.
    """
    rank, processes = world()
    if processes == 1:
        return x, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(processes)]
    dist.all_gather(counts, torch.tensor([len(x)], dtype=torch.int64, device=x.device))
    sizes = [int(c) for c in counts]
    return _GatherRows.apply(x, sizes, rank), sum(sizes[:rank])


def gather_objects(value: Any) -> list[Any]:
    """Return the value of every process, in rank order."""
    _, processes = world()
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)
    return values


def total(x: Tensor) -> Tensor:
    """Return the sum of `x` over the processes, without gradient."""
    x = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` holds on at least one process; all processes must ask."""
    if world()[1] == 1:
        return flag
    return bool(total(torch.tensor(float(flag), device=device)) > 0)


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

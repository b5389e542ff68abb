"""The DCL loss, forward and backward: nidl, lightly and nidl_dcl, in time and in memory.

    python benchmarks/loss.py

Two views of N samples in 128 dimensions, temperature 0.1, float32, one thread. Memory is the growth
of a process's largest resident size over that with the inputs made, a process for each arm. nidl and
lightly are measured where they are installed; their losses must agree with ours.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch.nn import functional as F

DIM = 128


def loss_of(arm: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if arm == "nidl":
        from nidl.losses.dcl import DCLLoss as NidlLoss

        return NidlLoss(temperature=0.1)
    if arm == "lightly":
        from lightly.loss import DCLLoss as LightlyLoss

        return LightlyLoss(temperature=0.1)
    if arm == "one product":  # of all similarities, forward and backward: a limit
        return lambda a, b: (
            F.normalize(torch.cat([a, b])) @ F.normalize(torch.cat([a, b])).T
        ).sum()
    from nidl_dcl import DCLLoss

    return DCLLoss(temperature=0.1)


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(n, DIM, generator=draw)
    return z.requires_grad_(), (
        z + 0.5 * torch.randn(n, DIM, generator=draw)
    ).detach().requires_grad_()


def step(loss: Any, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    for z in pair:
        z.grad = None
    value = loss(*pair)
    value.backward()
    return float(value.detach())


def memory(arm: str, n: int) -> float:
    """Return MB of a process of its own, above that with inputs and imports."""
    done = subprocess.run(
        [sys.executable, __file__, arm, str(n)], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def child(arm: str, n: int) -> None:
    torch.set_num_threads(1)
    loss = loss_of(arm)
    step(loss, inputs(8))
    pair = inputs(n)
    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far counts from here
    before = _resident("VmRSS")
    step(loss, pair)
    print(json.dumps(_resident("VmHWM") - before))


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def main(rounds: int = 5) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for n, peers in ((1024, {"nidl": 200.0, "lightly": 2.5}), (4096, {"lightly": 4.0})):
        there = [peer for peer in peers if importlib.util.find_spec(peer)]
        losses = {arm: loss_of(arm) for arm in ("ours", "one product", *there)}
        pair = inputs(n)
        value = step(losses["ours"], pair)
        for peer in there:  # they differ in whether a sample's own views count: within a percent
            found = step(losses[peer], inputs(64))
            if abs(found - step(losses["ours"], inputs(64))) > 0.05 * abs(found):
                raise AssertionError(f"{peer} gives {found} for 64 samples, ours differs")
        arms = {arm: lambda one=one: step(one, pair) for arm, one in losses.items()}
        times = measure.interleave(arms, rounds, expected={"ours": value})
        for peer, target in (*peers.items(), ("one product", None)):
            name = f"DCL loss, N = {n}: {peer} / ours"
            if peer not in times:
                rows.append(measure.skipped(name, peer))
                continue
            rows.append(
                measure.row(
                    name, times["ours"].cpu, times[peer].cpu, target, at_most=False, note="CPU s"
                )
            )
    mine = [memory("ours", 1024) for _ in range(rounds)]
    for peer, target in (("nidl", 200.0), ("lightly", None)):
        name = f"DCL loss, N = 1024: memory, {peer} / ours"
        if not importlib.util.find_spec(peer):
            rows.append(measure.skipped(name, peer))
            continue
        theirs = [memory(peer, 1024)] * rounds  # once: it takes the same each time, and long
        rows.append(measure.row(name, mine, theirs, target, at_most=False, note="MB"))
    return rows


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(sys.argv[1], int(sys.argv[2]))
    else:
        measure.print_table(main())

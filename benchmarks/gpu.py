"""Training on a GPU: precisions, a compiled encoder, views on the device, two devices, the loss.

    python benchmarks/gpu.py [DEVICE]

Seconds a step of `DCL.fit`, between the end of the first step and the end of the last, and the largest
memory that torch held. Volumes lie in memory; views are drawn anew for each step. DEVICE is cuda; cpu
tries the script, at sizes that say nothing.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from typing import Any

import lightning as L
import measure
import torch

from nidl_dcl import DCL, DCLLoss
from nidl_dcl.models.encoders import ResNet18, StridedCNN


class Stamps(L.Callback):
    """The time at the end of each step, without waiting for the device before the last."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1
        if self.steps == WARM:
            synchronize()
            self.first = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        synchronize()
        self.last = time.perf_counter()


WARM = 3
"""Steps that are not counted: compiling, choosing of algorithms, workers that start."""


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak() -> float:
    """Return MB that torch held at most since the last time."""
    if not torch.cuda.is_initialized():
        return float("nan")
    found = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return found


def train(name: str, volumes: torch.Tensor, batch: int, **options: Any) -> dict[str, Any]:
    """Return a row of a training with some options."""
    peak()
    stamps = Stamps()
    encoder = options.pop("encoder")
    given = {
        "proj_input_dim": 512, "max_epochs": 4, "batch_size": batch, "random_state": 0,
        "lr_scheduler": None, "devices": 1, "enable_progress_bar": False,
        "enable_model_summary": False, "callbacks": [stamps], **options,
    }  # fmt: skip
    try:
        DCL(encoder, **given).fit(volumes)
    except Exception as error:  # the other rows are still worth having
        return {"name": name, "s a step": "", "MB": "", "note": f"{type(error).__name__}: {error}"}
    seconds = (stamps.last - stamps.first) / (stamps.steps - WARM)
    return {"name": name, "s a step": seconds, "MB": peak(), "note": f"batch {batch}"}


def losses(n: int, device: str) -> list[dict[str, Any]]:
    """Return rows of the loss of n samples, and of the same with all similarities at once."""

    def dense(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        u = torch.nn.functional.normalize(torch.cat([a, b]))
        s = u @ u.T / 0.1
        own = torch.eye(n, dtype=torch.bool, device=a.device).tile(2, 2)
        return torch.logsumexp(s.masked_fill(own, -torch.inf), 1).mean() - (s.diagonal(n).mean())

    rows, values = [], []
    for name, loss in (("DCLLoss", DCLLoss(0.1)), ("all similarities at once", dense)):
        pair = [
            torch.randn(n, 128, generator=torch.Generator().manual_seed(k))
            .to(device)
            .requires_grad_()
            for k in (0, 1)
        ]
        for _ in range(WARM):
            loss(*pair).backward()
        peak()
        synchronize()
        start = time.perf_counter()
        for _ in range(10):
            loss(*pair).backward()
        synchronize()
        seconds = (time.perf_counter() - start) / 10
        values.append(float(loss(*pair).detach()))
        rows.append(
            {"name": f"{name}, N = {n}", "s a step": seconds, "MB": peak(), "note": "loss alone"}
        )
    if abs(values[0] - values[1]) > 1e-3 * abs(values[1]):
        raise AssertionError(f"The losses differ: {values}")
    return rows


def on_two_devices(device: str) -> dict[str, Any]:
    """Return the row of a training whose two processes share each batch."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         __file__, device, "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return {"name": "two devices", "s a step": "", "MB": "", "note": done.stderr[-300:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def in_a_process_of_two(device: str) -> None:
    encoder = ResNet18() if device == "cuda" else StridedCNN()
    kind = "gpu" if device == "cuda" else "cpu"
    options = {"accelerator": kind, "devices": 2, "strategy": "ddp", "encoder": encoder}
    volumes, batch, workers = data(device)
    name = f"{type(encoder).__name__.lower()}, two devices"
    row = train(name, volumes, batch, **options, num_workers=workers)
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(row))


def data(device: str) -> tuple[torch.Tensor, int, int]:
    """Return volumes, the size of a batch and the number of workers."""
    side, batch, n = (96, 16, 160) if device == "cuda" else (16, 4, 8)
    volumes = torch.rand(n, 1, side, side, side, generator=torch.Generator().manual_seed(0))
    return volumes, batch, min(8, os.cpu_count() or 1) if device == "cuda" else 1


def main(device: str = "cuda") -> list[dict[str, Any]]:
    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; `python benchmarks/gpu.py cpu` tries the script.")
    volumes, batch, workers = data(device)
    base = {"accelerator": "gpu" if cuda else "cpu", "num_workers": workers}
    small, large = {**base, "encoder": StridedCNN()}, {**base, "encoder": ResNet18()}
    on_device = {"views_on_device": True, "num_workers": 0}
    arms: list[tuple[str, dict[str, Any]]] = [
        ("cnn", small),
        ("cnn, views in this process", {**small, "num_workers": 0}),
        ("cnn, views on the device", {**small, **on_device}),
    ]
    if cuda:
        arms += [
            ("resnet18", large),
            ("resnet18, views on the device", {**large, **on_device}),
            ("resnet18, bf16-mixed", {**large, "precision": "bf16-mixed"}),
            ("resnet18, compiled", {**large, "encoder": torch.compile(ResNet18())}),
        ]
    rows = []
    for name, options in arms:
        print(f"==> {name}", file=sys.stderr, flush=True)
        rows.append(train(name, volumes, batch, **options))
    if not cuda or torch.cuda.device_count() > 1:
        print("==> two devices", file=sys.stderr, flush=True)
        rows.append(on_two_devices(device))
    print("==> loss", file=sys.stderr, flush=True)
    rows += losses(4096 if cuda else 256, device)
    return rows


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if sys.argv[2:]:
        in_a_process_of_two(sys.argv[1])
        sys.exit(0)
    found = main(*sys.argv[1:])
    if torch.cuda.is_initialized():
        print(torch.cuda.get_device_name())
    print(measure.machine("torch", "lightning", "monai"))
    measure.print_table(found)

"""Memory and time of a training epoch from the cache, on few and on many participants.

    python benchmarks/scale.py [--participants 10000]

Writes two synthetic datasets in a temporary folder (8 mm, 20 x 24 x 20 voxels), and for each starts
one process that indexes and checks it and fills the cache, and then, several times in turn, one that
trains from that cache, for as many steps as an epoch of the many has. Training
on many should add no more memory than training on few; what many hold before it are their tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import nibabel as nib
import numpy as np

FEW = 128
BATCH = 32
ROUNDS = 5


def write_dataset(folder: Path, n: int) -> Path:
    """Write `n` participants with one image each: smooth noise, another one for everybody."""
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    rng = np.random.default_rng(0)
    base = nib.Nifti1Image(np.zeros((20, 24, 20), np.int16), affine)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, k) for k in (20, 24, 20)], indexing="ij"))
    head = 800.0 * ((grid**2).sum(0) < 0.6)
    header = base.to_bytes()[:352]
    for i in range(n):
        image = folder / f"sub-{i:05d}" / "anat" / f"sub-{i:05d}_T1w.nii"
        image.parent.mkdir(parents=True)
        data = (head * rng.uniform(0.8, 1.2) + rng.normal(0, 20, head.shape)).astype("<i2")
        image.write_bytes(header + data.tobytes(order="F"))
    return folder


def _memory(name: str) -> float:
    """Return a line of the process's status in MB: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc has no {name}")


def child(bids: Path, steps: int) -> None:
    """Set up a data module, train for some optimizer steps, and print what it took as JSON."""
    import logging
    import warnings

    import torch

    from nidl_dcl import DCL, BIDSDataModule
    from nidl_dcl.models.encoders import StridedCNN

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = BIDSDataModule(
        bids,
        spacing=8.0,
        shape=(16, 24, 16),
        batch_size=BATCH,
        work_dir=bids.parent / f"{bids.name}-w",
    )
    data.setup()
    told = {
        "setup_seconds": time.perf_counter() - start,
        "table_mb": sum(
            float(table.memory_usage(deep=True).sum()) for table in (data.images, data.inputs)
        )
        / 2**20,
        "before_mb": _memory("VmRSS"),
    }
    if steps:
        model = DCL(
            StridedCNN(), proj_input_dim=512, max_epochs=-1, max_steps=steps, random_state=0,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        start = time.perf_counter()
        model.fit(data)
        told["step_seconds"] = (time.perf_counter() - start) / steps
    told["peak_mb"] = _memory("VmHWM")
    sys.stdout.write(json.dumps(told) + "\n")


def run(bids: Path, steps: int) -> dict[str, float]:
    """Run `child` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "child", str(bids), str(steps)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(participants: int = 10_000, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Measure; return one row per claim."""
    with tempfile.TemporaryDirectory() as folder:
        few = write_dataset(Path(folder) / "few", FEW)
        many = write_dataset(Path(folder) / "many", participants)
        first = {bids.name: run(bids, 0) for bids in (few, many)}
        found: dict[str, list[dict[str, float]]] = {"few": [], "many": []}
        for _ in range(rounds):
            for bids in (few, many):
                found[bids.name].append(run(bids, participants // BATCH))
    added = {n: [f["peak_mb"] - f["before_mb"] for f in told] for n, told in found.items()}
    tables = [
        many["before_mb"] - few["before_mb"]
        for many, few in zip(found["many"], found["few"], strict=True)
    ]
    step = {n: [f["step_seconds"] for f in told] for n, told in found.items()}
    setup = first["many"]["setup_seconds"]
    return [
        measure.row(
            f"memory that training adds, {participants} participants / {FEW}",
            added["many"], added["few"], 1.1, note="MB",
        ),
        measure.row(
            f"time of a step, {participants} participants / {FEW}",
            step["many"], step["few"], 1.1, note="s",
        ),
        measure.row(
            "memory held before training by those more participants, each",
            [1000 * t / (participants - FEW) for t in tables], [1.0] * rounds, None, note="kB",
        ),
        measure.row(
            f"first set-up of {participants} participants: index, check, fill the cache",
            [setup], [1.0], None, note="s, once",
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "child":
        child(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--participants", type=int, default=10_000)
        parser.add_argument("--rounds", type=int, default=ROUNDS)
        given = parser.parse_args()
        measure.print_table(main(given.participants, given.rounds))

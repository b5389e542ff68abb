"""Training from the cache: nidl_dcl beside a bare loop on views that lie ready in memory.

    python benchmarks/training.py

24 participants of 64 x 64 x 64 voxels, batches of 8, the default encoder, head, loss, optimizer and
views, one thread. Our arm is `DCL.fit` on a data module: volumes from the cache on disk, two views of
each drawn in the same thread, Lightning's loop. The bare loop has nothing to load or to draw: it is
what the encoder alone costs, so it is a limit. Both are timed by the optimizer step, between the end
of the first step and the end of the last.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import measure
import nibabel as nib
import numpy as np
import torch

from nidl_dcl import DCL, BIDSDataModule, DCLLoss
from nidl_dcl.models.encoders import StridedCNN

N, SIDE, BATCH, EPOCHS = 24, 64, 8, 2


class Stamps(L.Callback):
    """The time, elapsed and of the processor, at the end of each step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def write_dataset(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij")
    head = 800.0 * (np.stack(axes) ** 2).sum(0) < 0.6
    for i in range(N):
        image = folder / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_T1w.nii.gz"
        image.parent.mkdir(parents=True)
        data = 600 * head * rng.uniform(0.8, 1.2) + rng.normal(0, 20, head.shape)
        nib.save(nib.Nifti1Image(data.astype(np.int16), np.diag([3.0, 3.0, 3.0, 1.0])), image)
    return folder


def ours(data: BIDSDataModule, **more: Any) -> dict[str, float]:
    """Return seconds a step of a fit."""
    stamps = Stamps()
    model = DCL(
        StridedCNN(), proj_input_dim=512, max_epochs=EPOCHS, random_state=0, lr_scheduler=None,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[stamps], **more,
    )  # fmt: skip
    model.fit(data)
    steps = len(stamps.wall) - 1
    return {
        "wall": (stamps.wall[-1] - stamps.wall[0]) / steps,
        "cpu": (stamps.cpu[-1] - stamps.cpu[0]) / steps,
    }


def bare(batches: list[list[torch.Tensor]]) -> dict[str, float]:
    """Return seconds a step of a loop that does nothing but learn."""
    model = DCL(StridedCNN(), proj_input_dim=512, random_state=0)
    encoder, head, loss = model.encoder.train(), model.projection_head.train(), DCLLoss()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    wall = cpu = 0.0
    for number, (a, b) in enumerate(batches * EPOCHS):
        optimizer.zero_grad()
        loss(head(encoder(a)), head(encoder(b))).backward()
        optimizer.step()
        if number == 0:
            wall, cpu = time.perf_counter(), time.process_time()
    steps = len(batches) * EPOCHS - 1
    return {
        "wall": (time.perf_counter() - wall) / steps,
        "cpu": (time.process_time() - cpu) / steps,
    }


def main(rounds: int = 5) -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "ours, 1 worker": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        bids = write_dataset(Path(folder) / "bids")

        def data(workers: int = 0) -> BIDSDataModule:
            made = BIDSDataModule(
                bids, spacing=3.0, shape=(SIDE,) * 3, batch_size=BATCH, num_workers=workers,
                work_dir=Path(folder) / "work",
            )  # fmt: skip
            made.setup()
            return made

        batches = [list(batch) for batch in data().train_dataloader()]
        for round_ in range(rounds + 1):
            seconds = {"ours": ours(data()), "ours, 1 worker": ours(data(1)), "bare": bare(batches)}
            if round_:
                for name, taken in seconds.items():
                    found[name].append(taken)
    logging.disable(logging.NOTSET)
    cpu = {name: [r["cpu"] for r in rounds_] for name, rounds_ in found.items()}
    wall = {name: [r["wall"] for r in rounds_] for name, rounds_ in found.items()}
    return [
        measure.row(
            "training from the cache, 64x64x64: bare loop / ours", cpu["ours"], cpu["bare"], 0.85,
            at_most=False, note="CPU s a step of 8, views in the same thread",
        ),
        measure.row(
            "training from the cache, 64x64x64: bare loop / ours, 1 worker", wall["ours, 1 worker"],
            wall["bare"], None, at_most=False, note="s a step of 8, views in a second process",
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    measure.print_table(main())

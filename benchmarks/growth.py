"""How the cost of training grows with voxels and batch, and which part of it the encoder is.

    python benchmarks/growth.py

Volumes lie in memory; one thread draws the views and trains. A step is split into drawing its views
and the rest: encoder forward and backward, loss, optimizer. The last column is
an epoch of 10,000 participants at the measured time a participant.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import measure
import torch
from training import Stamps

from nidl_dcl import DCL
from nidl_dcl.data.datasets import ArraySamples, TwoViewSamples
from nidl_dcl.data.samplers import two_view_loader
from nidl_dcl.data.views import volume_views
from nidl_dcl.models.encoders import ENCODERS

SIDES, BATCHES, STEPS, MANY = (32, 48, 64, 96), (8, 16, 32), 4, 10_000


def steps(encoder: str, side: int, batch: int) -> tuple[list[float], list[float]]:
    """Return seconds of whole steps, and of drawing the views of each."""
    draw = torch.Generator().manual_seed(0)
    volumes = torch.rand(batch, 1, side, side, side, generator=draw)
    samples = TwoViewSamples(ArraySamples(volumes), volume_views(), seed=0)
    drawn = []
    for epoch in range(STEPS):
        start = time.process_time()
        for i in range(batch):
            samples[epoch, i]
        drawn.append(time.process_time() - start)
    stamps = Stamps()
    kind = ENCODERS[encoder]
    model = DCL(
        kind, proj_input_dim=kind().n_features, max_epochs=STEPS + 1, random_state=0,
        lr_scheduler=None, enable_progress_bar=False, enable_model_summary=False, callbacks=[stamps],
    )  # fmt: skip
    model.fit(two_view_loader(samples, batch))
    return [b - a for a, b in zip(stamps.cpu, stamps.cpu[1:], strict=False)], drawn


def main() -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    cases = [("cnn", side, 8) for side in SIDES] + [("cnn", 48, b) for b in BATCHES[1:]]
    rows = []
    for encoder, side, batch in [*cases, ("resnet18", 64, 8)]:
        whole, drawn = steps(encoder, side, batch)
        share = measure.median(drawn) / measure.median(whole)
        each = measure.median(whole) / batch
        rows.append(
            {
                "encoder": encoder,
                "volume": f"{side}x{side}x{side}",
                "batch": batch,
                "a step, CPU s": measure.span(whole),
                "of it views": f"{100 * share:.0f} %",
                "a participant, s": each,
                f"an epoch of {MANY}": f"{each * MANY / 3600:.2g} h",
            }
        )
    logging.disable(logging.NOTSET)
    return rows


if __name__ == "__main__":
    measure.print_table(main())

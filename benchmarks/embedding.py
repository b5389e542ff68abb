"""Embeddings of .nii.gz files: nidl_dcl beside nidl and beside what the processor must do.

    python benchmarks/embedding.py

16 images of 121 x 145 x 121 voxels of 1.5 mm through the default encoder, two cores: our arm does what
`nidl-dcl embed` does, read and prepare in threads into an empty cache and then encode. nidl's arm reads with
nibabel, scales and transforms with two workers, its best setting of 0, 1 and 2 found beforehand; it
does not check or repair. The bound is the inflating, by isal, plus the encoder on ready volumes,
shared by two cores without any loss. All prepare to the same shape.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import measure
import nibabel as nib
import numpy as np
import torch
from isal import igzip
from reading import SHAPE, SPACING, write_head
from torch.utils.data import DataLoader, Dataset

from nidl_dcl import DCL
from nidl_dcl.encoder import StridedCNN
from nidl_dcl.prepared import PreparedVolumes
from nidl_dcl.volumes import Preparation

N, CORES = 16, 2


class NibabelImages(Dataset[Any]):
    """What nidl's users write: nibabel, then the transforms."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from nidl.volume.transforms.preprocessing.intensity import RobustRescaling

        volume = nib.load(self.paths[index]).get_fdata(dtype=np.float32)[None]
        return torch.from_numpy(np.ascontiguousarray(RobustRescaling()(volume)))


def main(rounds: int = 5) -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_head(Path(folder) / f"{i}.nii.gz", seed=i) for i in range(N)]
        model = DCL(
            StridedCNN(), proj_input_dim=512, random_state=0,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        model.__dict__["_fitted"] = True
        rules = Preparation((SPACING,) * 3, SHAPE)
        volumes = PreparedVolumes(paths, [None] * N, rules, None)
        rounds_done = itertools.count()
        encoder = model.encoder.eval()

        def ours() -> None:
            cache = Path(folder) / f"cache-{next(rounds_done)}"
            made = PreparedVolumes(paths, [None] * N, rules, cache)
            for _ in made.fill(CORES):
                pass
            torch.set_num_threads(CORES)
            model.transform(DataLoader(made))
            torch.set_num_threads(1)

        @torch.inference_mode()
        def theirs(workers: int) -> None:
            torch.set_num_threads(CORES if workers == 0 else 1)
            for x in DataLoader(NibabelImages(paths), num_workers=workers):
                encoder(x)
            torch.set_num_threads(1)

        contents = [path.read_bytes() for path in paths]
        ready = volumes[0][None]

        @torch.inference_mode()
        def bound() -> float:
            start = time.process_time()
            for content in contents:
                igzip.decompress(content)
                encoder(ready)
            return (time.process_time() - start) / CORES

        arms: dict[str, Any] = {"ours": ours}
        if importlib.util.find_spec("nidl"):
            first = {w: _seconds(lambda w=w: theirs(w)) for w in (0, 1, 2)}
            best = min(first, key=lambda w: first[w])
            arms["nidl"] = lambda: theirs(best)
        times = {name: measure.Times() for name in arms}
        bounds = []
        for round_ in range(rounds + 1):
            for name, arm in arms.items():
                seconds = _seconds(arm)
                if round_:
                    times[name].wall.append(seconds)
            if round_:
                bounds.append(bound())
    logging.disable(logging.NOTSET)
    name = "embeddings from .nii.gz, 121x145x121"
    if "nidl" in times:
        rows.append(
            measure.row(
                f"{name}: nidl, {best} workers / ours", times["ours"].wall, times["nidl"].wall, 1.9,
                at_most=False, note=f"s for {N} images",
            )
        )  # fmt: skip
    else:
        rows.append(measure.skipped(f"{name}: nidl / ours", "nidl"))
    rows.append(
        measure.row(
            f"{name}: inflating and encoder alone / ours", times["ours"].wall, bounds, 0.9,
            at_most=False, note=f"s for {N} images",
        )
    )  # fmt: skip
    return rows


def _seconds(arm: Any) -> float:
    start = time.perf_counter()
    arm()
    return time.perf_counter() - start


if __name__ == "__main__":
    measure.print_table(main())

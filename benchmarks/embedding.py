"""Embeddings of .nii.gz files: nidl_dcl beside nidl and beside what the processor must do.

    python benchmarks/embedding.py

Images of 121 x 145 x 121 voxels of 1.5 mm through the default encoder, two cores: 16 as they are, 64 at
the 4 mm that are the default, where what a run costs before its first image would else weigh much. Our arm does what `nidl-dcl embed` does once the images are checked:
read and prepare in threads into an empty cache, then encode. (The check, on the first run alone,
reads each file once more.) nidl's arm reads with nibabel, scales and transforms with its best number
of workers of 0, 1 and 2, found beforehand; it does not check or repair. The bound is the inflating, by isal, plus the encoder on ready volumes,
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
from nidl_dcl.models.encoders import StridedCNN
from nidl_dcl.volumes.cache import PreparedVolumes
from nidl_dcl.volumes.preparation import Preparation
from nidl_dcl.volumes.reading import read_volume

CORES = 2
CASES = ((SPACING, SHAPE, 16), (4.0, (48, 56, 48), 64))


class NibabelImages(Dataset[Any]):
    """What nidl's users write: nibabel, then the transforms."""

    def __init__(self, paths: list[Path], spacing: float, shape: tuple[int, ...]) -> None:
        self.paths, self.spacing, self.shape = paths, spacing, shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        import SimpleITK as sitk

        peer = measure.nidl_transforms("preprocessing")
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        image = nib.load(self.paths[index])
        volume = image.get_fdata(dtype=np.float32)[None]
        if self.spacing != SPACING:
            volume = peer.CropOrPad(self.shape)(peer.Resample(self.spacing)(volume, image.affine))
        return torch.from_numpy(np.ascontiguousarray(peer.RobustRescaling()(volume)))


def main(rounds: int = 5) -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        most = max(n for _, _, n in CASES)
        heads = [write_head(Path(folder) / f"{i}.nii.gz", seed=i) for i in range(most)]
        model = DCL(
            StridedCNN(), proj_input_dim=512, random_state=0,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        model.fitted = True
        for spacing, shape, n in CASES:
            paths = heads[:n]
            rules = Preparation((spacing,) * 3, shape)
            volumes = PreparedVolumes(paths, [None] * n, rules, None)
            rounds_done = itertools.count()
            encoder = model.encoder.eval()

            def ours() -> None:
                cache = Path(folder) / f"cache-{spacing}-{next(rounds_done)}"
                made = PreparedVolumes(paths, [None] * n, rules, cache)
                for _ in made.fill(CORES):
                    pass
                torch.set_num_threads(CORES)
                model.transform(DataLoader(made))
                torch.set_num_threads(1)

            @torch.inference_mode()
            def theirs(workers: int) -> None:
                torch.set_num_threads(CORES if workers == 0 else 1)
                for x in DataLoader(NibabelImages(paths, spacing, shape), num_workers=workers):
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
            name = f"embeddings from .nii.gz, at {spacing:g} mm"
            if "nidl" in times:
                rows.append(
                    measure.row(
                        f"{name}: nidl, {best} workers / ours", times["ours"].wall, times["nidl"].wall, 1.9,
                        at_most=False, note=f"s for {n} images",
                    )
                )  # fmt: skip
            else:
                rows.append(measure.skipped(f"{name}: nidl / ours", "nidl"))
            rows.append(
                measure.row(
                    f"{name}: inflating and encoder alone / ours", times["ours"].wall, bounds, 0.9,
                    at_most=False, note=f"s for {n} images",
                )
            )  # fmt: skip
            rows += _parts(name, encoder, volumes, contents)
    logging.disable(logging.NOTSET)
    return rows


@torch.inference_mode()
def _parts(name: str, encoder: Any, volumes: PreparedVolumes, contents: list[bytes]) -> list[Any]:
    """Return what one image costs the processor, part by part: the profile behind the ratios."""
    ready, seconds = volumes[0][None], {}
    for part, work in (
        ("inflating", lambda i: igzip.decompress(contents[i])),
        ("reading with checks, inflating included", lambda i: read_volume(volumes.images[i])),
        ("reading and preparing", lambda i: volumes[i]),
        ("encoding", lambda i: encoder(ready)),
    ):
        told = []
        for i in range(8):
            start = time.process_time()
            work(i)
            told.append(time.process_time() - start)
        seconds[part] = told
    one = [1.0] * 8
    return [
        measure.row(f"{name}: {part}, one image", told, one, None, note="CPU s")
        for part, told in seconds.items()
    ]


def _seconds(arm: Any) -> float:
    start = time.perf_counter()
    arm()
    return time.perf_counter() - start


if __name__ == "__main__":
    measure.print_table(main())

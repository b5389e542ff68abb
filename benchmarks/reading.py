"""Reading volumes: nibabel, the inflating alone, and nidl_dcl from the file and from its cache.

    python benchmarks/reading.py

A synthetic head of 121 x 145 x 121 voxels of 1.5 mm with Rician noise (signal to noise 24), as 16-bit
integers, compressed as nibabel does it; both arms give float32. nidl_dcl checks header, values and the checksum of the stream, which
nibabel does not. The cached volume has the shape and the spacing of the file. One thread.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import measure
import nibabel as nib
import numpy as np
import torch
from isal import igzip
from scipy import ndimage

from nidl_dcl.volumes.cache import PreparedVolumes
from nidl_dcl.volumes.preparation import Preparation
from nidl_dcl.volumes.reading import read_volume

SHAPE, SPACING = (121, 145, 121), 1.5


def write_head(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE), 2)
    signal = inside * (600 + 1500 * texture)
    data = np.hypot(signal + rng.normal(0, 25, SHAPE), rng.normal(0, 25, SHAPE))
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    nib.save(nib.Nifti1Image(data.astype(np.int16), affine), path)
    return path


def main(rounds: int = 9) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        image = write_head(Path(folder) / "sub-01_T1w.nii.gz")
        plain = Path(folder) / "sub-01_T1w.nii"
        nib.save(nib.load(image), plain)
        rules = Preparation((SPACING,) * 3, SHAPE)
        cached = PreparedVolumes([image], [None], rules, Path(folder) / "cache")
        list(cached.fill())
        if not np.array_equal(read_volume(image).dataobj, nib.load(image).get_fdata()):
            raise AssertionError("nidl_dcl and nibabel read different values")
        compressed = image.read_bytes()

        def times(count: int, arm: Any) -> Any:
            return lambda: [arm() for _ in range(count)] and None

        def converted() -> Any:
            content = igzip.decompress(compressed)
            return np.frombuffer(content, np.int16, offset=352).astype(np.float32)

        counts = {"ours": 3, "nibabel": 2, "inflate": 4, "converted": 4, "cached": 60, "mapped": 60}
        arms = {
            "ours": lambda: read_volume(image),
            "nibabel": lambda: nib.load(image).get_fdata(dtype=np.float32),
            "inflate": lambda: igzip.decompress(compressed),
            "converted": converted,
            "cached": lambda: cached[0],
            "mapped": lambda: np.asarray(nib.load(plain).dataobj).astype(np.float32),
        }
        timed = measure.interleave({n: times(counts[n], arm) for n, arm in arms.items()}, rounds)
    each = {name: [t / counts[name] for t in told.cpu] for name, told in timed.items()}
    return [
        measure.row(
            "read .nii.gz: nibabel / ours", each["ours"], each["nibabel"], 2.2,
            at_most=False, note="CPU s, 121x145x121",
        ),
        measure.row(
            "read .nii.gz: isal inflating alone / ours", each["ours"], each["inflate"], 0.9,
            at_most=False, note="CPU s",
        ),
        measure.row(
            "read .nii.gz: isal inflating, conversion to float32 / ours", each["ours"],
            each["converted"], None, at_most=False, note="CPU s",
        ),
        measure.row(
            "cached volume: nibabel from .nii.gz / ours", each["cached"], each["nibabel"], 15.0,
            at_most=False, note="CPU s",
        ),
        measure.row(
            "cached volume: nibabel from .nii / ours", each["cached"], each["mapped"], None,
            at_most=False, note="CPU s",
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    measure.print_table(main())

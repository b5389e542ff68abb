"""Images that tests write: an egg with three tissues, and files that no library would write."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

SHAPE = (40, 48, 36)
AFFINE = np.array([[2.0, 0, 0, -40], [0, 2.0, 0, -50], [0, 0, 2.0, -30], [0, 0, 0, 1]])


def brain(shape=SHAPE, shift=(0, 0, 0)):
    """Return an egg with three tissues, different along each axis, and its mask."""
    center = (np.array(shape) - 1) / 2 + shift
    x, y, z = (g - c for g, c in zip(np.indices(shape), center, strict=True))
    radius = (x / 12) ** 2 + (y / 17) ** 2 + (z / 11) ** 2
    mask = (radius < 1) & ~((x > 6) & (y > 6))
    data = np.where(radius < 0.5, 900.0, 600.0) + 4 * x - 3 * y + 5 * z
    data[(np.abs(x - 3) < 2) & (np.abs(y) < 5) & (np.abs(z) < 3)] = 150
    return np.where(mask, data, 40.0).astype(np.float32), mask


def image(data=None, affine=AFFINE, dtype=np.float32):
    made = nib.Nifti1Image(
        (brain()[0] if data is None else data).astype(dtype), affine, dtype=dtype
    )
    made.set_qform(affine, 1)
    made.set_sform(affine, 1)
    return made


def save(path: Path, data=None, affine=AFFINE, dtype=np.float32, **header) -> Path:
    """Write an image, then overwrite header fields as no library would let one."""
    image(data, affine, dtype).to_filename(path)
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as stream:
        content = bytearray(stream.read())
    if header:
        fields = nib.Nifti1Header(bytes(content[:348]), check=False)
        for name, value in header.items():
            fields[name] = value
        content[:348] = fields.binaryblock
        with opener(path, "wb") as stream:
            stream.write(bytes(content))
    return path


def save_mgh(path: Path, data=None, affine=AFFINE, dtype=np.float32, **header) -> Path:
    """Write a FreeSurfer image, then overwrite header fields as no library would let one."""
    made = nib.MGHImage((brain()[0] if data is None else data).astype(dtype), affine)
    content = bytearray(made.to_bytes())
    fields = np.ndarray((), nib.freesurfer.mghformat.header_dtype, content)
    for name, value in header.items():
        fields[name] = value
    opener = gzip.open if path.name.endswith("z") else open
    with opener(path, "wb") as stream:
        stream.write(bytes(content))
    return path


def head(*shape: int) -> torch.Tensor:
    """Return a masked egg, brighter to the right, the front and the top."""
    sides = shape[-3:] or (18, 22, 16)
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in sides), indexing="ij")
    egg = ((x / 0.8) ** 2 + (y / 0.9) ** 2 + (z / 0.8) ** 2 < 1) * (
        0.6 + 0.1 * x + 0.3 * y + 0.2 * z
    )
    return egg.expand(shape or (1, *sides)).contiguous()

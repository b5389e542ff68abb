"""The files of one preprocessed image in a BIDS derivative, and the record that they are there."""

from __future__ import annotations

import gzip
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.formats import read_json, write_json, write_text
from nidl_dcl.models.serialization import versions
from nidl_dcl.preprocessing.itk import transform_text
from nidl_dcl.preprocessing.mosaic import draw_mosaic
from nidl_dcl.preprocessing.pipeline import AlignedBrain, Outcome
from nidl_dcl.preprocessing.template import SPACE

RULES = 1
"""Version of the steps; images that were preprocessed by another one are preprocessed again."""


@dataclass(frozen=True)
class Scan:
    """One image to preprocess.

    Attributes
    ----------
    path, mask : Path or None
        The files.
    source, mask_source : str or None
        BIDS URIs of both.
    target : str
        Folder and name without entities ``space`` and ``desc``, suffix and extension, in the
        derivative, such as ``sub-01/anat/sub-01_run-1``.
    suffix : str
        Such as ``T1w``.
    mode : {"strip", "rigid", "align"}
        What is done.
    """

    path: Path
    mask: Path | None
    source: str
    mask_source: str | None
    target: str
    suffix: str
    mode: str

    @property
    def brain(self) -> str:
        """The brain's path in the derivative."""
        space = "" if self.mode == "strip" else f"_space-{SPACE}"
        return f"{self.target}{space}_desc-preproc_{self.suffix}.nii.gz"

    @property
    def figure(self) -> str:
        """The path of its picture in the derivative."""
        return f"figures/{self.target.rpartition('/')[2]}_desc-preproc_{self.suffix}.png"

    def key(self) -> dict[str, Any]:
        """Return what a record must hold for its files to be those of this image."""
        stats = [None if file is None else file.stat() for file in (self.path, self.mask)]
        return {
            "source": self.source,
            "mask": self.mask_source,
            "state": [None if s is None else [s.st_size, s.st_mtime_ns] for s in stats],
            "mode": self.mode,
            "rules": RULES,
        }


def target_of(path: str) -> tuple[str, str]:
    """Return `Scan.target` and `Scan.suffix` of an image by its path in a dataset."""
    folder, _, name = path.rpartition("/")
    stem, _, suffix = name.partition(".")[0].rpartition("_")
    return f"{folder}/{re.sub('_(desc|space)-[a-zA-Z0-9+]+', '', stem)}", suffix


def read_record(folder: Path, scan: Scan) -> dict[str, Any] | None:
    """Return what became of an image, if it was preprocessed before and has not changed since."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record: dict[str, Any] = read_json(_record_file(folder, scan))
        names = [name for name in (record["brain"], record["figure"]) if name]
        if record["key"] == scan.key() and all((folder / name).is_file() for name in names):
            return record
    return None


def write_brain(folder: Path, scan: Scan, outcome: Outcome) -> dict[str, Any]:
    """Write the files of an image, and return the record of what became of it.

    An image that must not be used gets no brain, only a picture, if there is anything to see.

    Parameters
    ----------
    folder : Path
        The derivative.
    scan : Scan
        What was preprocessed.
    outcome : Outcome
        What came out; `outcome.brain` in the space that is wanted.
    """
    record: dict[str, Any] = {
        "key": scan.key(),
        **asdict(outcome.verdict),
        "measures": _measures(outcome),
        "brain": None,
        "figure": None,
    }
    if outcome.brain is not None:
        write_bytes(folder / scan.figure, draw_mosaic(outcome.brain))
        record["figure"] = scan.figure
        if outcome.verdict.status != "skip":
            _write_images(folder, scan, outcome)
            record["brain"] = scan.brain
    write_json(_record_file(folder, scan), record)
    return record


def _measures(outcome: Outcome) -> dict[str, float | None] | None:
    if outcome.measures is None:
        return None
    return {
        name: value if value is None else round(value, 6)
        for name, value in asdict(outcome.measures).items()
    }


def _record_file(folder: Path, scan: Scan) -> Path:
    return folder / ".work" / "preproc" / f"{scan.target}_{scan.suffix}.json"


def _write_images(folder: Path, scan: Scan, outcome: Outcome) -> None:
    brain = outcome.brain
    assert brain is not None
    head, target = brain.head, folder / scan.target
    mask = head.as_stored(brain.mask)
    inside = {"Type": "Brain", "Sources": [scan.mask_source or scan.source]}
    _write_nifti(Path(f"{target}_desc-brain_mask.nii.gz"), mask, head.stored_affine, np.uint8)
    write_json(Path(f"{target}_desc-brain_mask.json"), inside)
    values, affine = head.as_stored(brain.corrected * brain.mask), head.stored_affine
    if isinstance(brain, AlignedBrain):
        values, affine = brain.aligned, brain.template.affine
        there = f"{target}_space-{SPACE}_desc-brain_mask"
        _write_nifti(Path(f"{there}.nii.gz"), brain.aligned_mask, affine, np.uint8)
        write_json(Path(f"{there}.json"), inside)
        name = f"{target}_from-{scan.suffix}_to-{SPACE}_mode-image_xfm"
        write_text(Path(f"{name}.txt"), transform_text(brain.matrix))
    _write_nifti(folder / scan.brain, values, affine, np.int16)
    sidecar = {
        "Sources": [source for source in (scan.source, scan.mask_source) if source],
        "SkullStripped": True,
        "Preprocessing": scan.mode,
        "Steps": _steps(scan),
        "Versions": versions("SimpleITK", "deepbet", "nilearn", "scipy"),
        "Status": outcome.verdict.status,
        "Message": outcome.verdict.message or "n/a",
        "Measures": _measures(outcome),
    }
    write_json((folder / scan.brain).with_suffix("").with_suffix(".json"), sidecar)


def _steps(scan: Scan) -> list[str]:
    """Return what was done, in words and in order."""
    found = "brain extraction (deepbet)" if scan.mask is None else "brain mask of the dataset"
    steps = [found, "bias field correction (N4)"]
    if scan.mode != "strip":
        steps.append(f"affine registration to {SPACE}, correlation within the brain")
    if scan.mode == "rigid":
        steps.append("rotation and translation of it alone, by polar decomposition")
    return steps


def _write_nifti(
    path: Path, values: NDArray[Any], affine: NDArray[np.float64], dtype: type[np.generic]
) -> None:
    """Write an image, in mm, as integers (scaled, if it is not a mask)."""
    whole = dtype is np.uint8
    image = nib.Nifti1Image(np.asarray(values, dtype if whole else np.float32), affine)
    image.set_data_dtype(dtype)
    image.header.set_xyzt_units("mm")
    write_bytes(path, gzip.compress(image.to_bytes(), 6, mtime=0))

"""A synthetic head with its brain mask, drawn once."""

from __future__ import annotations

from pathlib import Path

import pytest

from nidl_dcl.bids.synthetic import write_demo_dataset


@pytest.fixture(scope="session")
def demo_head(tmp_path_factory) -> tuple[Path, Path]:
    """Return the paths of a head of 3 mm and of its true brain mask."""
    folder = write_demo_dataset(tmp_path_factory.mktemp("demo"), n_participants=1)
    mask = "derivatives/brainmask/sub-*/ses-*/anat/*_mask.nii.gz"
    return next(folder.glob("sub-*/ses-*/anat/*_T1w.nii.gz")), next(folder.glob(mask))

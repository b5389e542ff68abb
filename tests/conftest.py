"""What several test files need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ixi_dir() -> Path:
    """Return a BIDS dataset of real brains; the test is skipped where there is none."""
    named = os.environ.get("NIDL_DCL_IXI")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "ixi"
    if not (folder / "dataset_description.json").is_file():
        pytest.skip("no real data: NIDL_DCL_IXI names no BIDS dataset")
    return folder

"""What several test files need."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TWO_EPOCHS = ("--spacing", "8", "--max-epochs", "2", "--batch-size", "8")
ONE_EPOCH: dict[str, Any] = {
    "max_epochs": 1,
    "lr_scheduler": None,
    "random_state": 0,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a short and silent training."""
SLOW = [pytest.param("study", marks=pytest.mark.slow)]
"""`params` of a fixture that runs a study: whatever asks for it is slow."""

# One thread for each test and the processes it starts, as files of tests run side by side: threads
# that wait for one another on busy cores cost many times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most tests are not about preprocessing, and their images are too small for it.
os.environ.setdefault("NIDL_DCL_PREPROCESS", "none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of most slow tests, so that no core waits for another at the end.

    By itself, xdist begins with those of most tests; --no-loadscope-reorder keeps this order.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def ixi_dir() -> Path:
    """Return a BIDS dataset of real brains; the test is skipped where there is none."""
    named = os.environ.get("NIDL_DCL_IXI")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "ixi"
    if not (folder / "dataset_description.json").is_file():
        pytest.skip("no real data: NIDL_DCL_IXI names no BIDS dataset")
    return folder


def write_heads(folder: Path, n: int = 10, *, masks: bool = True, first: int = 1) -> Path:
    """Write a BIDS dataset of `n` tiny heads (8 mm), whose cavity grows with age.

    Every third participant has two sessions; one has no age. A second call adds participants.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = {"Name": "Heads", "BIDSVersion": "1.10.0"}
    (folder / "dataset_description.json").write_text(json.dumps(text))
    (folder / "README.md").write_text("Heads\n")
    derivative = folder / "derivatives" / "masks"
    if masks:
        derivative.mkdir(parents=True, exist_ok=True)
        text = {**text, "DatasetType": "derivative", "GeneratedBy": [{"Name": "test"}]}
        (derivative / "dataset_description.json").write_text(json.dumps(text))
    grid = np.stack(np.meshgrid(*[np.arange(n) - n / 2 for n in (20, 24, 20)], indexing="ij"))
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = (-80, -96, -80)
    rows = ["participant_id\tage\tsex"]
    for i in range(1, first + n):
        rng = np.random.default_rng(i)
        age = int(rng.integers(20, 80))
        sex = "FM"[i % 2]
        rows.append(f"sub-{i:02d}\t{'n/a' if i == 4 else age}\t{sex}")
        if i < first:
            continue
        for session in ("01", "02") if i % 3 == 0 else ("01",):
            size = (7.0 + 0.4 * (sex == "M")) * rng.uniform(0.93, 1.07, 3)[:, None, None, None]
            radius = np.sqrt(((grid / size) ** 2).sum(0))
            brain = radius < 1
            cavity = np.exp(-((grid[0] / 3) ** 2) - (grid[1] / 4) ** 2 - (grid[2] / 3) ** 2)
            signal = 600.0 * brain - 5 * age * cavity + 200 * (np.abs(radius - 1.15) < 0.08)
            signal = np.clip(signal + rng.normal(0, 15, signal.shape), 0, None)
            stem = f"sub-{i:02d}/ses-{session}/anat/sub-{i:02d}_ses-{session}"
            image = folder / f"{stem}_T1w.nii.gz"
            image.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(signal.astype(np.int16), affine), image)
            if masks:
                mask = derivative / f"{stem}_desc-brain_mask.nii.gz"
                mask.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(brain.astype(np.uint8), affine), mask)
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def heads_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of ten heads that no test may change."""
    return write_heads(tmp_path_factory.mktemp("heads") / "bids")


@pytest.fixture(scope="session")
def heads_writer() -> Callable[..., Path]:
    """Return `write_heads`, for datasets that several tests share."""
    return write_heads


@pytest.fixture
def make_heads(tmp_path: Path) -> Callable[..., Path]:
    """Return `write_heads` for a folder of the test's own."""
    return lambda name="bids", n=10, **more: write_heads(tmp_path / name, n, **more)


def predict_quickly(patch: pytest.MonkeyPatch) -> None:
    """Let the stage `predict` repeat and permute less than it does; tests of evaluation do not."""
    from nidl_dcl.workflow import predict

    for name in ("predict_phenotype", "site_audit"):
        quick = partial(getattr(predict, name), n_repeats=2, n_permutations=19)
        patch.setattr(predict, name, quick)


def give(*words: object, page: str = "last") -> int:
    """Give a command in this process and return its exit status; what it sets is put back.

    A study predicts quickly and writes its page at the end alone, for a `page` that is "live" as
    always, and for "none" never: most of the time goes into pictures.
    """
    from nidl_dcl.cli import main

    argv = [str(word) for word in words]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(sys, "argv", ["nidl-dcl", *argv])  # it names the log and is recorded
            if {"study", "predict", "group"} & {*argv}:
                predict_quickly(patch)
                if page != "live":
                    patch.setattr("nidl_dcl.report.live.LivePage.write", lambda *args, **more: None)
                if page == "none":
                    patch.setattr("nidl_dcl.workflow.study.report", lambda study: None)
            with pytest.raises(SystemExit) as ended:
                main(argv)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return int(ended.value.code or 0)


@pytest.fixture(scope="session")
def studied(heads_made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a study of age and sex of the ten heads, that no test may change."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert give("study", heads_made, out, "--target", "age", "sex", *TWO_EPOCHS) == 0
    return out


@dataclass
class Done:
    """How a command ended and what it wrote."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return the command line as a function, in this process; what it sets is put back."""

    def call(*words: object, page: str = "last") -> Done:
        capsys.readouterr()
        status = give(*words, page=page)
        text = capsys.readouterr()
        return Done(status, text.out, text.err)

    return call

"""Hostile and broken datasets, through the command: every fault has its row, the rest goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from faults import GOOD, Fault, state_of, write_faults

from nidl_dcl.io.formats import escape_control

SMALL = ("--spacing", "8", "--max-epochs", "2", "--batch-size", "16")
MOST_MEMORY = 1.0e9


@dataclass
class Ended:
    """How a process ended, what it wrote, and its largest resident size in bytes."""

    status: int
    out: str
    err: str
    memory: float


def watched(words: Sequence[object], folder: Path) -> Ended:
    """Run the command in a process of its own."""
    out, err, told = folder / "stdout", folder / "stderr", folder / "memory"
    # Asked of the process itself: the system's count of a child begins with its parent's memory.
    code = f"""
import atexit, resource, sys
from pathlib import Path
def tell():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if (status := Path("/proc/self/status")).exists():
        peak = 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    Path({str(told)!r}).write_text(str(peak))
atexit.register(tell)
from nidl_dcl.cli import main
main()
"""
    with out.open("wb") as stdout, err.open("wb") as stderr:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            stdout=stdout,
            stderr=stderr,
            check=False,
        )
    memory = float(told.read_text())
    return Ended(done.returncode, out.read_text("utf-8"), err.read_text("utf-8"), memory)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Fault]]:
    """Return a dataset with every fault, that no test may change, and its faults."""
    root = tmp_path_factory.mktemp("faults") / "bids"
    return root, write_faults(root)


def rows_of(inputs: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """Return status and code of each row, by participant."""
    return {
        str(who): list(zip(rows["status"], rows["code"], strict=True))
        for who, rows in inputs.groupby("participant_id", sort=False)
    }


def expected_rows(faults: Sequence[Fault]) -> dict[str, list[tuple[str, str]]]:
    """Return what `rows_of` has to return."""
    rows = {f"sub-g{i}": [("ok", "ok")] for i in range(1, GOOD + 1)}
    for fault in faults:
        text = fault.participant.encode("utf-8", "backslashreplace").decode("utf-8")
        rows[escape_control(text)] = fault.expected
    return rows


def read(path: Any) -> pd.DataFrame:
    """Return a table as the text that it holds."""
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=3)


def test_there_are_many_faults_and_each_code_is_one_of_them(
    dataset: tuple[Path, list[Fault]],
) -> None:
    faults = dataset[1]
    assert len(faults) > 130
    assert len({fault.name for fault in faults}) == len(faults)
    assert len({fault.participant for fault in faults}) == len(faults)


def test_every_fault_has_its_row(
    dataset: tuple[Path, list[Fault]], run: Callable[..., Any], tmp_path: Path
) -> None:
    root, faults = dataset
    before = state_of(root)
    done = run("index", root, "--check")
    assert done.status == 0, done.err
    (tmp_path / "inputs.tsv").write_text(done.out)
    inputs = read(tmp_path / "inputs.tsv")
    assert rows_of(inputs) == expected_rows(faults)
    assert ((inputs["message"] != "n/a") == (inputs["code"] != "ok")).all()
    assert state_of(root) == before


@pytest.mark.slow
def test_a_study_runs_on_what_is_sound(dataset: tuple[Path, list[Fault]], tmp_path: Path) -> None:
    root, faults = dataset
    before, out = state_of(root), tmp_path / "out"
    words = ["study", root, out, "--target", "age", *SMALL]
    refused = watched(words, tmp_path)
    assert refused.status == 3
    assert refused.memory < MOST_MEMORY
    assert "raise --max-skipped" in refused.err
    assert not (out / "models").exists()
    assert rows_of(read(out / "logs" / "inputs.tsv")) == expected_rows(faults)
    done = watched([*words, "--max-skipped", "1"], tmp_path)
    assert done.status == 0, done.err
    assert done.memory < MOST_MEMORY
    inputs = read(out / "logs" / "inputs.tsv")
    assert rows_of(inputs) == expected_rows(faults)
    table = read(out / "desc-dcl_embeddings.tsv")
    used = inputs[inputs["status"] != "skip"]
    assert sorted(table["source"]) == sorted("bids:raw:" + used["path"])
    metrics = json.loads((out / "desc-dclAge_metrics.json").read_text())
    assert metrics["n_participants"] == GOOD
    page = (out / "report.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert state_of(root) == before

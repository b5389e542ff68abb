from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

TESTS = Path(__file__).resolve().parents[1]
SCRIPTS = TESTS.parent / "pipelines" / "slurm"
NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh"))
SMALL = ("--spacing", "8", "--batch-size", "4", "--encoder", "encoders_for_tests:GroupNormed")


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return an environment whose sbatch, srun, scontrol and nidl-dcl run here."""
    place = tmp_path / "bin"
    place.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        (place / name).write_text(
            f'#!/bin/sh\nexec {sys.executable} {TESTS}/fake_slurm.py {name} "$@"\n'
        )
    (place / "nidl-dcl").write_text(f'#!/bin/sh\nexec {sys.executable} -m nidl_dcl "$@"\n')
    for path in place.iterdir():
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{place}:{os.environ['PATH']}",
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "TMPDIR": str(tmp_path),
        "FAKE_SLURM": "1 1 1",
        "FAKE_SLURM_LOG": str(tmp_path / "scontrol"),
        "FAKE_SLURM_PIDS": str(tmp_path / "pids"),
    }


def sbatch(
    cluster: dict[str, str], script: str, *words: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sbatch", str(SCRIPTS / script), *map(str, words)],
        env=cluster, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_scripts_are_sound_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    text = (SCRIPTS / name).read_text()
    assert "set -euo pipefail" in text
    assert os.access(SCRIPTS / name, os.X_OK)
    assert all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["shellcheck", *(str(SCRIPTS / name) for name in NAMES)], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "shape"), [("one_node.sh", "1 2 1"), ("several_nodes.sh", "2 1 1")]
)
def test_a_training_by_slurm_ends_with_a_model(
    script: str, shape: str, cluster: dict[str, str], heads_made: Path, tmp_path: Path
) -> None:
    cluster["FAKE_SLURM"] = shape
    out = tmp_path / "out"
    done = sbatch(cluster, script, "pretrain", heads_made, out, *SMALL, "--max-epochs", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("models/desc-dcl") == 1  # the other tasks say nothing
    assert done.stderr.count("Training encoders_for_tests:GroupNormed") == 1
    assert (out / "models" / "desc-dcl" / "weights.safetensors").is_file()
    assert json.loads((out / "logs" / "run.json").read_text())["exit_status"] == 0
    assert not (out / ".work").exists()


@pytest.mark.slow
def test_tasks_that_do_not_fit_the_options_are_refused_with_both_numbers(
    cluster: dict[str, str], heads_made: Path, tmp_path: Path
) -> None:
    cluster["FAKE_SLURM"] = "1 2 1"
    done = sbatch(cluster, "one_gpu.sh", "pretrain", heads_made, tmp_path / "out", *SMALL)
    assert done.returncode == 2, done.stderr
    assert "Slurm started 2 processes, and the options ask for 1" in done.stderr


@pytest.mark.slow
def test_a_job_array_and_its_merge_embed_everyone(
    cluster: dict[str, str], heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    trained, out = tmp_path / "trained", tmp_path / "out"
    small = ("--spacing", "8", "--max-epochs", "1", "--batch-size", "8")
    assert run("pretrain", heads_made, trained, *small).status == 0
    model = trained / "models" / "desc-dcl"
    cluster["FAKE_SLURM"] = "1 1 2"
    for script in ("embed_array.sh", "embed_merge.sh"):
        done = sbatch(cluster, script, heads_made, out, model)
        assert done.returncode == 0, done.stderr
    assert "13 images of 10 participants, 0 computed now" in done.stderr
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    assert table["participant_id"].nunique() == 10
    assert (out / "figures" / "embedding_2d.tsv").is_file()


@pytest.mark.slow
def test_a_preempted_job_is_put_back_and_goes_on(
    cluster: dict[str, str], heads_made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words: list[Any] = ["pretrain", heads_made, out, *SMALL, "--max-epochs", "30"]
    job = subprocess.Popen(
        ["sbatch", str(SCRIPTS / "requeue.sh"), *map(str, words)],
        env=cluster, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(list(out.glob(".work/checkpoints-*/step-*.ckpt"))) < 2:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(int((tmp_path / "pids").read_text()), signal.SIGTERM)
    said = job.communicate(timeout=300)[1]
    assert job.returncode == 143, said
    assert "goes on from here" in said
    assert (tmp_path / "scontrol").read_text().startswith("requeue ")
    done = sbatch(cluster, "requeue.sh", *words)
    assert done.returncode == 0, done.stderr
    assert "Training resumes at step" in done.stderr

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import give
from safetensors.torch import load_file

from nidl_dcl.workflow.launcher import Rank, Team, find_rank, run_processes

TESTS = Path(__file__).resolve().parents[1]
OPTIONS = ("--spacing", "8", "--batch-size", "5", "--accelerator", "cpu", "--encoder",
           "encoders_for_tests:GroupNormed")  # fmt: skip
STUDY = ("--target", "sex", "--trust", "encoders_for_tests")
TWO = ("--devices", "2", "--strategy", "ddp")


def started(*words: object, by: tuple[str, ...] = ("-m",), **more: str) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        [sys.executable, *by, "nidl_dcl", *map(str, words)],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", **more},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str, str]:
    """Return status, output and messages."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def embeddings(out: Path) -> np.ndarray:
    return np.load(out / "desc-dcl_embeddings.npy")


def status_of(out: Path) -> int | None:
    return json.loads((out / "logs" / "run.json").read_text())["exit_status"]


def test_places_are_read_from_torchrun_and_slurm() -> None:
    assert find_rank({}) == Rank()
    assert find_rank({"RANK": "0", "WORLD_SIZE": "1"}) == Rank()
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert find_rank(torchrun) == Rank(5, 8, 1, "torchrun")
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    assert find_rank(slurm) == Rank(3, 4, 1, "Slurm")
    # A batch script that starts the command without srun is one process, whatever was allotted.
    assert find_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Rank()


def test_one_process_alone_needs_no_group() -> None:
    with Team(Rank()) as team:
        assert team.broadcast("x") == "x"
        assert team.each(lambda: 3) == [3]
        assert team.here(lambda: 4) == 4
        assert team.run(lambda: 5) == 5
        with pytest.raises(RuntimeError, match="timed out"):
            team.run(lambda: (_ for _ in ()).throw(RuntimeError("timed out")))


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("", 0),
        ("sys.exit(3 if rank == 1 else 0)", 3),
        ("sys.exit(3) if rank == 1 else time.sleep(600)", 3),
        ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(600)", 1),
        ("sys.exit(2) if rank == 0 else (signal.signal(15, signal.SIG_IGN), time.sleep(600))", 2),
    ],
)
def test_one_process_that_fails_ends_all(
    script: str, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nidl_dcl.workflow.launcher._PATIENCE", 0.5)
    text = f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{script}"
    start = time.monotonic()
    assert run_processes([sys.executable, "-c", text], 3) == status
    assert time.monotonic() - start < 300
    assert ("was killed (SIGKILL)" in capfd.readouterr().err) == ("getpid" in script)


def test_every_process_knows_its_place(tmp_path: Path) -> None:
    text = (
        "import os, pathlib, sys\n"
        "names = ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'GROUP_RANK', 'MASTER_ADDR']\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(' '.join(os.environ[n] for n in names))"
    )
    command = [sys.executable, "-c", text, str(tmp_path)]
    assert run_processes(command, 2, node=1, nodes=3) == 0
    assert (tmp_path / "2").read_text() == "2 6 0 1 127.0.0.1"
    assert (tmp_path / "3").read_text() == "3 6 1 1 127.0.0.1"


@pytest.fixture(scope="module")
def alone(heads_made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a study by one process, of two optimizer steps."""
    out = tmp_path_factory.mktemp("alone") / "out"
    words = ("study", heads_made, out, "--max-epochs", "1", *OPTIONS, *STUDY)
    assert give(*words) == 0
    return out


@pytest.mark.slow
def test_a_study_on_two_processes_equals_that_of_one(
    alone: Path, heads_made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = (heads_made, out, "--max-epochs", "1", *OPTIONS, *TWO)
    status, said, err = finished(started("study", *words, *STUDY))
    assert status == 0, err
    assert said.count("report.html") == 1
    assert err.count("Training encoders_for_tests") == 1
    assert np.abs(embeddings(out) - embeddings(alone)).max() < 1e-6
    assert np.abs(embeddings(alone)).max() > 0.01
    names = {
        p.relative_to(alone).as_posix()
        for p in alone.rglob("*")
        if p.is_file() and not p.relative_to(alone).as_posix().startswith((".", "figures"))
        if p.suffix != ".log"
    }
    assert names <= {p.relative_to(out).as_posix() for p in out.rglob("*")}
    assert status_of(out) == 0
    assert not (out / ".lock").exists()
    status, _, err = finished(started("pretrain", *words))  # again: nothing to train
    assert status == 0, err
    assert "is trained already" in err


@pytest.mark.slow
def test_a_training_that_torchrun_starts_equals_that_of_one(
    alone: Path, heads_made: Path, tmp_path: Path
) -> None:
    by = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    words = ("pretrain", heads_made, tmp_path / "out", "--max-epochs", "1", *OPTIONS, *TWO)
    status, said, err = finished(started(*words, by=by))
    assert status == 0, err
    assert said.count("models/desc-dcl") == 1
    assert err.count("Training encoders_for_tests") == 1
    got, want = (
        load_file(out / "models" / "desc-dcl" / "weights.safetensors")
        for out in (tmp_path / "out", alone)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "said"),
    [
        ("1", "raise", "Process 1 of 2: sub-07.nii.gz cannot be reached (Input/output error)"),
        ("0", "SIGKILL", "Process 0 of 2 was killed (SIGKILL)"),
        ("1", "SIGSTOP", "does not answer"),
    ],
)
def test_one_failing_process_ends_all_with_a_message(
    rank: str, how: str, said: str, heads_made: Path, tmp_path: Path
) -> None:
    words = [*OPTIONS[:-1], "encoders_for_tests:Failing"]
    process = started(
        "pretrain", heads_made, tmp_path / "out", "--max-epochs", "9", *words, *TWO,
        FAIL_RANK=rank, FAIL_HOW=how, NIDL_DCL_TIMEOUT="5" if how == "SIGSTOP" else "60",
    )  # fmt: skip
    status, _, err = finished(process, 300)
    assert status == 1, err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "models").exists()


@pytest.mark.slow
def test_two_processes_stopped_by_sigterm_write_a_checkpoint_and_go_on(
    heads_made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("pretrain", heads_made, out, "--max-epochs", "20", *OPTIONS, *TWO)
    process = started(*words)
    deadline = time.monotonic() + 300
    while len(list(out.glob(".work/checkpoints-*/step-*.ckpt"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, _, err = finished(process, 300)
    assert status == 143, err
    assert err.count("goes on from here") == 1
    assert status_of(out) == 143
    status, _, err = finished(started(*words))
    assert status == 0, err
    assert "Training resumes at step" in err
    assert (out / "models" / "desc-dcl" / "weights.safetensors").is_file()


def test_a_script_without_a_team_trains_in_one_process_or_is_told_so(heads_made: Path) -> None:
    from nidl_dcl.errors import UsageError
    from nidl_dcl.workflow.launcher import on_one_process
    from nidl_dcl.workflow.options import TrainingOptions

    assert on_one_process(TrainingOptions(accelerator="cpu")).devices == "auto"
    with pytest.raises(UsageError, match="--devices 2"):
        on_one_process(TrainingOptions(accelerator="cpu", devices="2", strategy="ddp"))
    with pytest.raises(UsageError, match="--accelerator"):
        on_one_process(TrainingOptions(accelerator="cpu", devices="0"))

from __future__ import annotations

import json
import os
import random
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

from nidl_dcl.output.folder import Output
from nidl_dcl.output.lock import held

pytestmark = pytest.mark.slow  # all of them need a trained model

SMALL = ("--spacing", "8", "--max-epochs", "1", "--batch-size", "8")
RESULTS = ("desc-dcl_embeddings.tsv", "desc-dcl_embeddings.npy", "descriptions.tsv",
           "logs/inputs.tsv", "logs/phenotypes.tsv", "models/desc-dcl/model.json")  # fmt: skip


@pytest.fixture(scope="module")
def whole(heads_made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output with a model and the embeddings of all."""
    from nidl_dcl.workflow.embed import embed
    from nidl_dcl.workflow.inputs import Study
    from nidl_dcl.workflow.options import DataOptions, TrainingOptions
    from nidl_dcl.workflow.pretrain import pretrain

    output = Output(heads_made, tmp_path_factory.mktemp("whole") / "out")
    study = Study(output, DataOptions(preprocess="none"))
    training = TrainingOptions(spacing=[8.0], max_epochs=1, batch_size=8, accelerator="cpu")
    with study.output.writing():
        pretrain(study, training)
        embed(study)
    return study.output.path


def started(*words: object) -> list[str]:
    return [sys.executable, "-m", "nidl_dcl", *map(str, words)]


def check_collected(out: Path, whole: Path) -> None:
    """Compare an output that was collected from many jobs with that of one command."""
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    table = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t")
    assert len(table) == table["status"].isin(["ok", "warn", "skip"]).sum() == 13
    assert not list(out.glob(".lock*"))


def embed(run: Callable[..., Any], *words: object) -> Any:
    done = run("embed", *words)
    assert done.status == 0, done.err
    return done


def test_many_jobs_at_once_and_one_that_collects_make_the_table_of_one_whoever_is_killed(
    whole: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out, model = tmp_path / "out", whole / "models" / "desc-dcl"
    labels = [["01", "02"], ["03", "04", "05"], ["06", "07"], ["08", "09", "10"]]
    words = [
        ("embed", heads_made, out, "--model", model, "--participant-label", *asked)
        for asked in labels
    ]
    jobs = [subprocess.Popen(started(*w), stderr=subprocess.PIPE, text=True) for w in words]
    # One is killed at a random moment after it began to write somewhere.
    deadline = time.monotonic() + 300
    while not (out / ".work").exists() and not out.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.Random(os.getpid()).uniform(0, 3))
    jobs[3].send_signal(signal.SIGKILL)
    said = [job.communicate(timeout=600)[1] for job in jobs]
    for number, job in enumerate(jobs):
        assert job.returncode in ((0, -9) if number == 3 else (0,)), said[number]
    embed(run, *words[3][1:])
    done = embed(run, heads_made, out, "--model", model)
    assert "13 images of 10 participants, 0 computed now" in done.err
    check_collected(out, whole)
    assert json.loads((out / "logs" / "run.json").read_text())["exit_status"] == 0


FILL = """
import sys
from pathlib import Path
from nidl_dcl.io.file_cache import FileMemory
from nidl_dcl.volumes.cache import PreparedVolumes
from nidl_dcl.volumes.preparation import Preparation

images = sorted(Path(sys.argv[1]).glob("sub-*/**/*.nii.gz"))
work = Path(sys.argv[2])
contract = Preparation(spacing=(8.0, 8.0, 8.0), shape=(24, 24, 24), masked=False)
memory = FileMemory(work / "files.json")
volumes = PreparedVolumes(images, [None] * len(images), contract, work / "volumes", memory)
list(volumes.fill(2))
assert all(bool(volumes[i].isfinite().all()) for i in range(len(volumes)))
"""


def test_several_processes_fill_one_work_folder_at_once(heads_made: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-W", "error", "-c", FILL, str(heads_made), str(tmp_path)]
    jobs = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for job in jobs:
        said = job.communicate(timeout=600)[1]
        assert job.returncode == 0, said
    made = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len([p for p in made if p.suffix == ".f2"]) == 13
    assert len(made) == 14


def test_a_restricted_run_changes_nothing_of_others_and_the_whole_one_draws_the_figures(
    whole: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out, model = tmp_path / "out", whole / "models" / "desc-dcl"
    common = (heads_made, out, "--model", model)
    for label in ("09", "01", "03"):
        embed(run, *common, "--participant-label", label)
    embed(run, *common, "--session-label", "02")
    table = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t")
    assert set(table["participant_id"][table["path"].notna()]) == {
        *("sub-01", "sub-03", "sub-06", "sub-09")
    }
    done = embed(run, *common)
    assert "13 images of 10 participants" in done.err
    check_collected(out, whole)
    for name in ("volumes.png", "embedding_2d.tsv", "embedding_2d.json"):
        assert (out / "figures" / name).read_bytes() == (whole / "figures" / name).read_bytes()
    drawn = (out / "figures" / "volumes.png").stat().st_mtime_ns
    embed(run, *common, "--participant-label", "01")
    check_collected(out, whole)
    assert (out / "figures" / "volumes.png").stat().st_mtime_ns == drawn


def test_a_restricted_run_computes_while_the_folder_is_in_use_and_the_next_collects(
    whole: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out, model = tmp_path / "out", whole / "models" / "desc-dcl"
    common = (heads_made, out, "--model", model)
    out.mkdir()
    with held(out / ".lock"):
        done = embed(run, *common, "--participant-label", "02")
        assert f"process {os.getpid()} on" in done.err
        assert "without labels writes the table of all" in done.err
        assert not (out / "desc-dcl_embeddings.tsv").exists()
        assert not (out / "logs" / "inputs.tsv").exists()
        assert run("embed", *common).status == 4
    assert "10 participants, 12 computed now" in embed(run, *common).err
    check_collected(out, whole)


def test_a_restricted_run_that_fails_says_so_and_the_whole_one_lists_the_image(
    whole: Path, make_heads: Any, tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=3), tmp_path / "out"
    common = ("embed", bids, out, "--model", whole / "models" / "desc-dcl")
    image = next(bids.glob("sub-02/ses-01/anat/*.nii.gz"))
    image.write_bytes(image.read_bytes()[:100])
    statuses = [run(*common, "--participant-label", f"0{i}").status for i in (1, 2, 3)]
    assert statuses == [0, 3, 0]
    assert run(*common, "--max-skipped", "0.5").status == 0
    table = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t")
    assert table["code"].tolist() == ["ok", "truncated", "ok", "ok"]


def test_another_model_is_refused_and_changes_nothing(
    whole: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out, model = tmp_path / "out", whole / "models" / "desc-dcl"
    embed(run, heads_made, out, "--model", model, "--participant-label", "01")
    before = (out / "desc-dcl_embeddings.npy").read_bytes()
    other = shutil.copytree(whole, tmp_path / "other")
    shutil.rmtree(other / "models")
    done = run("pretrain", heads_made, other, *SMALL, "--random-seed", "5")
    assert done.status == 0, done.err
    words = ("--model", other / "models" / "desc-dcl", "--participant-label", "02")
    done = run("embed", heads_made, out, *words)
    assert done.status == 2
    assert "another model" in done.err
    assert (out / "desc-dcl_embeddings.npy").read_bytes() == before


def test_a_study_of_some_participants_keeps_the_rows_of_the_others(
    whole: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    done = run("study", heads_made, out, "--target", "sex", "--model",
               whole / "models" / "desc-dcl", "--participant-label",
               *[f"{i:02d}" for i in range(1, 9)], page="none")  # fmt: skip
    assert done.status == 0, done.err
    check_collected(out, whole)

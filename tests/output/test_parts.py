from __future__ import annotations

import itertools
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

import numpy as np
import pandas as pd
import pytest
from nidl_dcl.output.parts import (
    Part,
    Selection,
    merge_embeddings,
    merge_inputs,
    merge_matches,
    waiting_parts,
)

from nidl_dcl.output.embeddings import COLUMNS, Embeddings
from nidl_dcl.output.folder import Output
from nidl_dcl.output.lock import held

INPUTS = ("participant_id", "session_id", "path", "status", "code", "message")
MATCHES = ("participant_id", "id", "rule", "source")
SMALL = ("--spacing", "8", "--max-epochs", "1", "--batch-size", "8")
RESULTS = ("desc-dcl_embeddings.tsv", "desc-dcl_embeddings.npy", "descriptions.tsv",
           "logs/inputs.tsv", "logs/phenotypes.tsv", "models/desc-dcl/model.json")  # fmt: skip


@pytest.fixture(scope="module")
def whole(heads_made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output with a model and the embeddings of all."""
    from nidl_dcl.workflow import study as stages
    from nidl_dcl.workflow.options import DataOptions, RunOptions, TrainingOptions

    output = Output(heads_made, tmp_path_factory.mktemp("whole") / "out")
    training = TrainingOptions(spacing=[8.0], max_epochs=1, batch_size=8, accelerator="cpu")
    with output.writing():
        stages.pretrain(output, DataOptions(), training, RunOptions())
        stages.embed(output, DataOptions(), RunOptions())
    return output.path


def started(*words: object) -> list[str]:
    return [sys.executable, "-m", "nidl_dcl", *map(str, words)]


def rows(*ids: tuple[str, str | None, int]) -> pd.DataFrame:
    """Return a table of embeddings of (participant, session, run)."""
    names = [f"bids:raw:{p}/{p}_{s or 'x'}_run-{r}_T1w.nii.gz" for p, s, r in ids]
    listed = [
        (p, s, str(r), name, "holdout", "0") for (p, s, r), name in zip(ids, names, strict=True)
    ]
    return pd.DataFrame(listed, columns=list(COLUMNS), dtype=object)


def test_embeddings_of_parts_are_sorted_and_complete_in_any_order() -> None:
    ids = [(f"sub-{p:02d}", "ses-1", r) for p in range(1, 5) for r in (1, 2, 10)]
    matrix = np.arange(len(ids), dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    wanted = Embeddings(rows(*ids), matrix, {"model_sha256": "a"})
    for order in itertools.permutations(range(4)):
        found = None
        for person in order:
            own = slice(3 * person, 3 * person + 3)
            part = Embeddings(wanted.table.iloc[own], matrix[own], wanted.config)
            found = merge_embeddings(found, part, Selection.of([f"{person + 1:02d}"], []))
        assert found is not None
        assert found.table["source"].tolist() == wanted.table["source"].tolist()
        assert np.array_equal(found.matrix, matrix)


def test_an_image_that_is_gone_loses_its_row_within_the_selection_only() -> None:
    ids = [("sub-01", "ses-1", 1), ("sub-01", "ses-2", 1), ("sub-02", "ses-1", 1)]
    before = Embeddings(rows(*ids), np.eye(3, dtype=np.float32))
    now = Embeddings(rows(("sub-01", "ses-2", 2)), np.full((1, 3), 7, np.float32))
    found = merge_embeddings(before, now, Selection.of(["01"], ["2"]))
    assert list(found.table["source"]) == list(
        rows(ids[0], ("sub-01", "ses-2", 2), ids[2])["source"]
    )
    assert found.matrix[:, 0].tolist() == [1, 7, 0]


def test_inputs_of_sessions_list_nobody_with_an_image_as_one_without() -> None:
    def table(*found: tuple[str, str | None, str | None, str]) -> pd.DataFrame:
        return pd.DataFrame([(*row, row[3], "x") for row in found], columns=list(INPUTS))

    first = table(("sub-1", "ses-a", "sub-1_a", "ok"), ("sub-2", None, None, "skip"),
                  ("sub-3", None, None, "skip"))  # fmt: skip
    second = table(("sub-1", None, None, "skip"), ("sub-2", "ses-b", "sub-2_b", "ok"),
                   ("sub-3", None, None, "skip"))  # fmt: skip
    a, b = Selection.of([], ["a"]), Selection.of([], ["ses-b"])
    found = merge_inputs(merge_inputs(None, first, a), second, b)
    assert found["participant_id"].tolist() == ["sub-1", "sub-2", "sub-3"]
    assert found["status"].tolist() == ["ok", "ok", "skip"]
    again = merge_inputs(merge_inputs(None, second, b), first, a)
    pd.testing.assert_frame_equal(found, again)
    pd.testing.assert_frame_equal(merge_inputs(found, first, a), found)


def test_matches_of_parts_make_those_of_the_whole_in_any_order() -> None:
    people = ["sub-2", "sub-10", "sub-1"]
    table = [(p, p, "exact", "participants.tsv") for p in people]
    absent = [
        ("sub-1", None, "none", "phenotype/x.tsv"),
        ("sub-2", None, "none", "phenotype/x.tsv"),
    ]
    for order in itertools.permutations(people):
        found = None
        for person in order:
            own = [row for row in absent if row[0] == person]
            sessions = (person, person, "exact", "sub-*_sessions.tsv")
            part = pd.DataFrame([*table, *own, sessions], columns=list(MATCHES), dtype=object)
            found = merge_matches(found, part, Selection.of([person], []))
        assert found is not None
        names = found["participant_id"].tolist()
        assert names == [*people, "sub-1", "sub-2", *sorted(people)]


def test_a_part_is_one_file_without_pickles_and_comes_back_whole(tmp_path: Path) -> None:
    embeddings = Embeddings(rows(("sub-1", None, 1)), np.ones((1, 3), np.float32), {"a": 1})
    inputs = pd.DataFrame([["sub-1", None, "p", "ok", "ok", "a\tb"]], columns=list(INPUTS))
    matches = pd.DataFrame([], columns=list(MATCHES))
    part = Part(Selection.of(["1"], []), inputs, matches, embeddings, {"host": "h"})
    file = part.write(tmp_path, "dcl", "f" * 64)
    assert waiting_parts(tmp_path, "dcl", "f" * 64) == [file]
    assert waiting_parts(tmp_path, "dcl", "e" * 64) == []
    again = Part.read(file)
    assert again is not None
    assert again.selection == part.selection
    assert again.embeddings is not None
    assert np.array_equal(again.embeddings.matrix, embeddings.matrix)
    assert again.embeddings.table["session_id"].isna().all()
    assert again.inputs["message"].tolist() == ["a\\tb"]
    file.write_bytes(file.read_bytes()[:100])
    assert Part.read(file) is None
    assert Part.read(tmp_path / "none.npz") is None


def check_merged(out: Path, whole: Path) -> None:
    """Compare an output made of parts with that of one command."""
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    table = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t")
    assert len(table) == table["status"].isin(["ok", "warn", "skip"]).sum() == 13
    assert not list((out / ".parts").glob("*"))
    assert not list(out.glob(".lock*"))


@pytest.mark.slow
def test_many_jobs_at_once_make_the_table_of_one_and_one_that_is_killed_does_no_harm(
    whole: Path, heads_made: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", whole / "models" / "desc-dcl"
    labels = [["01"], ["02", "03"], ["04"], ["05", "06"], ["07"], ["08"], ["09", "10"]]
    words = [
        started("embed", heads_made, out, "--model", model, "--participant-label", *asked)
        for asked in labels
    ]
    jobs = [subprocess.Popen(w, stderr=subprocess.PIPE, text=True) for w in words]
    # One is killed at a random moment after it began to write somewhere.
    deadline = time.monotonic() + 120
    while not (out / ".work").exists() and not out.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.Random(os.getpid()).uniform(0, 3))
    jobs[3].send_signal(signal.SIGKILL)
    said = [job.communicate(timeout=200)[1] for job in jobs]
    for number, job in enumerate(jobs):
        assert job.returncode in ((0, -9) if number == 3 else (0,)), said[number]
    subprocess.run(words[3], check=True, timeout=200, capture_output=True)
    check_merged(out, whole)
    record = json.loads((out / "logs" / "run.json").read_text())
    assert sorted(part["selection"]["participants"][0] for part in record["parts"]) == [
        f"sub-{asked[0]}" for asked in labels
    ]
    assert {part["exit_status"] for part in record["parts"]} == {0}
    assert record["exit_status"] == 0


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


@pytest.mark.slow
def test_several_processes_fill_one_work_folder_at_once(heads_made: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-W", "error", "-c", FILL, str(heads_made), str(tmp_path)]
    jobs = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    for job in jobs:
        said = job.communicate(timeout=200)[1]
        assert job.returncode == 0, said
    made = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len([p for p in made if p.suffix == ".f2"]) == 13
    assert len(made) == 14


def embed(run: Callable[..., Any], *words: object) -> Any:
    done = run("embed", *words)
    assert done.status == 0, done.err
    return done


def test_a_part_changes_nothing_of_others_and_the_whole_command_makes_the_pictures(
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
    assert not (out / "figures").exists()
    done = embed(run, *common)
    assert "13 images of 10 participants" in done.err
    check_merged(out, whole)
    record = json.loads((out / "logs" / "run.json").read_text())
    assert len(record["parts"]) == 4
    for name in ("volumes.png", "embedding_2d.tsv", "embedding_2d.json"):
        assert (out / "figures" / name).read_bytes() == (whole / "figures" / name).read_bytes()
    pictures = (out / "figures" / "volumes.png").stat().st_mtime_ns
    embed(run, *common, "--participant-label", "01")
    check_merged(out, whole)
    assert (out / "figures" / "volumes.png").stat().st_mtime_ns == pictures


def test_a_part_waits_for_the_folder_and_is_kept_when_it_stays_in_use(
    whole: Path,
    heads_made: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nidl_dcl.workflow import study as stages

    out, model = tmp_path / "out", whole / "models" / "desc-dcl"
    original = stages.embed_part
    monkeypatch.setattr(stages, "embed_part", lambda *a, **more: original(*a, **more, patience=1.5))
    common = (heads_made, out, "--model", model)
    out.mkdir()
    with held(out / ".lock"):
        done = run("embed", *common, "--participant-label", "02")
    assert done.status == 4
    assert f"process {os.getpid()} on" in done.err
    assert "Waiting" in done.err
    assert not (out / "desc-dcl_embeddings.tsv").exists()
    assert len(list((out / ".parts").iterdir())) == 1
    embed(run, *common, "--participant-label", "05")
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    assert table["participant_id"].tolist() == ["sub-02", "sub-05"]
    assert not list((out / ".parts").iterdir())


def test_a_part_that_fails_has_its_rows_in_inputs_and_its_status(
    whole: Path, make_heads: Any, tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=3), tmp_path / "out"
    common = ("embed", bids, out, "--model", whole / "models" / "desc-dcl")
    image = next(bids.glob("sub-02/ses-01/anat/*.nii.gz"))
    image.write_bytes(image.read_bytes()[:100])
    statuses = [run(*common, "--participant-label", f"0{i}").status for i in (1, 2, 3)]
    assert statuses == [0, 3, 0]
    table = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t")
    assert table["code"].tolist() == ["ok", "truncated", "ok", "ok"]
    record = json.loads((out / "logs" / "run.json").read_text())
    assert [part["exit_status"] for part in record["parts"]] == [0, 3, 0]
    assert "no usable image" in record["parts"][1]["error"]


def test_parts_by_another_model_are_refused_and_leave_nothing(
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
    assert not list((out / ".parts").glob("*"))
    assert (out / "desc-dcl_embeddings.npy").read_bytes() == before


def test_a_study_of_some_participants_keeps_the_rows_of_the_others(
    whole: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    done = run("study", heads_made, out, "--target", "sex", "--model",
               whole / "models" / "desc-dcl", "--participant-label",
               *[f"{i:02d}" for i in range(1, 9)])  # fmt: skip
    assert done.status == 0, done.err
    check_merged(out, whole)


def test_a_run_that_was_suspended_and_replaced_writes_no_more(
    heads_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nidl_dcl.errors import OutputInUseError
    from nidl_dcl.output import lock

    monkeypatch.setattr(lock, "BEAT", 0.05)
    output = Output(heads_made, tmp_path / "out")
    file, records = tmp_path / "out" / ".lock", []

    def work() -> None:
        with output.writing():
            file.write_text(file.read_text().replace('"token": "', '"token": "x'))
            time.sleep(0.5)
            records.append((tmp_path / "out" / "logs" / "run.json").read_bytes())
            with output.stage("embed"):
                pass

    with pytest.raises(OutputInUseError, match="taken over"):
        work()
    assert (tmp_path / "out" / "logs" / "run.json").read_bytes() == records[0]

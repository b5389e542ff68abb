"""Images excluded after a look at the report: what is made again, what stays, and what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TWO_EPOCHS, give

STUDY = ("--target", "age", *TWO_EPOCHS)


@pytest.fixture(scope="module")
def again(
    studied: Path, heads_made: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return a finished study that was run again with a list of exclusions, and the list."""
    folder = tmp_path_factory.mktemp("excluded")
    out = shutil.copytree(studied, folder / "out", copy_function=shutil.copy2)
    listed = folder / "exclude.tsv"
    listed.write_text("participant_id\tsession_id\treason\nsub-03\tses-02\tmoved\n")
    words = ("--exclude", listed, "--exclude-participant-label", "02", "sub-05")
    assert give("study", heads_made, out, *STUDY, *words) == 0
    return out, listed


@pytest.mark.slow
def test_excluded_images_keep_a_row_with_the_reason_and_leave_the_results(
    again: tuple[Path, Path], studied: Path
) -> None:
    out, _ = again
    inputs = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t")
    assert len(inputs) == 13
    gone = inputs[inputs["code"] == "excluded"]
    assert list(gone["participant_id"]) == ["sub-02", "sub-03", "sub-05"]
    assert set(gone["status"]) == {"skip"}
    assert list(gone["message"])[1] == "moved"
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    assert len(table) == 10
    assert not {"sub-02", "sub-05"} & set(table["participant_id"])
    assert list(table.loc[table["participant_id"] == "sub-03", "session_id"]) == ["ses-01"]
    metrics = json.loads((out / "desc-dclAge_metrics.json").read_text())
    before = json.loads((studied / "desc-dclAge_metrics.json").read_text())
    assert (before["n_participants"], metrics["n_participants"]) == (9, 7)
    page = (out / "report.html").read_text()
    assert "3 of these were excluded by hand" in page
    assert "moved" in page
    outliers = pd.read_csv(out / "figures" / "outliers.tsv", sep="\t")
    assert sorted(outliers["source"]) == sorted(table["source"])


@pytest.mark.slow
def test_model_and_embeddings_of_the_others_are_not_computed_again(
    again: tuple[Path, Path], studied: Path
) -> None:
    out, _ = again
    for name in ("models/desc-dcl/weights.safetensors", "models/desc-dcl/model.json"):
        assert (out / name).stat().st_mtime_ns == (studied / name).stat().st_mtime_ns
    log = next(out.glob("logs/*_study.log")).parent
    text = max(log.glob("*_study.log"), key=lambda file: file.stat().st_mtime_ns).read_text()
    assert "10 images of 8 participants, 0 computed now" in text
    assert "3 participants with excluded images took part in the training" in text
    before = pd.read_csv(studied / "desc-dcl_embeddings.tsv", sep="\t")
    now = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    kept = before["source"].isin(now["source"]).to_numpy()
    rows = np.load(studied / "desc-dcl_embeddings.npy")[kept]
    assert np.array_equal(rows, np.load(out / "desc-dcl_embeddings.npy"))


@pytest.mark.slow
def test_the_same_exclusions_again_change_nothing_and_none_bring_all_back(
    again: tuple[Path, Path],
    studied: Path,
    heads_made: Path,
    tmp_path: Path,
    run: Callable[..., Any],
) -> None:
    out = shutil.copytree(again[0], tmp_path / "out", copy_function=shutil.copy2)
    config = yaml.safe_load((out / "code" / "config.yaml").read_text())
    assert config["exclude"] == str(again[1].resolve())
    assert config["exclude_participant_label"] == ["02", "sub-05"]
    words = ("--exclude", again[1], "--exclude-participant-label", "05", "02")
    assert run("study", heads_made, out, *STUDY, *words, page="none").status == 0
    stages = json.loads((out / "logs" / "run.json").read_text())["stages"]
    assert all(stage["skipped"] for stage in stages)
    assert run("study", heads_made, out, *STUDY, page="none").status == 0
    for name in ("desc-dcl_embeddings.tsv", "desc-dclAge_predictions.tsv", "logs/inputs.tsv"):
        assert (out / name).read_bytes() == (studied / name).read_bytes()


def test_a_list_that_names_nobody_is_refused_before_anything_is_done(
    heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    listed = tmp_path / "exclude.tsv"
    listed.write_text("participant_id\nsub-44\n")
    done = run("study", heads_made, tmp_path / "out", *STUDY, "--exclude", listed)
    assert done.status == 2
    assert "line 2: Unknown participant sub-44" in done.err
    assert not (tmp_path / "out" / "models").exists()


def test_index_and_the_dry_run_count_the_excluded(
    heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    done = run("index", heads_made, "--exclude-participant-label", "01")
    assert "\tskip\texcluded\t" in done.out
    assert "12 images: not excluded (1 excluded by hand)" in done.err
    words = (*STUDY, "--exclude-participant-label", "01", "--dry-run")
    done = run("study", heads_made, tmp_path / "out", *words)
    assert "1 skip: excluded" in done.out
    assert "9 participants to train on" in done.out

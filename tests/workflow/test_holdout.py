from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SLOW, give

from nidl_dcl import BIDSDataModule
from nidl_dcl.data.exposure import exposure_of
from nidl_dcl.errors import UsageError
from nidl_dcl.workflow.participants import (
    LEDGER,
    note_score,
    pretraining_splits,
    recorded_share,
    refuse_seen,
)

SHORT = ("--spacing", "16", "--mask", "none", "--max-epochs", "1", "--batch-size", "8")
ROW = {
    "target": "age",
    "n_participants": 9,
    "predicted_from": "embeddings",
    "metric": "mae",
    "score": 6.5,
    "config": "abc",
}


def metrics_of(folder: Path, label: str) -> dict[str, Any]:
    return json.loads((folder / f"desc-dcl{label}_metrics.json").read_text())


def ledger_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "logs" / "holdout.tsv", sep="\t")


def test_the_ledger_counts_by_target_and_keeps_every_row(tmp_path: Path) -> None:
    counts = [
        note_score(tmp_path, {**ROW, "target": t}) for t in ("age", "sex", "age", "ag", "age")
    ]
    assert counts == [1, 1, 2, 1, 3]
    table = ledger_of(tmp_path)
    assert tuple(table.columns) == LEDGER
    assert list(table["target"]) == ["age", "sex", "age", "ag", "age"]
    assert pd.to_datetime(table["time"], utc=True).is_monotonic_increasing
    path = tmp_path / "logs" / "holdout.tsv"
    odd = path.read_bytes() + b"a note of somebody\twithout an end"
    path.write_bytes(odd)
    assert note_score(tmp_path, ROW) == 4
    assert path.read_bytes().startswith(odd + b"\n")


def test_a_target_with_a_tab_in_its_name_is_one_target(tmp_path: Path) -> None:
    assert [note_score(tmp_path, {**ROW, "target": "a\tb"}) for _ in range(2)] == [1, 2]
    assert note_score(tmp_path, {**ROW, "target": "a"}) == 1


@pytest.mark.parametrize(
    ("config", "exposure", "how", "expected"),
    [
        ({"holdout": 0.2}, {"images": ["x"]}, ["image", ""], 0.2),
        ({"holdout": 0.2}, {"images": ["x"]}, ["id", ""], None),  # another dataset
        ({"holdout": 0.2}, {}, ["id", ""], 0.2),  # a folder of old, of this dataset by name
        ({}, {"images": ["x"]}, ["image"], None),
    ],
)
def test_the_share_of_a_model_holds_for_its_own_dataset(config, exposure, how, expected) -> None:
    provenance = {"config": config, "source": "bids"}
    description = {"provenance": provenance, "exposure": exposure}
    assert recorded_share(description, "bids", how) == expected


def test_who_came_after_a_training_is_not_called_held_out() -> None:
    people = [f"sub-{i}" for i in range(5)]
    exposure = exposure_of(["sub-0", "sub-1"], ["c0", "c1"], "salt", ["sub-1"])
    images = pd.DataFrame(
        {
            "participant_id": people,
            "person_id": [
                "sub-0",
                "sub-1",
                "sub-2",
                "sub-3",
                "sub-0",
            ],  # the last has another's scan
            "content": [f"c{i}" for i in range(5)],
            "split": ["train", "train", "holdout", "train", "train"],
        }
    )
    split = pretraining_splits(images, {"exposure": exposure})
    assert split == ["train", "val", "holdout", "not_in_training", "train"]
    assert pretraining_splits(images, {"exposure": {}}) == [None] * 5


@pytest.mark.parametrize(
    ("seen", "contents", "words"),
    [
        (["sub-1"], [], "1 of 2 participants to be held out were seen when m was trained: 0 by"),
        ([], ["c1"], "1 by their images, 0 by their id alone (first: sub-1)"),
        (["sub-1", "sub-2"], ["c1"], "2 of 2 participants"),
    ],
)
def test_held_out_participants_whom_a_model_saw_are_refused(seen, contents, words) -> None:
    images = pd.DataFrame(
        {
            "participant_id": ["sub-1", "sub-1", "sub-2", "sub-3"],
            "split": ["holdout", "holdout", "holdout", "train"],
            "content": ["c0", "c1", "c2", "c3"],
        }
    )
    refuse_seen(images, exposure_of(["sub-3"], ["c3"], "s"), Path("m"))
    refuse_seen(images, {}, Path("m"))
    with pytest.raises(UsageError) as error:
        refuse_seen(images, exposure_of(seen, contents, "s"), Path("m"))
    assert words in str(error.value)


@pytest.fixture(scope="module")
def cohort(heads_writer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of 24 heads in families of two, that no test may change."""
    folder = heads_writer(tmp_path_factory.mktemp("cohort") / "bids", 24, masks=False)
    table = pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    table["family"] = [f"f{i // 2}" for i in range(24)]
    table.to_csv(folder / "participants.tsv", sep="\t", index=False)
    return folder


@pytest.fixture(scope="module", params=SLOW)
def studied(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a study with participants held out, that no test may change."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert (
        give("study", cohort, out, "--target", "age", "--holdout", "0.4", *SHORT, page="none") == 0
    )
    return out


@pytest.fixture
def copied(studied: Path, tmp_path: Path) -> Path:
    """Return a copy of that output, to be changed."""
    return shutil.copytree(studied, tmp_path / "out", copy_function=shutil.copy2)


def test_a_study_holds_out_until_one_last_score(cohort: Path, studied: Path) -> None:
    module = BIDSDataModule(cohort, mask="none", holdout=0.4)
    aside = set(module.images.loc[module.images["split"] == "holdout", "participant_id"])
    assert 5 <= len(aside) < 20
    exposure = json.loads((studied / "models/desc-dcl/model.json").read_text())["exposure"]
    assert exposure["n_participants"] == 24 - len(aside)
    metrics = metrics_of(studied, "Age")
    table = pd.read_csv(studied / "desc-dclAge_predictions.tsv", sep="\t")
    used = {status: set(rows) for status, rows in table.groupby("status")["participant_id"]}
    assert used["holdout"] == aside - {"sub-04"}  # who has no age
    assert not used["ok"] & aside
    assert metrics["n_participants"] == len(used["ok"])
    assert metrics["exposure"]["by_image"] == metrics["exposure"]["seen"] == len(used["ok"])
    last = metrics["holdout"]
    assert last["n_participants"] == len(used["holdout"])
    assert set(last["baselines"]) == {"dummy", "untrained", "voxels"}
    assert last["times_scored"] == 1
    assert "not known" not in last["sentence"]
    assert table.loc[table["status"] == "holdout", "prediction"].notna().all()
    ledger = ledger_of(studied)
    assert list(ledger["target"]) == ["age"]
    assert ledger["score"][0] == pytest.approx(last["scores"]["mae"]["mean"])
    assert list(ledger["n_participants"]) == [last["n_participants"]]
    sidecar = json.loads((studied / "desc-dclAge_predictions.json").read_text())
    assert "holdout" in sidecar["status"]["Levels"]
    split = pd.read_csv(studied / "desc-dcl_embeddings.tsv", sep="\t")
    assert set(split.loc[split["split"] == "holdout", "participant_id"]) == aside
    assert "holdout: 0.4" in (studied / "code" / "config.yaml").read_text()


def test_labels_of_held_out_participants_change_no_score_of_the_others(
    cohort: Path, copied: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    before = metrics_of(copied, "Age")
    table = pd.read_csv(copied / "desc-dclAge_predictions.tsv", sep="\t")
    aside = set(table.loc[table["status"] == "holdout", "participant_id"])
    bids = shutil.copytree(cohort, tmp_path / "bids", copy_function=shutil.copy2)
    people = pd.read_csv(bids / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    people.loc[people["participant_id"].isin(aside), "age"] = "99"
    people.to_csv(bids / "participants.tsv", sep="\t", index=False)
    assert run("predict", bids, copied, "--target", "age", "--mask", "none").status == 0
    after = metrics_of(copied, "Age")
    for name in ("scores", "permutation", "baselines", "cv", "exposure", "distribution"):
        assert before[name] == after[name]
    assert before["holdout"]["scores"] != after["holdout"]["scores"]
    assert after["holdout"]["times_scored"] == 2
    assert "scored 2 times for age" in after["holdout"]["sentence"]
    assert list(ledger_of(copied)["target"]) == ["age", "age"]


def test_the_ledger_has_a_row_for_each_time_and_none_for_what_was_done_before(
    cohort: Path, copied: Path, run: Callable[..., Any]
) -> None:
    words = ("predict", cohort, copied, "--mask", "none", "--target")
    assert run(*words, "age").status == 0  # the share is the model's
    assert len(ledger_of(copied)) == 1
    done = run(*words, "age", "sex")
    assert done.status == 0, done.err
    assert "participants held out from everything" in done.err
    assert list(ledger_of(copied)["target"]) == ["age", "sex"]
    (copied / "desc-dclAge_metrics.json").unlink()
    assert run(*words, "age", "--holdout", "0.4").status == 0
    assert metrics_of(copied, "Age")["holdout"]["times_scored"] == 2
    assert metrics_of(copied, "Sex")["holdout"]["times_scored"] == 1


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("predict", ["--holdout", "0.2"], ["holdout was 0.4, is 0.2"]),
        ("predict", ["--holdout", "0"], ["holdout was 0.4, is 0"]),
        ("study", ["--holdout", "0.2", *SHORT], ["holdout was 0.4, is 0.2"]),
        ("predict", ["--random-seed", "3"], ["random_seed was 0, is 3"]),
        ("predict", ["--holdout", "0.9"], ["were seen when", "by their images", "--model-name"]),
    ],
)
def test_another_share_or_seed_than_the_models_is_refused(
    command: str,
    options: list[str],
    words: list[str],
    cohort: Path,
    copied: Path,
    run: Callable[..., Any],
) -> None:
    if "--mask" not in options:
        options = [*options, "--mask", "none"]
    done = run(command, cohort, copied, "--target", "age", *options)
    assert done.status == 2
    for word in words:
        assert word in done.err
    assert len(ledger_of(copied)) == 1


def test_a_model_that_saw_renamed_participants_cannot_be_used_with_them_held_out(
    cohort: Path, studied: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    """Participants get other names and their files other bytes; the voxels are the same."""
    bids = tmp_path / "renamed"
    bids.mkdir()
    shutil.copy(cohort / "dataset_description.json", bids)
    rows = ["participant_id\tage"]
    for image in sorted(cohort.glob("sub-*/ses-01/anat/*.nii.gz")):
        name = "sub-new" + image.name[4:6]
        target = bids / name / "anat" / f"{name}_T1w.nii.gz"
        target.parent.mkdir(parents=True)
        target.write_bytes(gzip.compress(gzip.decompress(image.read_bytes()), 1, mtime=3))
        rows.append(f"{name}\t{30 + len(rows)}")
    (bids / "participants.tsv").write_text("\n".join(rows) + "\n")
    model = studied / "models" / "desc-dcl"
    given = ("--target", "age", "--model", model, "--mask", "none")
    done = run("study", bids, tmp_path / "out", *given, "--holdout", "0.9")
    assert done.status == 2
    assert "by their images, 0 by their id alone (first: sub-new" in done.err
    init = ("--holdout", "0.9", "--init", model, *SHORT)
    done = run("pretrain", bids, tmp_path / "further", *init)
    assert done.status == 2
    assert "were seen when" in done.err
    assert not (tmp_path / "further" / "models").exists()


def test_weights_that_go_on_learning_keep_whom_they_saw(
    cohort: Path,
    studied: Path,
    make_heads: Callable[..., Path],
    tmp_path: Path,
    run: Callable[..., Any],
) -> None:
    bids, out = make_heads(n=4, first=60, masks=False), tmp_path / "out"
    model = studied / "models" / "desc-dcl"
    assert run("pretrain", bids, out, "--init", model, *SHORT).status == 0
    exposure = json.loads((out / "models/desc-dcl/model.json").read_text())["exposure"]
    before = json.loads((model / "model.json").read_text())["exposure"]
    assert exposure["before"] == [before]
    assert exposure["n_participants"] == 4


def test_a_model_of_another_dataset_brings_no_share_along(
    studied: Path, make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=24, first=60, masks=False), tmp_path / "out"
    model = studied / "models" / "desc-dcl"
    words = ("study", bids, out, "--target", "sex", "--model", model, "--mask", "none")
    assert run(*words, page="none").status == 0
    assert metrics_of(out, "Sex")["holdout"] is None
    assert not (out / "logs" / "holdout.tsv").exists()
    again = tmp_path / "again"
    assert run(*words[:2], again, *words[3:], "--holdout", "0.4", page="none").status == 0
    metrics = metrics_of(again, "Sex")
    assert metrics["holdout"]["n_participants"] >= 5
    assert metrics["holdout"]["n_participants"] + metrics["n_participants"] == 24


def test_too_few_held_out_or_left_have_their_answers(
    studied: Path, make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, model = make_heads(n=12, first=60, masks=False), studied / "models" / "desc-dcl"
    words = ("--target", "sex", "--model", model, "--mask", "none")
    few = run("study", bids, tmp_path / "few", *words, "--holdout", "0.2", page="none")
    assert few.status == 0
    last = metrics_of(tmp_path / "few", "Sex")["holdout"]
    assert 0 < last["n_participants"] < 5
    assert last["scores"] is None
    assert last["times_scored"] is None
    assert "fewer than 5" in few.err
    assert not (tmp_path / "few" / "logs" / "holdout.tsv").exists()
    many = run("study", bids, tmp_path / "many", *words, "--holdout", "0.99")
    assert many.status == 3
    assert "held out" in many.err


@pytest.mark.slow
def test_families_are_held_out_whole_by_all_stages(
    cohort: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    family = dict(
        pd.read_csv(cohort / "participants.tsv", sep="\t")[["participant_id", "family"]].to_numpy()
    )
    given = ("--holdout", "0.4", "--group", "family")
    assert run("pretrain", cohort, tmp_path, *given, *SHORT).status == 0
    assert run("embed", cohort, tmp_path, "--mask", "none").status == 0
    words = ("predict", cohort, tmp_path, "--target", "age", "--mask", "none")
    assert run(*words, "--group", "family").status == 0
    table = pd.read_csv(tmp_path / "desc-dclAge_predictions.tsv", sep="\t")
    sides = table[table["status"] != "dropped"].groupby(table["participant_id"].map(family))[
        "status"
    ]
    assert sides.nunique().max() == 1
    assert (table["status"] == "holdout").sum() >= 5
    assert metrics_of(tmp_path, "Age")["holdout"]["scores"]


def test_a_held_out_participant_whose_family_is_not_is_not_held_out(
    cohort: Path, copied: Path, run: Callable[..., Any]
) -> None:
    (copied / "desc-dclAge_metrics.json").unlink()
    words = ("predict", cohort, copied, "--target", "age", "--mask", "none", "--group", "family")
    done = run(*words)
    assert done.status == 0, done.err
    assert "not held out after all" in done.err
    table = pd.read_csv(copied / "desc-dclAge_predictions.tsv", sep="\t")
    people = pd.read_csv(cohort / "participants.tsv", sep="\t")[["participant_id", "family"]]
    family = table["participant_id"].map(dict(people.to_numpy()))
    assert table[table["status"] != "dropped"].groupby(family)["status"].nunique().max() == 1


def test_those_who_share_an_image_count_once_and_are_of_one_side(
    make_heads: Callable[..., Path], studied: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids = make_heads(n=24, first=60, masks=False)
    name = "sub-{0}/ses-01/anat/sub-{0}_ses-01_T1w.nii.gz"
    for twin, one in (("62", "61"), ("64", "67"), ("73", "70")):
        (bids / name.format(twin)).write_bytes(
            gzip.compress(gzip.decompress((bids / name.format(one)).read_bytes()), 1, mtime=1)
        )
    model = studied / "models" / "desc-dcl"
    given = ("--target", "age", "--model", model, "--mask", "none", "--holdout", "0.4")
    done = run("study", bids, tmp_path / "out", *given, page="none")
    assert done.status == 0, done.err
    assert "6 participants are 3 by their images" in done.err
    assert "contradict" in done.err
    metrics = metrics_of(tmp_path / "out", "Age")
    assert metrics["n_participants"] + metrics["holdout"]["n_participants"] == 21
    assert len(metrics["duplicates"]["conflicting"]) == 3
    table = pd.read_csv(tmp_path / "out" / "desc-dclAge_predictions.tsv", sep="\t")
    status = dict(zip(table["participant_id"], table["status"], strict=True))
    for twin, one in (("62", "61"), ("64", "67"), ("73", "70")):
        assert status[f"sub-{twin}"] == status[f"sub-{one}"]
    assert np.isfinite(metrics["scores"]["mae"]["mean"])


@pytest.mark.parametrize(
    ("kept", "seen", "words"),
    [
        (("salt", "n_participants", "participants"), None, "The encoder saw"),  # a folder of old
        ((), 0, "It is not known which"),
    ],
)
def test_a_model_that_keeps_less_of_whom_it_saw_is_still_used_and_claims_less(
    kept: tuple[str, ...],
    seen: int | None,
    words: str,
    cohort: Path,
    copied: Path,
    run: Callable[..., Any],
) -> None:
    file = copied / "models" / "desc-dcl" / "model.json"
    description = json.loads(file.read_text())
    description["exposure"] = {name: description["exposure"][name] for name in kept}
    description["provenance"]["source"] = cohort.name
    file.write_text(json.dumps(description))
    words_given = ("study", cohort, copied, "--target", "sex", *SHORT)
    done = run(*words_given, page="none")
    assert done.status == 0, done.err
    exposure = metrics_of(copied, "Sex")["exposure"]
    assert exposure["by_image"] is None
    assert exposure["by_id_only"] is None
    assert words in exposure["sentence"]
    assert (exposure["seen"] == 0) == (seen == 0)
    last = metrics_of(copied, "Sex")["holdout"]["sentence"]
    assert ("It is not known whether the encoder saw them" in last) == (not kept)
    split = pd.read_csv(copied / "desc-dcl_embeddings.tsv", sep="\t")["split"]
    assert split.isna().all() if not kept else set(split) == {"train", "holdout"}

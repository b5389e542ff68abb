from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import TWO_EPOCHS, give, write_heads

from nidl_dcl import BIDSDataModule
from nidl_dcl.data import image_table
from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.workflow.dry_run import dry_run
from nidl_dcl.workflow.options import DataOptions, RunOptions

MANY_EPOCHS = ("--target", "age", "--spacing", "8", "--max-epochs", "24", "--batch-size", "4")
READOUT_WEIGHTS = "Age_readout.safetensors"
VALIDATOR = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))


def files_of(folder: Path) -> dict[str, int]:
    """Return the change time of every file, hidden ones and logs of runs left out."""
    return {
        p.relative_to(folder).as_posix(): p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file()
        and p.suffix != ".log"
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    }


def embeddings_of(folder: Path, label: str = "dcl") -> bytes:
    """Return the bytes of the embeddings."""
    return (folder / f"desc-{label}_embeddings.npy").read_bytes()


def record_of(folder: Path) -> dict[str, Any]:
    """Return the record of the last run."""
    return json.loads((folder / "logs" / "run.json").read_text())


@pytest.fixture
def copied(studied: Path, tmp_path: Path) -> Path:
    """Return a copy of that output, to be changed."""
    return shutil.copytree(studied, tmp_path / "out", copy_function=shutil.copy2)


@pytest.mark.parametrize(
    "file",
    [
        *("dataset_description.json", "README.md", "CHANGES", ".bidsignore"),
        *("descriptions.tsv", "descriptions.json", "report.html", "code/config.yaml"),
        *("desc-dcl_embeddings.tsv", "desc-dcl_embeddings.json", "desc-dcl_embeddings.npy"),
        *("desc-dclAge_predictions.tsv", "desc-dclAge_predictions.json"),
        *("desc-dclAge_folds.tsv", "desc-dclAge_folds.json"),
        *("desc-dclSex_metrics.json", "desc-dclAge_metrics.json", "desc-dclSex_predictions.tsv"),
        *("models/desc-dcl/weights.safetensors", "models/desc-dcl/model.json"),
        *("logs/inputs.tsv", "logs/run.json", "logs/metrics.csv", "logs/CITATION.md"),
    ],
)
def test_a_study_writes_every_file_of_the_contract(file: str, studied: Path) -> None:
    assert (studied / file).stat().st_size > 0


def test_every_file_of_a_study_is_documented(studied: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "files.md").read_text()
    logs = [path.relative_to(studied).as_posix() for path in studied.glob("logs/*.log")]
    assert len(logs) == 1
    for name in (*files_of(studied), *logs):
        if name.startswith("figures/"):
            continue
        for target in ("Age", "Sex"):
            name = name.replace(f"desc-dcl{target}_", "desc-<model><Target>_")
        name = name.replace("desc-dcl", "desc-<model>")
        name = re.sub(r"\d{8}T\d{6}Z_study", "<UTC time>_<command>", name)
        folder, _, own = name.rpartition("/")
        assert f"`{name}`" in text or (f"`{folder}/`" in text and f"`{own}`" in text), name


def test_embeddings_have_one_row_for_each_image_in_table_order(studied: Path) -> None:
    table = pd.read_csv(studied / "desc-dcl_embeddings.tsv", sep="\t", dtype=str)
    matrix = np.load(studied / "desc-dcl_embeddings.npy")
    assert list(table.columns) == ["participant_id", "session_id", "run", "source", "split", "row"]
    assert len(table) == len(matrix) == 13
    assert matrix.dtype == np.float32
    assert list(table["row"]) == [str(i) for i in range(13)]
    assert set(table["split"]) == {"train"}
    assert table["source"].str.startswith("bids:raw:sub-").all()
    assert len(np.unique(matrix, axis=0)) == 13


def test_average_outliers_and_retrieval_are_of_all_images(studied: Path) -> None:
    figures, sources = studied / "figures", []
    for name in ("average.tsv", "outliers.tsv"):
        table = pd.read_csv(figures / name, sep="\t", keep_default_na=False)
        sources.append(sorted(table["source"]))
        assert sorted(table["rank"]) == list(range(1, 14))
    embedded = pd.read_csv(studied / "desc-dcl_embeddings.tsv", sep="\t")
    assert sources == [sorted(embedded["source"])] * 2
    assert {"noise", "sharpness", "brain_distance", "embedding_distance"} <= set(table.columns)
    mean, spread = np.load(figures / "average.npy")
    assert 0 < spread.mean() < mean.max()
    retrieval = pd.read_csv(figures / "retrieval.tsv", sep="\t", index_col="features")
    assert list(retrieval.index) == ["embeddings", "untrained"]
    assert list(retrieval["n_images"]) == [6, 6]  # every third of ten has two sessions
    page = (studied / "report.html").read_text()
    assert "Not finished" not in page
    assert "of 6 images the nearest neighbor" in page


def test_predictions_keep_every_participant_and_say_why_one_was_not_used(studied: Path) -> None:
    table = pd.read_csv(studied / "desc-dclAge_predictions.tsv", sep="\t", dtype=str)
    metrics = json.loads((studied / "desc-dclAge_metrics.json").read_text())
    assert table["participant_id"].nunique() == 10
    assert metrics["n_participants"] == 9
    assert {"dummy", "untrained", "voxels"} <= set(metrics["baselines"])
    assert metrics["exposure"]


def test_all_of_a_participants_rows_are_in_inputs(studied: Path) -> None:
    table = pd.read_csv(studied / "logs" / "inputs.tsv", sep="\t", dtype=str)
    assert list(table["status"]) == ["ok"] * 13


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_the_official_validator_reports_no_error(studied: Path) -> None:
    from nidl_dcl.bids.validator import validate

    validate(studied)


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_what_the_validator_reports_is_an_error(copied: Path) -> None:
    from nidl_dcl.bids.validator import validate
    from nidl_dcl.errors import NidlDclError

    (copied / "dataset_description.json").write_text("{}")
    with pytest.raises(NidlDclError, match="validator reports"):
        validate(copied)


def test_the_same_command_again_changes_nothing(
    copied: Path, heads_made: Path, run: Callable[..., Any]
) -> None:
    before = files_of(copied)
    done = run("study", heads_made, copied, "--target", "age", "sex", *TWO_EPOCHS)
    assert done.status == 0
    assert "voxels" in done.out
    assert "half the labels" in done.out
    after = files_of(copied)
    assert {n for n in after if after[n] != before.get(n)} <= {
        *("logs/run.json", "code/config.yaml")
    }
    record = record_of(copied)
    assert all(stage["skipped"] for stage in record["stages"])
    assert [stage["skipped"] for stage in record["earlier"][0]["stages"]] == [False] * 4


@pytest.mark.slow
def test_all_stages_of_a_study_read_the_dataset_once(
    copied: Path, heads_made: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    for name in ("find_images", "check_images", "read_phenotypes"):
        original = getattr(image_table, name)

        def counted(*args: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            calls[name] += 1
            return original(*args, **more)

        monkeypatch.setattr(image_table, name, counted)
    (copied / "desc-dclAge_metrics.json").unlink()
    done = run("study", heads_made, copied, "--target", "age", "sex", *TWO_EPOCHS)
    assert done.status == 0, done.err
    stages = [stage["name"] for stage in record_of(copied)["stages"]]
    assert stages == ["pretrain", "embed", "predict", "report"]
    assert calls == {"find_images": 1, "check_images": 1, "read_phenotypes": 1}


@pytest.mark.parametrize(
    "lost",
    [
        ["code/config.yaml"],
        *(
            pytest.param(lost, marks=pytest.mark.slow)
            for lost in (
                ["desc-dcl_embeddings.npy", "report.html"],
                ["desc-dcl_embeddings.tsv", "descriptions.tsv"],
                ["desc-dclAge_metrics.json", "desc-dclSex_predictions.tsv", "logs/inputs.tsv"],
                [f"models/desc-dcl/desc-dcl{x}" for x in ("Sex_readout.json", READOUT_WEIGHTS)],
                ["figures/average.npy", "figures/outlier_1.png"],
                ["figures/outliers.tsv", ".work"],
                ["logs/quality.tsv"],
                ["desc-dclAge_folds.tsv", "desc-dclAge_folds.json"],
            )
        ),
    ],
    ids=lambda lost: lost[0],
)
def test_what_was_lost_is_made_again_and_the_same(
    lost: list[str], copied: Path, studied: Path, heads_made: Path, run: Callable[..., Any]
) -> None:
    for place in (copied / name for name in lost):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    done = run("study", heads_made, copied, "--target", "age", "sex", *TWO_EPOCHS)
    assert done.status == 0
    for name in lost:
        assert (copied / name).exists()
        if name not in (".work", "report.html", "code/config.yaml"):
            assert (copied / name).read_bytes() == (studied / name).read_bytes()
    assert embeddings_of(copied) == embeddings_of(studied)


@pytest.mark.slow
def test_the_saved_configuration_runs_the_study_again(
    copied: Path, run: Callable[..., Any], studied: Path
) -> None:
    file = copied / "code" / "config.yaml"
    file.write_text(file.read_text().replace(str(studied), str(copied)))
    shutil.rmtree(copied / ".work")
    (copied / "desc-dcl_embeddings.npy").unlink()
    done = run("study", "--config", file)
    assert done.status == 0
    assert embeddings_of(copied) == embeddings_of(studied)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--max-epochs", "3"], "max_epochs"),
        (["--random-seed", "5"], "random_seed"),
        (["--spacing", "10"], "preparation"),
        (["--views", "strong"], "views"),
        (["--mask", "none"], "preparation"),
    ],
)
def test_a_changed_configuration_is_refused_with_the_fields_that_differ(
    words: list[str], field: str, copied: Path, heads_made: Path, run: Callable[..., Any]
) -> None:
    before = files_of(copied)
    name, value = words
    settings = dict(zip(TWO_EPOCHS[::2], TWO_EPOCHS[1::2], strict=True)) | {name: value}
    options = [word for pair in settings.items() for word in pair]
    done = run("study", heads_made, copied, "--target", "age", *options)
    assert done.status == 2
    assert field in done.err
    assert "desc-dcl" in done.err
    after = files_of(copied)
    assert {n for n in after if after[n] != before.get(n)} <= {"logs/run.json"}


@pytest.mark.slow
def test_confounds_and_sites_reach_the_predictions_and_a_changed_option_is_refused(
    make_heads: Callable[..., Path], studied: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(), tmp_path / "out"
    file = bids / "participants.tsv"
    table = pd.read_csv(file, sep="\t", keep_default_na=False)
    table["weight"] = ["n/a", *(60.5 + np.arange(9) * 7 % 5)]
    table["hospital"] = ["north", "south"] * 5
    table["constant"] = "same"
    table.to_csv(file, sep="\t", index=False)
    model = studied / "models" / "desc-dcl"
    assert run("embed", bids, out, "--model", model).status == 0
    words = ["predict", bids, out, "--target", "sex", "--confounds", "weight"]
    done = run(*words, "--site", "hospital", "--harmonize")
    assert (done.status, done.err.count("Error")) == (0, 0), done.err
    assert "confounds" in done.out
    metrics = json.loads((out / "desc-dclSex_metrics.json").read_text())
    assert metrics["n_dropped"] == {"confound missing: weight": 1}
    assert {"dummy", "untrained", "voxels", "confounds", "site"} == set(metrics["baselines"])
    assert metrics["site"]["column"] == "hospital"
    assert metrics["site"]["within"]["north"]["n_participants"] == 4
    assert set(metrics["site"]["leave_one_site_out"]["scores"]) >= {"embeddings", "voxels"}
    assert metrics["harmonization"]["n_images_not_harmonized"] >= 0
    assert metrics["provenance"]["config"]["confounds"] == ["weight"]
    before = files_of(out)
    assert run(*words, "--site", "hospital", "--harmonize").status == 0
    assert {n for n, t in files_of(out).items() if t != before.get(n)} == {"logs/run.json"}
    for changed, field in ((words, "harmonize was True, is False"), (words[:5], "confounds was")):
        refused = run(*changed, "--site", "hospital")
        assert refused.status == 2
        assert field in refused.err
    refused = run(*words[:5], "--confounds", "constant")
    assert refused.status == 2
    assert "Confound 'constant' is constant" in refused.err
    # Another value of a confound is new data, not another configuration.
    table.loc[3, "weight"] = 99.5
    table.to_csv(file, sep="\t", index=False)
    assert run(*words, "--site", "hospital", "--harmonize").status == 0
    again = json.loads((out / "desc-dclSex_metrics.json").read_text())
    assert again["provenance"]["data"] != metrics["provenance"]["data"]


@pytest.mark.slow
def test_a_site_column_that_came_later_and_a_second_analysis_are_no_dead_end(
    copied: Path, make_heads: Callable[..., Path], run: Callable[..., Any]
) -> None:
    bids = make_heads()
    file = bids / "participants.tsv"
    words = ("--target", "age", *TWO_EPOCHS)
    refused = run("study", bids, copied, *words, "--confounds", "sex")
    assert refused.status == 2
    model = copied / "models" / "desc-dcl"
    assert "configuration: confounds was [], is ['sex']. To keep both:" in refused.err
    assert f"--model {model} and another --model-name" in refused.err
    again = ("--confounds", "sex", "--model", model, "--model-name", "dclsex")
    second = run("study", bids, copied, "--target", "age", *again, page="none")
    assert second.status == 0, second.err
    assert ", 0 computed now" in second.err
    config = [
        json.loads((copied / f"desc-{name}Age_metrics.json").read_text())["provenance"]["config"]
        for name in ("dcl", "dclsex")
    ]
    assert [c["confounds"] for c in config] == [[], ["sex"]]
    table = pd.read_csv(file, sep="\t", keep_default_na=False)
    table["site"] = ["north", "south"] * 5
    table.to_csv(file, sep="\t", index=False)
    done = run("study", bids, copied, *words, page="none")
    assert done.status == 0, done.err
    metrics = json.loads((copied / "desc-dclAge_metrics.json").read_text())
    assert metrics["site"]["column"] == "site"
    table["clinic"] = table["site"]
    table.to_csv(file, sep="\t", index=False)
    refused = run("study", bids, copied, *words, "--site", "clinic")
    assert refused.status == 2
    assert "site was 'site', is 'clinic'" in refused.err


@pytest.mark.slow
def test_a_new_target_and_a_new_participant_are_added_to_what_is_there(
    make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=8), tmp_path / "out"
    assert run("study", bids, out, "--target", "age", *TWO_EPOCHS, page="none").status == 0
    first = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    rows = np.load(out / "desc-dcl_embeddings.npy")
    weights = (out / "models" / "desc-dcl" / "weights.safetensors").read_bytes()
    make_heads(n=2, first=9)
    words = ("study", bids, out, "--target", "age", "sex", *TWO_EPOCHS)
    assert run(*words, page="none").status == 0
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    assert (out / "models" / "desc-dcl" / "weights.safetensors").read_bytes() == weights
    assert table["participant_id"].nunique() == 10
    assert (
        dict(zip(table["participant_id"], table["split"], strict=True))["sub-10"]
        == "not_in_training"
    )
    again = np.load(out / "desc-dcl_embeddings.npy")[table["source"].isin(first["source"])]
    assert np.array_equal(again, rows)
    assert (out / "desc-dclSex_metrics.json").exists()
    metrics = json.loads((out / "desc-dclAge_metrics.json").read_text())
    assert metrics["n_participants"] == 9


@pytest.mark.slow
def test_new_participants_with_larger_images_do_not_change_the_shape(
    make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=4, masks=False), tmp_path / "out"
    assert run("pretrain", bids, out, *TWO_EPOCHS).status == 0
    make_heads(n=8, first=5, masks=False)
    for i in range(5, 13):
        for path in bids.glob(f"sub-{i:02d}/ses-*/anat/*.nii.gz"):
            image = nib.load(path)
            wide = np.pad(np.asanyarray(image.dataobj), 10)
            nib.save(nib.Nifti1Image(wide, image.affine), path)
    for words in (("pretrain", bids, out, *TWO_EPOCHS), ("embed", bids, out)):
        done = run(*words)
        assert done.status == 0, done.err
    assert pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")["participant_id"].nunique() == 12


@pytest.mark.slow
def test_another_dataset_is_embedded_by_an_existing_model(
    studied: Path, make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=8, first=21), tmp_path / "out"
    model = studied / "models" / "desc-dcl"
    done = run("study", bids, out, "--target", "sex", "--model", model, page="none")
    assert done.status == 0
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    assert set(table["split"]) == {"not_in_training"}
    weights = "weights.safetensors"
    copy = out / "models" / "desc-dcl" / weights
    assert copy.read_bytes() == (model / weights).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"masks": False}, ["brain-masked", "--mask NAME"]),
        ({"voxel": 12.0}, ["_T1w.nii.gz has voxels of 12 mm", "8 mm at most", "--spacing"]),
        ({"suffix": "T2w"}, ["T1w images and these are T2w"]),
    ],
)
def test_images_that_break_the_models_contract_are_refused_with_what_to_do(
    change: dict[str, Any],
    words: list[str],
    studied: Path,
    make_heads: Callable[..., Path],
    tmp_path: Path,
    run: Callable[..., Any],
) -> None:
    bids, out = make_heads(n=4, first=21, masks=change.get("masks", True)), tmp_path / "out"
    options: list[object] = []
    for path in bids.rglob("*_T1w.nii.gz"):
        if "voxel" in change:
            image = nib.load(path)
            affine = image.affine * (change["voxel"] / 8.0)
            nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), path)
        if "suffix" in change:
            path.rename(path.with_name(path.name.replace("T1w", change["suffix"])))
    if "suffix" in change:
        asked = tmp_path / "filter.json"
        asked.write_text(json.dumps({"suffix": change["suffix"]}))
        options = ["--bids-filter-file", asked]
    done = run("embed", bids, out, "--model", studied / "models" / "desc-dcl", *options)
    assert done.status == 2
    for word in words:
        assert word in done.err
    assert not (out / "desc-dcl_embeddings.tsv").exists()


@pytest.mark.slow
def test_participants_who_share_an_image_are_warned_of_and_stay_in_one_group(
    make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=8), tmp_path / "out"
    name = "sub-{0}/ses-01/anat/sub-{0}_ses-01_T1w.nii.gz"
    mask = "derivatives/masks/" + name.replace("T1w", "desc-brain_mask")
    for file in (name, mask):
        shutil.copy(bids / file.format("02"), bids / file.format("07"))
    module = BIDSDataModule(bids, spacing=8.0)
    assert [who for who, _ in module.participants("train")] == [
        f"sub-{i:02d}" for i in (1, 2, 3, 4, 5, 6, 8)
    ]
    assert run("study", bids, out, "--target", "sex", *TWO_EPOCHS, page="none").status == 0
    inputs = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t").set_index("participant_id")
    assert list(inputs.index[inputs["code"] == "duplicate"]) == ["sub-02", "sub-07"]
    assert set(inputs["status"]) == {"ok", "warn"}
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    assert table["participant_id"].nunique() == 8
    assert set(table["split"]) == {"train"}
    metrics = json.loads((out / "desc-dclSex_metrics.json").read_text())
    assert metrics["groups"]["n"] == 7


@pytest.mark.slow
def test_a_dataset_that_is_fetched_in_part_is_used_as_far_as_it_goes(
    make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=10), tmp_path / "out"
    for i in (1, 2, 4, 5, 7, 8):
        image = bids / f"sub-{i:02d}/ses-01/anat/sub-{i:02d}_ses-01_T1w.nii.gz"
        image.unlink()
        image.symlink_to("../../../.git/annex/objects/xx/yy/SHA256E-s9--0.nii.gz")
    fetch = f"cd {bids} && datalad get sub-*/ses-*/anat/*_T1w.nii.gz"
    words = ["pretrain", bids, out, *TWO_EPOCHS]
    done = run(*words)
    assert done.status == 3
    assert fetch in done.err
    inputs = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t")
    assert (inputs["code"] == "not_fetched").sum() == 6
    done = run(*words, "--max-skipped", "0.5")
    assert done.status == 0
    assert done.err.count("datalad get") == 1
    assert fetch in done.err


@pytest.mark.slow
def test_a_broken_image_and_a_mask_that_misses_get_a_row_with_the_reason_and_the_others_go_on(
    make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=9), tmp_path / "out"
    mask = bids / "derivatives/masks/sub-02/ses-01/anat/sub-02_ses-01_desc-brain_mask.nii.gz"
    image = nib.load(mask)
    away = image.affine.copy()
    away[:3, 3] += 500
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), away), mask)
    broken = bids / "sub-05" / "ses-01" / "anat" / "sub-05_ses-01_T1w.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-300])
    words = ["study", bids, out, "--target", "sex", *TWO_EPOCHS, "--max-skipped"]
    # The mask is known to miss when it is laid on the image; then they are too many.
    assert run(*words, "0.1").status == 3
    inputs = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t").set_index("participant_id")
    assert inputs.loc["sub-02", "code"] == "affine"
    done = run(*words, "0.2")
    assert done.status == 0
    inputs = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t").set_index("participant_id")
    assert list(inputs.loc[["sub-02", "sub-05"], "code"]) == ["affine", "truncated"]
    assert list(inputs.loc[["sub-02", "sub-05"], "status"]) == ["skip"] * 2
    relative = mask.relative_to(bids).as_posix()
    said = f"mask {relative}: The mask does not overlap with the image."
    assert inputs.loc["sub-02", "message"] == said
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    assert set(table["participant_id"]) == {f"sub-{i:02d}" for i in (1, 3, 4, 6, 7, 8, 9)}
    assert "truncated" in (out / "report.html").read_text()
    assert run(*words, "0.2").status == 0


@pytest.mark.slow
def test_outputs_that_share_a_work_folder_keep_their_own_checkpoints(
    heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    work = tmp_path / "work"
    for name in ("a", "b"):
        words = ["pretrain", heads_made, tmp_path / name, "--work-dir", work, *TWO_EPOCHS]
        assert run(*words).status == 0
    volumes = list((work / "volumes").rglob("*.f2"))
    assert len(volumes) == 13
    assert not list(work.glob("checkpoints-*"))


def test_index_checks_images_where_masks_are_incomplete(
    make_heads: Callable[..., Path], run: Callable[..., Any]
) -> None:
    bids = make_heads(n=3)
    next((bids / "derivatives").rglob("*_mask.nii.gz")).unlink()
    done = run("index", bids, "--check")
    assert done.status == 0
    assert len(done.out.splitlines()) == 5
    assert "have a brain mask" in done.err


def test_a_broken_sidecar_is_a_warning(
    make_heads: Callable[..., Path], run: Callable[..., Any]
) -> None:
    bids = make_heads(n=3)
    (bids / "sub-01/ses-01/anat/sub-01_ses-01_T1w.json").write_text("{")
    (bids / "sub-02/ses-01/anat/sub-02_ses-01_T1w.json").symlink_to("nowhere")
    (bids / "sub-03/ses-01/anat/sub-03_ses-01_T1w.json").write_text('{"EchoTime": 0.003}')
    done = run("index", bids, "--check")
    codes = [line.split("\t")[4] for line in done.out.splitlines()[1:]]
    assert codes == ["sidecar", "sidecar", "ok", "ok"]


def test_parquet_holds_ids_and_embeddings_in_one_table(
    copied: Path, heads_made: Path, run: Callable[..., Any]
) -> None:
    assert run("embed", heads_made, copied, "--parquet").status == 0
    table = pd.read_parquet(copied / "desc-dcl_embeddings.parquet")
    assert list(table["row"]) == list(range(13))
    assert (table["participant_id"] == sorted(table["participant_id"])).all()
    assert np.array_equal(
        table.filter(regex=r"^dcl\d+$"), np.load(copied / "desc-dcl_embeddings.npy")
    )


def test_parquet_without_pyarrow_is_refused_before_anything_is_done(
    heads_made: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run("study", heads_made, tmp_path / "out", "--target", "age", "--parquet")
    assert done.status == 2
    assert "pip install 'nidl_dcl[parquet]'" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_parts_of_a_dataset_embedded_one_after_another_make_one_table(
    studied: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    model = studied / "models" / "desc-dcl"
    for label in ("07", "sub-03", "01"):
        words = ("embed", heads_made, tmp_path, "--model", model, "--participant-label", label)
        assert run(*words).status == 0
    table = pd.read_csv(tmp_path / "desc-dcl_embeddings.tsv", sep="\t")
    assert list(table["participant_id"]) == ["sub-01", "sub-03", "sub-03", "sub-07"]
    whole = pd.read_csv(studied / "desc-dcl_embeddings.tsv", sep="\t")
    rows = whole["source"].isin(table["source"]).to_numpy()
    expected = np.load(studied / "desc-dcl_embeddings.npy")[rows]
    assert np.array_equal(np.load(tmp_path / "desc-dcl_embeddings.npy"), expected)


def test_the_model_transforms_paths_to_the_rows_that_embed_wrote(
    studied: Path, heads_made: Path
) -> None:
    from nidl_dcl import BIDSDataModule, load_model

    model = load_model(studied / "models" / "desc-dcl")
    images = BIDSDataModule(heads_made, preparation=model.preparation).images
    table = images.assign(
        path=[heads_made / p for p in images["path"]],
        mask_path=[heads_made / p for p in images["mask_path"]],
    )
    written = np.load(studied / "desc-dcl_embeddings.npy")
    assert np.array_equal(model.transform(table), written)


ODD: dict[str, tuple[list[object], str]] = {
    "constant": ([5] * 10, "'constant' is constant"),
    "lonely": (["a"] * 9 + ["b"], "'lonely' has fewer than two classes"),
    "twice": ([1] * 9 + [2], "'1' 9, '2' 1"),
    "empty": (["n/a"] * 10, "'empty' has no value"),
    "infinite": (["inf"] * 10, "'infinite' "),
    "name": ([f"Xa{i}x" for i in range(10)], "'name' holds 10 different texts for 10 participants"),
    "rare": (["n/a"] * 8 + [1.5, 2.5], "'rare' is known for 2 participants"),
    "open": (["89+", *[f"{20 + i}.5" for i in range(9)]], ""),
    "some_infinite": (["inf", *[f"{20 + i}.5" for i in range(9)]], ""),
    "yes": (["true", "false"] * 5, ""),
    "three": (["a", "b", "a", "b", "a", "b", "a", "b", "a", "c"], ""),
}
"""Columns of ten participants, and what is said of those that cannot be predicted."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of ten heads with odd columns, that no test may change."""
    bids = write_heads(tmp_path_factory.mktemp("odd") / "bids")
    columns = {name: values for name, (values, _) in ODD.items()}
    table = pd.read_csv(bids / "participants.tsv", sep="\t", keep_default_na=False)
    table.assign(**columns).to_csv(bids / "participants.tsv", sep="\t", index=False)
    return bids


def test_odd_targets_are_refused_before_training_or_can_be_predicted(
    odd: Path, tmp_path: Path
) -> None:
    def attempt(targets: list[str]) -> None:
        dry_run(odd, tmp_path / "out", DataOptions(), None, RunOptions(), targets=targets)

    attempt([name for name, (_, said) in ODD.items() if not said])
    refused = {name: said for name, (_, said) in ODD.items() if said}
    with pytest.raises(InputsUnusableError) as caught:
        attempt([*refused])
    assert [said for said in refused.values() if said not in str(caught.value)] == []
    assert str(caught.value).count("Target '") == len(refused)


def test_a_study_of_unusable_targets_names_them_all_and_trains_nothing(
    odd: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    words = ["study", odd, tmp_path / "out", "--target", "constant", "age", "name", *TWO_EPOCHS]
    done = run(*words)
    assert done.status == 3
    assert len(done.err.strip().splitlines()[-1].split("Target ")) == 3
    for text in (
        "'constant' is constant",
        "'name' holds",
        "Nothing was done for the other targets",
    ):
        assert text in done.err
    assert not (tmp_path / "out" / "models").exists()
    assert not (tmp_path / "out" / "code").exists()


@pytest.mark.slow
def test_a_prediction_of_an_unusable_target_leaves_the_others_undone(
    copied: Path, heads_made: Path, run: Callable[..., Any]
) -> None:
    table = pd.read_csv(heads_made / "participants.tsv", sep="\t")
    file = copied / "more.tsv"
    more = table[["participant_id"]].assign(height=[1.5 + i for i in range(10)], same="x")
    more.to_csv(file, sep="\t", index=False)
    words = ["predict", heads_made, copied, "--phenotypes", file, "--target", "height", "same"]
    done = run(*words)
    assert done.status == 3
    assert "'same' is constant" in done.err
    assert not (copied / "desc-dclHeight_metrics.json").exists()
    assert run(*words[:-1]).status == 0
    assert (copied / "desc-dclHeight_metrics.json").exists()


@pytest.mark.slow
def test_families_count_when_a_target_is_judged(
    make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids = make_heads(n=10)
    table = pd.read_csv(bids / "participants.tsv", sep="\t", keep_default_na=False)
    table["family"] = [f"f{i // 2}" for i in range(10)]
    table.to_csv(bids / "participants.tsv", sep="\t", index=False)
    words = ["study", bids, tmp_path / "out", "--target", "age", "--dry-run", *TWO_EPOCHS]
    assert run(*words).status == 0
    done = run(*words, "--group", "family")
    assert done.status == 3
    assert "'age' is known for 5 participants" in done.err


@pytest.mark.slow
def test_workers_and_the_work_folder_change_no_result(
    studied: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    words = ("--target", "age", *TWO_EPOCHS, "--nprocs", "2", "--work-dir", tmp_path / "work")
    assert run("study", heads_made, out, *words, page="none").status == 0
    assert embeddings_of(out) == embeddings_of(studied)
    assert not (out / ".work").exists()


@pytest.fixture(scope="module")
def studied_for_long(heads_made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a longer study of age, that no test may change."""
    out = tmp_path_factory.mktemp("long") / "out"
    assert give("study", heads_made, out, *MANY_EPOCHS, page="none") == 0
    return out


@pytest.mark.slow
def test_a_study_that_is_stopped_again_and_again_ends_with_the_same_embeddings(
    heads_made: Path, studied_for_long: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    words = ("study", str(heads_made), str(out), *MANY_EPOCHS)

    def checkpoints() -> set[str]:
        return {file.name for file in out.glob(".work/checkpoints-*/step-*.ckpt")}

    for stop, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before, deadline = checkpoints(), time.monotonic() + 300
        process = subprocess.Popen(
            [sys.executable, "-m", "nidl_dcl", *words],
            stderr=subprocess.PIPE,
            text=True,
            # Tests that a script runs in the background have it ignored, and pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while not checkpoints() - before:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, stop)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == status, said
        assert ("The same command goes on from" in said) == (stop != signal.SIGKILL)
        assert not (out / "models").exists()
        page = (out / "report.html").read_text()
        assert "Not finished: in progress since" in page
        assert "pretraining" in page
        if stop != signal.SIGKILL:
            assert record_of(out)["exit_status"] == status
    assert run(*words, "--nprocs", "2").status == 0
    assert "Not finished" not in (out / "report.html").read_text()
    record = record_of(out)
    runs = (*record["earlier"], record)
    first, *steps = [one["stages"][0]["resumed_from_step"] for one in runs]
    assert first is None
    assert len(steps) == 3
    assert 0 < steps[0] < steps[1] < steps[2]
    assert embeddings_of(out) == embeddings_of(studied_for_long)
    weights = "models/desc-dcl/weights.safetensors"
    assert (out / weights).read_bytes() == (studied_for_long / weights).read_bytes()
    curve, whole = (
        pd.read_csv(folder / "logs" / "metrics.csv") for folder in (out, studied_for_long)
    )
    assert curve.notna().drop(columns="loss/val").to_numpy().all()
    # An epoch in which it was stopped is measured over its other steps alone.
    sides = [(curve["step"] <= step) | (curve["step"].shift() >= step) for step in steps]
    other = np.all(sides, axis=0)
    pd.testing.assert_frame_equal(curve[other], whole[other], rtol=0, atol=0)
    assert other.sum() >= len(whole) - 3

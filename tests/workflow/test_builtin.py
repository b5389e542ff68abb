"""`--model builtin` and `--init builtin`, on brains that the model has not seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import SLOW, give

from nidl_dcl.data.exposure import exposure_of
from nidl_dcl.errors import UsageError
from nidl_dcl.models.model_source import folder_of
from nidl_dcl.models.serialization import load_model, read_description, save_model, weights_sha256
from nidl_dcl.workflow import preprocess as stage
from nidl_dcl.workflow.factory import check_training
from nidl_dcl.workflow.options import (
    DataOptions,
    StudyOptions,
    TrainingOptions,
    read_study,
    study_yaml,
)

SPACE = "MNI152NLin2009aSym"
ALIGNED = ("--preset", "preprocessed", "--preprocess", "auto")
SHORT = ("--max-epochs", "1", "--batch-size", "8")


def write_brains(folder: Path, n: int = 12, first: int = 0) -> Path:
    """Write a dataset of small masked brains of 3.5 mm, as `nidl-dcl preprocess` leaves them."""
    derivative = folder / "derivatives" / "preproc"
    text = {"Name": "Brains", "BIDSVersion": "1.10.0"}
    rows = ["participant_id\tage"]
    grid = np.stack(np.indices((40, 48, 40))) - np.array([20, 24, 20])[:, None, None, None]
    affine = np.diag([3.5, 3.5, 3.5, 1.0])
    affine[:3, 3] = (-80, -96, -80)
    for i in range(first, first + n):
        rng, name = np.random.default_rng(i), f"sub-{i:02d}"
        age = int(rng.integers(20, 80))
        size = np.array([17, 21, 16])[:, None, None, None] * rng.uniform(0.95, 1.05)
        mask = ((grid / size) ** 2).sum(0) < 1
        values = mask * (600 - 4 * age * np.exp(-(grid**2).sum(0) / 40))
        values = np.where(mask, values + rng.normal(0, 15, mask.shape), 0)
        anat = derivative / name / "anat"
        anat.mkdir(parents=True)
        for data, ending in ((values, "preproc_T1w"), (mask, "brain_mask")):
            image = nib.Nifti1Image(data.astype(np.int16), affine)
            nib.save(image, anat / f"{name}_space-{SPACE}_desc-{ending}.nii.gz")
        rows.append(f"{name}\t{age}")
    (folder / "dataset_description.json").write_text(json.dumps(text))
    about = {**text, "DatasetType": "derivative", "GeneratedBy": [{"Name": "nidl_dcl"}]}
    (derivative / "dataset_description.json").write_text(json.dumps(about))
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brains(tmp_path_factory.mktemp("brains") / "bids")


@pytest.fixture(scope="module", params=SLOW)
def studied_with_it(brains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studied") / "out"
    assert give("study", brains, out, "--target", "age", "--model", "builtin", *ALIGNED) == 0
    return out


def test_a_study_embeds_people_it_never_saw_and_says_so(studied_with_it: Path) -> None:
    out = studied_with_it
    own = out / "models" / "desc-dcl"
    assert weights_sha256(own) == weights_sha256("builtin")
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t", keep_default_na=False)
    assert set(table["split"]) == {"not_in_training"}
    metrics = json.loads((out / "desc-dclAge_metrics.json").read_text())
    assert (metrics["exposure"]["seen"], metrics["exposure"]["unknown"]) == (0, 0)
    assert np.load(out / "desc-dcl_embeddings.npy").shape == (
        12,
        read_description("builtin")["n_features"],
    )


def test_its_files_name_the_model_by_its_word_and_not_where_it_is_installed(
    studied_with_it: Path,
) -> None:
    out, installed = studied_with_it, str(folder_of("builtin").parent)
    texts = {
        file: file.read_text("utf-8", "ignore")
        for file in out.rglob("*")
        if file.is_file() and file.suffix in (".json", ".tsv", ".yaml", ".md", ".html", ".log")
    }
    assert not [file for file, text in texts.items() if installed in text]
    assert yaml.safe_load((out / "code" / "config.yaml").read_text())["model"] == "builtin"
    assert "--model builtin" in " ".join(json.loads((out / "logs/run.json").read_text())["command"])
    assert "(the model builtin of nidl_dcl)" in (out / "descriptions.tsv").read_text()
    for name in ("report.html", "models/desc-dcl/README.md", "logs/CITATION.md"):
        assert "https://brain-development.org/ixi-dataset/" in texts[out / name], name
    assert "An existing encoder (RegionalEncoder)" in texts[out / "report.html"]


def test_the_same_study_again_by_its_configuration_does_nothing(
    studied_with_it: Path, run: Callable[..., Any]
) -> None:
    again = run("study", "--config", studied_with_it / "code" / "config.yaml")
    assert again.status == 0, again.err
    stages = json.loads((studied_with_it / "logs" / "run.json").read_text())["stages"]
    assert all(entry["skipped"] for entry in stages if entry["name"] in ("embed", "predict"))


def test_its_readout_is_applied_to_another_cohort(
    studied_with_it: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    others, out = write_brains(tmp_path / "bids", first=12), tmp_path / "out"
    words = ("--model", "builtin", *ALIGNED, "--readout", studied_with_it)
    done = run("study", others, out, "--target", "age", *words, page="none")
    assert done.status == 0, done.err
    metrics = json.loads((out / "desc-dclAge_externalmetrics.json").read_text())
    assert metrics["provenance"]["readout"]


def test_a_shared_copy_keeps_the_word_and_the_credits(
    studied_with_it: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    words = ("share", studied_with_it, tmp_path / "shared", "--key-file", tmp_path / "key")
    assert run(*words).status == 0
    shared = tmp_path / "shared"
    assert yaml.safe_load((shared / "code" / "config.yaml").read_text())["model"] == "builtin"
    card = (shared / "models" / "desc-dcl" / "README.md").read_text()
    assert "license: cc-by-sa-3.0" in card
    assert "https://brain-development.org/ixi-dataset/" in card
    about = read_description(shared / "models" / "desc-dcl")
    assert "participants" not in about["exposure"]


@pytest.mark.slow
def test_a_training_that_starts_from_it_keeps_whom_it_saw_and_its_credits(
    brains: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    words = ("pretrain", brains, out, *ALIGNED, *SHORT, "--encoder", "regional")
    done = run(*words, "--init", "builtin")
    assert done.status == 0, done.err
    about, first = read_description(out / "models" / "desc-dcl"), read_description("builtin")
    assert about["exposure"]["n_participants"] == 12
    assert about["exposure"]["before"] == [first["exposure"]]
    assert about["provenance"]["credits"] == first["provenance"]["credits"]
    assert about["provenance"]["config"]["init"] == weights_sha256("builtin")
    assert "license" not in about["provenance"]
    card = (out / "models" / "desc-dcl" / "README.md").read_text()
    assert "This model started from another one, whose terms hold" in card


def test_starting_from_it_with_another_encoder_is_refused_before_anything_is_done() -> None:
    with pytest.raises(UsageError, match=r"--init builtin .* give --encoder regional"):
        check_training(TrainingOptions(init="builtin", encoder="resnet18"))
    check_training(TrainingOptions(init="builtin", encoder="regional"))


def test_people_whom_it_saw_cannot_be_held_out_and_are_marked(
    brains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    """With a model in place of the one of the package that saw some of these brains."""
    seen = exposure_of([f"sub-{i:02d}" for i in range(6)], [], "salt")
    model = load_model("builtin")
    save_model(model, tmp_path / "seen", preparation=model.preparation, exposure=seen)

    def elsewhere(source: str | Path) -> Path:
        return tmp_path / "seen" if source == "builtin" else Path(source)

    for module in ("models.serialization", "workflow.embed", "workflow.participants"):
        monkeypatch.setattr(f"nidl_dcl.{module}.folder_of", elsewhere)
    words = ("embed", brains, tmp_path / "out", "--model", "builtin", *ALIGNED)
    refused = run(*words, "--holdout", "0.5")
    assert refused.status == 2
    assert "seen when builtin was trained" in refused.err
    assert run(*words).status == 0
    table = pd.read_csv(tmp_path / "out" / "desc-dcl_embeddings.tsv", sep="\t")
    assert table["split"].tolist() == ["train"] * 6 + ["not_in_training"] * 6


def test_scans_are_preprocessed_for_it_or_one_message_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "missing_packages", lambda: "")
    assert stage.choose_mode(DataOptions(), "builtin") == "align"
    monkeypatch.undo()
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda name: None)
    message = (
        "The model builtin takes scans after --preprocess align, and it needs SimpleITK and "
        r"deepbet: pip install 'nidl_dcl\[preprocess\]'"
    )
    with pytest.raises(UsageError, match=message):
        stage.choose_mode(DataOptions(), "builtin")


def test_a_dry_run_says_what_the_model_is(
    brains: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    about = read_description("builtin")
    done = run("embed", brains, tmp_path / "out", "--model", "builtin", *ALIGNED, "--dry-run")
    assert done.status == 0, done.err
    seen = about["exposure"]["n_participants"]
    assert (
        f"model builtin: RegionalEncoder, {about['n_features']} numbers an image, "
        f"trained on {seen} participants"
    ) in done.out
    shape = " x ".join(map(str, about["input_contract"]["shape"]))
    assert f"volumes of {shape} voxels" in done.out
    words = ("pretrain", brains, tmp_path / "out", *ALIGNED, *SHORT, "--init", "builtin")
    done = run(*words, "--encoder", "regional", "--dry-run")
    assert done.status == 0, done.err
    assert "starts from builtin: RegionalEncoder" in done.out


def test_whole_heads_are_refused_with_what_to_do(
    heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    done = run("embed", heads_made, tmp_path / "out", "--model", "builtin", "--preprocess", "none")
    assert done.status == 2
    assert "--preprocess auto (or align) makes such images" in done.err


def test_another_model_of_that_name_in_an_output_is_named_with_a_way_on(
    brains: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    own = tmp_path / "out" / "models" / "desc-dcl"
    shutil.copytree(folder_of("builtin"), own)
    model = load_model(own)
    next(model.parameters()).data += 1
    save_model(model, own, preparation=model.preparation, exposure=model.exposure)
    (tmp_path / "out" / "dataset_description.json").write_text('{"DatasetType": "derivative"}')
    done = run("embed", brains, tmp_path / "out", "--model", "builtin", *ALIGNED)
    assert done.status == 2
    assert "holds another model than builtin" in done.err
    assert f"--model {own}" in done.err


@pytest.mark.parametrize("option", ["model", "init"])
def test_the_command_and_files_tell_the_word_from_a_folder_of_that_name(
    option: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = ("study", "bids", "out", "--target", "age")
    for given, kept in (("builtin", "builtin"), ("./builtin", "./builtin"), ("a/b", "a/b")):
        printed = run(*study, f"--{option}", given, "--print-config").out
        assert yaml.safe_load(printed)[option] == kept
        Path("config.yaml").write_text(printed)
        assert run("study", "--config", "config.yaml", "--print-config").out == printed
        options = read_study("config.yaml")
        value = options.model if option == "model" else options.training.init
        assert value == ("builtin" if given == "builtin" else Path(given))


def test_the_configuration_of_a_study_keeps_the_word() -> None:
    folders = {"bids_dir": Path("b"), "output_dir": Path("o")}
    trained = StudyOptions(**folders, training=TrainingOptions(init="builtin"))
    assert yaml.safe_load(study_yaml(trained))["init"] == "builtin"
    values = yaml.safe_load(study_yaml(StudyOptions(**folders, model="builtin")))
    assert values["model"] == "builtin"
    assert not {"init", "encoder", "max_steps"} & set(values)  # nothing is trained
    values = yaml.safe_load(study_yaml(StudyOptions(**folders, model=Path("builtin"))))
    assert values["model"] == str(Path("builtin").resolve())

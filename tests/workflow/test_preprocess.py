"""The stage `preprocess`, on heads whose brain masks are given: the network is not asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import SLOW

from nidl_dcl.bids.synthetic import write_demo_dataset
from nidl_dcl.bids.validator import validate
from nidl_dcl.models.serialization import load_model
from nidl_dcl.preprocessing.measures import overlap
from nidl_dcl.preprocessing.template import load_template
from nidl_dcl.workflow import preprocess as stage
from nidl_dcl.workflow.options import DataOptions

pytest.importorskip("SimpleITK")

SPACE = "MNI152NLin2009aSym"
SHORT = ("--max-epochs", "1", "--batch-size", "4", "--spacing", "8", "--views", "light")


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of measures and ``inputs.tsv``, by participant."""
    files = (folder / "desc-preproc_measures.tsv", folder / "logs" / "inputs.tsv")
    measures, inputs = (pd.read_csv(file, sep="\t", na_values=["n/a"]) for file in files)
    return measures.set_index("source"), inputs


def images_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("sub-*/**/*.nii.gz"))}


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo that most tests preprocess nothing."""
    monkeypatch.setenv("NIDL_DCL_PREPROCESS", "auto")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of three people, heads of 3 mm with brain masks, that no test may change."""
    return write_demo_dataset(tmp_path_factory.mktemp("demo") / "bids", n_participants=3)


@pytest.fixture(scope="module", params=SLOW)
def done(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of `nidl-dcl preprocess`, that no test may change."""
    from conftest import give

    out = tmp_path_factory.mktemp("preprocessed") / "out"
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    assert give("preprocess", dataset, out, "--preprocess", "align", "--nprocs", "1") == 0
    assert before == {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    return out


@pytest.fixture
def own(dataset: Path, done: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return copies of both that a test may change, in which nothing is to be done again."""
    bids, out = tmp_path / "bids", tmp_path / "out"
    shutil.copytree(dataset, bids)  # keeps times, by which changed files are told
    shutil.copytree(done, out)
    return bids, out


def test_each_head_becomes_a_brain_in_the_space_of_the_template(dataset: Path, done: Path) -> None:
    measures, inputs = tables(done)
    assert list(measures["status"]) == ["ok"] * len(measures)
    assert list(inputs["status"]) == ["ok"] * len(measures)
    template = load_template(2)
    for source, row in measures.iterrows():
        scan = dataset / str(source).removeprefix("bids:raw:")
        image = nib.load(done / row["brain"])
        mask = nib.load(str(done / row["brain"]).replace("preproc_T1w", "brain_mask"))
        assert row["brain"] == str(scan.relative_to(dataset)).replace(
            "_T1w", f"_space-{SPACE}_desc-preproc_T1w"
        )
        np.testing.assert_allclose(image.affine, template.affine)
        assert image.shape == mask.shape == template.data.shape
        assert not image.get_fdata()[mask.get_fdata() == 0].any()
        assert overlap(mask.get_fdata() > 0, template.mask) > 0.93
        own = nib.load(
            done / str(source).removeprefix("bids:raw:").replace("T1w", "desc-brain_mask")
        )
        np.testing.assert_array_equal(own.affine, nib.load(scan).affine)
        assert row["mask_ml"] == pytest.approx(own.get_fdata().sum() * 0.027)
        assert (done / row["figure"]).read_bytes().startswith(b"\x89PNG")


def test_sidecars_say_from_what_and_how(done: Path) -> None:
    file = next(done.glob("sub-*/ses-*/anat/*_desc-preproc_T1w.json"))
    sidecar = json.loads(file.read_text())
    assert sidecar["SkullStripped"] is True
    assert [s.split("/")[0] for s in sidecar["Sources"]] == [
        f"bids:raw:{file.parts[-4]}",
        f"bids:brainmask:{file.parts[-4]}",
    ]
    assert {"nidl_dcl", "SimpleITK"} <= sidecar["Versions"].keys()
    assert sidecar["Steps"][0] == "brain mask of the dataset"


def test_the_output_is_a_derivative_that_the_official_validator_accepts(done: Path) -> None:
    validate(done)
    description = json.loads((done / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["Name"].startswith("Preprocessed images of")
    assert description["DatasetLinks"].keys() == {"raw", "brainmask"}


def test_a_second_run_does_nothing_again_but_what_has_changed(run: Any, own: Any) -> None:
    bids, out = own
    brains = {p: p.stat().st_mtime_ns for p in out.glob("sub-*/**/*_desc-preproc_T1w.nii.gz")}
    again = run("preprocess", bids, out, "--nprocs", "1")
    assert again.status == 0, again.err
    assert "0 computed now" in again.err
    assert brains == {p: p.stat().st_mtime_ns for p in brains}
    scan = min(bids.glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
    os.utime(scan, ns=(1, 1))
    min(brains).unlink()
    changed = run("preprocess", bids, out, "--nprocs", "1")
    assert "1 computed now" in changed.err
    assert min(brains).is_file()


def test_an_excluded_scan_keeps_its_row_with_what_was_measured(run: Any, own: Any) -> None:
    bids, out = own
    before, _ = tables(out)
    first = str(before["participant_id"].iloc[0])
    words = ("preprocess", bids, out, "--preprocess", "align", "--nprocs", "1")
    assert run(*words, "--exclude-participant-label", first).status == 0
    measures, inputs = tables(out)
    assert list(measures.index) == list(before.index)
    theirs = measures["participant_id"] == first
    assert set(measures.loc[theirs, "code"]) == {"excluded"}
    assert set(measures.loc[~theirs, "status"]) == {"ok"}
    assert measures["mask_ml"].equals(before["mask_ml"])
    assert set(inputs.loc[inputs["participant_id"] == first, "code"]) == {"excluded"}
    assert run(*words).status == 0
    assert tables(out)[0].equals(before)


def test_another_mode_in_the_same_folder_is_refused(run: Any, own: Any) -> None:
    refused = run("preprocess", *own, "--preprocess", "rigid")
    assert refused.status == 2
    assert "--preprocess was 'align', is 'rigid'" in refused.err


def test_what_fails_has_a_row_and_no_brain(run: Any, own: Any) -> None:
    bids, out = own
    first, second, *_ = sorted(bids.glob("sub-*/ses-01/anat/*_T1w.nii.gz"))
    first.write_bytes(first.read_bytes()[:2000])
    image = nib.load(second)
    cut = np.asarray(image.dataobj)[:, :, :45]  # the top was not scanned
    nib.save(nib.Nifti1Image(cut, image.affine), second)
    mask = bids / "derivatives" / "brainmask" / second.relative_to(bids)
    mask = mask.with_name(mask.name.replace("T1w", "desc-brain_mask"))
    inside = nib.load(mask)
    nib.save(nib.Nifti1Image(np.asarray(inside.dataobj)[:, :, :45], inside.affine), mask)

    refused = run("preprocess", bids, out, "--nprocs", "1")

    assert refused.status == 3
    assert "1 truncated" in refused.err
    measures, inputs = tables(out)
    assert len(inputs) == len(measures)
    for scan, code in ((first, "truncated"), (second, "field_of_view")):
        path = scan.relative_to(bids).as_posix()
        row = inputs[inputs["path"] == path].iloc[0]
        assert (row["status"], row["code"]) == ("skip", code)
        assert measures.loc[f"bids:raw:{path}", "status"] == "skip"
        assert pd.isna(measures.loc[f"bids:raw:{path}", "brain"])
    allowed = run("preprocess", bids, out, "--nprocs", "1", "--max-skipped", "0.9")
    assert allowed.status == 0, allowed.err
    assert "0 computed now" in allowed.err


def test_no_usable_scan_at_all_is_said_with_the_reasons(run: Any, tmp_path: Path) -> None:
    anat = tmp_path / "bids" / "sub-01" / "anat"
    anat.mkdir(parents=True)
    (tmp_path / "bids" / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1"}')
    (anat / "sub-01_T1w.nii.gz").write_bytes(b"<html>")
    done = run("preprocess", tmp_path / "bids", tmp_path / "out", "--nprocs", "1")
    assert done.status == 3
    assert "1 not_nifti" in done.err
    assert tables(tmp_path / "out")[1]["code"].tolist() == ["not_nifti"]


def test_many_jobs_each_for_some_make_what_one_makes(run: Any, dataset: Path, done: Path) -> None:
    out = done.parent / "jobs"
    labels = sorted({p.name for p in dataset.glob("sub-*")})
    for some in (labels[:1], labels[1:]):
        assert (
            run("preprocess", dataset, out, "--nprocs", "1", "--participant-label", *some).status
            == 0
        )
    assert images_in(out) == images_in(done)
    for name in ("desc-preproc_measures.tsv", "logs/inputs.tsv"):
        assert (out / name).read_text().replace("/jobs/", "/out/") == (done / name).read_text()


def test_masks_of_an_earlier_run_inside_the_dataset_are_not_masks_of_the_dataset(
    run: Any, own: Any
) -> None:
    bids, out = own
    inside = bids / "derivatives" / "preproc"
    shutil.move(out, inside)
    again = run("preprocess", bids, inside, "--nprocs", "1")
    assert again.status == 0, again.err
    assert "0 computed now" in again.err


def test_two_contrasts_that_would_share_names_are_refused(run: Any, own: Any) -> None:
    bids, _ = own
    scan = min(bids.glob("sub-*/ses-01/anat/*_T1w.nii.gz"))
    shutil.copy(scan, scan.with_name(scan.name.replace("T1w", "T2w")))
    filters = bids.parent / "filters.json"
    filters.write_text('{"suffix": ["T1w", "T2w"]}')
    refused = run("preprocess", bids, bids.parent / "o", "--bids-filter-file", filters)
    assert refused.status == 2
    assert "one contrast at a time" in refused.err


def test_another_contrast_is_preprocessed_if_asked_for_and_said(run: Any, own: Any) -> None:
    bids, _ = own
    scan = min(bids.glob("sub-*/ses-01/anat/*_T1w.nii.gz"))
    shutil.copy(scan, scan.with_name(scan.name.replace("T1w", "PDw")))
    filters, out = bids.parent / "filters.json", bids.parent / "o"
    filters.write_text('{"suffix": "PDw"}')
    words = ("--bids-filter-file", filters, "--nprocs", "1", "--max-skipped", "0")
    asked = run("preprocess", bids, out, *words)
    assert asked.status == 0, asked.err
    assert "made for T1w, and these are PDw" in asked.err
    assert tables(out)[1]["path"].dropna().str.endswith("_desc-preproc_PDw.nii.gz").sum() == 1


def test_a_dry_run_measures_one_image_and_writes_nothing(
    run: Any, dataset: Path, tmp_path: Path
) -> None:
    told = run("preprocess", dataset, tmp_path / "out", "--dry-run")
    assert told.status == 0, told.err
    n = len(list(dataset.glob("sub-*/ses-*/anat/*_T1w.nii.gz")))
    assert f"{n} scans to preprocess (align), {n} by masks of the dataset, 0 done" in told.out
    assert "one image measured" in told.out
    assert not (tmp_path / "out").exists()


# -- which mode --------------------------------------------------------------------------------


def model_folder(folder: Path, preprocessing: str | None) -> Path:
    folder.mkdir()
    origin = {} if preprocessing is None else {"preprocessing": preprocessing}
    text = {"input_contract": {"origin": {"contrast": "T1w", "space": "native", **origin}}}
    (folder / "model.json").write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize(
    ("options", "trained", "expected"),
    [
        ({}, None, "align"),
        ({"preset": "fmriprep-native"}, None, "align"),
        ({"preset": "fmriprep-mni"}, None, "none"),
        ({"preset": "cat12-vbm"}, None, "none"),
        ({"preset": "mp2rage"}, None, "none"),
        ({"bids_filter_file": Path("filters.json")}, None, "none"),
        ({"preprocess": "none"}, None, "none"),
        ({"preprocess": "rigid"}, None, "rigid"),
        ({"preprocess": "strip", "bids_filter_file": Path("filters.json")}, None, "strip"),
        ({}, "align", "align"),
        ({}, "none", "none"),
        ({}, "rigid", "rigid"),
        ({"preset": "preprocessed"}, "align", "none"),
    ],
)
def test_auto_is_as_the_model_was_trained_and_else_what_is_missing(
    options: dict[str, Any],
    trained: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        stage, "read_description", lambda f: json.loads((f / "model.json").read_text())
    )
    monkeypatch.setattr(stage, "missing_packages", lambda: "")
    folder = tmp_path / "model"
    if trained is not None:
        model_folder(folder, trained)
    assert stage.choose_mode(DataOptions(**options), folder) == expected


def test_without_its_packages_auto_goes_on_and_says_so_and_align_does_not(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda name: None)
    caplog.set_level("INFO", "nidl_dcl")
    assert stage.choose_mode(DataOptions(), tmp_path) == "none"
    assert "pip install 'nidl_dcl[preprocess]'" in caplog.text
    (tmp_path / "bids").mkdir()
    refused = run("preprocess", tmp_path / "bids", tmp_path / "out")
    assert refused.status == 2
    assert "it needs SimpleITK and deepbet: pip install 'nidl_dcl[preprocess]'" in refused.err


def test_images_that_are_no_scans_are_not_preprocessed(run: Any, tmp_path: Path) -> None:
    (tmp_path / "bids").mkdir()
    refused = run("preprocess", tmp_path / "bids", tmp_path / "out", "--preset", "cat12-vbm")
    assert refused.status == 2
    assert "'cat12-vbm' are no scans in their own space. It is for raw-t1w" in refused.err


# -- in a study ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a training on brains that the stage aligned."""
    from conftest import give

    out = tmp_path_factory.mktemp("trained") / "out"
    words = ("pretrain", dataset, out, *SHORT, "--preprocess", "align", "--nprocs", "1")
    assert give(*words) == 0
    return out


@pytest.mark.slow
def test_a_model_of_aligned_brains_aligns_the_heads_that_it_embeds(
    run: Any, dataset: Path, trained: Path, done: Path, tmp_path: Path
) -> None:
    brains = trained / "derivatives" / "preproc"
    assert images_in(brains) == images_in(done)
    model = trained / "models" / "desc-dcl"
    origin = load_model(model).preparation.origin
    assert (origin.preprocessing, origin.space, origin.stripped) == ("align", SPACE, True)
    out = tmp_path / "out"
    given = ("embed", dataset, out, "--model", model, "--nprocs", "1")
    refused = run(*given, "--preprocess", "none")
    assert refused.status == 2
    assert "trained on images in the space MNI152NLin2009aSym" in refused.err
    assert "--preprocess auto (or align) makes such images" in refused.err
    embedded = run(*given)
    assert embedded.status == 0, embedded.err
    assert "Preprocessing, brain aligned" in embedded.err
    table = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")
    links = json.loads((out / "dataset_description.json").read_text())["DatasetLinks"]
    assert links["preproc"] == "derivatives/preproc"
    assert table["source"].str.startswith("bids:preproc:sub-").all()
    # The same brains, made by the command of their own beforehand.
    other = tmp_path / "other"
    words = ("--preset", "preprocessed", "--derivatives", f"preproc={done}")
    assert run("embed", dataset, other, "--model", model, *words).status == 0
    for name in ("desc-dcl_embeddings.npy", "desc-dcl_embeddings.tsv"):
        assert (other / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.slow
def test_any_number_of_processes_and_a_kill_make_the_same_images(
    dataset: Path, done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "nidl_dcl", "preprocess", dataset, out, "--nprocs", "2"]
    words += ["--preprocess", "align"]
    killed = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 100
    while not list(out.glob(".work/preproc/**/*.json")):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert images_in(out) == images_in(done)
    names = ("desc-preproc_measures.tsv",)
    assert all((out / n).read_bytes() == (done / n).read_bytes() for n in names)
    assert not list(out.rglob("*.part"))


def test_brain_volumes_are_a_column_where_size_was_taken_out(dataset: Path, done: Path) -> None:
    from nidl_dcl.data.image_table import ImageTable

    table = ImageTable(dataset, preset="preprocessed", derivatives=[f"preproc={done}"])
    assert table.images["brain_ml"].tolist() == pytest.approx(tables(done)[0]["mask_ml"].tolist())
    assert table.preprocessing == "align"
    assert "brain_ml" not in ImageTable(dataset).images

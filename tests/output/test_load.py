from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml

from nidl_dcl import BIDSDataModule, index_bids, load_embeddings
from nidl_dcl.errors import UsageError
from nidl_dcl.io.formats import write_text
from nidl_dcl.output.embeddings import COLUMNS, Embeddings, write_embeddings
from nidl_dcl.output.folder import Output


def write_output(bids: Path, out: Path, **options: Any) -> tuple[pd.DataFrame, np.ndarray]:
    """Write what `nidl-dcl embed` leaves, with invented numbers; return images and matrix."""
    images = BIDSDataModule(bids, spacing=8.0, **options).images
    matrix = np.random.default_rng(0).normal(size=(len(images), 5)).astype(np.float32)
    config = {"phenotypes": [str(f) for f in options.get("phenotypes", ())]}
    with Output(bids, out, config=config).writing():
        table = images.assign(row=range(len(images)))[list(COLUMNS)]
        write_embeddings(out, "dcl", Embeddings(table, matrix))
    return images, matrix


@pytest.fixture
def made(make_heads: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """Return a dataset with phenotypes on three levels, and an output of it."""
    bids, out = make_heads(n=6), tmp_path / "out"
    (bids / "sub-03" / "sub-03_sessions.tsv").write_text(
        "session_id\tage\tmood\nses-01\t41\tlow\nses-02\t43\thigh\n"
    )
    name = "anat/sub-01_ses-01_T1w.nii.gz"
    (bids / "sub-01" / "ses-01" / "sub-01_ses-01_scans.tsv").write_text(
        f"filename\tquality\n{name}\t7\n"
    )
    (bids / "phenotype").mkdir()
    (bids / "phenotype" / "tests.tsv").write_text("participant_id\tiq\tsplit\nsub-02\t99\tx\n")
    write_output(bids, out)
    return bids, out


def test_rows_are_those_of_the_files_in_order_with_ids_first(made: tuple[Path, Path]) -> None:
    table, matrix = load_embeddings(made[1])

    assert list(table.columns[:6]) == list(COLUMNS)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, np.load(made[1] / "desc-dcl_embeddings.npy"))
    written = pd.read_csv(made[1] / "desc-dcl_embeddings.tsv", sep="\t", dtype=str)
    assert list(table["source"]) == list(written["source"])
    assert list(table["row"]) == list(range(len(matrix))) == [int(r) for r in written["row"]]
    assert list(table["session_id"]) == list(written["session_id"])
    assert table["run"].isna().all()


def test_phenotypes_are_joined_as_the_pipelines_join_them(made: tuple[Path, Path]) -> None:
    table, _ = load_embeddings(made[1])

    module = BIDSDataModule(made[0], spacing=8.0)
    for expected in (
        module.images[module.table.phenotype_columns],
        index_bids(made[0], phenotypes=True).drop(columns=["session_id", "run", "path"]),
    ):
        own = [c for c in expected.columns if c != "participant_id"]
        pd.testing.assert_frame_equal(table[own], expected[own].reset_index(drop=True))
        assert list(table.columns) == [*COLUMNS, *own]
    rows = table.set_index(["participant_id", "session_id"])
    assert rows.loc[("sub-03", "ses-01"), ["age", "mood"]].tolist() == [41, "low"]
    assert rows.loc[("sub-03", "ses-02"), ["age", "mood"]].tolist() == [43, "high"]
    assert rows.loc[("sub-01", "ses-01"), "quality"] == 7
    assert rows.loc[("sub-02", "ses-01"), "iq"] == 99


def test_images_of_a_derivative_get_the_rows_of_the_raw_scans(
    make_heads: Callable[..., Path], tmp_path: Path
) -> None:
    bids, out = make_heads(n=3, masks=False), tmp_path / "out"
    home = bids / "derivatives" / "fmriprep"
    for path in sorted(bids.glob("sub-*/ses-*/anat/*_T1w.nii.gz")):
        name = path.name.replace("_T1w", "_desc-preproc_T1w")
        target = home / path.relative_to(bids).with_name(name)
        target.parent.mkdir(parents=True)
        shutil.move(path, target)
    (home / "dataset_description.json").write_text((bids / "dataset_description.json").read_text())
    (bids / "sub-01/ses-01/sub-01_ses-01_scans.tsv").write_text(
        "filename\tquality\nanat/sub-01_ses-01_T1w.nii.gz\t7\n"
    )
    images, _ = write_output(bids, out, preset="fmriprep-native")

    table, _ = load_embeddings(out)

    assert table["source"].iloc[0].startswith("bids:fmriprep:sub-01/")
    assert table["quality"].iloc[0] == 7
    assert table["age"].tolist() == images["age"].tolist()


def test_no_image_is_opened(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for path in made[0].rglob("*.nii.gz"):
        path.write_bytes(b"")
    monkeypatch.setattr(nib, "load", None)

    assert load_embeddings(made[1])[0]["age"].notna().sum() == 7


def test_without_phenotypes_only_the_output_is_looked_at(made: tuple[Path, Path]) -> None:
    shutil.rmtree(made[0])

    table, matrix = load_embeddings(made[1], phenotypes=False)

    assert list(table.columns) == list(COLUMNS)
    assert len(table) == len(matrix) == 8


def test_a_dataset_that_has_moved_is_found_when_it_is_given(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    before, _ = load_embeddings(made[1])
    moved = made[0].rename(tmp_path / "elsewhere")

    with pytest.warns(UserWarning, match=r"has no phenotypes\. Give bids_dir="):
        alone, matrix = load_embeddings(made[1])
    again, _ = load_embeddings(made[1], bids_dir=moved)

    assert list(alone.columns) == list(COLUMNS)
    assert len(matrix) == 8
    pd.testing.assert_frame_equal(again, before)


def test_an_output_moved_together_with_its_dataset_needs_no_word(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    before, _ = load_embeddings(made[1])
    (tmp_path / "new").mkdir()
    for folder in made:
        folder.rename(tmp_path / "new" / folder.name)

    pd.testing.assert_frame_equal(load_embeddings(tmp_path / "new" / "out")[0], before)


@pytest.mark.parametrize("text", ["{", "[]", '{"DatasetLinks": {"raw": 3}}', "{}"])
def test_an_output_that_names_no_dataset_gives_ids_and_a_warning(
    made: tuple[Path, Path], text: str
) -> None:
    write_text(made[1] / "dataset_description.json", text)

    with pytest.warns(UserWarning, match="bids_dir="):
        assert list(load_embeddings(made[1])[0].columns) == list(COLUMNS)


@pytest.mark.parametrize("where", ["run", "config"])
def test_tables_given_to_the_study_are_joined_and_one_that_is_gone_is_warned_of(
    made: tuple[Path, Path], tmp_path: Path, where: str
) -> None:
    bids, out = made
    file = tmp_path / "more.csv"
    file.write_text("participant_id,height\nsub-01,170\nsub-02,180.5\n")
    if where == "run":
        write_output(bids, out, phenotypes=[file])
    else:
        write_text(out / "code" / "config.yaml", yaml.safe_dump({"phenotypes": [str(file)]}))

    table, _ = load_embeddings(out)
    file.unlink()
    with pytest.warns(UserWarning, match=r"more\.csv.*is gone"):
        without, _ = load_embeddings(out)

    assert table["height"].tolist()[:2] == [170, 180.5]
    assert list(without.columns) == [c for c in table.columns if c != "height"]


def test_a_table_recorded_twice_is_joined_once(made: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "more.tsv"
    file.write_text("participant_id\theight\nsub-01\t170\n")
    write_output(*made, phenotypes=[file])
    write_text(made[1] / "code" / "config.yaml", yaml.safe_dump({"phenotypes": [str(file)]}))

    assert [c for c in load_embeddings(made[1])[0] if "height" in c] == ["height"]


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"config": null}', '{"config": {"phenotypes": null}}']
)
def test_a_broken_record_is_no_obstacle(made: tuple[Path, Path], record: str) -> None:
    write_text(made[1] / "logs" / "run.json", record)

    assert "age" in load_embeddings(made[1])[0]


def test_a_dataset_that_is_given_and_wrong_is_an_error(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_embeddings(made[1], bids_dir=tmp_path / "absent")
    (tmp_path / "other" / "sub-77").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"has none of the participants .* sub-01"):
        load_embeddings(made[1], bids_dir=tmp_path / "other")


def test_what_is_not_there_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no folder"):
        load_embeddings(tmp_path / "absent")
    with pytest.raises(UsageError, match="no embeddings of model 'big'; there are: dcl"):
        load_embeddings(made[1], model_name="big")
    with pytest.raises(UsageError, match="there are: none"):
        load_embeddings(made[0])


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("npy", b""),
        ("npy", b"\x93NUMPY\x01\x00"),
        ("npy", b"no array"),
        ("tsv", b""),
        ("tsv", b"\xff\xfe\x00"),
        ("json", b"{"),
        ("json", b"[]"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(
    made: tuple[Path, Path], kind: str, content: bytes
) -> None:
    (made[1] / f"desc-dcl_embeddings.{kind}").write_bytes(content)

    with pytest.raises(UsageError, match=rf"_embeddings\.{kind} is damaged .* embed"):
        load_embeddings(made[1])


def test_files_that_do_not_belong_together_are_refused(made: tuple[Path, Path]) -> None:
    for array in (np.zeros((3, 5)), np.zeros(8), np.zeros(())):
        np.save(made[1] / "desc-dcl_embeddings.npy", array)
        with pytest.raises(UsageError, match="do not belong together"):
            load_embeddings(made[1])


def test_a_table_with_a_row_number_that_is_none_is_refused(made: tuple[Path, Path]) -> None:
    file = made[1] / "desc-dcl_embeddings.tsv"
    file.write_text(file.read_text().replace("\t7\n", "\tseven\n"))

    with pytest.raises(UsageError, match="is damaged"):
        load_embeddings(made[1])

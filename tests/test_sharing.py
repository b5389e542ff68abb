from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import write_heads
from PIL import Image

from nidl_dcl import load_embeddings
from nidl_dcl.embedding import read_embeddings
from nidl_dcl.errors import UsageError
from nidl_dcl.output import Output
from nidl_dcl.pseudonyms import Pseudonyms, read_key

PEOPLE = (
    *("AdaLovelace", "BlaisePascal", "CarlGauss", "DavidHilbert", "EmmyNoether", "FelixKlein"),
    *(
        "GraceHopper",
        "HenriPoincare",
        "IsaacNewton",
        "JuliaRobinson",
        "KurtGoedel",
        "LeonhardEuler",
    ),
)
DATES = {"01": "19790203", "02": "20240131"}
WORDS = (
    *("--target", "age", "sex", "--spacing", "8", "--max-epochs", "2", "--batch-size", "8"),
    *("--mask", "none", "--holdout", "0.2", "--max-skipped", "0.3", "--confounds", "dose"),
    *("--group", "family"),
)
PARQUET = ("--parquet",) if importlib.util.find_spec("pyarrow") else ()
VALIDATOR = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))


def write_telling(home: Path) -> Path:
    """Write a dataset whose ids, sessions, paths and tables tell who people are."""
    bids = write_heads(home / "asylumfolder", 12)
    description = bids / "dataset_description.json"
    description.write_text(json.dumps({"Name": "Bedlam Asylum", "BIDSVersion": "1.10.0"}))
    for number, name in enumerate(PEOPLE, 1):
        old = f"sub-{number:02d}"
        for file in sorted(bids.rglob(f"{old}*")):
            if file.is_file():
                to = file.name.replace(old, f"sub-{name}")
                for session, date in DATES.items():
                    to = to.replace(f"_ses-{session}_", f"_ses-{date}_")
                file.rename(file.with_name(to))
        for folder in sorted(bids.rglob(old)):
            for session, date in DATES.items():
                if (folder / f"ses-{session}").is_dir():
                    (folder / f"ses-{session}").rename(folder / f"ses-{date}")
            folder.rename(folder.with_name(f"sub-{name}"))
    table = pd.read_csv(bids / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    table["participant_id"] = [f"sub-{name}" for name in PEOPLE]
    table["birthday"] = [f"1{i}.07.1951" for i in range(10, 22)]
    table["remark"] = [f"neighbour of Mrs Fermat no {i}" for i in range(12)]
    table["dose"] = [str(i % 5) for i in range(12)]
    table["family"] = [f"clan {'Bernoulli' if i < 2 else i}" for i in range(12)]
    table.loc[6, "age"] = "retired Admiral"
    table.loc[12] = ["sub-MaryMissing", "50", "F", "1.1.1950", "no scan of hers", "1", "none"]
    table.to_csv(bids / "participants.tsv", sep="\t", index=False)
    more = pd.DataFrame({"participant_id": table["participant_id"], "salary": range(13)})
    more.to_csv(home / "payroll.tsv", sep="\t", index=False)
    broken = next((bids / "sub-BlaisePascal").rglob("*T1w.nii.gz"))
    broken.write_bytes(broken.read_bytes()[:-200])
    return bids


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the dataset, its study, and its study with --share."""
    home = tmp_path_factory.mktemp("telltalehome")
    bids = write_telling(home)
    code = (
        "import socket\nsocket.gethostname = lambda: 'telltalehost'\n"
        "from nidl_dcl.cli import main\nmain()\n"
    )
    for name, more in (("plainstudy", ()), ("given", ("--share",))):
        words = ["study", bids, home / name, *WORDS, "--phenotypes", home / "payroll.tsv", *more]
        words += PARQUET
        subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            check=True,
            timeout=300,
            env={**os.environ, "HOME": str(home), "USER": "telltaleuser", "XDG_CONFIG_HOME": ""},
        )
    return home


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return that folder, as the user's home."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "telltalehost")
    return home


def names_of(home: Path) -> Pseudonyms:
    return Pseudonyms(read_key(home / ".config" / "nidl_dcl" / "share.key", make=False, outside=()))


def private_of(home: Path) -> Path:
    """Return the private folder of the shared study."""
    (folder,) = (home / "given-private").glob("study-*")
    return folder


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every file, hidden ones too."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            raw = file.read_bytes()
            yield file.relative_to(folder).as_posix(), raw
            if raw[:2] == b"\x1f\x8b":
                yield f"{file.name}, unpacked", gzip.decompress(raw)


def traces(folder: Path, home: Path) -> dict[str, list[str]]:
    """Return what a folder tells of people, paths and computers, and in which files."""
    family = ("Bernoulli",)
    telling = (
        *(PEOPLE + tuple(DATES.values()) + family),
        *("MaryMissing", "Bedlam", "asylumfolder", "payroll", "salary", "birthday", "07.1951"),
        *("Fermat", "remark", "Admiral", "telltale", "plainstudy", "given-private", "share.key"),
        *(home.name, str(home), home.parent.name),
        (home / ".config/nidl_dcl/share.key").read_text().strip(),
    )
    found: dict[str, list[str]] = {}
    for name, raw in contents(folder):
        for word in telling:
            if word.lower().encode() in raw.lower() or word.lower() in name.lower():
                found.setdefault(word, []).append(name)
    return found


def table(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)


def test_nothing_that_is_given_away_tells_of_people_paths_or_computers(home: Path) -> None:
    assert traces(home / "given", home) == {}
    # The search would find them, had they been written.
    told = traces(home / "plainstudy", home)
    assert {*PEOPLE, *DATES.values(), "asylumfolder", "Admiral", "telltale", "Fermat"} <= set(told)


def test_no_picture_of_a_head_is_given_away(home: Path) -> None:
    figures = {p.name for p in (home / "given" / "figures").iterdir()}
    assert not {name for name in figures if name.endswith((".png", ".npy"))}
    page = (home / "given" / "report.html").read_text()
    assert "Pictures of heads are left out" in page
    assert "<img" not in page
    assert "<img" in (private_of(home) / "report.html").read_text()
    found = re.findall("data:image/png;base64,([A-Za-z0-9+/=\\s]+)", page)
    assert found
    for picture in found:  # scales of colours, the same along one side, and tables of few colours
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        colours = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)
        assert (pixels == pixels[:, :1]).all() or (pixels == pixels[:1]).all() or len(colours) <= 4


def test_scores_are_those_of_the_study_that_is_not_shared(home: Path) -> None:
    for target in ("Age", "Sex"):
        plain, given = (
            json.loads((home / name / f"desc-dcl{target}_metrics.json").read_text())
            for name in ("plainstudy", "given")
        )
        assert plain.pop("provenance") != given.pop("provenance")
        assert given == plain


def test_every_table_has_the_same_rows_under_other_names_in_another_order(home: Path) -> None:
    names = names_of(home)
    for name in ("desc-dcl_embeddings.tsv", "desc-dclAge_predictions.tsv", "logs/quality.tsv"):
        plain, given = table(home / "plainstudy" / name), table(home / "given" / name)
        assert len(plain) == len(given) > 0
        assert given["participant_id"].is_monotonic_increasing
        assert not plain["participant_id"].map(names.participant).equals(given["participant_id"])
        assert given["source"].is_unique
        assert given["source"].str.match("bids:raw:sub-[0-9a-f]{16}/[0-9a-f]{16}$").all()
        plain["participant_id"] = plain["participant_id"].map(names.participant)
        plain["session_id"] = plain["session_id"].map(names.session)
        plain["source"] = [
            names.image(s, who)
            for s, who in zip(plain["source"], plain["participant_id"], strict=True)
        ]
        ours = plain.set_index("source").loc[given["source"]].reset_index()[given.columns]
        for column in set(given.columns) - {"row", "reason"}:
            assert list(ours[column]) == list(given[column]), (name, column)
    inputs, shown = (
        table(home / "plainstudy/logs/inputs.tsv"),
        table(home / "given/logs/inputs.tsv"),
    )
    assert sorted(inputs["code"]) == sorted(shown["code"])
    assert {"no_image", "ok"} < set(shown["code"])


def test_a_row_of_the_matrix_belongs_to_the_same_person_as_before(home: Path) -> None:
    names = names_of(home)
    plain, given = (read_embeddings(home / name, "dcl") for name in ("plainstudy", "given"))
    assert plain is not None
    assert given is not None
    rows = {
        names.image(source, names.participant(who)): row
        for source, who, row in zip(
            plain.table["source"], plain.table["participant_id"], plain.matrix, strict=True
        )
    }
    assert list(given.table["row"]) == [str(i) for i in range(len(given.matrix))]
    for source, row in zip(given.table["source"], given.matrix, strict=True):
        np.testing.assert_array_equal(row, rows[source])


@pytest.mark.skipif(not PARQUET, reason="pyarrow is not installed")
def test_the_parquet_table_holds_the_same_rows_in_the_same_order(home: Path) -> None:
    whole = pd.read_parquet(home / "given" / "desc-dcl_embeddings.parquet")
    rows = table(home / "given" / "desc-dcl_embeddings.tsv")
    assert list(whole["source"]) == list(rows["source"])
    assert list(whole["row"]) == list(range(len(rows)))
    matrix = np.load(home / "given" / "desc-dcl_embeddings.npy")
    np.testing.assert_array_equal(whole.iloc[:, -matrix.shape[1] :].to_numpy(), matrix)


def test_reasons_and_phenotypes_keep_their_values_to_themselves(home: Path) -> None:
    given = table(home / "given" / "desc-dclAge_predictions.tsv")
    assert {"n/a", "target not a number", "target missing"} <= set(given["reason"])
    assert set(given.loc[given["status"] == "dropped", "target"]) == {"n/a"}
    plane = table(home / "given" / "figures" / "embedding_2d.tsv")
    assert sorted(plane.columns) == ["age", "participant_id", "session_id", "sex", "x", "y"]
    assert set(plane["sex"]) == {"F", "M"}
    assert (plane["age"] == "n/a").sum() == 2  # one is missing, one is no number


def test_hashes_of_ids_are_not_in_the_model_and_those_of_images_are(home: Path) -> None:
    for folder, kept in ((home / "plainstudy", True), (home / "given", False)):
        model = json.loads((folder / "models/desc-dcl/model.json").read_text())
        readout = json.loads((folder / "models/desc-dcl/desc-dclSex_readout.json").read_text())
        assert ("participants" in model["exposure"]) is kept
        assert model["exposure"]["images"]
        assert bool(readout["members"]["participants"]) is kept
        card = (folder / "models/desc-dcl/README.md").read_text()
        assert ("the participants' ids" in card) is kept
        assert readout["members"]["images"]


def test_a_receiver_recognises_images_and_does_not_know_about_others(
    home: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids = write_heads(tmp_path / "elsewhere", 12)
    shutil.rmtree(bids / "sub-01")  # whose image is taken by one that nobody has seen
    write_heads(tmp_path / "strangers", 2, first=40)
    shutil.copytree(tmp_path / "strangers" / "sub-40", bids / "sub-40")
    participants = bids / "participants.tsv"
    people = table(participants)
    people.assign(family=people["participant_id"]).to_csv(participants, sep="\t", index=False)
    model = home / "given" / "models" / "desc-dcl"
    done = run("embed", bids, tmp_path / "out", "--model", model, "--mask", "none")
    assert done.status == 0, done.err
    rows = table(tmp_path / "out" / "desc-dcl_embeddings.tsv").set_index("participant_id")["split"]
    assert rows["sub-40"] == "n/a"
    assert "train" in set(rows)


def test_the_private_folder_is_the_whole_study_for_its_owner_alone(home: Path) -> None:
    private = private_of(home)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    who = table(private / "logs" / "pseudonyms.tsv").set_index("participant_id")["pseudonym"]
    assert who["sub-AdaLovelace"] in set(
        table(home / "given/desc-dcl_embeddings.tsv")["participant_id"]
    )
    phenotypes, _ = load_embeddings(private)
    assert "birthday" in phenotypes


def test_shared_embeddings_are_read_without_phenotypes(home: Path) -> None:
    with pytest.warns(UserWarning, match="ids are pseudonyms"):
        found, matrix = load_embeddings(home / "given")
    assert list(found.columns) == ["participant_id", "session_id", "run", "source", "split", "row"]
    assert len(found) == len(matrix)


def test_the_same_command_again_writes_nothing_but_the_record(
    at_home: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    def times() -> dict[str, int]:
        return {
            p.name: p.stat().st_mtime_ns
            for p in (at_home / "given").rglob("*")
            if p.is_file() and p.name != ".lock"
        }

    before = times()
    words = ["study", at_home / "asylumfolder", at_home / "given", *WORDS]
    done = run(*words, "--phenotypes", at_home / "payroll.tsv", "--share", *PARQUET)
    assert done.status == 0, done.err
    after = times()
    assert {name for name in after if after[name] != before.get(name)} == {"run.json"}
    record = json.loads((at_home / "given" / "logs" / "run.json").read_text())
    assert all(stage["skipped"] for stage in record["stages"])
    assert traces(at_home / "given", at_home) == {}


def test_sharing_and_its_key_are_part_of_the_configuration(
    at_home: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids = at_home / "asylumfolder"
    cases: list[tuple[list[Any], str]] = [
        ([at_home / "given"], "share was True, is False"),
        ([at_home / "plainstudy", "--share"], "share was False, is True"),
        ([at_home / "given", "--share", "--share-key", tmp_path / "none"], "is missing. Put it"),
        ([at_home / "given", "--share", "--work-dir", tmp_path / "w"], "private part of"),
        ([tmp_path / "a", "--share", "--work-dir", tmp_path / "a" / "w"], "must not lie in"),
        ([tmp_path / "a", "--share-key", tmp_path / "k"], "give both"),
    ]
    for words, message in cases:
        done = run("embed", bids, *words)
        assert done.status == 2
        assert message in done.err
    (tmp_path / "other").write_text("m" * 64)
    (tmp_path / "other").chmod(0o600)
    done = run("embed", bids, at_home / "given", "--share", "--share-key", tmp_path / "other")
    assert done.status == 2
    assert "another key" in done.err
    done = run("index", bids, "--share")
    assert done.status == 2
    assert not (tmp_path / "none").exists()


def test_a_stage_does_not_share_by_an_output_that_is_not_shared(
    heads_made: Path, tmp_path: Path
) -> None:
    output = Output(heads_made, tmp_path / "out")
    with (
        pytest.raises(UsageError, match="whole output"),
        output.writing(),
        output.stage("embed", share=True),
    ):
        pass


def test_a_refused_dataset_still_tells_what_became_of_its_images_without_names(
    at_home: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    done = run("pretrain", at_home / "asylumfolder", out, "--mask", "none", "--share", "--strict")
    assert done.status == 3
    assert "truncated" in set(table(out / "logs" / "inputs.tsv")["code"]) or "crc" in set(
        table(out / "logs" / "inputs.tsv")["code"]
    )
    assert json.loads((out / "logs" / "run.json").read_text())["exit_status"] == 3
    assert traces(out, at_home) == {}
    assert (
        "BlaisePascal"
        in (tmp_path / "out-private")
        .joinpath(next((tmp_path / "out-private").glob("study-*")).name, "logs", "inputs.tsv")
        .read_text()
    )


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_the_official_validator_accepts_what_is_given_away(home: Path) -> None:
    done = subprocess.run(
        [str(VALIDATOR), str(home / "given"), "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [i for i in issues if i.get("severity") == "error"] == []

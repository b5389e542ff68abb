from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import json
import logging
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
from conftest import SLOW, give, write_heads
from PIL import Image

from nidl_dcl import load_embeddings
from nidl_dcl.errors import OutputInUseError, UsageError
from nidl_dcl.io.formats import write_json, write_npy, write_text, write_tsv
from nidl_dcl.output import sharing
from nidl_dcl.output.embeddings import Embeddings, read_embeddings, write_embeddings
from nidl_dcl.output.folder import Output
from nidl_dcl.output.lock import held
from nidl_dcl.output.pseudonyms import Pseudonyms, read_key
from nidl_dcl.output.sharing import share
from nidl_dcl.report.build import write_report

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


def write_revealing(home: Path) -> Path:
    """Write a dataset whose ids, sessions, paths and tables reveal who people are."""
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
    table["remark"] = [f"neighbor of Mrs Fermat no {i}" for i in range(12)]
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


@pytest.fixture(scope="module", params=SLOW)
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the dataset, its study, and what of that is shared."""
    home = tmp_path_factory.mktemp("revealinghome")
    bids = write_revealing(home)
    with pytest.MonkeyPatch.context() as patch:
        live_at(home, patch)
        words = ["study", bids, home / "plainstudy", *WORDS, "--phenotypes", home / "payroll.tsv"]
        assert give(*words, *PARQUET) == 0
        assert give("share", home / "plainstudy", home / "given") == 0
    return home


def live_at(home: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the user's name, home and computer reveal who is at work."""
    patch.setenv("HOME", str(home))
    patch.setenv("USER", "revealinguser")
    patch.delenv("XDG_CONFIG_HOME", raising=False)
    patch.setattr(socket, "gethostname", lambda: "revealinghost")


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return that folder, as the user's home."""
    live_at(home, monkeypatch)
    return home


def names_of(home: Path) -> Pseudonyms:
    return Pseudonyms(read_key(home / ".config" / "nidl_dcl" / "share.key", make=False))


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every file, hidden ones too."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            raw = file.read_bytes()
            yield file.relative_to(folder).as_posix(), raw
            if raw[:2] == b"\x1f\x8b":
                yield f"{file.name}, unpacked", gzip.decompress(raw)


def traces(folder: Path, home: Path) -> dict[str, list[str]]:
    """Return what a folder reveals of people, paths and computers, and in which files."""
    family = ("Bernoulli",)
    words = (
        *(PEOPLE + tuple(DATES.values()) + family),
        *("MaryMissing", "Bedlam", "asylumfolder", "payroll", "salary", "birthday", "07.1951"),
        *("Fermat", "remark", "Admiral", "revealing", "plainstudy", "share.key"),
        *(home.name, str(home), home.parent.name),
        (home / ".config/nidl_dcl/share.key").read_text().strip(),
    )
    found: dict[str, list[str]] = {}
    for name, raw in contents(folder):
        for word in words:
            if word.lower().encode() in raw.lower() or word.lower() in name.lower():
                found.setdefault(word, []).append(name)
    return found


def table(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)


def test_nothing_that_is_given_away_tells_of_people_paths_or_computers(home: Path) -> None:
    assert traces(home / "given", home) == {}
    # The search would find them, had they been written.
    found = traces(home / "plainstudy", home)
    assert {*PEOPLE, *DATES.values(), "asylumfolder", "Admiral", "revealing", "Fermat"} <= set(
        found
    )


def test_no_picture_of_a_head_is_given_away(home: Path) -> None:
    figures = {p.name for p in (home / "given" / "figures").iterdir()}
    assert not {name for name in figures if name.endswith((".png", ".npy"))}
    page = (home / "given" / "report.html").read_text()
    assert "Pictures of heads are left out" in page
    assert "<img" not in page
    assert "<img" in (home / "plainstudy" / "report.html").read_text()
    found = re.findall("data:image/png;base64,([A-Za-z0-9+/=\\s]+)", page)
    assert found
    for picture in found:  # scales of colors, the same along one side, and tables of few colors
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        colors = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)
        assert (pixels == pixels[:, :1]).all() or (pixels == pixels[:1]).all() or len(colors) <= 4


# A study that is large enough for averages.


@pytest.fixture(scope="module", params=SLOW)
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a study of 33 people, eleven with two sessions, and what is shared of it."""
    home = tmp_path_factory.mktemp("crowd")
    words = ["study", write_heads(home / "bids", 33), home / "study", "--target", "age"]
    words += ["--spacing", "8", "--max-epochs", "2", "--mask", "none", "--occlusion"]
    assert give(*words) == 0
    assert give("share", home / "study", home / "given", "--key-file", home / "key") == 0
    return home


def section(page: str, name: str) -> str:
    found = page.partition(f'<section id="{name}"')[2].partition("</section>")[0]
    assert found
    return found


@pytest.mark.parametrize("name", ["brains", "outliers", "retrieval", "occlusion"])
def test_a_shared_section_shows_what_may_be_shown_and_says_what_not(crowd: Path, name: str) -> None:
    page = section((crowd / "given" / "report.html").read_text(), name)
    assert 'class="nothing"' not in page
    assert ("Left out, as this output was made to be shared" in page) == (name != "retrieval")
    pictures = re.findall('alt="([^"]+)"', page)
    if name == "brains":
        assert [alt.partition(":")[0] for alt in pictures] == ["Mean of the prepared volumes"]
        assert "The mean of 44 prepared images of 33 participants." in page
    elif name == "occlusion":
        assert [alt.partition(".")[0] for alt in pictures] == ["Map of age on the mean brain"]
        assert "Background: the average brain (figures/average.npy)." in page
    else:
        assert pictures == []
        assert page.count("<tr") > 2


@pytest.mark.parametrize("name", ["outliers", "average"])
def test_images_are_ranked_as_in_the_private_table_under_pseudonyms(crowd: Path, name: str) -> None:
    names = Pseudonyms(read_key(crowd / "key", make=False))
    private = table(crowd / "study" / "figures" / f"{name}.tsv")
    given = table(crowd / "given" / "figures" / f"{name}.tsv")
    assert given["participant_id"].is_monotonic_increasing
    private["participant_id"] = private["participant_id"].map(names.participant)
    both = private.merge(given, on=["rank", "participant_id"])
    assert len(both) == len(private) == len(given) == 44
    for column in set(private) - {"rank", "participant_id", "session_id", "source"}:
        assert list(both[f"{column}_x"]) == list(both[f"{column}_y"])
    page = section(
        (crowd / "given" / "report.html").read_text(), "brains" if name == "average" else name
    )
    first = given.loc[given["rank"] == "1", "participant_id"].item()
    assert first in page.partition("<tbody>")[2].partition("</tr>")[0]


def test_each_number_of_a_shared_page_is_in_a_file_beside_it(crowd: Path) -> None:
    given = crowd / "given"
    page = (given / "report.html").read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, flags=re.DOTALL)
    assert len(captions) > 5
    for caption in captions:
        (name,) = re.findall(r"<code>(figures/[^<]+)</code>", caption)
        assert (given / name).is_file()
    for found in table(given / "figures/retrieval.tsv")["share"]:
        assert f'data-value="{float(found)!r}"' in section(page, "retrieval")
    about = json.loads((given / "figures/desc-dclAge_occlusion.json").read_text())
    for sentence in about["Outputs"][0]["Sentences"]:
        assert sentence.replace("'", "&#39;") in section(page, "occlusion")


def test_no_single_head_is_in_a_shared_output_of_many(crowd: Path) -> None:
    given, private = crowd / "given", crowd / "study"
    heads = [f"figures/{name}_1.png" for name in ("odd", "outlier")] + ["figures/views.npy"]
    assert all((private / name).is_file() for name in heads)
    files = {name for name, _ in contents(given)}
    assert {n for n in files if n.endswith(".png")} == {
        "figures/desc-dcl_mean.png",
        "figures/desc-dclAge_occlusion.png",
    }
    assert {n for n in files if n.endswith((".npy", ".nii.gz", ".parquet"))} == {
        "desc-dcl_embeddings.npy",
        "figures/average.npy",
        "figures/desc-dclAge_occlusion.nii.gz",
    }
    page = (given / "report.html").read_text()
    shown = re.findall('<img src="data:image/png;base64,([^"]+)"', page)
    assert {base64.b64decode(uri) for uri in shown} == {
        file.read_bytes() for file in (given / "figures").glob("*.png")
    }
    (mean,) = np.load(given / "figures/average.npy")
    own = np.load(private / "figures/average.npy")[0]
    assert 0.05 < (mean > 0).mean() < (own > 0).mean()
    np.testing.assert_array_equal(mean[mean > 0], own[mean > 0])
    places = table(given / "figures/desc-dclAge_occlusion.tsv")
    assert "change" in places
    assert not [name for name in places if "participants" in name]


def test_no_id_no_path_and_no_checksum_of_them_is_in_a_shared_output_of_many(crowd: Path) -> None:
    private = crowd / "study"
    average, retrieval, about = (
        json.loads((private / f"figures/{name}.json").read_text())
        for name in ("average", "retrieval", "desc-dclAge_occlusion")
    )
    made_of = (average["of"], retrieval["of"], about["provenance"]["people"])
    forms = (r"(sub|ses)-\d\d(?![0-9a-f])", re.escape(str(crowd)), *made_of)
    revealing = re.compile("|".join(forms).encode())
    for name, raw in contents(crowd / "given"):
        if not name.endswith((".npy", ".safetensors")):
            assert revealing.search(raw) is None, name
    assert revealing.search((private / "figures/outliers.tsv").read_bytes())


# Small outputs, made up.


def write_output(folder: Path, people: range, brightness: float = 0.5) -> Path:
    """Write an output of one image for each participant, with their average; return the folder."""
    write_json(folder / "dataset_description.json", {
        "Name": "Bedlam", "GeneratedBy": [{"Name": "nidl_dcl"}], "DatasetLinks": {"raw": "../bids"},
    })  # fmt: skip
    record = {"command": ["nidl-dcl", "study", "/asylum"], "started": "2026", "stages": []}
    write_json(
        folder / "logs" / "run.json",
        {**record, "exit_status": 0, "config": {}, "versions": {}, "earlier": []},
    )
    rows = pd.DataFrame({"participant_id": [f"sub-{i}" for i in people], "session_id": "n/a"})
    paths = [f"{who}/anat/{who}_T1w.nii.gz" for who in rows["participant_id"]]
    inputs = rows.assign(path=paths, status="ok", code="ok", message="no fault of sub-1")
    write_tsv(folder / "logs" / "inputs.tsv", inputs)
    rows = rows.assign(run="n/a", source=[f"bids:raw:{path}" for path in paths])
    matrix = np.array([[i, -i, 0.5] for i in people], np.float32)
    write_embeddings(folder, "dcl", Embeddings(rows.assign(split="train", row=0), matrix))
    n = len(people)
    write_tsv(folder / "figures" / "average.tsv", rows.assign(rank=range(1, n + 1), distance=0.5))
    mean = np.full((6, 6, 6), brightness, np.float32)
    write_npy(folder / "figures" / "average.npy", np.stack([mean, 0 * mean]))
    about = {"n_images": n, "n_participants": n, "spacing": [8, 8, 8], "of": str(n)}
    write_json(folder / "figures" / "average.json", about)
    return folder


def shared_of(output: Path) -> Path:
    """Share a made-up output; return the folder to give away, beside it."""
    return share(output, output.with_name("given"), key_file=output.with_name("key")).parent


def state(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def test_an_average_of_few_is_not_given_away(tmp_path: Path) -> None:
    given = shared_of(write_output(tmp_path / "out", range(19)))
    files = sorted(file.name for file in given.glob("figures/average.*"))
    assert files == ["average.json", "average.tsv"]
    page = section((given / "report.html").read_text(), "brains")
    assert "shared if made of 20 participants or more" in page
    assert "<img" not in page
    shared_of(write_output(tmp_path / "out", range(20)))
    assert (given / "figures" / "average.npy").is_file()


def test_two_averages_do_not_show_who_came_or_went(tmp_path: Path) -> None:
    given = shared_of(write_output(tmp_path / "out", range(40)))

    def average() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in given.glob("figures/average.*")}

    before = average()
    for people in (range(41), range(30), range(10, 49)):
        shared_of(write_output(tmp_path / "out", people, 0.7))
        assert average() == before
    shared_of(write_output(tmp_path / "out", range(60), 0.7))
    figures = given / "figures"
    assert np.load(figures / "average.npy").max() == np.float32(0.7)
    assert len(table(figures / "average.tsv")) == 60
    assert json.loads((figures / "average.json").read_text())["n_participants"] == 60
    for file in (tmp_path / "out" / "figures").glob("average.*"):
        file.unlink()
    after = average()
    shared_of(tmp_path / "out")
    assert average() == after


def test_a_copy_follows_its_output_and_pseudonyms_stay(tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", range(20))
    names = ("models/desc-dcl/weights.safetensors", "models/desc-dcl/README.md", "logs/metrics.csv")
    for name in names[::2]:
        write_text(out / name, "made of numbers")
    given = shared_of(out)
    before = table(given / "desc-dcl_embeddings.tsv")
    assert (given / names[0]).is_file()
    assert not (given / "models/desc-dcl/readme").exists()
    write_output(out, range(25))
    shutil.rmtree(out / "models")
    shared_of(out)
    after = table(given / "desc-dcl_embeddings.tsv")
    assert len(after) == 25
    assert set(before["source"]) < set(after["source"])
    assert not (given / "models").exists()
    assert (given / "logs" / "metrics.csv").is_file()
    assert sorted(state(given)) == sorted(
        [*json.loads((given / "logs/sharing.json").read_text())["files"], "logs/sharing.json"]
    )


def test_an_output_that_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", range(20))
    before = state(out)
    given = shared_of(out)
    stamps = {file: file.stat().st_mtime_ns for file in given.rglob("*") if file.is_file()}
    shared_of(out)
    files = [file for file in given.rglob("*") if file.is_file()]
    assert stamps == {file: file.stat().st_mtime_ns for file in files}
    assert state(out) == before


def test_what_others_wrote_into_the_copy_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write_output(tmp_path / "out", range(20))
    given = shared_of(out)
    for name in ("LICENSE", "README.md"):
        write_text(given / name, "CC0, ask us")
    with caplog.at_level(logging.INFO, "nidl_dcl"):
        shared_of(write_output(out, range(21)))
    assert f"Left in {given}, as share did not write them: LICENSE." in caplog.messages
    assert (given / "LICENSE").read_text() == (given / "README.md").read_text() == "CC0, ask us"
    write_text(given / "logs" / "metrics.csv", "mine")
    write_text(out / "logs" / "metrics.csv", "ours")
    with pytest.raises(UsageError, match=r"metrics.csv was not written by `nidl-dcl share`"):
        shared_of(out)
    assert (given / "logs" / "metrics.csv").read_text() == "mine"


def test_files_without_a_rule_stay_behind_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write_output(tmp_path / "out", range(19))
    hidden = (
        "figures/odd_1.png",
        "figures/odd_2.png",
        "logs/1_study.log",
        "sub-1.txt",
        ".work/a.f4",
    )
    for name in hidden:
        write_text(out / name, "sub-1 of Bedlam")
    few = "averages of too few participants, their spread, and maps of a few heads"
    with caplog.at_level(logging.INFO, "nidl_dcl"):
        page = share(out, tmp_path / "given", key_file=tmp_path / "key")
    assert page == tmp_path / "given" / "report.html"
    assert not {*hidden} & {*state(page.parent)}
    assert caplog.messages == [
        "Left out: logs of runs, which quote ids, paths and names (logs/1_study.log).",
        f"Left out: {few} (figures/average.npy).",
        "Left out: single heads: they can be recognized (figures/odd_1.png and 1 more).",
        "Left out: files that no rule allows (sub-1.txt).",
    ]
    for name, raw in contents(page.parent):
        assert not re.search(rb"sub-\d+\b|bedlam|asylum", raw.lower().replace(b"sub-0", b"")), name


@pytest.mark.parametrize("base", ["", "derivatives/preproc/"])
def test_preprocessed_heads_and_their_pictures_are_never_given_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, base: str
) -> None:
    out = write_output(tmp_path / "out", range(3))
    names = [f"sub-{i}" for i in range(3)]
    rows = pd.DataFrame({"participant_id": names, "session_id": "n/a", "run": "n/a"})
    rows["source"] = [f"bids:raw:{who}/anat/{who}_T1w.nii.gz" for who in names]
    rows = rows.assign(status=["ok", "warn", "skip"], code=["ok", "misaligned", "no_brain"])
    rows["message"] = "No brain of sub-1 was found in /asylum."
    rows["figure"] = [f"figures/{who}_T1w.png" for who in names]
    rows["brain"] = [f"{who}/anat/{who}_desc-preproc_T1w.nii.gz" for who in names]
    rows["date"] = 20240131
    rows["overlap"], rows["upright"] = [0.95, 0.875, 0.625], 0.75
    write_tsv(out / base / "desc-preproc_measures.tsv", rows)
    write_json(out / base / "desc-preproc_measures.json", {"Mode": "align"})
    drawn = io.BytesIO()
    Image.fromarray(np.arange(2100, dtype=np.uint16).astype(np.uint8).reshape(30, 70)).save(
        drawn, "png"
    )
    picture = drawn.getvalue()
    (out / base / "figures").mkdir(exist_ok=True)
    for who, figure in zip(names, rows["figure"], strict=True):
        (out / base / figure).write_bytes(picture)
        write_text(out / base / f"{who}/anat/{who}_desc-preproc_T1w.nii.gz", "head")
        write_text(out / base / f"{who}/anat/{who}_from-T1w_to-MNI_xfm.txt", "head")
    assert base64.b64encode(picture) in write_report(out).read_bytes()
    assert (out / "figures/preprocessing.html").is_file()
    with caplog.at_level(logging.INFO, "nidl_dcl"):
        given = shared_of(out)
    first = f"{base}figures/sub-0_T1w.png" if base else "figures/preprocessing.html"
    said = f"Left out: single heads: they can be recognized ({first} and 9 more)."
    assert said in caplog.messages
    files = state(given)
    assert not [n for n in files if n.endswith((".png", ".nii.gz", ".txt", "preprocessing.html"))]
    assert base64.b64encode(picture) not in files["report.html"]
    shown = section(files["report.html"].decode(), "preprocessing")
    assert "<img" not in shown
    assert "2 of 3 images of 3 participants" in shown
    assert "Left out, as this output was made to be shared: pictures of single heads" in shown
    measures = table(given / base / "desc-preproc_measures.tsv")
    assert (measures[["figure", "message", "brain", "date"]] == "n/a").all(axis=None)
    assert sorted(measures["overlap"]) == ["0.625", "0.875", "0.95"]
    assert measures["participant_id"].str.fullmatch("sub-[0-9a-f]{16}").all()
    for name, raw in contents(given):
        assert not re.search(rb"sub-\d\b|bedlam|asylum|t1w\.|20240131", raw.lower()), name


def test_a_copy_names_no_dataset(tmp_path: Path) -> None:
    given = shared_of(write_output(tmp_path / "out", range(20)))
    description = json.loads((given / "dataset_description.json").read_text())
    assert description["Name"] == "nidl_dcl embeddings"
    (source,) = description["SourceDatasets"]
    assert source["URL"] == description["DatasetLinks"]["raw"]
    assert source["URL"].startswith("urn:uuid:")
    assert "BIDS dataset (not named)" in (given / "README.md").read_text()


def test_the_owner_gets_the_table_of_pseudonyms(tmp_path: Path) -> None:
    out, who = write_output(tmp_path / "out", range(3)), tmp_path / "own" / "who.tsv"
    share(out, tmp_path / "given", key_file=tmp_path / "key", pseudonyms=who)
    assert stat.S_IMODE(who.stat().st_mode) == 0o600
    pairs = table(who).set_index("participant_id")["pseudonym"]
    assert list(pairs.index) == ["sub-0", "sub-1", "sub-2"]
    rows = table(tmp_path / "given" / "desc-dcl_embeddings.tsv").set_index("participant_id")["row"]
    assert np.load(tmp_path / "given/desc-dcl_embeddings.npy")[int(rows[pairs["sub-2"]]), 0] == 2


def test_a_copy_that_is_killed_says_so_and_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_output(tmp_path / "out", range(20))
    moves = iter(range(5))
    whole = sharing.replacing

    def killed(path: Path) -> Any:
        if next(moves, None) is None:
            raise KeyboardInterrupt
        return whole(path)

    with monkeypatch.context() as patch:
        patch.setattr(sharing, "replacing", killed)
        with pytest.raises(KeyboardInterrupt):
            shared_of(out)
    given = tmp_path / "given"
    assert len(state(given)) == 6
    assert json.loads((given / "logs/sharing.json").read_text())["finished"] is False
    shared_of(out)
    assert json.loads((given / "logs/sharing.json").read_text())["finished"] is True
    share(out, tmp_path / "whole", key_file=tmp_path / "key")
    assert state(given) == state(tmp_path / "whole")


KILLED = """
import os, sys
from pathlib import Path
from nidl_dcl.output.sharing import share

folder, step = Path(sys.argv[1]), int(sys.argv[2])
real, count = os.replace, 0


def replace(*paths):
    global count
    count += 1
    if count == at:
        os._exit(9)
    real(*paths)


os.replace = replace
for at in range(1, 10**6, step):
    count = 0
    if (child := os.fork()) == 0:
        share(folder / "out", folder / "given", key_file=folder / "key")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    assert status == 9
print(at)
"""


@pytest.mark.slow
def test_a_copy_may_be_killed_again_and_again(tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", range(20))
    shared_of(out)
    write_output(out, range(45), 0.7)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "4"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert int(done.stdout) > 20
    share(out, tmp_path / "whole", key_file=tmp_path / "key")
    given = shared_of(out)  # what a killed copy left half-written is removed when it is not new
    assert state(given) == state(tmp_path / "whole")


def test_no_run_writes_into_a_copy(tmp_path: Path, heads_made: Path) -> None:
    given = shared_of(write_output(tmp_path / "out", range(3)))
    with pytest.raises(UsageError, match="real ids must not get into it"):
        Output(heads_made, given)


def test_an_output_in_use_is_not_shared(tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", range(3))
    with held(out / ".lock"), pytest.raises(OutputInUseError, match="is being written"):
        shared_of(out)
    assert not (tmp_path / "given").exists()
    assert not (tmp_path / "key").exists()


def test_an_output_whose_last_run_failed_is_shared_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write_output(tmp_path / "out", range(20))
    record = json.loads((out / "logs" / "run.json").read_text())
    write_json(out / "logs" / "run.json", {**record, "exit_status": 3, "error": "of sub-1"})
    with caplog.at_level(logging.INFO, "nidl_dcl"):
        shared_of(out)
    assert "did not end well" in caplog.messages[0]
    given = json.loads((tmp_path / "given" / "logs" / "run.json").read_text())
    assert given["exit_status"] == 3
    assert "error" not in given


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("desc-dclAge_metrics.json", "{"),
        ("desc-dcl_embeddings.tsv", "participant_id\tsource\nsub-1\tbids:raw:a\n"),
        ("logs/holdout.tsv", "x\n1\n"),
        ("code/config.yaml", "a: ["),
        ("models/desc-dcl/model.json", "[]"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    out = write_output(tmp_path / "out", range(20))
    write_text(out / name, content)
    stem = re.escape(Path(name).name.partition(".")[0])
    with pytest.raises(UsageError, match=rf"{stem}\S* is damaged"):
        shared_of(out)


def test_folders_and_keys_that_cannot_be_used_are_refused(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    out, key, bids = write_output(tmp_path / "out", range(3)), tmp_path / "key", tmp_path / "bids"
    write_json(bids / "dataset_description.json", {"Name": "Heads"})
    write_text(tmp_path / "full" / "notes.txt", "mine")
    write_text(
        tmp_path / "older" / "logs" / "sharing.json", '{"format": 1, "key": "", "study": ""}'
    )
    given = shared_of(out)
    before = state(tmp_path)
    others = tmp_path / "others"
    write_text(others, "m" * 64)
    others.chmod(0o600)
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "none", tmp_path / "a"], "is no output of nidl_dcl"),
        ([bids, tmp_path / "a"], "is no output of nidl_dcl"),
        ([given, tmp_path / "a"], "is a shared copy"),
        ([out, out], "must lie neither in nor around OUTPUT_DIR"),
        ([out, out / "given"], "must lie neither in nor around OUTPUT_DIR"),
        ([out, tmp_path], "must lie neither in nor around OUTPUT_DIR"),
        ([out, bids / "given"], "nor in BIDS_DIR"),
        ([out, tmp_path / "full"], "was not written by `nidl-dcl share`"),
        ([out, others], "was not written by `nidl-dcl share`"),
        ([out, tmp_path / "older"], "is of another version"),
        ([out, given, "--key-file", others], "another key"),
        ([out, given, "--key-file", tmp_path / "missing"], "is missing. Put it back"),
        ([out, tmp_path / "a", "--key-file", tmp_path / "a" / "key"], "for you alone"),
        ([out, tmp_path / "a", "--key-file", bids / "key"], "for you alone"),
        ([out, given, "--pseudonyms", given / "who.tsv"], "for you alone"),
    ]
    for words, message in cases:
        more = [] if "--key-file" in words else ["--key-file", key]
        done = run("share", *words, *more)
        assert (done.status, done.out) == (2, ""), done.err
        assert message in done.err
        assert done.err.count("\n") == 1
    others.unlink()
    assert state(tmp_path) == before
    assert run("share", out, bids / "derivatives" / "given", "--key-file", key).status == 0


def test_the_command_prints_the_page(tmp_path: Path, run: Callable[..., Any]) -> None:
    out = write_output(tmp_path / "out", range(3))
    done = run("share", out, tmp_path / "given", "--key-file", tmp_path / "key")
    assert (done.status, done.out) == (0, f"{tmp_path / 'given' / 'report.html'}\n")
    assert done.err.startswith("Left out: averages of too few participants")


@pytest.mark.parametrize(("largest", "shown"), [(0.05, True), (0.06, False), (None, False)])
def test_a_map_of_the_mean_of_few_is_not_given_away(
    tmp_path: Path, crowd: Path, largest: float | None, shown: bool
) -> None:
    out = write_output(tmp_path / "out", range(3))
    made = crowd / "study" / "figures" / "desc-dclAge_occlusion"
    for ending in (".json", ".tsv", ".nii.gz", "participants.nii.gz", ".png"):
        shutil.copyfile(f"{made}{ending}", out / "figures" / f"{made.name}{ending}")
    about = json.loads(Path(f"{made}.json").read_text())
    write_json(out / "figures" / f"{made.name}.json", {**about, "LargestShare": largest})
    files = [file.name for file in (shared_of(out) / "figures").glob("*occlusion*")]
    endings = (".json", ".nii.gz", ".tsv") if shown else ()
    assert sorted(files) == [f"{made.name}{ending}" for ending in endings]


def test_a_map_that_is_gone_is_taken_back_with_its_picture(crowd: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "study", tmp_path / "given"
    shutil.copytree(crowd / "study", out)
    shutil.copytree(crowd / "given", given)
    share(out, given, key_file=crowd / "key")
    assert len(list((given / "figures").glob("*_occlusion*"))) == 4
    for file in (out / "figures").glob("*_occlusion*"):
        file.unlink()
    share(out, given, key_file=crowd / "key")
    assert not list((given / "figures").glob("*_occlusion*"))
    assert (given / "figures" / "desc-dcl_loss.svg").is_file()


# What a study holds, and what is shared of it.


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


def test_a_receiver_recognizes_images_and_does_not_know_about_others(
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


def test_shared_embeddings_are_read_without_phenotypes(home: Path) -> None:
    with pytest.warns(UserWarning, match="ids are pseudonyms"):
        found, matrix = load_embeddings(home / "given")
    assert list(found.columns) == ["participant_id", "session_id", "run", "source", "split", "row"]
    assert len(found) == len(matrix)


def test_the_same_command_again_writes_nothing(at_home: Path, run: Callable[..., Any]) -> None:
    def times() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (at_home / "given").rglob("*") if p.is_file()}

    before = times()
    done = run("share", at_home / "plainstudy", at_home / "given")
    assert done.status == 0, done.err
    assert times() == before


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

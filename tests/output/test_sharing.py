from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import json
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
from nidl_dcl.errors import UsageError
from nidl_dcl.io.formats import write_json, write_npy, write_tsv
from nidl_dcl.output.embeddings import read_embeddings
from nidl_dcl.output.folder import Output
from nidl_dcl.output.pseudonyms import Pseudonyms, read_key
from nidl_dcl.output.sharing import Sharing
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
    """Return a folder with the dataset, its study, and its study with --share."""
    home = tmp_path_factory.mktemp("telltalehome")
    bids = write_telling(home)
    with pytest.MonkeyPatch.context() as patch:
        live_at(home, patch)
        for name, more in (("plainstudy", ()), ("given", ("--share",))):
            words = ["study", bids, home / name, *WORDS, "--phenotypes", home / "payroll.tsv"]
            assert give(*words, *more, *PARQUET) == 0
    return home


def live_at(home: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the user's name, home and computer tell who is at work."""
    patch.setenv("HOME", str(home))
    patch.setenv("USER", "telltaleuser")
    patch.delenv("XDG_CONFIG_HOME", raising=False)
    patch.setattr(socket, "gethostname", lambda: "telltalehost")


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return that folder, as the user's home."""
    live_at(home, monkeypatch)
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
    for picture in found:  # scales of colors, the same along one side, and tables of few colors
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        colors = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)
        assert (pixels == pixels[:, :1]).all() or (pixels == pixels[:1]).all() or len(colors) <= 4


# A study that is large enough for averages.


@pytest.fixture(scope="module", params=SLOW)
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a shared study of 33 people, eleven of them with two sessions."""
    home = tmp_path_factory.mktemp("crowd")
    words = ["study", write_heads(home / "bids", 33), home / "given", "--target", "age"]
    words += ["--spacing", "8", "--max-epochs", "2", "--mask", "none", "--occlusion", "--share"]
    assert give(*words, "--share-key", home / "key") == 0
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
    names = Pseudonyms(read_key(crowd / "key", make=False, outside=()))
    private = table(private_of(crowd) / "figures" / f"{name}.tsv")
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
    given, private = crowd / "given", private_of(crowd)
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
    private = private_of(crowd)
    average, retrieval, about = (
        json.loads((private / f"figures/{name}.json").read_text())
        for name in ("average", "retrieval", "desc-dclAge_occlusion")
    )
    made_of = (average["of"], retrieval["of"], about["provenance"]["people"])
    forms = (r"(sub|ses)-\d\d(?![0-9a-f])", re.escape(str(crowd)), *made_of)
    telling = re.compile("|".join(forms).encode())
    for name, raw in contents(crowd / "given"):
        if not name.endswith((".npy", ".safetensors")):
            assert telling.search(raw) is None, name
    assert telling.search((private / "figures/outliers.tsv").read_bytes())


@pytest.fixture
def shared(tmp_path: Path) -> Sharing:
    """Return two folders, nothing in them."""
    (tmp_path / "bids").mkdir()
    sharing = Sharing(tmp_path / "bids", tmp_path / "given", key_file=tmp_path / "key")
    sharing.begin()
    return sharing


def write_crowd(sharing: Sharing, people: range, brightness: float) -> Path:
    """Write an average of one image for each participant; return where it is given away."""
    figures = sharing.private / "figures"
    rows = pd.DataFrame({"participant_id": [f"sub-{i}" for i in people]})
    rows["source"] = [f"bids:raw:{who}/anat/{who}_T1w.nii.gz" for who in rows["participant_id"]]
    write_tsv(figures / "average.tsv", rows.assign(rank=range(1, len(rows) + 1), distance=0.5))
    mean = np.full((6, 6, 6), brightness, np.float32)
    write_npy(figures / "average.npy", np.stack([mean, 0 * mean]))
    n = len(people)
    about = {"n_images": n, "n_participants": n, "spacing": [8, 8, 8], "of": str(n)}
    write_json(figures / "average.json", about)
    sharing.publish()
    return sharing.public / "figures"


def test_an_average_of_few_is_not_given_away(shared: Sharing) -> None:
    given = write_crowd(shared, range(19), 0.5)
    assert sorted(file.name for file in given.iterdir()) == ["average.json", "average.tsv"]
    page = section(write_report(shared.public).read_text(), "brains")
    assert "shared if made of 20 participants or more" in page
    assert "<img" not in page
    given = write_crowd(shared, range(20), 0.5)
    assert (given / "average.npy").is_file()


def test_two_averages_do_not_show_who_came_or_went(shared: Sharing) -> None:
    given = write_crowd(shared, range(40), 0.5)
    before = {file.name: file.read_bytes() for file in given.iterdir()}
    for people in (range(41), range(39), range(30), range(10, 49)):
        write_crowd(shared, people, 0.7)
        assert {file.name: file.read_bytes() for file in given.iterdir()} == before
    write_crowd(shared, range(60), 0.7)
    assert np.load(given / "average.npy").max() == np.float32(0.7)
    assert len(table(given / "average.tsv")) == 60
    assert json.loads((given / "average.json").read_text())["n_participants"] == 60


@pytest.mark.parametrize(("share", "given"), [(0.05, True), (0.06, False), (None, False)])
def test_a_map_of_the_mean_of_few_is_not_given_away(
    shared: Sharing, crowd: Path, share: float | None, given: bool
) -> None:
    made = private_of(crowd) / "figures" / "desc-dclAge_occlusion"
    for ending in (".json", ".tsv", ".nii.gz", "participants.nii.gz", ".png"):
        to = shared.private / "figures" / f"{made.name}{ending}"
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(f"{made}{ending}", to)
    about = json.loads(Path(f"{made}.json").read_text())
    write_json(shared.private / "figures" / f"{made.name}.json", {**about, "LargestShare": share})
    shared.publish()
    files = [file.name for file in (shared.public / "figures").glob("*")]
    endings = (".json", ".nii.gz", ".tsv") if given else ()
    assert sorted(files) == [f"{made.name}{ending}" for ending in endings]


def test_a_map_that_is_gone_is_taken_back_with_its_picture(shared: Sharing, crowd: Path) -> None:
    for folder in (shared.private, shared.public):
        folder.mkdir(exist_ok=True)
    shutil.copytree(crowd / "given" / "figures", shared.public / "figures")
    shutil.copytree(private_of(crowd) / "figures", shared.private / "figures")
    shared.publish()
    there = {file.name for file in (shared.public / "figures").glob("*_occlusion*")}
    assert len(there) == 4
    for file in (shared.private / "figures").glob("*_occlusion*"):
        file.unlink()
    shared.publish()
    assert not list((shared.public / "figures").glob("*_occlusion*"))
    assert (shared.public / "figures" / "desc-dcl_loss.svg").is_file()


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

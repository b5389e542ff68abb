"""The section and the pages about preprocessing, against the table that they come from."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import Browser
from colors import contrast
from PIL import Image
from report.test_browser import TEXTS, as_hex
from report.test_build import HOSTILE, SECTIONS, Page

from nidl_dcl.io.formats import write_json, write_text, write_tsv
from nidl_dcl.report.build import write_report
from nidl_dcl.report.plots import draw_strips
from nidl_dcl.report.preprocessing import TABLE

ALONE = ("preprocessing", "participants", "limits", "methods", "citation", "settings", "versions")
MEASURES = (
    *("mask_ml", "determinant", "stretch", "shear_degrees", "overlap", "correlation", "upright"),
    *("lead", "at_edge", "clipped"),
)


_PICTURES = 9
"""Different ones: the files of the others are links to these."""


def draw(seed: int) -> bytes:
    """Return what stands for the picture of a head and a brain: ellipses with outlines."""
    y, x = np.mgrid[:220, :900] / 100
    pixels = np.zeros((220, 900, 3), np.uint8)
    for number in range(9):
        radius = np.hypot((x - number - 0.5) / 0.42, (y - 1.1) / (0.7 + 0.02 * (seed % 9)))
        pixels[radius < 1] = 90 + 10 * number
        pixels[abs(radius - 0.9) < 0.03] = (255, 160, 0) if number < 5 else (0, 200, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def write_preprocessing(
    folder: Path, n: int = 30, *, mode: str = "align", hostile: str = ""
) -> pd.DataFrame:
    """Write what preprocessing leaves for the report, with invented numbers; return the table.

    Of every 15 images one has no brain, one is skipped for its measures and one is flagged.
    """
    rng = np.random.default_rng(0)
    ids = [f"sub-{i:04d}{hostile}" for i in range(n)]
    table = pd.DataFrame({"participant_id": ids, "session_id": "ses-1", "run": "n/a"})
    names = [f"sub-{i:04d}_ses-1_T1w" for i in range(n)]
    table["source"] = [f"bids:raw:{name}.nii.gz" for name in names]
    table = table.assign(status="ok", code="ok", message="n/a")
    table["figure"] = [f"figures/{name}.png" for name in names]
    middles = (1450, 1.25, 1.1, 3, 0.945, 0.6, 0.92, 0.4, 0.001, 0.001)
    for name, middle in zip(MEASURES, middles, strict=True):
        table[name] = rng.normal(middle, 0.02 * middle, n).round(6)
    at = np.arange(n) % 15
    table.loc[at == 3, ["status", "code"]] = ["skip", "no_brain"]
    table.loc[at == 3, ["message", "figure"]] = ["No brain was found.", "n/a"]
    table.loc[at == 3, list(MEASURES)] = np.nan
    table.loc[at == 6, ["status", "code", "overlap", "upright"]] = ["skip", "misaligned", 0.6, 0.5]
    table.loc[at == 6, "message"] = f"Its overlap with the template's is 0.60.{hostile}"
    table.loc[at == 9, ["status", "code", "clipped"]] = ["warn", "field_of_view", 0.05]
    table.loc[at == 9, "message"] = "5% of it is beyond the template's field."
    if mode == "strip":
        table[[name for name in MEASURES if name not in ("mask_ml", "at_edge")]] = np.nan
    write_tsv(folder / TABLE, table)
    about = {name: {"Description": f"What {name} is"} for name in table}
    write_json(folder / TABLE.replace(".tsv", ".json"), {**about, "Mode": mode})
    (folder / "figures").mkdir(exist_ok=True)
    drawn: list[Path] = []
    for figure in table["figure"][table["figure"] != "n/a"]:
        (folder / figure).unlink(missing_ok=True)
        if len(drawn) < _PICTURES:
            (folder / figure).write_bytes(draw(len(drawn)))
            drawn.append(folder / figure)
        else:
            (folder / figure).hardlink_to(drawn[int(figure[12:16]) % _PICTURES])
    return table


def write_alone(folder: Path, n: int = 30, hostile: str = "", **options: str) -> pd.DataFrame:
    """Write what `nidl-dcl preprocess` leaves."""
    table = write_preprocessing(folder, n, hostile=hostile, **options)
    paths = table["source"].str.removeprefix("bids:raw:")
    columns = ["participant_id", "session_id", "status", "code", "message"]
    write_tsv(folder / "logs/inputs.tsv", table[columns].assign(path=paths))
    stage = {"name": "preprocess", "started": "2026-11-30T10:00:00", "seconds": 240.5}
    write_json(
        folder / "logs/run.json",
        {
            "command": ["nidl-dcl", "preprocess", "BIDS", f"OUT{hostile}"],
            "config": {"preprocess": "align", "resolution": 2},
            "versions": {"nidl_dcl": "0.1.0", "SimpleITK": "2.5.2"},
            "stages": [stage],
            "exit_status": 0,
        },
    )
    write_json(folder / "dataset_description.json", {"Name": f"Aligned brains{hostile}"})
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preprocessed")
    write_alone(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report(folder))


@pytest.fixture(scope="module")
def everyone(page: Page, folder: Path) -> Page:
    return Page(folder / "figures/preprocessing.html")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_json(folder / "logs/run.json", {"command": ["nidl-dcl", "study"]})
    write_preprocessing(folder / "derivatives/preproc")
    write_report(folder)
    return folder


def captions(page: Page) -> list[str]:
    """Return the words under each picture of an image."""
    items = re.findall(r"<li[^>]*>\s*<figure.*?<figcaption>(.*?)</figcaption>", page.source, re.S)
    return [" ".join(re.sub("<[^>]+>", " ", item).split()) for item in items]


def section(source: str, name: str = "preprocessing") -> str:
    return source.partition(f'<section id="{name}"')[2].partition("</section>")[0]


# The page about preprocessing alone.


def test_preprocessing_alone_has_its_sections_and_no_others(page: Page) -> None:
    sections = [str(found.get("id")) for tag, found in page.elements if tag == "section"]
    assert sections == [*ALONE, "files"]
    assert [link for link in page.attributes("href") if link in {f"#{s}" for s in SECTIONS}]
    assert "nothing" not in page.attributes("class")
    assert "What could not be read" not in page.text
    assert page.text.startswith("Aligned brains") or "Aligned brains" in page.text[:60]
    for word in ("mbedding", "Headline", "model dcl", "ontrastive"):
        assert word not in page.text, word


def test_one_sentence_says_what_was_done_to_how_many(page: Page, study: Path) -> None:
    said = (
        "Bias field corrected, brain extracted, aligned to MNI152NLin2009aSym by an affine "
        "transform: 26 of 30 images of 30 participants; flagged among them: 2 (field of view 2); "
        "skipped: 4 (misaligned 2, no brain 2)."
    )
    assert said in page.text
    assert said in section((study / "report.html").read_text())


def test_codes_are_counted(study: Path) -> None:
    page = Page(study / "report.html")
    rows = page.tables["Preprocessed images by status and code"][1:]
    shown = [(row[0]["text"], row[1]["text"], float(row[2]["value"])) for row in rows]
    table = pd.read_csv(study / "derivatives/preproc" / TABLE, sep="\t")
    counts = table.groupby(["status", "code"]).size()
    assert {(status, code): n for status, code, n in shown} == counts.to_dict()
    assert [status for status, _, _ in shown] == ["skip", "skip", "warn", "ok"]


def test_each_mode_is_named_for_what_it_does(tmp_path: Path) -> None:
    for mode, words, limit in (
        ("strip", "left in their own space: 2", "not moved"),
        ("rigid", "by rotation and translation: 2", "moved and turned"),
        ("other", "brain extracted: 2", "research software"),
    ):
        write_alone(tmp_path, 2, mode=mode)
        page = Page(write_report(tmp_path))
        assert words in page.text
        assert limit in section(page.source, "limits")
        assert ("Fonov" in page.text) == (mode != "strip")


def test_the_worst_come_first_and_the_page_has_twelve_of_them(page: Page, folder: Path) -> None:
    table = pd.read_csv(folder / TABLE, sep="\t", na_values="n/a")
    ranks = table["status"].map({"skip": 0, "warn": 1, "ok": 2})
    order = table.assign(rank=ranks).sort_values(["rank", "upright"], kind="stable")
    expected = list(order.dropna(subset=["figure"])["participant_id"])[:12]
    shown = captions(page)
    assert [text.split()[0] for text in shown] == expected
    assert shown[0].startswith("sub-0006 ses-1 · skipped · misaligned: Its overlap with")
    row = order.iloc[0]
    assert f"overlap {row['overlap']:.3f} · correlation" in shown[0]
    assert f"upright 0.500 · brain {row['mask_ml']:,.0f} ml" in shown[0]
    uris = [str(f["src"])[22:] for t, f in page.elements if t == "img"]
    files = order.dropna(subset=["figure"])["figure"][:12]
    assert [base64.b64decode(uri) for uri in uris] == [(folder / f).read_bytes() for f in files]
    assert "could not be read: 2." in page.text


def test_the_measures_are_drawn_with_those_that_stand_out(page: Page, folder: Path) -> None:
    (svg,) = re.findall(r"<svg.*?</svg>", section(page.source), flags=re.DOTALL)
    table = pd.read_csv(folder / TABLE, sep="\t", na_values="n/a")
    titles = re.findall("<title>(.*?)</title>", svg)
    assert len(titles) == 4 * table["overlap"].notna().sum()
    for who, overlap in zip(table["participant_id"], table["overlap"], strict=True):
        assert (f"{who} ses-1 · {overlap:.4g}" in titles) == np.isfinite(overlap)
    assert all(f"{word} ({n})" in svg for word, n in (("ok", 24), ("flagged", 2), ("skipped", 4)))
    assert f"overlap {table['overlap'].median():.3f}" in section(page.source)
    assert (folder / "figures/desc-dcl_preprocessing.svg").read_text() == svg


def test_a_value_far_outside_does_not_hide_the_others() -> None:
    values = pd.DataFrame({"size": [*np.linspace(1, 2, 30), 500.0, np.nan]})
    groups = pd.Series([*["ok"] * 30, "bad", "bad"])
    order, hover = ["ok", "odd", "bad"], [f"sub-{i}" for i in range(32)]
    svg = draw_strips("x", values, groups, order=order, hover=hover, alt="Sizes").decode()
    across = [float(x) for x in re.findall(r'<use[^>]* x="([\d.]+)"[^>]*><title>sub', svg)]
    assert len(across) == 31
    assert max(across) == across[-1]
    assert np.ptp(across[:30]) > 0.15 * np.ptp(across)
    assert "sub-30 · 500" in svg
    assert "odd" not in svg


# The page of all images.


def test_all_images_stand_on_a_page_of_their_own(everyone: Page, page: Page, folder: Path) -> None:
    table = pd.read_csv(folder / TABLE, sep="\t", na_values="n/a")
    shown = captions(everyone)
    assert sorted(text.split()[0] for text in shown) == sorted(table["participant_id"])
    with_picture = [text for text in shown if "no brain" not in text]
    assert with_picture[:12] == captions(page)
    assert everyone.text.count("No picture.") == 2
    images = [found for tag, found in everyone.elements if tag == "img"]
    assert len(images) == table["figure"].notna().sum()
    for found in images:
        assert (folder / "figures" / str(found["src"])).is_file()
        assert found["loading"] == "lazy"
        assert found["alt"]
        assert (found["width"], found["height"]) == ("900", "220")
    titles = re.findall(r"<h2[^>]*><a[^>]*>([^<]+)", everyone.source)
    assert titles == ["Skipped (4)", "Flagged (2)", "Ok (24)"]


def test_links_lead_from_the_page_to_each_image_and_back(page: Page, everyone: Page) -> None:
    ids = everyone.attributes("id")
    assert len(ids) == len(set(ids))
    inside = [link[1:] for link in everyone.attributes("href") if link.startswith("#")]
    assert set(inside) <= set(ids)
    assert "../report.html" in everyone.attributes("href")
    links = [link for link in page.attributes("href") if not link.startswith("#")]
    assert links[0] == "figures/preprocessing.html"
    assert len(links) == 13
    assert {link.partition("#")[2] for link in links[1:]} <= set(ids)


def test_the_page_of_all_runs_nothing_and_loads_its_pictures_alone(everyone: Page) -> None:
    assert not {tag for tag, _ in everyone.elements} & {"script", "link", "iframe", "object"}
    (policy,) = [str(f["content"]) for _, f in everyone.elements if "http-equiv" in f]
    assert policy.startswith("default-src 'none'; img-src 'self' file:; style-src 'sha256-")
    assert "style" not in {name for _, found in everyone.elements for name in found}


def test_a_study_finds_its_pictures_where_preprocessing_left_them(study: Path) -> None:
    page = Page(study / "report.html")
    sections = [str(found.get("id")) for tag, found in page.elements if tag == "section"]
    assert sections == list(SECTIONS)
    assert sections.index("preprocessing") == sections.index("brains") - 1
    everyone = Page(study / "figures/preprocessing.html")
    sources = [str(found["src"]) for tag, found in everyone.elements if tag == "img"]
    assert len(sources) == 28
    assert all((study / "figures" / source).resolve().is_file() for source in sources)
    assert "derivatives/preproc/desc-preproc_measures.tsv" in section(page.source)
    methods = section(page.source, "methods")
    for said in ("N4 (Tustison", "deepbet (Fisch", "MNI152NLin2009aSym (Fonov", "SimpleITK (Low"):
        assert said in methods
    assert "of 30 images 2 were flagged and 4 skipped" in methods
    limits = section(page.source, "limits")
    assert "flagged in preprocessing and used like all others: 2 (see Preprocessing)" in limits
    assert "no nonlinear registration" in limits


def test_a_study_without_preprocessing_says_so_in_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "logs/run.json", {"command": ["nidl-dcl", "study"]})
    page = Page(write_report(tmp_path))
    assert "Nothing was preprocessed here" in section(page.source)
    assert "deepbet" not in page.text
    assert not (tmp_path / "figures/preprocessing.html").exists()


@pytest.mark.parametrize("command", ["preprocess", "study"])
def test_before_the_first_image_is_done_the_page_waits(tmp_path: Path, command: str) -> None:
    stages = [{"name": "preprocess", "started": "2026-11-30T10:00:00"}]
    run = {"command": ["nidl-dcl", command], "stages": stages, "exit_status": None}
    write_json(tmp_path / "logs/run.json", run)
    page = Page(write_report(tmp_path, under_way=True))
    assert "Not known yet" in section(page.source)
    assert "at this stage: preprocessing" in page.text
    assert ("headline" in page.attributes("id")) == (command == "study")


def test_pictures_that_are_missing_or_elsewhere_are_told_and_not_loaded(tmp_path: Path) -> None:
    table = write_alone(tmp_path)
    (tmp_path / "secret.png").write_bytes(draw(0))
    table.loc[0, "figure"] = "figures/../secret.png"
    table.loc[1, "figure"] = "javascript:alert(1)//.png"
    table.loc[2, "figure"] = "figures/gone.png"
    table.loc[4, "status"] = "maybe"
    write_tsv(tmp_path / TABLE, table)
    (tmp_path / table.loc[6, "figure"]).unlink()
    (tmp_path / table.loc[6, "figure"]).write_bytes(b"no picture")
    page = Page(write_report(tmp_path))
    problems = page.text.partition("What could not be read")[2]
    assert "3 pictures that desc-preproc_measures.tsv names are missing" in problems
    assert f"{table.loc[6, 'figure']} is not a PNG" in problems
    assert "sub-0004 ses-1 · maybe" in captions(page)[0]
    source = (tmp_path / "figures/preprocessing.html").read_text()
    assert not re.search(r'(src|href)="[^"]*(secret|javascript|gone)', source)


@pytest.mark.parametrize(
    "text",
    [
        "participant_id\n",
        "participant_id\tstatus\nsub-1\tok\n",
        "status\tfigure\tupright\nwarn\tn/a\tabc\nn/a\tn/a\tinf\n",
    ],
)
def test_a_table_with_little_in_it_gives_a_page(tmp_path: Path, text: str) -> None:
    write_text(tmp_path / TABLE, text)
    page = Page(write_report(tmp_path))
    assert "preprocessing" in page.attributes("id")
    assert not (tmp_path / "figures/preprocessing.html").exists()


def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    write_alone(tmp_path, hostile=HOSTILE)
    pages = Page(write_report(tmp_path)), Page(tmp_path / "figures/preprocessing.html")
    for found in pages:
        assert not [name for _, f in found.elements for name in f if name.startswith("on")]
        assert "PWNED" in found.text
    assert [tag for tag, _ in pages[0].elements].count("script") == 1
    assert [tag for tag, _ in pages[1].elements].count("script") == 0


def test_the_same_files_give_the_same_pages(folder: Path, everyone: Page) -> None:
    assert write_report(folder).read_text()
    assert (folder / "figures/preprocessing.html").read_text() == everyone.source


def write_many(folder: Path, n: int) -> Path:
    write_alone(folder, n)
    return write_report(folder)


@pytest.mark.slow
def test_five_thousand_images_stay_small(tmp_path: Path) -> None:
    page = write_many(tmp_path, 5000)
    assert page.stat().st_size < 1_000_000
    everyone = Page(tmp_path / "figures/preprocessing.html")
    assert len(everyone.source) < 4_000_000
    parts = [link for link in everyone.attributes("href") if link.startswith("#group")]
    assert 50 < len(parts) < 70
    assert "Ok 3,901–4,000" in everyone.text


# In a browser.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report.html", "figures/preprocessing.html"])
def test_a_browser_shows_both_pages_whole(
    browser: Browser, page: Page, folder: Path, name: str
) -> None:
    tab = browser.open(folder / name)
    assert tab.troubles() == []
    assert tab.evaluate("[...document.images].filter(i => i.alt).length") == len(
        tab.evaluate("[...document.images].map(i => i.src)")
    )
    tab.evaluate("[...document.images].forEach(i => i.loading = 'eager')")
    tab.evaluate("Promise.all([...document.images].map(i => i.decode()))")
    assert tab.evaluate("[...document.images].every(i => i.naturalWidth === 900)")
    assert all(url.startswith(folder.as_uri()) for url in tab.requests())
    for media in ({"prefers_color_scheme": "light"}, {"prefers_color_scheme": "dark"}):
        tab.emulate(**media)
        texts = [(as_hex(ink), as_hex(behind)) for ink, behind, _ in tab.evaluate(TEXTS)]
        assert [found for found in texts if contrast(*found) < 4.5] == []
    tab.emulate()
    for width in (320, 400, 1280, 1920):
        tab.resize(width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    roles = [n["role"].get("value") for n in tab.call("Accessibility.getFullAXTree")["nodes"]]
    assert roles.count("listitem") >= 12
    assert {"list", "image", "navigation", "main"} <= set(roles)
    assert tab.pdf().startswith(b"%PDF")
    tab.close()


@pytest.mark.slow
def test_five_thousand_images_load_as_they_come_into_view(browser: Browser, tmp_path: Path) -> None:
    write_many(tmp_path, 5000)
    tab = browser.open(tmp_path / "figures/preprocessing.html")
    assert 4 <= len(tab.requests()) - 1 < 60
    tab.evaluate("document.querySelector('nav li:last-child a').click()")
    tab.evaluate("new Promise(done => setTimeout(done, 1500))")
    seen = tab.evaluate(
        "document.querySelector('section:last-of-type h3:last-of-type').getBoundingClientRect().top"
    )
    assert -5 < seen < 900
    assert len(tab.requests()) < 150
    assert tab.troubles() == []
    tab.close()


def test_the_sidecar_may_be_missing(tmp_path: Path) -> None:
    write_preprocessing(tmp_path)
    sidecar = tmp_path / TABLE.replace(".tsv", ".json")
    assert json.loads(sidecar.read_text())["Mode"] == "align"
    sidecar.unlink()
    assert "brain extracted: 26 of 30" in Page(write_report(tmp_path)).text

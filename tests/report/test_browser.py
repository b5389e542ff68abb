"""The report as Chromium shows, sorts and prints it; skipped where there is no Chromium."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from browser import Browser, Tab
from colors import contrast
from report.test_build import SECTIONS, write_output

from nidl_dcl.evaluation.outliers import rank_outliers
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.formats import (
    camel_case,
    escape_control,
    write_json,
    write_npy,
    write_text,
    write_tsv,
)
from nidl_dcl.report.build import write_report

pytestmark = pytest.mark.slow  # a browser starts

ELSEWHERE = "http://elsewhere.example"
PAYLOADS = (
    "<script>top.ran=1</script>",
    "<img src=x onerror=top.ran=1>",
    '"><svg onload=top.ran=1><animate onbegin=top.ran=1>',
    "<svg><script>top.ran=1</script><foreignObject><body onload=top.ran=1>",
    '" onfocus="top.ran=1" autofocus x=\'',
    "' onmouseover='top.ran=1' x='",
    "</style><style>*{display:none!important}</style>",
    "</title></svg></td></table><script>top.ran=1</script>",
    "}*{display:none!important;background:url(" + ELSEWHERE + "/css)}",
    f'<link rel=stylesheet href="{ELSEWHERE}/a.css"><base href="{ELSEWHERE}/">',
    f'<meta http-equiv=refresh content="0;url={ELSEWHERE}/"><iframe srcdoc="<b>">',
    f"<form action={ELSEWHERE}><input autofocus onfocus=top.ran=1>",
    "<a href='javascript:top.ran=1'>x</a><!-- ]]> <![CDATA[",
    "{{ 7*7 }}{% raw %}{# &lt;b&gt; &#60;i&#62; $x_1$ \\frac",
    "\u202egpj.exe\u202c \u2066a\u2069 \u200fb\u200e \ufeff",
    "\x1b[31m \x07 \x7f \x85 \u2028",
)
"""What ids, columns and values may hold: HTML, handlers, CSS, SVG, templates, controls, bidi."""


@pytest.fixture(scope="module")
def output(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output folder that no test may change."""
    return write_output(tmp_path_factory.mktemp("study"), n=24)


@pytest.fixture(scope="module")
def page(output: Path) -> Path:
    return write_report(output)


@pytest.fixture(scope="module")
def tab(browser: Browser, page: Path) -> Tab:
    """Return the page, opened once; a test leaves it as it found it."""
    return browser.open(page)


@pytest.fixture(autouse=True)
def as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "tab" in request.fixturenames:
        shared: Tab = request.getfixturevalue("tab")
        shared.emulate()
        shared.resize(1280)


def poison(value: Any, text: str) -> Any:
    """Return a JSON value with `text` behind all its strings and the names of its options."""
    if isinstance(value, dict):
        return {k: v if k in ("task", "metric") else poison(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(item, text) for item in value]
    return value + text if isinstance(value, str) else value


def write_hostile(output: Path, folder: Path) -> Path:
    """Write the output once more, with payloads in its ids, columns, values, targets and options."""
    shutil.copytree(output, folder)
    (folder / "report.html").unlink(missing_ok=True)
    shutil.rmtree(folder / "figures")
    shutil.copytree(output / "figures", folder / "figures")
    joined = " ".join(PAYLOADS)
    for path in [*folder.rglob("*.tsv")]:
        table = pd.read_csv(path, sep="\t", dtype="str", keep_default_na=False)
        for column in {"participant_id", "path", "code", "message", "session_id", "split"} & {
            *table.columns
        }:
            table[column] = [
                f"{value}{PAYLOADS[row % len(PAYLOADS)]}" for row, value in enumerate(table[column])
            ]
        if path.name == "inputs.tsv":
            table.loc[1:, "status"] = "skip"
        if path.name == "embedding_2d.tsv":
            for number, payload in enumerate(PAYLOADS):
                table.insert(4, f"{number}{payload}", np.arange(len(table)) % 3)
                table[f"{number}{payload}"] = table[f"{number}{payload}"].astype(str) + payload
        rows = ["\t".join(table.columns), *map("\t".join, table.to_numpy().tolist())]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="")
    for path in [*folder.rglob("*.json")]:
        value = poison(json.loads(path.read_text()), joined)
        if path.name == "run.json":
            value["config"].update({f"option {payload}": payload for payload in PAYLOADS})
        write_json(path, value)
    for number, kind in ((0, "Age"), (2, "Sex")):
        stem = f"desc-dcl{kind}"
        metrics = json.loads((folder / f"{stem}_metrics.json").read_text())
        name = metrics["target"] = f"{kind} {PAYLOADS[number]}"
        label = camel_case(name)
        write_json(folder / f"desc-dcl{label}_metrics.json", metrics)
        (folder / f"{stem}_metrics.json").unlink()
        for ending in ("predictions.json", "predictions.tsv"):
            (folder / f"{stem}_{ending}").rename(folder / f"desc-dcl{label}_{ending}")
    write_text(folder / "logs/CITATION.md", "\n".join(PAYLOADS))
    return write_report(folder)


@pytest.fixture(scope="module")
def hostile(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile(output, tmp_path_factory.mktemp("hostile") / "study")


def write_large(output: Path, folder: Path, n: int = 10_000) -> Path:
    """Write the output of a study with `n` participants, most of its numbers invented."""
    shutil.copytree(output, folder)
    rng = np.random.default_rng(0)
    ids = np.array([f"sub-{i:06d}" for i in range(n)])
    who = pd.DataFrame({"participant_id": ids, "session_id": "ses-01", "run": "n/a"})
    status = rng.choice(["ok", "warn", "skip"], n, p=[0.9, 0.06, 0.04])
    write_tsv(
        folder / "logs/inputs.tsv",
        who.drop(columns="run").assign(
            path=[f"{i}/ses-01/anat/{i}_ses-01_T1w.nii.gz" for i in ids],
            status=status,
            code=np.where(status == "ok", "ok", rng.choice(["spacing", "crc", "blank"], n)),
            message=np.where(status == "ok", "", "Slices are 6 mm thick, voxels 4 mm."),
        ),
    )
    write_npy(folder / "desc-dcl_embeddings.npy", rng.standard_normal((n, 128)).astype(np.float32))
    write_tsv(
        folder / "desc-dcl_embeddings.tsv",
        who.assign(source="bids:raw:x", split=rng.choice(["train", "val"], n), row=np.arange(n)),
    )
    age, sex = rng.uniform(20, 80, n).round(1), rng.choice(["F", "M"], n)
    points = who.drop(columns="run").assign(
        x=rng.standard_normal(n) + age / 20, y=rng.standard_normal(n), age=age, sex=sex
    )
    points["site"] = rng.choice([f"site {i}" for i in range(60)], n)
    for number in range(8):
        points[f"scale{number}"] = rng.standard_normal(n).round(3)
    points.loc[::17, "age"] = np.nan
    write_tsv(folder / "figures/embedding_2d.tsv", points)
    tables = {
        "Age": who.assign(target=age, prediction=(age + rng.normal(0, 8, n)).round(2)),
        "Sex": who.assign(target=sex, prediction=np.where(rng.random(n) < 0.8, sex, "F")),
    }
    for label, table in tables.items():
        write_tsv(folder / f"desc-dcl{label}_predictions.tsv", table.assign(status="ok"))
    images = who.assign(source=[f"bids:raw:{i}/ses-01/anat/{i}_ses-01_T1w.nii.gz" for i in ids])
    distance = pd.Series(rng.lognormal(0, 1, n))
    rank = distance.rank(ascending=False).astype(int)
    write_tsv(folder / "figures/average.tsv", images.assign(rank=rank, distance=distance))
    ranked = rank_outliers(images.assign(brain_distance=distance))
    write_tsv(folder / "figures/outliers.tsv", ranked)
    return write_report(folder)


@pytest.fixture(scope="module")
def large(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large(output, tmp_path_factory.mktemp("large") / "study")


@pytest.fixture(scope="module")
def shared(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page with maps, of an output that was made to be shared."""
    folder = Path(shutil.copytree(output, tmp_path_factory.mktemp("shared") / "study"))
    for pattern in ("views.*", "odd_*", "outlier_*"):
        for file in (folder / "figures").glob(pattern):
            file.unlink()
    mean = np.load(folder / "figures/average.npy")[:1]
    write_npy(folder / "figures/average.npy", mean)
    write_json(folder / "logs/sharing.json", {"format": 1})
    for target, names in (("Age", ["age"]), ("Sex", ["F", "M", "x" * 90])):
        stem = f"desc-dcl{target}_occlusion"
        maps = np.stack([mean[0] * (1 - k) for k in range(len(names))], axis=-1) - 0.2
        image = nib.Nifti1Image(maps, np.diag([4.0, 4.0, 4.0, 1.0]))
        write_bytes(folder / f"figures/{stem}.nii.gz", gzip.compress(image.to_bytes(), mtime=0))
        output_of = {"Units": "years", "Peak": [40, 48, 40], "PeakPlace": "middle"}
        output_of |= {"Minimum": -0.2, "Maximum": 0.8, "Sentences": ["Hiding a block " * 20]}
        about = {"Outputs": [{"Name": name, **output_of} for name in names]}
        about |= {"BlockSize": [24] * 3, "Stride": [12] * 3, "MeanOf": 48, "Participants": 6}
        about |= {"Task": "regression" if target == "Age" else "classification"}
        write_json(folder / f"figures/{stem}.json", about)
        regions = {
            "region": "front",
            "x": 1,
            "y": 2,
            "z": 3,
            "change": [0.8, 0.5, -0.2] * len(names),
        }
        rows = pd.DataFrame({"output": np.repeat(names, 3), **regions})
        write_tsv(folder / f"figures/{stem}.tsv", rows)
    return write_report(folder)


# What the watch over a page would see.


def test_a_page_that_misbehaves_is_noticed(browser: Browser, tmp_path: Path) -> None:
    write_text(
        tmp_path / "page.html",
        f"""<!DOCTYPE html><meta http-equiv="Content-Security-Policy"
        content="script-src 'none'"><body onload="top.ran=1"><img src="{ELSEWHERE}/x.png">""",
    )
    found = browser.open(tmp_path / "page.html")
    troubles = " ".join(found.troubles())
    assert "Content Security Policy" in troubles
    assert "ERR_NAME_NOT_RESOLVED" in troubles
    assert found.requests()[1:] == [f"{ELSEWHERE}/x.png"]
    found.close()


# One page, looked at in many ways.


def test_the_page_asks_for_nothing_and_complains_of_nothing(tab: Tab, page: Path) -> None:
    assert tab.troubles() == []
    assert tab.requests() == [page.as_uri()]


def test_all_sections_are_seen_in_the_order_of_the_contents(tab: Tab) -> None:
    seen = tab.evaluate(
        "[...document.querySelectorAll('main > section')].filter(s => s.checkVisibility() && "
        "s.innerText.length > 20).map(s => s.id)"
    )
    links = tab.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert seen == links
    assert set(SECTIONS) <= set(seen)


def test_a_link_of_the_contents_leads_to_its_section(tab: Tab) -> None:
    tab.emulate(prefers_reduced_motion="reduce")
    for section in ("limits", "training"):
        tab.evaluate(f"document.querySelector('nav a[href=\"#{section}\"]').click()")
        assert tab.evaluate("location.hash") == f"#{section}"
        top = tab.evaluate(f"document.getElementById('{section}').getBoundingClientRect().top")
        assert 0 <= top < 60
    current = "document.querySelector('nav a[aria-current]').hash"
    tab.evaluate("new Promise(done => setTimeout(done, 100))")
    assert tab.evaluate(current) == "#training"
    assert tab.evaluate("getComputedStyle(document.querySelector('h2 a'), '::after').content") == (
        '" #" / ""'
    )


ORDER = "[...document.querySelectorAll('#scores tbody th')].map(cell => cell.innerText.trim())"
SORT = "document.querySelector('#scores th:nth-child({}) button')"


def test_tables_sort_by_number_with_a_click(tab: Tab, output: Path) -> None:
    n = {
        name: json.loads((output / f"desc-dcl{name.title()}_metrics.json").read_text())
        for name in ("age", "sex")
    }
    rising = sorted(n, key=lambda name: n[name]["scores"][n[name]["headline"]["metric"]]["mean"])
    box = tab.evaluate(
        f"(b => (b.scrollIntoView({{behavior: 'instant', block: 'center'}}), b = "
        f"b.getBoundingClientRect(), [b.x + b.width / 2, b.y + b.height / 2]))({SORT.format(4)})"
    )
    for order, expected in (("ascending", rising), ("descending", rising[::-1])):
        for kind in ("mousePressed", "mouseReleased"):
            tab.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )
        assert tab.evaluate(ORDER) == expected
        assert tab.evaluate(f"{SORT.format(4)}.parentNode.ariaSort") == order
    assert tab.evaluate("document.querySelectorAll('#scores [aria-sort]').length") == 1


def test_tables_sort_by_keyboard_and_say_so(tab: Tab) -> None:
    tab.evaluate(f"{SORT.format(1)}.focus()")
    tab.press("Enter", 13, "\r")
    assert tab.evaluate(ORDER) == ["age", "sex"]
    assert tab.evaluate(f"{SORT.format(1)}.parentNode.ariaSort") == "ascending"
    tab.press(" ", 32, " ")
    assert tab.evaluate(ORDER) == ["sex", "age"]
    assert tab.evaluate(f"{SORT.format(1)}.parentNode.ariaSort") == "descending"


def test_what_is_missing_is_sorted_last_in_either_direction(tab: Tab) -> None:
    gains = """(() => {
      const table = document.querySelector("article table");
      const button = [...table.tHead.rows[0].cells].at(-1).querySelector("button");
      button.click();
      return [...table.tBodies[0].rows].map(row => row.cells[row.cells.length - 1].dataset.value);
    })()"""
    for reverse in (False, True):
        *numbers, last = tab.evaluate(gains)
        assert last == ""
        assert len(numbers) >= 2
        assert numbers == sorted(numbers, key=float, reverse=reverse)


def test_every_table_of_several_rows_can_be_sorted(tab: Tab) -> None:
    unsorted = tab.evaluate(
        "[...document.querySelectorAll('table')].filter(t => t.tBodies[0].rows.length > 1 && "
        "t.tHead.querySelectorAll('button').length < t.tHead.rows[0].cells.length).length"
    )
    assert unsorted == 0


def test_focus_is_seen_on_all_that_takes_it_and_the_first_skips_the_contents(tab: Tab) -> None:
    tab.evaluate("(document.activeElement.blur(), scrollTo({top: 0, behavior: 'instant'}))")
    hidden = tab.evaluate(
        """[...document.querySelectorAll("a, button, summary, [tabindex]")]
        .filter(e => e.checkVisibility()).filter(e => {
          e.focus({focusVisible: true});
          const style = getComputedStyle(e), box = e.getBoundingClientRect();
          return document.activeElement !== e || style.outlineStyle === "none"
            || parseFloat(style.outlineWidth) < 1 || box.right <= 0 || box.width === 0;
        }).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert hidden == []
    assert tab.evaluate("document.querySelector('a').hash") == "#headline"
    assert tab.evaluate("document.querySelector('a').getBoundingClientRect().right") < 0


def test_every_picture_has_a_name_for_screen_readers(tab: Tab) -> None:
    tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    images = [
        node["name"].get("value")
        for node in nodes
        if not node.get("ignored") and node["role"].get("value") in ("image", "img")
    ]
    there = tab.evaluate("document.querySelectorAll('main img, main svg[role=img]').length")
    assert len(images) == there > 10
    assert all(images)


def test_points_tell_whose_they_are_and_their_values(tab: Tab, output: Path) -> None:
    rows = pd.read_csv(output / "desc-dclAge_predictions.tsv", sep="\t", na_values="n/a")
    first = rows.dropna(subset=["target"]).iloc[0]
    titles = tab.evaluate(
        "[...document.querySelectorAll('#target-Age figure:first-child svg title')]"
        ".map(t => t.textContent)"
    )
    assert len(titles) == rows["target"].notna().sum()
    assert titles[0].startswith(f"{first['participant_id']} ses-1 · true {first['target']:g}")


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 1280, 1920])
@pytest.mark.parametrize("which", ["page", "hostile", "large", "shared"])
def test_nothing_overflows(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int
) -> None:
    opened: Callable[[str], Tab] = request.getfixturevalue("opened")
    found = opened(which)
    found.resize(width)
    over = found.evaluate("[document.documentElement, document.body].map(e => e.scrollWidth)")
    assert max(over) <= found.evaluate("document.documentElement.clientWidth") == width


def test_a_shared_page_with_maps_is_whole(shared: Path, opened: Callable[[str], Tab]) -> None:
    found = opened("shared")
    assert found.troubles() == []
    assert found.requests() == [shared.as_uri()]
    sections = found.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)")
    assert set(sections) == set(SECTIONS)
    pictures = "[...document.querySelectorAll('img')].filter(i => {})"
    assert found.evaluate(f"{pictures.format('i.naturalWidth > 0')}.length") == 1 + 1 + 3
    assert found.evaluate(f"{pictures.format('!i.alt')}.length") == 0
    words = found.evaluate("document.body.innerText")
    for said in ("single brains, and the spread", "pictures of these scans", "own volumes"):
        assert re.search(f"Left out, as this output was made to be shared: .*{said}", words)


@pytest.fixture(scope="module")
def opened(browser: Browser, request: pytest.FixtureRequest) -> Callable[[str], Tab]:
    tabs: dict[str, Tab] = {}

    def get(name: str) -> Tab:
        if name not in tabs:
            tabs[name] = browser.open(request.getfixturevalue(name))
        return tabs[name]

    return get


TEXTS = """(() => {
  const parse = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const found = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest("script, title")) continue;
    const style = getComputedStyle(element);
    let under = element, behind;
    do {
      behind = parse(getComputedStyle(under).backgroundColor);
      under = under.parentElement;
    } while (under && behind[3] === 0);
    const ink = parse(element.closest("svg") ? style.fill : style.color);
    found.set(JSON.stringify([ink, behind]), node.data.trim().slice(0, 40));
  }
  return [...found].map(([colors, text]) => [...JSON.parse(colors), text]);
})()"""
ON_CELLS = {"#fefefe", "#010101"}
"""Numbers in a confusion matrix stand on its colors: see test_svg.py."""


def as_hex(color: list[float]) -> str:
    assert len(color) == 3, f"a color that is seen through: {color}"
    return "#" + "".join(f"{round(part):02x}" for part in color)


@pytest.mark.parametrize(
    "media",
    [
        {"prefers_color_scheme": "light"},
        {"prefers_color_scheme": "dark"},
        {"medium": "print", "prefers_color_scheme": "dark"},
    ],
    ids=["light", "dark", "print"],
)
def test_text_stands_out_from_what_is_behind_it(tab: Tab, media: dict[str, str]) -> None:
    tab.emulate(**media)
    texts = [(as_hex(ink), as_hex(behind), text) for ink, behind, text in tab.evaluate(TEXTS)]
    texts = [found for found in texts if found[0] not in ON_CELLS]
    assert len(texts) >= 3
    assert [found for found in texts if contrast(*found[:2]) < 4.5] == []
    dark = media["prefers_color_scheme"] == "dark" and "medium" not in media
    grounds = {contrast(behind, "#000000" if dark else "#ffffff") for _, behind, _ in texts}
    assert max(grounds) < 1.6


def test_print_is_whole_and_fits_the_paper(tab: Tab) -> None:
    tab.emulate("print")
    tab.resize(688)  # A4 without margins
    seen = tab.evaluate(
        """({
          over: document.documentElement.scrollWidth - innerWidth,
          cut: [...document.querySelectorAll("main .scroll")].filter(box =>
            box.scrollHeight > box.clientHeight + 1 && getComputedStyle(box).overflowY !== "visible"
          ).length,
          folded: [...document.querySelectorAll("details table")].filter(t => !t.offsetHeight).length,
          torn: [...document.querySelectorAll("figure, tr, .scroll:not(.tall) > table")].filter(e =>
            getComputedStyle(e).breakInside !== "avoid").length,
        })"""
    )
    assert seen == {"over": 0, "cut": 0, "folded": 0, "torn": 0}
    tab.emulate()
    printed = tab.pdf()
    assert printed.startswith(b"%PDF")
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 25


def test_nothing_moves_for_those_who_ask_for_it(tab: Tab) -> None:
    behavior = "getComputedStyle(document.documentElement).scrollBehavior"
    tab.emulate(prefers_reduced_motion="no-preference")
    assert tab.evaluate(behavior) == "smooth"
    tab.emulate(prefers_reduced_motion="reduce")
    assert tab.evaluate(behavior) == "auto"


def test_figures_keep_a_light_ground_where_colors_are_forced(tab: Tab) -> None:
    tab.emulate(forced_colors="active", prefers_color_scheme="dark")
    seen = tab.evaluate(
        "(s => [s.backgroundColor, getComputedStyle(document.querySelector('figure.chart svg text'))"
        ".fill])(getComputedStyle(document.querySelector('figure.chart svg')))"
    )
    assert seen == ["rgb(255, 255, 255)", "rgb(31, 35, 40)"]


def test_without_scripts_everything_can_be_read(browser: Browser, page: Path, tab: Tab) -> None:
    plain = browser.open(page, scripts=False)
    assert plain.evaluate("document.querySelectorAll('th button').length") == 0
    text = "[...document.querySelectorAll('main > section')].map(s => s.innerText.length > 20)"
    assert all(plain.evaluate(text))
    rows = "[...document.querySelectorAll('main tr')].length"
    assert plain.evaluate(rows) == tab.evaluate(rows) > 20
    plain.close()


# Hostile names.


@pytest.mark.parametrize("policy", [True, False], ids=["with policy", "by escaping alone"])
def test_hostile_names_run_nothing_and_are_shown(
    browser: Browser, hostile: Path, policy: bool
) -> None:
    found = browser.open(hostile, policy=policy)
    assert found.troubles() == []
    assert found.requests() == [hostile.as_uri()]
    assert found.evaluate("window.ran") is None
    assert found.evaluate("document.title") == " ".join(
        ("Demo study" + escape_control(" ".join(PAYLOADS))).split()
    )
    assert found.evaluate("[document.scripts.length, document.styleSheets.length]") == [1, 1]
    strange = "iframe, form, input, base, link, object, embed, animate, foreignObject, svg script"
    assert found.evaluate(f"document.querySelectorAll('{strange}').length") == 0
    attributes = found.evaluate(
        "[...new Set([...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()))]"
    )
    assert not [name for name in attributes if name.startswith("on") or name == "style"]
    links = found.evaluate("[...document.links].map(link => link.getAttribute('href')[0])")
    assert set(links) == {"#"}
    assert found.evaluate("getComputedStyle(document.body).display") == "block"
    for place in ("document.body", "document.querySelector('#participants')"):
        text = found.evaluate(f"{place}.textContent")
        assert [p for p in PAYLOADS if escape_control(p) not in text] == []
        assert not set(text) & set("\u202e\u202c\u2066\u2069\u200f\x1b\x07\x85\u2028")
    found.close()


# Ten thousand participants.


def test_ten_thousand_participants_load_and_scroll(browser: Browser, large: Path) -> None:
    assert large.stat().st_size < 15_000_000
    found = browser.open(large)
    measured = found.evaluate(
        """(async () => {
          const load = performance.getEntriesByType("navigation")[0].loadEventEnd;
          const nodes = document.querySelectorAll("*").length;
          const frames = [];
          const high = document.documentElement.scrollHeight;
          await new Promise(done => {
            let at = 0, before = performance.now();
            const step = now => {
              frames.push(now - before);
              before = now;
              at += high / 60;
              scrollTo({top: at, behavior: "instant"});
              if (at < high) requestAnimationFrame(step); else done();
            };
            requestAnimationFrame(step);
          });
          frames.sort((a, b) => a - b);
          return {load, nodes, frame: frames[frames.length >> 1], longest: frames.at(-1)};
        })()"""
    )
    assert measured["load"] < 5000, measured
    assert measured["nodes"] < 15_000, measured
    assert measured["frame"] < 100, measured
    assert found.troubles() == []
    words = found.evaluate("document.body.innerText.replace(/\\s+/g, ' ')")
    assert "10,000 rows were listed" in words
    assert "drawn as one image" in words
    assert re.search(r"The first 20, oddest first; [\d,]+ more stand out", words)
    assert re.search(r"The first 200 rows, .* more in logs/inputs\.tsv", words)
    found.close()

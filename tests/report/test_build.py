from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.outliers import rank_outliers
from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.evaluation.retrieval import retrieve_participants
from nidl_dcl.io.formats import write_json, write_npy, write_text, write_tsv
from nidl_dcl.report.build import write_report
from nidl_dcl.report.plots import draw_slices
from nidl_dcl.report.training import _collapse

HOSTILE = "<script>document.title='PWNED'</script><img src=x onerror=\"document.title='PWNED'\">"
SECTIONS = (
    *("headline", "participants", "preprocessing", "brains", "views", "training", "embeddings"),
    "retrieval",
    *(
        "outliers",
        "predictions",
        "holdout",
        "occlusion",
        "external",
        "exposure",
        "site",
        "limits",
        "methods",
        "citation",
        "settings",
        "versions",
    ),
)


def blob(rng: np.random.Generator, shape: tuple[int, int, int] = (20, 24, 20)) -> np.ndarray:
    """Return an ellipsoid with a dark middle, bright rim and noise: what stands for a brain here."""
    grid = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in shape], indexing="ij")
    radius = np.sqrt(sum(g**2 for g in grid))
    inside = np.clip((1 - radius) * 6, 0, 1) * (0.4 + 0.6 * radius)
    return (inside + 0.03 * rng.standard_normal(shape) * (inside > 0)).astype(np.float32)


def write_output(
    folder: Path,
    *,
    n: int = 48,
    signal: float = 2.0,
    name: str = "Demo study",
    hostile: str = "",
    volumes: np.ndarray | None = None,
) -> Path:
    """Write what a finished study leaves, with invented numbers."""
    rng = np.random.default_rng(0)
    ids = [f"sub-{i:03d}{hostile}" for i in range(n)]
    age = rng.uniform(20, 80, n).round(1)
    sex = np.where(rng.random(n) < 0.5, "F", "M")
    features = rng.standard_normal((n, 12))
    features[:, 0] += signal * (age - 50) / 17
    features[:, 1] += signal * (sex == "F")
    sites = np.where(rng.random(n) < 0.4, "north", "south")
    images = pd.DataFrame({"participant_id": ids, "session_id": "ses-1", "run": pd.NA})

    inputs = images.drop(columns="run").assign(
        path=[f"{i}/ses-1/anat/{i}_ses-1_T1w.nii.gz" for i in ids],
        status="ok",
        code="ok",
        message="",
    )
    inputs.loc[[1, 2], ["status", "code", "message"]] = (
        *("warn", "spacing"),
        f"Slices are 6 mm thick, voxels 4 mm.{hostile}",
    )
    for who in ("sub-cut", "sub-short"):
        path, message = f"{who}/anat/{who}_T1w.nii.gz", "The file is shorter than its header says."
        inputs.loc[len(inputs)] = [who, pd.NA, path, "skip", "truncated", message]
    message = "No image of this participant was found."
    inputs.loc[len(inputs)] = ["sub-lost", pd.NA, pd.NA, "skip", "no_image", message]
    write_tsv(folder / "logs/inputs.tsv", inputs)
    write_json(
        folder / "logs/run.json",
        {
            "command": ["nidl-dcl", "study", "BIDS", f"OUT {hostile}", "--target", "age", "sex"],
            "config": {
                "pretrain": {"temperature": 0.1, "batch_size": 32, "learning_rate": 3e-4},
                "spacing": [4.0, 4.0, 4.0],
                "shape": [40, 48, 40],
                "target": ["age", "sex"],
                "random_seed": 0,
                f"option{hostile}": hostile or None,
            },
            "versions": {"nidl_dcl": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
            "stages": [
                {
                    "name": stage,
                    "started": f"2026-11-24T10:{minute:02d}:00",
                    "seconds": 61.25,
                    "resumed_from_step": 120 if stage == "pretrain" else None,
                }
                for minute, stage in enumerate(("index", "pretrain", "embed", "predict"))
            ],
            "exit_status": 0,
        },
    )
    write_json(folder / "dataset_description.json", {"Name": name + hostile})
    write_text(folder / "code/config.yaml", "target: [age, sex]\n")

    epochs = np.arange(20)
    curves = pd.DataFrame(
        {
            "epoch": epochs,
            "step": (epochs + 1) * 4,
            "loss/train": 2.9 * np.exp(-epochs / 6) + 1.2,
            "loss/val": 2.8 * np.exp(-epochs / 6) + 1.4,
            "learning_rate": 3e-4,
            "alignment": 0.6 * np.exp(-epochs / 8) + 0.2,
            "uniformity": -3.2 + 2 * np.exp(-epochs / 5),
            "effective_rank": 12 - 8 * np.exp(-epochs / 5),
            "collapse_loss": np.log(62),
        }
    )
    write_text(folder / "logs/metrics.csv", curves.to_csv(index=False))

    write_npy(folder / "desc-dcl_embeddings.npy", features.astype(np.float32))
    write_tsv(
        folder / "desc-dcl_embeddings.tsv",
        images.assign(source="bids:raw:x", split=np.where(np.arange(n) % 8, "train", "val"), row=1),
    )
    points = images.drop(columns="run").assign(
        x=features[:, 0], y=features[:, 1], age=age, sex=sex, same="one"
    )
    points[f"group{hostile}"] = rng.choice(["patient", f"_control{hostile}"], n)
    points.loc[[4, 5], "age"] = np.nan
    points.loc[6, "sex"] = pd.NA
    write_tsv(folder / "figures/embedding_2d.tsv", points)
    write_json(
        folder / "figures/embedding_2d.json", {"method": "PCA", "explained_variance": [0.31, 0.12]}
    )
    if volumes is None:
        volumes = np.stack([[blob(rng) for _ in range(3)] for _ in range(2)])
    write_npy(folder / "figures/views.npy", volumes.astype(np.float32))
    write_tsv(
        folder / "figures/views.tsv",
        pd.DataFrame(
            {"participant_id": ids[: len(volumes)], "path": inputs["path"][: len(volumes)]}
        ),
    )
    write_json(folder / "figures/views.json", {"spacing": [4.0, 4.0, 4.0]})

    write_image_summaries(folder, images, features, volumes)
    for target, values in (("age", age), ("sex", sex)):
        result = predict_phenotype(
            features,
            [None, *values[1:]],
            ids,
            target=target,
            baselines={
                "untrained": features[:, 2:5] + 0.2 * features[:, :3],
                "voxels": features + rng.standard_normal(features.shape),
            },
            site=sites,
            ids=images.assign(seen=np.arange(n) % 8 > 0),
            n_repeats=2,
            n_permutations=20,
        )
        stem = f"desc-dcl{target.capitalize()}"
        write_json(folder / f"{stem}_metrics.json", result.metrics)
        write_tsv(folder / f"{stem}_predictions.tsv", result.predictions)
        columns = {**result.columns}
        if target == "age":
            columns["target"] = {**columns["target"], "Units": "year"}
        write_json(folder / f"{stem}_predictions.json", columns)
    return folder


def write_image_summaries(
    folder: Path, images: pd.DataFrame, features: np.ndarray, volumes: np.ndarray
) -> None:
    """Write what the stages leave of the average brain, of outlying scans and of retrieval."""
    rng = np.random.default_rng(1)
    n = len(images)
    ids = images.assign(source=[f"bids:raw:{who}" for who in images["participant_id"]])
    distance = pd.Series(rng.uniform(0.1, 0.2, n))
    distance[5] = 0.9
    rank = distance.rank(ascending=False).astype(int)
    write_tsv(folder / "figures/average.tsv", ids.assign(rank=rank, distance=distance))
    write_npy(folder / "figures/average.npy", np.stack([volumes[0, 0], volumes[0, 1]]))
    about = {"n_images": n, "n_participants": n, "spacing": [4.0, 4.0, 4.0], "block_mm": [12] * 3}
    about |= {"mean_inside": 0.61, "sd_inside": 0.13, "distance_median": distance.median()}
    write_json(folder / "figures/average.json", about)
    measures = {"embedding_distance": rng.uniform(0.3, 0.4, n), "noise": rng.uniform(1, 1.1, n)}
    measures["noise"][7] = 3.0
    ranked = rank_outliers(ids.assign(**measures, brain_distance=distance))
    write_tsv(folder / "figures/outliers.tsv", ranked)
    given = {"spacing": [4.0] * 3, "at": [10, 12, 10], "window": (0.0, 1.0), "width": 2.0}
    for name in ("odd_1", "odd_2", "outlier_1", "outlier_2"):
        (folder / f"figures/{name}.png").write_bytes(draw_slices(volumes[0, 0], **given))
    table, words = retrieve_participants(
        {"embeddings": [features], "untrained": [features[:, ::-1], features[:, 1:]]},
        [f"sub-{i // 2}" for i in range(n)],
        ["1", "2"] * (n // 2),
        [""] * n,
    )
    write_tsv(folder / "figures/retrieval.tsv", table)
    write_json(folder / "figures/retrieval.json", words)


class Page(HTMLParser):
    """Elements, tables and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[dict[str, str]]]] = {}
        self.cell: dict[str, str] | None = None
        self.label = ""
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if "aria-label" in found and tag == "div":
            self.label = str(found["aria-label"])
        elif tag == "table":
            self.tables[self.label] = []
        elif tag == "tr":
            self.tables[self.label].append([])
        elif tag in ("td", "th"):
            self.cell = {"text": "", "value": found.get("data-value") or ""}
            self.tables[self.label][-1].append(self.cell)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("style", "script"):
            return
        self.words.append(data)
        if self.cell is not None:
            self.cell["text"] += data

    def attributes(self, name: str) -> list[str]:
        return [str(found[name]) for _, found in self.elements if name in found]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_output(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return Page(write_report(study))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_output(tmp_path_factory.mktemp("hostile"), n=24, hostile=HOSTILE)
    write_text(folder / "logs/CITATION.md", f"Cite {HOSTILE}\nand \x1b[31mthis.\n")
    return write_report(folder)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_stands_on_the_page_and_can_be_linked_to(page: Page, section: str) -> None:
    assert page.attributes("id").count(section) == 1
    assert f"#{section}" in page.attributes("href")


def test_a_complete_output_leaves_nothing_unread_and_no_section_empty(page: Page) -> None:
    assert "What could not be read" not in page.text
    assert "nothing" not in page.attributes("class")


def test_the_page_loads_nothing(page: Page) -> None:
    loads = [
        str(found[name])
        for tag, found in page.elements
        for name in ("src", "href", "srcset", "data", "action", "poster")
        if name in found
    ]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in loads)
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base"}
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)


def test_every_link_and_reference_of_the_page_has_one_target(page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    targets = [link[1:] for link in page.attributes("href") if link.startswith("#")]
    targets += re.findall(r"url\(#([^)]+)\)", page.source)
    targets += " ".join(page.attributes("aria-labelledby")).split()
    assert set(targets) <= set(ids)


def test_the_policy_allows_only_the_pages_own_style_and_script(page: Page) -> None:
    (policy,) = [
        str(found["content"])
        for tag, found in page.elements
        if found.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "img-src data:" in policy
    assert "unsafe" not in policy
    assert "style" not in {name for _, found in page.elements for name in found}
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_picture_says_in_words_what_it_shows(page: Page) -> None:
    pictures = [
        found.get("alt") or found.get("aria-label")
        for tag, found in page.elements
        if tag in ("img", "svg")
    ]
    assert len(pictures) == 2 + 2 + 6 + 4 + 3 + 2 + 6 + 4
    assert all(pictures)


def test_scores_on_the_page_are_those_of_the_metrics_files(study: Path, page: Page) -> None:
    head, *rows = page.tables["Scores of each target"]
    columns = [cell["text"] for cell in head]
    assert [row[0]["text"] for row in rows] == ["age", "sex"]
    for row in rows:
        shown = dict(zip(columns, row, strict=True))
        metrics = json.loads((study / f"desc-dcl{row[0]['text'].title()}_metrics.json").read_text())
        metric = metrics["headline"]["metric"]
        score = metrics["scores"][metric]
        assert float(shown["embeddings"]["value"]) == score["mean"]
        assert float(shown["first repeat"]["value"]) == metrics["permutation"]["observed"]
        assert float(shown["chance"]["value"]) == metrics["permutation"]["chance"]
        if metrics["permutation"]["p"] == 1 / 21:
            assert shown["p"]["text"] == "≤ 0.048"
        assert float(shown["p"]["value"]) == metrics["permutation"]["p"]
        assert int(float(shown["n"]["value"])) == metrics["n_participants"]
        for name, baseline in metrics["baselines"].items():
            assert float(shown[name]["value"]) == baseline[metric]["mean"]
        ends = [float(x) for x in re.findall(r"\d+\.\d+", shown["embeddings"]["text"])]
        assert ends == pytest.approx([score["mean"], *score["ci95"]], rel=0.01)


def test_a_figures_table_holds_the_numbers_of_the_metrics_file(study: Path, page: Page) -> None:
    metrics = json.loads((study / "desc-dclAge_metrics.json").read_text())
    drawn = pd.read_csv(study / "figures/desc-dclAge_baselines.tsv", sep="\t", index_col="features")
    np.testing.assert_allclose(drawn.pop("chance"), metrics["permutation"]["chance"], rtol=1e-9)
    assert list(drawn.index) == ["embeddings", "dummy", "untrained", "voxels", "site"]
    for name, scores in {"embeddings": metrics["scores"], **metrics["baselines"]}.items():
        expected = [scores["mae"]["mean"], *scores["mae"]["ci95"]]
        np.testing.assert_allclose(drawn.loc[name], expected, rtol=1e-9)


def test_the_learning_curve_is_drawn_from_the_metrics_file(study: Path, page: Page) -> None:
    curve = json.loads((study / "desc-dclAge_metrics.json").read_text())["learning_curve"]
    drawn = pd.read_csv(study / "figures/desc-dclAge_learningcurve.tsv", sep="\t")
    assert list(drawn["features"].unique()) == [
        "embeddings",
        "dummy",
        "untrained",
        "voxels",
        "site",
    ]
    for name, points in curve["scores"].items():
        rows = drawn[drawn["features"] == name]
        np.testing.assert_allclose(rows["n_participants"], curve["n_participants"])
        np.testing.assert_allclose(rows["mean"], [point["mean"] for point in points])
        np.testing.assert_allclose(rows[["low", "high"]], [point["ci95"] for point in points])
    assert curve["sentence"] in page.text


@pytest.mark.parametrize(
    "curve",
    [
        None,
        [],
        {"scores": {"embeddings": [{"mean": 3.0}]}},
        {"n_participants": [40.0], "scores": {"embeddings": [{"mean": 3.0, "ci95": None}]}},
        {"n_participants": [20, None], "scores": {"embeddings": [{"mean": None}, 5, 6]}},
    ],
)
def test_a_target_without_a_whole_learning_curve_has_its_other_pictures(
    tmp_path: Path, curve: object
) -> None:
    scores = {"mae": {"mean": 3.0, "ci95": [2.0, 4.0]}}
    found = {"target": "age", "task": "regression", "scores": scores, "learning_curve": curve}
    write_json(tmp_path / "desc-dclAge_metrics.json", found)
    write_report(tmp_path)
    assert [p.name for p in (tmp_path / "figures").glob("*.svg")] == ["desc-dclAge_baselines.svg"]


def test_the_confusion_table_counts_the_predictions(study: Path, page: Page) -> None:
    rows = pd.read_csv(study / "desc-dclSex_predictions.tsv", sep="\t", keep_default_na=False)
    rows = rows[rows["status"] == "ok"]
    table = pd.read_csv(study / "figures/desc-dclSex_confusion.tsv", sep="\t", index_col="true")
    for true, predicted in ((t, p) for t in "FM" for p in "FM"):
        expected = ((rows["target"] == true) & (rows["prediction"] == predicted)).sum()
        assert table.loc[true, predicted] == expected


def test_images_are_counted_by_code_and_the_odd_ones_are_named(study: Path, page: Page) -> None:
    with (study / "logs/inputs.tsv").open() as stream:
        inputs = list(csv.DictReader(stream, delimiter="\t"))
    shown = {
        row[1]["text"]: int(float(row[2]["value"]))
        for row in page.tables["Rows by status and code"][1:]
    }
    assert shown == dict(Counter(row["code"] for row in inputs))
    assert f"{len(inputs)} rows were listed" in page.text
    odd = page.tables["Images skipped or warned about"][1:]
    assert [row[0]["text"] for row in odd] == (
        ["sub-cut", "sub-short", "sub-lost", "sub-001", "sub-002"]
    )


def test_each_picture_is_also_a_file_with_its_numbers_beside_it(study: Path, page: Page) -> None:
    svgs = sorted(path.name for path in (study / "figures").glob("*.svg"))
    assert svgs == sorted(
        f"desc-dcl{name}.svg"
        for name in (
            *("_loss", "_alignment", "_uniformity", "_effectiverank"),
            *("Age_embedding", "Sex_embedding", "Group_embedding"),
            *("Age_truth", "Age_baselines", "Sex_confusion", "Sex_baselines"),
            *("Age_learningcurve", "Sex_learningcurve", "Age_errors"),
            *("Sex_roc", "Sex_precisionrecall", "Sex_reliability"),
        )
    )
    assert len(list((study / "figures").glob("*.png"))) == 2 + 2 + 6 + 2
    for source in re.findall(r"<code>((?:figures/)?desc-[^<]+\.tsv)</code>", page.source):
        assert (study / source).is_file()
    shown = {base64.b64decode(str(found["src"])[22:]) for t, found in page.elements if t == "img"}
    assert shown == {path.read_bytes() for path in (study / "figures").glob("*.png")}


def test_each_view_is_drawn_from_its_volume_alone(study: Path, page: Page, tmp_path: Path) -> None:
    rest = shutil.ignore_patterns("logs", "desc-*.json", "desc-*.svg", "embedding_2d.*")
    shutil.copytree(study, tmp_path, dirs_exist_ok=True, ignore=rest)
    before = {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*.png")}
    volumes = np.load(study / "figures/views.npy")
    volumes[1, 2] = volumes[1, 2, ::-1] * 0.5
    write_npy(tmp_path / "figures/views.npy", volumes)
    page = Page(write_report(tmp_path))
    after = {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*.png")}
    assert [name for name in after if after[name] != before[name]] == ["desc-dcl2_view2.png"]
    alts = [str(found["alt"]).partition(":")[0] for t, found in page.elements if t == "img"]
    rows = [
        [f"{who}, {what}" for what in ("original", "view 1", "view 2")]
        for who in ("sub-000", "sub-001")
    ]
    at = alts.index(rows[0][0])
    assert alts[at : at + 6] == [*rows[0], *rows[1]]


def test_stages_options_and_versions_are_those_of_the_record(study: Path, page: Page) -> None:
    run = json.loads((study / "logs/run.json").read_text())

    def cells(label: str) -> list[list[str]]:
        return [[cell["text"] for cell in row] for row in page.tables[label][1:]]

    assert cells("Versions") == [list(row) for row in run["versions"].items()]
    assert [row[0] for row in cells("Stages")] == [stage["name"] for stage in run["stages"]]
    assert [row[2]["value"] for row in page.tables["Stages"][1:]] == ["61.25"] * 4
    options = dict(map(tuple, cells("Options")))
    assert options["pretrain.temperature"] == "0.1"
    assert options["spacing"] == "4, 4, 4"
    assert "nidl-dcl study BIDS" in page.text


def test_counts_of_images_are_those_of_the_tables(study: Path, page: Page) -> None:
    inputs = pd.read_csv(study / "logs/inputs.tsv", sep="\t", keep_default_na=False)
    images = pd.read_csv(study / "desc-dcl_embeddings.tsv", sep="\t")
    used = inputs[inputs["status"] != "skip"]
    rest = inputs["participant_id"].nunique() - used["participant_id"].nunique()
    assert f"participants used {used['participant_id'].nunique()} " in page.text
    assert f"images used {len(used)} " in page.text
    assert f"skipped {len(inputs) - len(used)} " in page.text
    assert f"{rest} of {inputs['participant_id'].nunique()} participants were not" in page.text
    shown = {row[0]["text"]: row[1:] for row in page.tables["Images by split"][1:]}
    assert list(shown) == ["train", "val"]
    for split, (people, count) in shown.items():
        rows = images[images["split"] == split]
        assert float(people["value"]) == rows["participant_id"].nunique()
        assert float(count["value"]) == len(rows)


def test_the_report_has_nothing_to_compute_with() -> None:
    code = "import sys, nidl_dcl.report.build; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "nidl_dcl.report.plots" in loaded
    assert not loaded & {"torch", "sklearn", "lightning", "monai"}
    computing = {name for name in loaded if name.startswith("nidl_dcl.evaluation.")}
    assert computing <= {"nidl_dcl.evaluation.metrics"}


def test_the_same_files_give_the_same_page(study: Path, page: Page) -> None:
    assert write_report(study).read_text("utf-8") == page.source


@pytest.mark.parametrize(
    "gains",
    [{"age": (True, 2.0), "iq": (False, 2.0)}, {"age": (False, 2.0), "iq": (False, -0.5)}],
    ids=["better and even", "even and worse"],
)
def test_the_worst_comparison_is_the_first_sentence(
    gains: dict[str, tuple[bool, float]], tmp_path: Path
) -> None:
    metrics = {
        "task": "regression",
        "scores": {"mae": {"mean": 8.0, "ci95": [7.0, 9.0]}},
        "headline": {"metric": "mae", "best_baseline": "voxels"},
    }
    for target, (beats, high) in gains.items():
        said = {"beats": beats, "sentence": f"{target} beats: {beats}."}
        gain = {"mean": high - 1, "ci95": [high - 2, high]}
        headline = {**metrics["headline"], **said, "gain": gain}
        stem = f"desc-dcl{target.title()}"
        write_json(
            tmp_path / f"{stem}_metrics.json", {**metrics, "target": target, "headline": headline}
        )
    source = write_report(tmp_path).read_text()
    assert re.search(r'<p class="lead">iq beats: False\.</p>', source)


NEARLY_EMPTY = {
    "nothing": {},
    "only the run": {"logs/run.json": '{"command": "nidl-dcl pretrain", "exit_status": null}'},
    "empty objects": {"logs/run.json": "{}", "desc-dclAge_metrics.json": '{"target": "age"}'},
    "headers only": {
        "logs/inputs.tsv": "participant_id\tstatus\n",
        "logs/metrics.csv": "epoch,loss/train\n",
        "figures/embedding_2d.tsv": "participant_id\tx\ty\n",
        "desc-dclAge_metrics.json": '{"target": "age", "task": "regression", "scores": {}}',
        "desc-dclAge_predictions.tsv": "participant_id\ttarget\tprediction\n",
    },
    "one row": {
        "logs/inputs.tsv": "participant_id\tpath\tstatus\tcode\nsub-1\tn/a\tskip\tno_image\n",
        "logs/metrics.csv": "epoch,loss/train\n0,3.5\n",
        "figures/embedding_2d.tsv": "participant_id\tx\ty\tage\nsub-1\t0\t1\t30\n",
    },
    "nulls": {
        "logs/run.json": '{"command": null, "config": null, "stages": null, "versions": null}',
        "desc-dclSex_metrics.json": (
            '{"target": "sex", "task": "classification", "scores": {"roc_auc": {"mean": null, '
            '"ci95": null}}, "permutation": null, "baselines": null, "n_dropped": null, '
            '"exposure": null, "site": null, "headline": null, "cv": null}'
        ),
    },
}


@pytest.mark.parametrize("files", NEARLY_EMPTY.values(), ids=NEARLY_EMPTY)
def test_what_is_missing_is_said_in_a_line(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        write_text(tmp_path / name, text)
    page = Page(write_report(tmp_path))
    assert set(SECTIONS) <= set(page.attributes("id"))
    assert "nothing" in page.attributes("class")
    assert "What could not be read" not in page.text


BROKEN = {
    "logs/run.json": "{",
    "logs/inputs.tsv": "a\tb\n1\t2\t3\t4\n5\n",
    "logs/metrics.csv": 'a,b\n"1,2\n',
    "figures/embedding_2d.json": "[1]",
    "figures/views.npy": "no array",
    "desc-dcl_embeddings.npy": "",
    "desc-dclAge_metrics.json": '"text"',
}


def test_a_broken_file_is_named_and_the_rest_is_shown(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("figures"))
    for name, text in BROKEN.items():
        write_text(tmp_path / name, text)
    page = Page(write_report(tmp_path))
    problems = page.text.partition("What could not be read")[2]
    assert [name for name in BROKEN if name not in problems] == []
    assert page.tables["Scores of each target"][1][0]["text"] == "sex"


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        write_report(tmp_path / "absent")


def test_targets_of_another_model_stay_away(tmp_path: Path) -> None:
    for stem, target in (("dclAge", "age"), ("dclBigAge", "age"), ("otherAge", "age")):
        write_json(tmp_path / f"desc-{stem}_metrics.json", {"target": target, "scores": {}})
    assert len(Page(write_report(tmp_path)).tables["Scores of each target"]) == 2
    assert len(Page(write_report(tmp_path, model="dclBig")).tables["Scores of each target"]) == 2


def test_long_tables_are_cut_with_a_word_about_the_rest(tmp_path: Path) -> None:
    rows = [f"sub-{i:04d}\tsub-{i:04d}.nii\tskip\tcrc\tbroken" for i in range(1234)]
    head = "participant_id\tpath\tstatus\tcode\tmessage"
    write_text(tmp_path / "logs/inputs.tsv", "\n".join([head, *rows]) + "\n")
    page = Page(write_report(tmp_path))
    assert len(page.tables["Images skipped or warned about"]) == 201
    assert "1,034 more in logs/inputs.tsv" in page.text


def test_collapse_is_said_in_plain_words(tmp_path: Path) -> None:
    words = "The encoder has collapsed"
    for loss, rank, verdict in ((4.13, 1.1, words), (3.1, 1.4, "nearly"), (3.1, 9.5, "No sign")):
        assert verdict in _collapse(loss, 4.127, rank)["verdict"]
    curves = "epoch,loss/train,effective_rank,collapse_loss\n4,4.13,1.1,4.127\n"
    write_text(tmp_path / "logs/metrics.csv", curves)
    assert words in Page(write_report(tmp_path)).text


def test_ten_thousand_participants_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 10_000
    points = pd.DataFrame({"participant_id": [f"sub-{i}" for i in range(n)]})
    points = points.assign(x=rng.standard_normal(n), y=rng.standard_normal(n), age=rng.random(n))
    write_tsv(tmp_path / "figures/embedding_2d.tsv", points)
    assert write_report(tmp_path).stat().st_size < 1_000_000


def test_hostile_names_run_nothing(hostile: Path) -> None:
    page = Page(hostile)
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["script"] == 1
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert all(
        str(found["src"]).startswith("data:") for tag, found in page.elements if tag == "img"
    )
    assert html.escape(HOSTILE, quote=False)[:20] in page.source
    assert "\x1b" not in page.source
    assert r"\x1b[31mthis." in page.text


def test_hostile_names_make_plain_file_names(hostile: Path) -> None:
    names = [path.name for path in (hostile.parent / "figures").iterdir()]
    assert len(names) > 20
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.(svg|png|tsv|json|npy)", name) for name in names)

"""Every number of the page against the file that it comes from, section by section."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report.test_build import HOSTILE, Page, write_output

from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.formats import write_json, write_npy, write_text, write_tsv
from nidl_dcl.report.build import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output with sites, confounds, copies of people and people held out."""
    folder = write_output(tmp_path_factory.mktemp("study"))
    rng = np.random.default_rng(2)
    n = 60
    iq = rng.normal(100, 15, n)
    features = rng.standard_normal((n, 6))
    features[:, 0] += iq / 15
    persons = [f"sub-{i:03d}" for i in range(n)]
    persons[41], iq[41] = persons[40], iq[40]
    result = predict_phenotype(
        features,
        iq,
        persons,  # the groups, too
        target="iq",
        baselines={"voxels": rng.standard_normal((n, 4))},
        site=pd.Series(rng.choice(["north", "south", "west"], n), name="hospital"),
        confounds=pd.DataFrame({"age": rng.uniform(20, 80, n)}),
        held_out=np.arange(n) >= 48,
        ids=pd.DataFrame(
            {
                "participant_id": [f"sub-{i:03d}" for i in range(n)],
                "person_id": persons,
                "seen": np.isin(np.arange(n), range(9, 48)),
            }
        ),
        n_repeats=2,
        n_permutations=20,
    )
    metrics = result.metrics
    metrics["holdout"]["times_scored"] = 3
    write_json(folder / "desc-dclIq_metrics.json", metrics)
    write_tsv(folder / "desc-dclIq_predictions.tsv", result.predictions)
    write_json(folder / "desc-dclIq_predictions.json", result.columns)
    write_json(
        folder / "desc-dclIq_externalmetrics.json",
        {
            "target": "iq",
            "n_participants": 31,
            "headline": {
                "metric": "mae",
                "external": {"mean": 9.25, "ci95": [7.5, 11.25]},
                "internal": {"mean": 8.125, "ci95": [7.0, 9.5]},
                "sentence": "In 31 people of this cohort the readout has 9.25.",
            },
            "internal": {"n_participants": 400},
            "baselines": {"dummy": {"mae": {"mean": 12.5, "ci95": [10.0, 15.0]}}},
            "calibration": {"slope": {"mean": 0.75}, "intercept": {"mean": 22.5}},
            "overlap": {"sentence": "None of the 31 participants is in its training."},
            "exposure": {"sentence": "The encoder saw none of the 31."},
            "shift": {"sentences": ["People here are older."]},
        },
    )
    return folder


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return Page(write_report(study))


def rows_of(page: Page, label: str) -> list[dict[str, dict[str, str]]]:
    """Return the rows of a table, each a mapping of its column to its cell."""
    head, *rows = page.tables[label]
    return [dict(zip([cell["text"] for cell in head], row, strict=True)) for row in rows]


def number(cell: dict[str, str]) -> float | None:
    """Return the value of a cell, None where the page shows none."""
    return float(cell["value"]) if cell["value"] else None


def ends(cell: dict[str, str]) -> list[float]:
    """Return the numbers that stand in a cell: a score, then its interval."""
    text = cell["text"].replace("−", "-").replace(",", " ")
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)]


def metrics_of(study: Path, target: str) -> dict[str, Any]:
    return dict(json.loads((study / f"desc-dcl{target.title()}_metrics.json").read_text()))


TARGETS = ("age", "sex", "iq")


@pytest.mark.parametrize("target", TARGETS)
def test_all_scores_and_gains_are_those_of_the_metrics_file(
    study: Path, page: Page, target: str
) -> None:
    metrics = metrics_of(study, target)
    rows = page.tables[f"All scores of {target}"][1:]
    shown = {row[0]["text"]: row[1:] for row in rows}
    assert list(shown) == ["embeddings", *metrics["baselines"]]
    for name, scores in {"embeddings": metrics["scores"], **metrics["baselines"]}.items():
        cells = shown[name][:-1]
        assert [number(c) for c in cells] == [scores[m]["mean"] for m in metrics["scores"]]
        for cell, metric in zip(cells, metrics["scores"], strict=True):
            if scores[metric]["ci95"] is not None:
                expected = [scores[metric]["mean"], *scores[metric]["ci95"]]
                assert ends(cell) == pytest.approx(expected, rel=0.02, abs=0.006)
    for name, gain in metrics["headline"]["gains"].items():
        assert number(shown[name][-1]) == gain["mean"]
    for said in ("headline", "learning_curve", "exposure"):
        assert metrics[said]["sentence"] in page.text


def test_the_confounds_are_a_baseline_and_their_sentence_is_told(study: Path, page: Page) -> None:
    metrics = metrics_of(study, "iq")
    (row,) = [r for r in rows_of(page, "Scores of each target") if r["target"]["text"] == "iq"]
    assert number(row["confounds"]) == metrics["baselines"]["confounds"]["mae"]["mean"]
    assert metrics["confounds"]["sentence"] in page.text


def test_people_who_are_one_by_their_images_are_told(study: Path, page: Page) -> None:
    assert metrics_of(study, "iq")["duplicates"]["sentence"] in page.text


def test_held_out_people_have_the_scores_of_the_metrics_file(study: Path, page: Page) -> None:
    last = metrics_of(study, "iq")["holdout"]
    (row,) = rows_of(page, "Held-out people")
    assert number(row["n"]) == last["n_participants"] == 12
    assert number(row["embeddings"]) == last["scores"]["mae"]["mean"]
    assert ends(row["embeddings"])[1:] == pytest.approx(last["scores"]["mae"]["ci95"], rel=0.02)
    for name, scores in last["baselines"].items():
        assert number(row[name]) == scores["mae"]["mean"]
    assert number(row["times scored"]) == 3
    assert last["sentence"] in page.text


def test_exposure_is_that_of_the_metrics_files(study: Path, page: Page) -> None:
    rows = {row["target"]["text"]: row for row in rows_of(page, "Exposure")}
    for target in TARGETS:
        exposure = metrics_of(study, target)["exposure"]
        for column, key in (("seen", "seen"), ("not seen", "not_seen"), ("unknown", "unknown")):
            assert number(rows[target][column]) == exposure[key]
        assert exposure["sentence"] in page.text


def test_the_site_is_decoded_as_the_metrics_file_says(study: Path, page: Page) -> None:
    site = metrics_of(study, "iq")["site"]
    before, after = rows_of(page, "Site audit")
    for row, audit in ((before, site), (after, site["harmonized"])):
        assert number(row["balanced accuracy for hospital"]) == audit["balanced_accuracy"]["mean"]
        assert number(row["chance"]) == audit["permutation"]["chance"]
        assert number(row["p"]) == audit["permutation"]["p"]
        assert audit["sentence"] in page.text
    sizes = {
        r["site"]["text"]: number(r["participants"]) for r in rows_of(page, "Participants per site")
    }
    assert sizes == site["sites"]


@pytest.mark.parametrize("target", TARGETS)
def test_each_site_has_its_scores(study: Path, page: Page, target: str) -> None:
    metrics = metrics_of(study, target)
    site, metric = metrics["site"], metrics["headline"]["metric"]
    *rows, mean = rows_of(page, f"Sites of {target}")
    left_out = site["leave_one_site_out"]
    assert [row["site"]["text"] for row in rows] == list(left_out["sites"])
    for row in rows:
        label = row["site"]["text"]
        assert number(row["n"]) == left_out["sites"][label]
        assert number(row["within the site"]) == site["within"][label][metric]
        for name, scores in left_out["scores"].items():
            assert number(row[f"left out: {name}"]) == scores[metric]["sites"][label]
    for name, scores in left_out["scores"].items():
        assert number(mean[f"left out: {name}"]) == scores[metric]["mean"]
    assert left_out["sentence"] in page.text


def test_external_scores_are_those_of_their_file(study: Path, page: Page) -> None:
    found = json.loads((study / "desc-dclIq_externalmetrics.json").read_text())
    (row,) = rows_of(page, "External validity")
    assert [number(cell) for cell in list(row.values())[2:]] == [
        *(31, 9.25, 400, 8.125, 12.5, 0.75, 22.5)
    ]
    for said in (found["headline"], found["overlap"], found["exposure"]):
        assert said["sentence"] in page.text
    assert found["shift"]["sentences"][0] in page.text


def test_the_images_farthest_from_the_mean_are_those_of_the_table(study: Path, page: Page) -> None:
    table = pd.read_csv(study / "figures/average.tsv", sep="\t").sort_values("rank")
    rows = rows_of(page, "Images farthest from the mean")
    assert [number(row["rank"]) for row in rows] == list(range(1, 11))
    assert [number(row["distance"]) for row in rows] == list(table["distance"][:10])
    shown = [row["source"]["text"] for row in rows]
    assert shown == list(table["source"][:10])
    assert shown[0] == "bids:raw:sub-005"
    assert "The mean of 48 prepared images of 48 participants" in page.text
    assert "the mean is 0.610 and the standard deviation 0.130" in page.text
    assert "in blocks of 12 × 12 × 12 mm" in page.text


def test_outlying_scans_are_those_of_the_table(study: Path, page: Page) -> None:
    table = pd.read_csv(study / "figures/outliers.tsv", sep="\t")
    flagged = table[table["flagged"] == "yes"]
    assert set(flagged["participant_id"]) == {"sub-005", "sub-007"}
    assert "2 of 48 images stand out" in page.text
    rows = rows_of(page, "Outlying scans")
    assert len(rows) == 20
    for row, (_, expected) in zip(rows, table.iterrows(), strict=False):
        assert row["image"]["text"].split()[0] == expected["participant_id"]
        assert number(row["worst z"]) == expected["worst_z"]
        assert number(row["noise z"]) == expected["noise_z"]
        assert number(row["embedding z"]) == expected["embedding_distance_z"]
        assert number(row["brain z"]) == expected["brain_distance_z"]
        reasons = expected["reasons"]
        assert row["reasons"]["text"] == (
            reasons if isinstance(reasons, str) else "within the usual range"
        )
    assert "2 images stand out" in page.text.partition("Limits")[2]


def test_retrieval_is_that_of_the_table(study: Path, page: Page) -> None:
    table = pd.read_csv(study / "figures/retrieval.tsv", sep="\t")
    rows = rows_of(page, "Same participant")
    assert [row["features"]["text"] for row in rows] == ["embeddings", "untrained"]
    for row, (_, expected) in zip(rows, table.iterrows(), strict=True):
        assert number(row["share found"]) == expected["share"]
        assert number(row["chance"]) == expected["chance"]
        assert number(row["images"]) == expected["n_images"]
        assert number(row["participants"]) == expected["n_participants"]
        assert number(row["candidates"]) == expected["n_candidates"]
    assert json.loads((study / "figures/retrieval.json").read_text())["sentence"] in page.text


def test_without_a_second_image_a_line_says_why(tmp_path: Path) -> None:
    words = {"unit": None, "sentence": "No participant has a second image."}
    write_json(tmp_path / "figures/retrieval.json", words)
    write_text(tmp_path / "figures/retrieval.tsv", "features\tn_images\tshare\n")
    page = Page(write_report(tmp_path))
    assert words["sentence"] in page.text
    assert "Same participant" not in page.tables


@pytest.mark.parametrize("name", ["loss", "alignment", "uniformity", "effectiverank"])
def test_a_training_curve_is_drawn_from_the_log(study: Path, page: Page, name: str) -> None:
    log = pd.read_csv(study / "logs/metrics.csv")
    drawn = pd.read_csv(study / f"figures/desc-dcl_{name}.tsv", sep="\t")
    column = "effective_rank" if name == "effectiverank" else name
    assert list(drawn["epoch"]) == list(log["epoch"])
    if name == "loss":
        np.testing.assert_allclose(drawn["training"], log["loss/train"])
        np.testing.assert_allclose(drawn["validation"], log["loss/val"])
        np.testing.assert_allclose(drawn["collapse"], log["collapse_loss"])
    else:
        np.testing.assert_allclose(drawn.iloc[:, 1], log[column])


def test_truth_is_drawn_from_the_predictions(study: Path, page: Page) -> None:
    table = pd.read_csv(study / "desc-dclIq_predictions.tsv", sep="\t")
    used = table[table["status"] == "ok"]
    drawn = pd.read_csv(study / "figures/desc-dclIq_truth.tsv", sep="\t")
    assert len(drawn) == 48
    assert list(drawn["participant_id"]) == list(used["participant_id"])
    np.testing.assert_allclose(drawn[["target", "prediction"]], used[["target", "prediction"]])


def test_every_caption_names_a_file_that_is_there(study: Path, page: Page) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.source, flags=re.DOTALL)
    assert len(captions) > 20
    for caption in captions:
        (name,) = re.findall(r"<code>(figures/[^<]+)</code>", caption)
        assert (study / name).is_file()


def test_the_methods_text_and_the_citations_come_from_the_files(
    study: Path, tmp_path: Path
) -> None:
    shutil.copytree(study, tmp_path, dirs_exist_ok=True)
    write_text(tmp_path / "logs/CITATION.md", "Cite this.\n")
    write_json(
        tmp_path / "models/desc-dcl/model.json",
        {
            "encoder": {"class": "nidl_dcl.models.encoders:StridedCNN"},
            "arguments": {"temperature": 0.25, "optimizer": "adamW", "weight_decay": 0.0005},
            "input_contract": {
                "spacing": [3.0, 3.0, 3.0],
                "shape": [50, 60, 50],
                "masked": False,
                "intensity": "robust",
                "origin": {"contrast": "T1w"},
            },
            "provenance": {"config": {"preset": "raw-t1w"}},
        },
    )
    page = Page(write_report(tmp_path))
    methods = page.text.partition("To paste and adapt")[2].partition("How to cite")[0]
    for words in (
        *("48 T1-weighted images of", "preset raw-t1w", "voxels of 3 × 3 × 3 mm", "whole head"),
        *("50 × 60 × 50 voxels", "rule: robust", "StridedCNN", "temperature 0.25", "20 epochs"),
        *("32 participants per batch", "optimizer adamW", "2 times 5 folds", "20 permutations"),
        *("Nadeau", "Johnson WE", "torch 2.13.0", "Decoupled contrastive learning"),
    ):
        assert words in methods
    assert "Johnson WE" in page.text.rpartition("Cite this.")[2]
    assert "Images were not masked to the brain" in page.text


@pytest.mark.parametrize(
    ("origin", "is_limit"),
    [
        ({"contrast": "T1w", "space": "native"}, True),
        ({"contrast": "T1w", "space": "MNI152NLin2009aSym", "preprocessing": "align"}, False),
        ({"contrast": "T1w", "space": "MNI152NLin2009cAsym"}, False),
        ({"contrast": "T2w", "space": "MNI152NLin2009cAsym"}, True),
        (None, False),
    ],
)
def test_images_other_than_those_of_the_default_training_are_a_limit(
    tmp_path: Path, origin: dict[str, str] | None, is_limit: bool
) -> None:
    folder = write_output(tmp_path)
    write_json(
        folder / "models/desc-dcl/model.json",
        {"format": 1, "input_contract": {"masked": True, "origin": origin}},
    )
    page = Page(write_report(folder))
    assert ("were not aligned to a template" in page.text) == is_limit


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("holdout", "Nobody was held out"),
        ("site", "There was no site audit"),
        ("external", "All scores are of one cohort"),
    ],
)
def test_what_was_not_done_is_a_limit(
    study: Path, page: Page, tmp_path: Path, missing: str, said: str
) -> None:
    assert said not in page.text.partition("Limits")[2]
    metrics = metrics_of(study, "iq")
    if missing != "external":
        metrics[missing] = None
    write_json(tmp_path / "desc-dclIq_metrics.json", metrics)
    text = Page(write_report(tmp_path)).text.rpartition("This is research software")[0]
    assert said in text
    assert "The sample is small" in text
    assert "Pretraining saw images of the people" in text


BROKEN: dict[str, bytes] = {
    "figures/average.npy": b"no array",
    "figures/average.json": b"[",
    "figures/average.tsv": b"rank\tdistance\nx\ty\n",
    "figures/outliers.tsv": b"rank\tworst_z\n1\tn/a\n",
    "figures/retrieval.tsv": b"features\tshare\nx\t1\n",
    "figures/retrieval.json": b'{"sentence": 4}',
    "figures/outlier_1.png": b"GIF89a",
}


def test_broken_files_break_no_page(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "figures", tmp_path / "figures")
    for name, content in BROKEN.items():
        write_bytes(tmp_path / name, content)
    page = Page(write_report(tmp_path))
    assert {"brains", "outliers", "retrieval"} <= set(page.attributes("id"))
    problems = page.text.partition("What could not be read")[2]
    for name in ("figures/average.npy", "figures/average.json", "figures/outlier_1.png"):
        assert name in problems


def test_an_array_of_another_shape_is_named(tmp_path: Path) -> None:
    for array in (np.zeros((3, 4, 4, 4), np.float32), np.zeros((2, 4)), np.array(["a"])):
        write_npy(tmp_path / "figures/average.npy", array)
        page = Page(write_report(tmp_path))
        assert "figures/average.npy has the shape" in page.text


def test_hostile_ids_stay_text_in_every_new_section(study: Path, tmp_path: Path) -> None:
    for name in ("average.tsv", "average.json", "outliers.tsv", "retrieval.tsv", "odd_1.png"):
        content = (study / "figures" / name).read_bytes()
        for id_ in (b"sub-005", b"embeddings"):
            content = content.replace(id_, id_ + HOSTILE.encode())
        write_bytes(tmp_path / "figures" / name, content)
    metrics = json.dumps(metrics_of(study, "iq")).replace('"north"', json.dumps(f"north{HOSTILE}"))
    metrics = metrics.replace('"hospital"', json.dumps(f"hospital{HOSTILE}"))
    write_text(tmp_path / "desc-dclIq_metrics.json", metrics)
    source = write_report(tmp_path).read_text()
    for section in ("brains", "outliers", "retrieval", "site"):
        part = source.partition(f'<section id="{section}"')[2].partition("</section>")[0]
        assert "&lt;script&gt;" in part
        assert "<script" not in part
        assert "<img src=x" not in part

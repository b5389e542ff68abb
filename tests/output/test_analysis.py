"""The examples of analysis.md, run on a small study, and the fields of what a study writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SLOW, give, write_heads
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nidl_dcl import load_embeddings, load_model, predict_phenotype

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "analysis.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module", params=SLOW)
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with MY_DATASET and MY_OUTPUT, a study of whole heads at two sites."""
    folder = tmp_path_factory.mktemp("analysis")
    bids = write_heads(folder / "MY_DATASET", masks=False)
    table = pd.read_csv(bids / "participants.tsv", sep="\t", keep_default_na=False)
    table["site"] = ["north", "south"] * 5
    table.to_csv(bids / "participants.tsv", sep="\t", index=False)
    own = pd.DataFrame({"participant_id": ["01", "sub-02", "77"], "memory": [3.5, 4, 5]})
    own.to_csv(folder / "my_table.csv", index=False)
    words = ["MY_DATASET", "MY_OUTPUT", "--target", "age", "sex", "--spacing", "8"]
    words += ["--max-epochs", "1", "--batch-size", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert give("study", *words) == 0
    return folder


@pytest.fixture(scope="module")
def ran(place: Path) -> dict[str, Any]:
    """Return the names that the examples leave, run one after another."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for example in EXAMPLES:
            exec(example, names)
    return names


def test_the_ten_lines_need_the_folder_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "MY_OUTPUT").symlink_to(place / "MY_OUTPUT")
    monkeypatch.chdir(tmp_path)
    assert "nidl_dcl" not in EXAMPLES[0]
    names: dict[str, Any] = {}

    exec(EXAMPLES[0], names)

    mine, theirs = (float(word) for word in capsys.readouterr().out.split())
    used = names["used"]
    assert len(used) == len(names["mine"]) == 12
    assert set(used["participant_id"]) == {f"sub-{i:02d}" for i in range(1, 11)} - {"sub-04"}
    assert (used["participant_id"] == used["participant_id_again"]).all()
    assert mine == mean_absolute_error(used["target"], names["mine"])
    assert theirs == mean_absolute_error(used["target"], used["prediction"])


def test_the_examples_go_on_with_every_phenotype(ran: dict[str, Any]) -> None:
    assert len(EXAMPLES) == 5
    assert ran["people"]["memory"].dropna().to_dict() == {"sub-01": 3.5, "sub-02": 4.0}
    assert len(ran["people"]) == 9
    assert list(ran["by_sex"].index) == ["F", "M"]
    assert ran["result"].metrics["n_participants"] == 9
    assert ran["embeddings"].shape[0] == len(ran["table"]) == 13


def test_a_pipeline_over_paths_gives_the_numbers_of_the_exported_table(ran: dict[str, Any]) -> None:
    assert len(ran["one"]) == 12
    assert np.std(ran["one"]) > 0
    np.testing.assert_array_equal(ran["one"], ran["two"])


@pytest.mark.parametrize("form", ["list", "array", "table"])
def test_the_model_folder_turns_paths_into_the_exported_rows(place: Path, form: str) -> None:
    table, matrix = load_embeddings(place / "MY_OUTPUT")
    paths = [str(place / "MY_DATASET" / s.removeprefix("bids:raw:")) for s in table["source"]]
    given = {"list": paths, "array": np.array(paths), "table": pd.DataFrame({"path": paths})}[form]
    model = load_model(place / "MY_OUTPUT" / "models" / "desc-dcl")

    np.testing.assert_array_equal(model.transform(given), matrix)


@pytest.mark.slow
def test_a_table_of_paths_and_masks_goes_through_a_pipeline(
    heads_made: Path, studied: Path
) -> None:
    table, matrix = load_embeddings(studied)
    images = [s.removeprefix("bids:raw:") for s in table["source"]]
    masks = [p.replace("_T1w", "_desc-brain_mask") for p in images]
    given = pd.DataFrame(
        {
            "path": [str(heads_made / p) for p in images],
            "mask_path": [str(heads_made / "derivatives/masks" / p) for p in masks],
        }
    )
    y, cv = np.arange(len(table)) % 7, GroupKFold(3)
    encoder = FrozenEstimator(load_model(studied / "models" / "desc-dcl"))

    options = {"groups": table["participant_id"], "cv": cv}
    one = cross_val_predict(make_pipeline(encoder, StandardScaler(), Ridge()), given, y, **options)
    two = cross_val_predict(make_pipeline(StandardScaler(), Ridge()), matrix, y, **options)

    np.testing.assert_array_equal(one, two)


def documented(heading: str) -> set[str]:
    """Return what a section of files.md names as code in the first column of its table."""
    text = (DOCS / "files.md").read_text()
    part = re.split(r"^## ", text.split(f"## {heading}\n", 1)[1], flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| (`.*?) \|", part, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


LEAVES = {
    *("n_dropped", "n_images_dropped", "classes", "scores", "baselines", "headline.gains"),
    *("holdout.n_dropped", "holdout.scores", "holdout.baselines"),
    *("learning_curve.scores", "site.sites", "site.permutation", "provenance.config"),
    *("site.within", "site.permutation_within", "site.harmonized.permutation"),
    *("calibration", "regression_to_the_mean", "confusion", "missing"),
    *("curves.roc", "curves.precision_recall"),
    *("site.leave_one_site_out.sites", "site.leave_one_site_out.scores"),
}
"""Keys whose content is named by the data, or described elsewhere."""


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Return the dotted keys of an object down to numbers, texts, lists and scores."""
    if path in LEAVES or not isinstance(value, dict) or set(value) == {"mean", "ci95", "folds"}:
        yield path
        return
    for key, item in value.items():
        yield from keys(item, f"{path}.{key}" if path else key)


@pytest.mark.parametrize("target", ["Age", "Sex"])
def test_every_key_of_the_metrics_is_documented(place: Path, target: str) -> None:
    metrics = json.loads((place / "MY_OUTPUT" / f"desc-dcl{target}_metrics.json").read_text())
    found = set(keys(metrics))

    assert found - documented("`desc-<model><Target>_metrics.json`") == set()
    assert {"site.sentence", "learning_curve.sentence", "summary.half"} <= found
    assert isinstance(metrics["site"]["balanced_accuracy"], dict)


def everything() -> dict[str, Any]:
    """Return the metrics of a prediction with all that the study above has not."""
    rng, n = np.random.default_rng(0), 90
    people = [f"sub-{i:02d}" for i in range(n)]
    persons = [people[0], people[0], *people[2:]]
    return predict_phenotype(
        rng.normal(size=(n, 4)),
        rng.normal(size=n),
        persons,
        ids=pd.DataFrame({"participant_id": people, "person_id": persons}),
        held_out=np.arange(n) >= 70,
        n_repeats=1,
        n_permutations=10,
    ).metrics


def test_no_key_is_documented_that_is_not_written(place: Path) -> None:
    written = {"site", "summary", "holdout", "duplicates", "holdout.times_scored"}
    written |= set(keys(everything()))
    for target in ("Age", "Sex"):
        file = place / "MY_OUTPUT" / f"desc-dcl{target}_metrics.json"
        written |= set(keys(json.loads(file.read_text())))

    assert documented("`desc-<model><Target>_metrics.json`") - written == set()


@pytest.mark.parametrize("target", ["Age", "Sex"])
def test_every_column_of_the_predictions_is_documented(place: Path, target: str) -> None:
    table = pd.read_csv(place / "MY_OUTPUT" / f"desc-dcl{target}_predictions.tsv", sep="\t")
    columns = {re.sub("^probability_.*", "probability_<class>", c) for c in table.columns}

    assert columns - documented("`desc-<model><Target>_predictions.tsv`") == set()


def test_fields_that_the_page_for_analysts_names_exist(place: Path) -> None:
    text = (DOCS / "analysis.md").read_text().split("## What each field means")[1].split("##")[0]
    metrics = json.loads((place / "MY_OUTPUT" / "desc-dclAge_metrics.json").read_text())
    for name in re.findall(r"`(\w+\.\w+)`", text):
        outer, inner = name.split(".")
        assert inner in metrics[outer]

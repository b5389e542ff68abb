"""Scores computed again from the table of folds, by the examples of docs/scores_again.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.io.formats import write_json, write_tsv

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scores_again.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
N = 72


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Return what the examples leave, run on predictions with sessions, sites and a holdout."""
    folder = tmp_path_factory.mktemp("again")
    (folder / "MY_OUTPUT").mkdir()
    rng = np.random.default_rng(0)
    person = np.arange(N) // 2  # two sessions each
    x = rng.normal(size=(N, 6))
    age = np.round(50 + 10 * x[:, 0] + 5 * rng.normal(size=N), 1)
    age[1::6] = age[::6]  # the same in both sessions, for some
    sex = np.array(["F", "M"])[(x[:, 1] > 0).astype(int)]
    sex[1::2] = sex[::2]
    found = {}
    for name, y in (("Age", age), ("Sex", sex)):
        result = predict_phenotype(
            x,
            y,
            person,
            target=name.lower(),
            baselines={
                "untrained": list(rng.normal(size=(3, N, 6))),
                "voxels": Baseline(rng.normal(size=(N, 40)), pca=True),
            },
            site=np.array(["a", "b"])[person // 2 % 2],
            held_out=person >= 28,
            n_repeats=2,
            n_permutations=9,
        )
        stem = folder / "MY_OUTPUT" / f"desc-dcl{name}"
        write_tsv(stem.with_name(f"{stem.name}_folds.tsv"), result.folds, exact=True)
        write_json(stem.with_name(f"{stem.name}_metrics.json"), result.metrics)
        assert set(result.folds) == set(result.fold_columns) - {"Description"}
        found[name] = json.loads(stem.with_name(f"{stem.name}_metrics.json").read_text())
    spaces = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        space = {}
        for example in EXAMPLES:
            exec(example, space)
            spaces.append(dict(space))
    return {"Age": (found["Age"], spaces[0]), "Sex": (found["Sex"], spaces[1])}


@pytest.mark.parametrize("target", ["Age", "Sex"])
def test_every_score_of_every_fold_is_that_of_scikit_learn_on_the_table(names, target):
    metrics, space = names[target]
    by_fold = space["by_fold"]

    assert set(by_fold.index.get_level_values("features")) == {"embeddings", *metrics["baselines"]}
    for name, scores in {"embeddings": metrics["scores"], **metrics["baselines"]}.items():
        mine = by_fold.loc[name]
        assert len(mine) == metrics["cv"]["n_splits"] * metrics["cv"]["n_repeats"]
        for metric, score in scores.items():
            folds = np.array(score["folds"], dtype=float)
            np.testing.assert_allclose(mine[metric], folds, rtol=1e-11, atol=1e-12)


def test_the_interval_is_that_of_the_file(names):
    metrics, space = names["Age"]

    found = [space["mae"].mean() - space["half"], space["mae"].mean() + space["half"]]
    np.testing.assert_allclose(found, metrics["scores"]["mae"]["ci95"], rtol=1e-11)


@pytest.mark.parametrize("target", ["Age", "Sex"])
def test_scores_of_held_out_participants_and_new_sites_are_in_the_table_too(names, target):
    metrics, space = names[target]
    each = space["each"].groupby(level=["test", "features", "site"], dropna=False).mean()

    for name, scores in {
        "embeddings": metrics["holdout"]["scores"],
        **metrics["holdout"]["baselines"],
    }.items():
        for metric, score in scores.items():
            mine = each.xs(("holdout", name), level=("test", "features"))[metric].iloc[0]
            assert score["mean"] == pytest.approx(mine, rel=1e-11, nan_ok=True) or pd.isna(mine)
    for name, scores in metrics["site"]["leave_one_site_out"]["scores"].items():
        for metric, score in scores.items():
            for site, value in score["sites"].items():
                mine = each.loc[("site", name, site), metric]
                assert value == pytest.approx(mine, rel=1e-11) or pd.isna(mine)


def test_the_permuted_score_is_that_of_the_first_repeat(names):
    metrics, space = names["Age"]

    mine = space["by_fold"].loc["embeddings"].xs(0, level="repeat")["mae"].mean()
    assert metrics["permutation"]["observed"] == pytest.approx(mine, rel=1e-9)

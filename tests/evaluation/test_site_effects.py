from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.preprocessing import StandardScaler

from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation import site_effects
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.cross_validation import permuted_together
from nidl_dcl.evaluation.folds import make_design
from nidl_dcl.evaluation.linear_models import Ridge
from nidl_dcl.evaluation.metrics import regression_scores
from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.evaluation.site_effects import site_audit
from nidl_dcl.evaluation.targets import read_target

pytestmark = pytest.mark.slow

FEW = {"n_permutations": 19, "n_repeats": 2}
N = 90
PEOPLE = [f"sub-{i:02}" for i in range(N)]


def _sites(seed=0, d=8):
    """Return features with a signal and a mark of the site, a number, and three sites."""
    rng = np.random.default_rng(seed)
    site = np.array(["a", "b", "c"])[np.arange(N) % 3]
    signal = rng.normal(size=N)
    x = rng.normal(size=(N, d))
    x[:, 0] += 2 * signal
    x += 3 * rng.normal(size=(3, d))[np.arange(N) % 3]
    return x, 50 + 10 * signal, pd.Series(site, name="scanner")


@pytest.fixture(scope="module")
def result():
    x, y, site = _sites()
    noise = np.random.default_rng(1).normal(size=(3, N, 8))
    return predict_phenotype(
        x,
        y,
        PEOPLE,
        target="score",
        site=site,
        baselines={"untrained": list(noise), "voxels": Baseline(x, pca=True)},
        **FEW,
    )


def test_the_audit_is_of_the_column_before_and_after_harmonization(result):
    site = result.metrics["site"]

    assert site["column"] == "scanner"
    assert site["balanced_accuracy"]["mean"] > 0.9
    assert site["harmonized"]["balanced_accuracy"]["mean"] < 0.5
    assert site["harmonized"]["permutation"]["p"] > 0.05
    assert site["harmonized_sentence"].startswith("After harmonization (ComBat in the folds), site")
    json.dumps(result.metrics, allow_nan=False)


def test_scores_within_each_site_are_those_of_its_cross_validated_predictions(result):
    within = result.metrics["site"]["within"]

    assert list(within) == ["a", "b", "c"]
    assert {entry["n_participants"] for entry in within.values()} == {30}
    # One repeat: the table has the very predictions.
    x, y, site = _sites()
    once = predict_phenotype(x, y, PEOPLE, site=site, n_permutations=0, n_repeats=1)
    table = once.predictions[(site == "b").to_numpy()]
    expected = regression_scores(
        table["target"].to_numpy(), table["prediction"].to_numpy(), np.ones(30)
    )
    found = once.metrics["site"]["within"]["b"]
    assert {k: found[k] for k in expected} == pytest.approx(expected)


def test_a_new_site_is_predicted_by_a_model_tuned_on_the_others(result):
    x, y, site = _sites()
    new = result.metrics["site"]["leave_one_site_out"]
    for label in "abc":
        test = (site == label).to_numpy()
        # Any of the strengths: the score must be that of one of scikit-learn's models.
        known = StandardScaler().fit(x[~test])
        z, z_test = known.transform(x[~test]), known.transform(x[test])
        possible = [
            np.abs(SklearnRidge(alpha=s * (z**2).sum()).fit(z, y[~test]).predict(z_test) - y[test])
            for s in Ridge().strengths
        ]
        found = new["scores"]["embeddings"]["mae"]["sites"][label]
        assert min(abs(e.mean() - found) for e in possible) < 1e-6
        dummy = np.abs(y[~test].mean() - y[test]).mean()
        assert new["scores"]["dummy"]["mae"]["sites"][label] == pytest.approx(dummy)
    assert set(new["scores"]) == {"embeddings", "dummy", "untrained", "voxels", "site"}
    mae = new["scores"]["embeddings"]["mae"]
    assert mae["mean"] == pytest.approx(np.mean(list(mae["sites"].values())))
    assert mae["ci95"][0] < mae["mean"] < mae["ci95"][1]
    assert new["sites"] == {"a": 30, "b": 30, "c": 30}
    assert "Trained without the site that is tested" in new["sentence"]


@pytest.mark.slow
def test_a_participant_at_two_sites_is_tested_at_both_and_learnt_from_at_neither():
    x, y, site = _sites()
    people = np.array(PEOPLE, dtype=object)
    people[:2] = "sub-both"  # an image at site a, another at site b
    y[1] = y[0]
    y_wild, x_wild = y.copy(), x.copy()
    y_wild[:2], x_wild[1] = 1e6, 1e3
    two = (site != "c").to_numpy()

    def scores(features, values):
        found = predict_phenotype(
            features[two], values[two], people[two], site=site[two], task="regression", **FEW
        )
        return found.metrics["site"]

    assert scores(x, y)["within"]["a"]["n_participants"] == 30
    assert scores(x, y)["within"]["b"]["n_participants"] == 30

    # Two sites: nobody else's prediction can change if both images are kept out of training.
    def error_of_others(values):
        return 30 * values["leave_one_site_out"]["scores"]["dummy"]["mae"]["sites"]["a"]

    other_mean = y[two & (site == "b").to_numpy() & (people != "sub-both")].mean()
    own = (site == "a").to_numpy()
    assert error_of_others(scores(x, y)) == pytest.approx(np.abs(y[own] - other_mean).sum())
    assert error_of_others(scores(x_wild, y_wild)) == pytest.approx(
        np.abs(y_wild[own] - other_mean).sum()
    )


def test_what_is_undefined_at_a_site_is_none():
    x, y, site = _sites()
    sex = np.where(y > 50, "M", "F")
    sex[(site == "a").to_numpy()] = "M"
    places = site.to_numpy().astype(object)
    places[[1, 4]], places[7] = "tiny", None

    found = predict_phenotype(x, sex, PEOPLE, site=places, **FEW).metrics["site"]

    assert found["within"]["a"] == {
        "n_participants": 30,
        "balanced_accuracy": None,
        "roc_auc": None,
    }
    assert found["within"]["tiny"]["balanced_accuracy"] is None
    assert found["within"]["b"]["n_participants"] == 27
    new = found["leave_one_site_out"]["scores"]["embeddings"]["balanced_accuracy"]
    assert new["sites"]["a"] is None
    assert new["sites"]["tiny"] is None
    assert new["sites"]["b"] is not None
    assert new["sites"]["c"] is not None
    assert new["ci95"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("site", [["a"] * N, [None] * N, ["a", *["b"] * 2, *["c"] * (N - 3)]])
def test_one_site_or_none_gives_a_sentence_and_no_scores(site):
    x, y, _ = _sites()

    found = predict_phenotype(x, y, PEOPLE, site=site, **FEW).metrics["site"]

    assert found["harmonized"] is None
    assert found["sentence"].startswith("Site was not decoded")
    assert found.get("leave_one_site_out") is None


@pytest.mark.slow
def test_harmonization_helps_where_sites_hide_the_signal():
    x, y, site = _sites()
    x = 10 * x * np.where(site == "a", 1, 3)[:, None]
    plain = predict_phenotype(x, y, PEOPLE, site=site, **FEW).metrics
    harmonized = predict_phenotype(x, y, PEOPLE, site=site, harmonize=True, **FEW).metrics

    assert harmonized["scores"]["r2"]["mean"] > plain["scores"]["r2"]["mean"] + 0.05
    assert harmonized["harmonization"]["n_images_not_harmonized"] == 0
    assert "ComBat by site" in harmonized["model"]
    assert plain["harmonization"] is None


def test_an_effect_of_a_confound_is_not_a_prediction():
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, N)
    x = rng.normal(size=(N, 6)) + age[:, None] / 10
    score = age + 3 * rng.normal(size=N)
    voxels = Baseline(np.repeat(x, 30, axis=1), pca=True)
    table = pd.DataFrame({"age": age})

    more = {"baselines": {"voxels": voxels}, "target": "score", **FEW}
    plain = predict_phenotype(x, score, PEOPLE, **more).metrics
    found = predict_phenotype(x, score, PEOPLE, confounds=table, **more)

    assert plain["scores"]["r"]["mean"] > 0.8
    assert found.metrics["scores"]["r2"]["mean"] < 0.05
    assert found.metrics["baselines"]["voxels"]["r2"]["mean"] < 0.05
    assert found.metrics["baselines"]["confounds"]["r"]["mean"] > 0.9
    assert found.metrics["headline"]["best_baseline"] == "confounds"
    assert found.metrics["confounds"]["columns"]["age"]["kind"] == "numeric"
    assert found.summary()["confounds"] < found.summary()["score"]
    json.dumps(found.metrics, allow_nan=False)


def test_rows_without_a_confound_are_dropped_with_the_reason():
    x, y, _ = _sites()
    age = np.random.default_rng(0).uniform(20, 80, N)
    age[:4] = np.nan
    y[3:6] = np.nan

    found = predict_phenotype(x, y, PEOPLE, confounds=pd.DataFrame({"age": age}), **FEW)

    assert found.metrics["n_participants"] == N - 6
    assert found.metrics["n_dropped"] == {"confound missing: age": 3, "target missing": 3}
    assert list(found.predictions["reason"][:4]) == [
        *["confound missing: age"] * 3,
        "target missing",
    ]
    assert list(found.predictions["status"][:7]) == ["dropped"] * 6 + ["ok"]


def test_dropping_rows_does_not_change_what_the_target_is():
    x, _, _ = _sites()
    grade = np.arange(N) % 12
    table = pd.DataFrame({"age": np.where(grade < 6, np.arange(N) + 0.5, np.nan)})

    found = predict_phenotype(x, grade, PEOPLE, confounds=table, **FEW).metrics

    assert found["task"] == "regression"
    assert "12 distinct whole numbers" in found["task_rule"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"confounds": pd.DataFrame({"target": np.arange(N)})}, "is the target"),
        ({"confounds": pd.DataFrame({"copy": _sites()[1]})}, "has the values of the target"),
        ({"confounds": pd.DataFrame({"age": np.ones(N)})}, "is constant"),
        ({"confounds": pd.DataFrame({"age": np.arange(3)})}, "3 rows"),
        ({"confounds": [1, 2]}, "DataFrame"),
        ({"harmonize": True}, "needs a site"),
        (
            {
                "confounds": pd.DataFrame({"age": np.arange(N) + 0.5}),
                "baselines": {"confounds": np.ones((N, 2))},
            },
            "'confounds' is taken",
        ),
    ],
    ids=["target", "copy", "constant", "length", "list", "no site", "name"],
)
def test_what_cannot_be_cleaned_is_refused(more, said):
    x, y, _ = _sites()
    with pytest.raises(UsageError, match=said):
        predict_phenotype(x, y, PEOPLE, **more, **FEW)


def test_a_confound_that_no_image_with_the_target_has_is_said():
    x, y, _ = _sites()
    y[:45] = np.nan
    age = np.where(np.arange(N) < 45, np.arange(N) + 0.5, np.nan)
    with pytest.raises(InputsUnusableError, match="both the target"):
        predict_phenotype(x, y, PEOPLE, confounds=pd.DataFrame({"age": age}), **FEW)


def test_without_the_package_the_audit_says_so_and_harmonizing_is_refused(monkeypatch):
    x, y, site = _sites()
    monkeypatch.setattr(site_effects, "can_harmonize", lambda: False)
    monkeypatch.setattr("nidl_dcl.evaluation.harmonization.can_harmonize", lambda: False)

    audit = site_audit(x, site, PEOPLE, **FEW)

    assert audit["harmonized"] is None
    assert "nidl_dcl[harmonize]" in audit["harmonized_sentence"]
    assert audit["balanced_accuracy"]["mean"] > 0.9
    with pytest.raises(UsageError, match=r"nidl_dcl\[harmonize\]"):
        predict_phenotype(x, y, PEOPLE, site=site, harmonize=True, **FEW)


def test_one_site_harmonizes_nothing_and_says_so():
    x, y, _ = _sites()

    found = predict_phenotype(x, y, PEOPLE, site=["a"] * N, harmonize=True, **FEW).metrics
    plain = predict_phenotype(x, y, PEOPLE, site=["a"] * N, **FEW).metrics

    assert found["harmonization"]["n_images_not_harmonized"] == N
    assert "90 of 90 images were tested as they are" in found["harmonization"]["sentence"]
    assert found["scores"]["mae"]["mean"] == pytest.approx(plain["scores"]["mae"]["mean"])


def test_progress_counts_up_to_its_end():
    x, y, site = _sites()
    seen = []

    predict_phenotype(
        x,
        y,
        PEOPLE,
        site=site,
        confounds=pd.DataFrame({"age": np.arange(N) + 0.5}),
        progress=lambda done, steps: seen.append((done, steps)),
        **FEW,
    )

    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))


def _assert_close(found, expected):
    """Compare numbers inside of dictionaries and lists, other values exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_close(one, other)
    else:
        assert found == (
            pytest.approx(expected, rel=1e-9) if expected.__class__ is float else expected
        )


@pytest.mark.slow
def test_held_out_rows_decide_nothing_and_are_adjusted_by_what_the_others_taught():
    x, y, site = _sites()
    held_out = np.arange(N) >= 70
    table = pd.DataFrame(
        {"age": np.random.default_rng(2).uniform(20, 80, N), "sex": np.arange(N) // 3 % 2}
    )
    voxels = np.repeat(x, 20, axis=1)
    options = {"harmonize": True, "learning_curve": False, "n_permutations": 0, "n_repeats": 2}

    def scored(x, y, site, table, rows=slice(None)):
        return predict_phenotype(
            x[rows],
            y[rows],
            PEOPLE[rows],
            site=site[rows],
            confounds=table[rows],
            baselines={"voxels": Baseline(voxels[rows], pca=True)},
            held_out=held_out[rows],
            **options,
        )

    result = scored(x, y, site, table)
    alone = scored(x, y, site, table, slice(0, 70)).metrics
    wild_x, wild_site, wild = x.copy(), site.copy(), table.copy()
    wild_x[80:] += 1e3
    wild_site[80:] = "never seen"
    wild.loc[80:, "age"], wild.loc[80:, "sex"] = 1e4, 7
    changed = scored(wild_x, y, wild_site, wild)

    assert result.metrics["holdout"]["n_participants"] == 20
    assert set(result.metrics["holdout"]["baselines"]) == {"dummy", "voxels", "confounds", "site"}
    # Products of matrices of other shapes are rounded otherwise.
    for name in ("scores", "site", "confounds"):
        _assert_close(result.metrics[name], alone[name])
        assert result.metrics[name] == changed.metrics[name]
    np.testing.assert_allclose(
        result.predictions["prediction"][70:80], changed.predictions["prediction"][70:80]
    )


@pytest.fixture(scope="module")
def site_alone():
    """Return the prediction of a target that is its site and noise, by features that hold sites."""
    x, _, site = _sites()
    rng = np.random.default_rng(4)
    y = site.map({"a": 40, "b": 50, "c": 60}) + 3 * rng.normal(size=N)
    return predict_phenotype(
        x, y, PEOPLE, target="score", site=site, **FEW | {"n_permutations": 49}
    ).metrics


def test_a_target_that_is_site_and_noise_is_not_said_to_be_predicted(site_alone):
    headline, site = site_alone["headline"], site_alone["site"]

    assert site_alone["permutation"]["p"] == 1 / 50  # shuffled over all, it looks like something
    assert headline["best_baseline"] == "site"
    assert not headline["beats"]
    assert site["permutation_within"]["p"] > 0.05
    assert headline["within_site"] is False
    assert "Within sites, no prediction is shown" in headline["sentence"]


def test_a_target_that_is_predicted_within_sites_has_no_such_sentence(result):
    assert result.metrics["site"]["permutation_within"]["p"] == 1 / 20
    assert result.metrics["headline"]["within_site"] is True
    assert "Within sites" not in result.metrics["headline"]["sentence"]
    assert result.metrics["baselines"]["site"]["mae"]["mean"] > 7


def test_sites_too_small_to_shuffle_within_leave_it_unknown():
    x, y, _ = _sites()
    site = pd.Series([f"s{i // 3}" for i in range(N)])

    metrics = predict_phenotype(x, y, PEOPLE, site=site, learning_curve=False, **FEW).metrics

    assert metrics["site"]["permutation_within"] is None
    assert metrics["headline"]["within_site"] is None


def test_targets_change_places_between_groups_of_one_site_and_fold_alone():
    rng = np.random.default_rng(0)
    target = read_target(rng.normal(size=30), PEOPLE[:30])
    who = np.array(PEOPLE[:30], dtype=object)
    design = make_design(target, who, who, n_splits=3, n_repeats=1, seed=0)
    strata = np.arange(30) % 2

    blocks = permuted_together(design, strata)

    assert sorted(np.concatenate(list(blocks.values()))) == list(range(30))
    for members in blocks.values():
        assert len(set(strata[members])) == len(set(design.fold[0][members])) == 1

"""What must not leak: chance stays chance, copies stay together, held-out rows decide nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score

from nidl_dcl.data.grouping import connected_groups
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.metrics import roc_area
from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.evaluation.site_effects import site_audit

pytestmark = pytest.mark.slow

QUICK = {"n_permutations": 19, "n_repeats": 2}


def cohort(n=60, d=8, seed=0):
    """Return features, a number and a class that they carry, and participants."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    signal = x[:, 0] + x[:, 1] + 0.5 * rng.normal(size=n)
    return x, 50 + 10 * signal, np.where(signal > 0, "M", "F"), [f"sub-{i:03}" for i in range(n)]


@pytest.mark.parametrize(("which", "metric", "chance"), [(1, "r", 0.0), (2, "roc_auc", 0.5)])
@pytest.mark.slow
def test_over_many_shuffles_p_is_uniform_and_the_score_is_chance(which, metric, chance):
    data = cohort(n=42, d=4)
    rng = np.random.default_rng(5)
    p, scores = [], []
    for _ in range(40):
        y = rng.permutation(data[which])
        metrics = predict_phenotype(data[0], y, data[3], n_repeats=1, n_permutations=39).metrics
        p.append(metrics["permutation"]["p"])
        scores.append(metrics["scores"][metric]["mean"])

    # p takes the values 1/40, 2/40, ... 1: uniform once it is spread over its steps.
    assert kstest(np.array(p) - rng.uniform(0, 1 / 40, 40), "uniform").pvalue > 0.05
    assert np.mean(np.array(p) <= 0.05) <= 0.15
    error = np.std(scores, ddof=1) / np.sqrt(len(scores))
    # Leaving a fold out bends the mean of its rest away from it: chance is at, or below, chance.
    assert chance - 0.25 < np.mean(scores) < chance + 3 * error


@pytest.mark.parametrize(
    ("task", "metric", "most"),
    [("regression", "r", 0.4), ("classification", "balanced_accuracy", 0.65)],
)
def test_copies_under_other_names_are_a_leak_until_they_are_one_person(task, metric, most):
    rng = np.random.default_rng(0)
    image = np.tile(np.arange(40), 4)
    x = rng.normal(size=(40, 60))[image]
    y = (rng.normal(size=40) if task == "regression" else rng.permutation(np.arange(40) % 2))[image]
    people = np.array([f"sub-{i:03}" for i in range(160)])
    persons = connected_groups(people, image)
    ids = pd.DataFrame({"participant_id": people, "person_id": persons})

    leaking = predict_phenotype(x, y, people, task=task, **QUICK).metrics
    closed = predict_phenotype(x, y, persons, ids=ids, task=task, **QUICK).metrics

    assert leaking["scores"][metric]["mean"] > 0.85
    assert leaking["permutation"]["p"] == 1 / 20
    assert closed["scores"][metric]["mean"] < most
    assert closed["permutation"]["p"] > 0.05
    assert (closed["n_participants"], closed["groups"]["n"], closed["n_images"]) == (40, 40, 160)
    assert closed["duplicates"]["n_ids"] == 160
    assert closed["duplicates"]["conflicting"] == []
    if task == "classification":
        assert closed["classes"] == {"0": 20, "1": 20}


def test_copies_weigh_as_one_participant():
    x, age, _, people = cohort(n=30)
    again = [*range(30), 0, 0, 0]
    persons = np.array(people)[again]
    names = [*people, "sub-a", "sub-b", "sub-c"]

    once = predict_phenotype(x, age, people, n_permutations=0).metrics
    copied = predict_phenotype(
        x[again],
        age[again],
        persons,
        ids=pd.DataFrame({"participant_id": names, "person_id": persons}),
        n_permutations=0,
    ).metrics

    assert copied["n_participants"] == once["n_participants"] == 30
    assert copied["distribution"]["mean"] == pytest.approx(once["distribution"]["mean"])
    assert copied["cv"]["test_train_ratio"] == once["cv"]["test_train_ratio"]
    assert once["duplicates"] is None


def test_one_image_with_two_ages_is_one_participant_with_two_values_and_a_note():
    x, age, _, people = cohort(n=30)
    rows, ages = [*range(30), 0], np.append(age, age[0] + 30)
    persons = np.array(people)[rows]

    result = predict_phenotype(
        x[rows],
        ages,
        persons,
        ids=pd.DataFrame({"participant_id": [*people, "sub-twin"], "person_id": persons}),
        **QUICK,
    )

    duplicates = result.metrics["duplicates"]
    assert result.metrics["n_participants"] == 30
    assert duplicates["conflicting"] == ["sub-000"]
    assert "2 participants are 1" in duplicates["sentence"]
    assert "contradict" in duplicates["sentence"]
    assert result.predictions["status"].eq("ok").all()


def test_dropped_copies_are_dropped_once():
    x, age, _, people = cohort(n=30)
    rows, ages = [*range(30), 0], np.append(age, np.nan)
    ages[0] = np.nan
    persons = np.array(people)[rows]
    ids = pd.DataFrame({"participant_id": [*people, "sub-twin"], "person_id": persons})

    metrics = predict_phenotype(x[rows], ages, persons, ids=ids, **QUICK).metrics

    assert metrics["n_dropped"] == {"target missing": 1}
    assert metrics["n_images_dropped"] == {"target missing": 2}


@pytest.mark.parametrize(
    ("persons", "groups", "words"),
    [
        (["p", "q", *"abcd"], list("xxabcd"), "Participant 'one' is in several persons"),
        (["p", "p", "p", *"bcd"], list("xxabcd"), "Person 'p' is in several groups"),
    ],
)
def test_persons_that_do_not_fit_are_refused(persons, groups, words):
    ids = pd.DataFrame({"participant_id": ["one", "one", *"abcd"], "person_id": persons})
    with pytest.raises(UsageError, match=words):
        predict_phenotype(np.eye(6), range(6), groups, ids=ids)


@pytest.fixture(scope="module")
def apart():
    """Return the data of 70 participants, of whom every seventh is held out, the first included."""
    x, age, sex, people = cohort(n=70)
    voxels = np.random.default_rng(1).normal(size=(70, 300)) + x[:, :1]
    return {
        "x": x,
        "age": age,
        "sex": sex.astype(object),
        "people": people,
        "noise": np.random.default_rng(2).normal(size=(2, 70, 5)),
        "voxels": voxels,
        "site": np.array(["a", "b"])[np.arange(70) % 2],
        "held_out": np.arange(70) % 7 == 0,
    }


def predicted(data, target):
    """Return the prediction of a target, with baselines and a site audit."""
    baselines = {"untrained": list(data["noise"]), "voxels": Baseline(data["voxels"], pca=True)}
    return predict_phenotype(
        data["x"],
        data[target],
        data["people"],
        target=target,
        baselines=baselines,
        site=data["site"],
        held_out=data["held_out"],
        ids=pd.DataFrame({"participant_id": data["people"], "seen": False}),
        **QUICK,
    )


@pytest.mark.parametrize("target", ["age", pytest.param("sex", marks=pytest.mark.slow)])
def test_held_out_rows_decide_about_nothing_in_the_cross_validation(apart, target):
    rng = np.random.default_rng(9)
    held_out = apart["held_out"]
    changed = {name: value.copy() if name != "people" else value for name, value in apart.items()}
    changed["x"][held_out] = 1e3 * rng.normal(size=changed["x"][held_out].shape)
    changed["noise"][:, held_out] = 7
    changed["voxels"][held_out] = 1e4 * rng.normal(size=changed["voxels"][held_out].shape)
    changed["age"][held_out] = -500.5
    changed["sex"][held_out] = ["M", "F", "other", None, "M", "F", "M", "F", "M", "F"]
    changed["site"][held_out] = "b"

    before, after = predicted(apart, target), predicted(changed, target)

    both = [{k: v for k, v in r.metrics.items() if k != "holdout"} for r in (before, after)]
    assert both[0] == both[1]
    assert before.metrics["holdout"] != after.metrics["holdout"]
    pd.testing.assert_frame_equal(
        before.predictions[~held_out],
        after.predictions[~held_out],
        check_exact=True,
        check_dtype=False,
    )
    assert before.metrics["n_participants"] == 60
    assert before.metrics["site"]["n_participants"] == 60
    if target == "sex":
        reasons = after.predictions.loc[held_out, "reason"].tolist()
        assert reasons[2] == "class that no participant in the cross-validation has: other"
        assert reasons[3] == "target missing"
        assert after.metrics["holdout"]["n_dropped"] == 2


@pytest.mark.parametrize("target", ["age", pytest.param("sex", marks=pytest.mark.slow)])
def test_held_out_participants_are_scored_by_one_read_out_of_all_others(apart, target):
    result = predicted(apart, target)

    last, held_out = result.metrics["holdout"], apart["held_out"]
    table = result.predictions[held_out]
    assert last["n_participants"] == 10
    assert set(last["scores"]) == set(result.metrics["scores"])
    assert set(last["baselines"]) == {"dummy", "untrained", "voxels", "site"}
    for scores in (last["scores"], *last["baselines"].values()):
        assert all(set(score) == {"mean", "ci95"} for score in scores.values())
    assert set(table["status"]) == {"holdout"}
    assert (table["n_folds"] == 0).all()
    assert set(result.predictions["status"][~held_out]) == {"ok"}
    assert "holdout" in result.columns["status"]["Levels"]
    if target == "age":
        error = np.abs(table["prediction"] - apart["age"][held_out]).mean()
        assert last["scores"]["mae"]["mean"] == pytest.approx(error)
        assert error < last["baselines"]["dummy"]["mae"]["mean"]
        mean = apart["age"][~held_out].mean()
        dummy = np.abs(apart["age"][held_out] - mean).mean()
        assert last["baselines"]["dummy"]["mae"]["mean"] == pytest.approx(dummy)
    else:
        right = (
            (table["prediction"] == apart["sex"][held_out]).groupby(apart["sex"][held_out]).mean()
        )
        assert last["scores"]["balanced_accuracy"]["mean"] == pytest.approx(right.mean())
    low, high = last["scores"]["mae" if target == "age" else "balanced_accuracy"]["ci95"]
    assert low < high
    assert "10 participants held out" in last["sentence"]
    assert result.metrics == predicted(apart, target).metrics


def test_the_last_read_out_is_that_of_scikit_learn(apart):
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    result, held_out = predicted(apart, "age"), apart["held_out"]

    alpha = result.metrics["holdout"]["strength"] * 60 * 8
    model = make_pipeline(StandardScaler(), Ridge(alpha)).fit(
        apart["x"][~held_out], apart["age"][~held_out]
    )
    expected = model.predict(apart["x"][held_out])
    assert result.predictions["prediction"][held_out].to_numpy() == pytest.approx(expected)


@pytest.mark.slow
def test_the_interval_of_the_last_score_holds_what_new_people_give():
    inside = []
    for seed in range(20):
        x, age, _, people = cohort(n=400, seed=seed)
        held_out = np.arange(400) % 10 == 0
        last = predict_phenotype(
            x, age, people, held_out=held_out, n_repeats=1, n_permutations=0
        ).metrics["holdout"]["scores"]["mae"]
        inside.append(last["ci95"][0] < 10 * 0.5 * np.sqrt(2 / np.pi) * 1.01 < last["ci95"][1])
    assert sum(inside) >= 17


@pytest.mark.parametrize(
    ("held_out", "words"),
    [(0, None), (3, "3 participants are held out"), (10, "10 participants held out")],
)
def test_nobody_a_few_or_enough_held_out(held_out, words):
    x, age, _, people = cohort(n=40)

    result = predict_phenotype(x, age, people, held_out=np.arange(40) < held_out, **QUICK)

    last = result.metrics["holdout"]
    assert (last is None) == (words is None)
    if words:
        assert words in last["sentence"]
        assert "not known whether the encoder saw them" in last["sentence"]
        assert (last["scores"] is None) == (held_out < 5)
    status = result.predictions["status"].tolist()
    assert status == ["holdout"] * held_out + ["ok"] * (40 - held_out)
    assert result.predictions["prediction"].isna().sum() == (held_out if held_out < 5 else 0)


def test_families_are_held_out_whole_and_resampled_whole():
    x, age, _, people = cohort(n=40)
    family = np.array([f"family-{i // 4}" for i in range(40)])
    ids = pd.DataFrame({"participant_id": people})
    given = {"ids": ids, **QUICK}

    whole = predict_phenotype(x, age, family, held_out=np.arange(40) < 8, **given).metrics

    assert whole["holdout"]["n_participants"] == 8
    with pytest.raises(UsageError, match="'family-1' is held out in part"):
        predict_phenotype(x, age, family, held_out=np.arange(40) < 6, **given)


def test_whom_the_encoder_saw_cannot_be_held_out():
    x, age, _, people = cohort(n=40)
    held_out, seen = np.arange(40) < 8, np.arange(40) == 5
    ids = pd.DataFrame({"participant_id": people, "seen": seen})
    with pytest.raises(UsageError, match="sub-005 is held out, but the encoder saw it"):
        predict_phenotype(x, age, people, held_out=held_out, ids=ids, **QUICK)


@pytest.mark.parametrize(
    ("n", "words"), [(40, "Every participant is held out"), (36, "besides 36")]
)
def test_too_few_left_is_an_error_that_says_who_is_held_out(n, words):
    x, age, _, people = cohort(n=40)
    with pytest.raises(InputsUnusableError, match=words):
        predict_phenotype(x, age, people, held_out=np.arange(40) < n, task="regression", **QUICK)


@pytest.mark.parametrize(
    ("seen", "by", "counts", "words"),
    [
        (
            [True] * 12 + [False] * 18,
            ["image"] * 10 + ["id"] * 2 + [""] * 18,
            (10, 2),
            "to be safe",
        ),
        ([True] * 12 + [False] * 18, ["image"] * 12 + [""] * 18, (12, 0), "12 were recognized"),
        ([True] * 12 + [False] * 18, None, (None, None), "saw 12 of the 30"),
        ([False] * 30, [""] * 30, (0, 0), "saw none of the 30"),
    ],
)
def test_exposure_says_how_participants_were_recognized(seen, by, counts, words):
    x, age, _, people = cohort(n=30)

    ids = pd.DataFrame({"participant_id": people, "seen": seen})
    if by is not None:
        ids["seen_by"] = by

    result = predict_phenotype(x, age, people, ids=ids, n_repeats=1, n_permutations=0)

    exposure = result.metrics["exposure"]
    assert not {"seen", "seen_by", "person_id"} & set(result.predictions)

    assert (exposure["by_image"], exposure["by_id_only"]) == counts
    assert words in exposure["sentence"]
    assert ("another person of the same name" in exposure["sentence"]) == (counts == (10, 2))


def test_the_area_under_the_curve_is_scikit_learns():
    rng = np.random.default_rng(0)
    for n in (5, 50, 500):
        member, score = np.arange(n) % 3 == 0, rng.integers(0, 9, n) / 9
        weight = rng.uniform(0.1, 1, n)
        expected = roc_auc_score(member, score, sample_weight=weight)
        assert roc_area(member, score, weight) == pytest.approx(expected, rel=1e-12)


def test_site_is_decoded_from_shuffled_labels_no_better_than_by_chance():
    x, _, _, people = cohort(n=60)
    site = np.random.default_rng(0).permutation(np.array(["a", "b", "c"])[np.arange(60) % 3])
    assert site_audit(x, site, people, n_repeats=1, n_permutations=39)["permutation"]["p"] > 0.05

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.cross_validation import (
    ProgressCounter,
    cross_validate,
    cross_validate_dummy,
)
from nidl_dcl.evaluation.features import Features
from nidl_dcl.evaluation.folds import make_design
from nidl_dcl.evaluation.learning_curve import labeled_groups, learning_shares
from nidl_dcl.evaluation.linear_models import Logistic, Ridge, nested_cv_predict
from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.evaluation.targets import read_target

FEW = {"n_permutations": 0, "n_repeats": 2}


def cohort(n=80, d=6, seed=0):
    """Return features, a number and a class that they carry, and participants."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    signal = x[:, 0] + x[:, 1] + 0.5 * rng.normal(size=n)
    return (
        x,
        50 + 10 * signal,
        np.where(signal > 0.5, "M", "F"),
        np.array([f"s{i:03}" for i in range(n)]),
    )


def design_of(y, people, **more):
    """Return the design of a target."""
    read = read_target(y, people)
    options = {"n_splits": 5, "n_repeats": 3, "seed": 0} | more
    return make_design(read, people, people, **options)


X, AGE, SEX, PEOPLE = cohort()


@pytest.mark.parametrize(("y", "model"), [(AGE, Ridge()), (SEX == "M", Logistic(2))])
def test_knowing_all_rows_is_the_same_as_saying_nothing(y, model):
    fold, targets = np.arange(80) % 5, y.astype(float)[:, None]

    plain = nested_cv_predict(Features(X), targets, fold, model)
    known = nested_cv_predict(Features(X), targets, fold, model, np.ones(80, dtype=bool))

    np.testing.assert_array_equal(plain[0], known[0])
    np.testing.assert_array_equal(plain[1], known[1])


@pytest.mark.parametrize(("y", "model"), [(AGE, Ridge()), (SEX == "M", Logistic(2))])
def test_rows_that_are_not_known_change_no_prediction_and_no_strength(y, model):
    fold, known = np.arange(80) % 5, np.arange(80) % 3 > 0
    x, targets = X.copy(), y.astype(float)[:, None]
    plain, strengths = nested_cv_predict(Features(x), targets, fold, model, known)
    targets[~known] = 1 - targets[~known]

    other, again = nested_cv_predict(Features(x), targets, fold, model, known)

    np.testing.assert_array_equal(plain, other)
    np.testing.assert_array_equal(strengths, again)
    # Nor do their features, but for the row's own prediction.
    x[~known] += 100
    moved, _ = nested_cv_predict(Features(x), targets, fold, model, known)
    np.testing.assert_array_equal(plain[known], moved[known])
    assert (plain[~known] != moved[~known]).any()


@pytest.mark.parametrize(("y", "model"), [(AGE, Ridge()), (SEX == "M", Logistic(2))])
def test_known_rows_are_predicted_as_if_the_others_were_not_there(y, model):
    fold, known = np.arange(80) % 5, np.arange(80) % 3 > 0
    targets = y.astype(float)[:, None]

    within, strengths = nested_cv_predict(Features(X), targets, fold, model, known)
    alone, same = nested_cv_predict(Features(X[known]), targets[known], fold[known], model)

    np.testing.assert_allclose(within[known], alone, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(strengths, same)


def test_the_dummy_learns_from_the_known_rows_alone():
    design = design_of(AGE, PEOPLE, n_repeats=1)
    known = np.ones((1, 80), dtype=bool)
    known[0, ::2] = False
    changed = design_of(np.where(known[0], AGE, AGE + 1000), PEOPLE, n_repeats=1)

    _, said = cross_validate_dummy(design, known)

    fold = design.row_folds[0]
    expected = [
        np.abs(AGE[fold == k] - AGE[known[0] & (fold != k)].mean()).mean() for k in range(5)
    ]
    np.testing.assert_allclose([s["mae"] for s in said], expected)
    assert changed.n_folds == 5


@pytest.mark.parametrize(
    "y", [AGE, SEX, np.where(AGE > 62, "c", SEX)], ids=["number", "two", "three"]
)
def test_smaller_sets_lie_in_larger_ones_with_classes_in_proportion_and_folds_alike(y):
    design = design_of(y, PEOPLE)
    before = np.ones((3, 80), dtype=bool)

    for share in (0.75, 0.5, 0.25):
        groups = labeled_groups(design, share, seed=0)

        assert (groups <= before).all()
        for k in range(len(design.labels)):
            member = design.value == k
            assert (groups[:, member].sum(axis=1) == np.rint(share * member.sum())).all()
        for repeat in range(3):
            within = np.bincount(design.fold[repeat][groups[repeat]], minlength=5)
            assert within.max() - within.min() <= max(1, len(design.labels))
        before = groups
    assert labeled_groups(design, 1.0, seed=0).all()


def test_the_choice_is_keyed_by_seed_and_repeat_and_knows_no_value():
    design = design_of(AGE, PEOPLE)
    groups = labeled_groups(design, 0.5, seed=0)

    np.testing.assert_array_equal(groups, labeled_groups(design, 0.5, seed=0))
    assert (groups != labeled_groups(design, 0.5, seed=1)).any()
    assert (groups[0] != groups[1]).any()


@pytest.mark.parametrize(
    ("n", "shares"), [(80, [0.125, 0.25, 0.5, 1.0]), (20, [0.5, 1.0]), (18, [1.0]), (6, [1.0])]
)
def test_sizes_are_halved_while_ten_remain(n, shares):
    assert learning_shares(design_of(AGE[:n], PEOPLE[:n]), True) == shares


def test_sizes_stop_where_a_class_has_fewer_than_three():
    rare = np.array(["a"] * 73 + ["b"] * 7)

    assert learning_shares(design_of(rare, PEOPLE), True) == [0.5, 1.0]


def test_more_folds_need_more_participants():
    assert learning_shares(design_of(AGE, PEOPLE, n_splits=20), True) == [0.5, 1.0]


def test_families_are_kept_or_left_as_a_whole():
    family = np.array([f"f{i // 2:03}" for i in range(80)])
    design = make_design(read_target(AGE, family), PEOPLE, family, n_splits=5, n_repeats=1, seed=0)

    groups = labeled_groups(design, 0.5, seed=0)

    assert groups.shape == (1, 40)
    assert groups.sum() == 20


@pytest.fixture(scope="module")
def both():
    noise = np.random.default_rng(1).normal(size=(2, 80, 6))
    baselines = {"untrained": list(noise), "voxels": Baseline(X + noise[0], pca=True)}
    return {
        name: predict_phenotype(X, y, PEOPLE, target=name, baselines=baselines, **FEW)
        for name, y in (("age", AGE), ("sex", SEX))
    }


@pytest.mark.parametrize("name", ["age", "sex"])
def test_with_all_participants_the_curve_is_the_main_scores(both, name):
    metrics = both[name].metrics
    curve = metrics["learning_curve"]

    assert curve["metric"] == metrics["headline"]["metric"]
    assert curve["n_participants"] == pytest.approx([8, 16, 32, 64], abs=0.5)
    assert set(curve["scores"]) == {"embeddings", "dummy", "untrained", "voxels"}
    main = {"embeddings": metrics["scores"], **metrics["baselines"]}
    for features, points in curve["scores"].items():
        score = main[features][curve["metric"]]
        assert points[-1] == {"mean": score["mean"], "ci95": score["ci95"]}
        assert len(points) == 4
        assert all(
            low < p["mean"] < high for p in points for low, high in [p["ci95"]] if low < high
        )


@pytest.mark.parametrize("name", ["age", "sex"])
def test_more_labeled_participants_help_features_that_carry_the_target(both, name):
    sign = -1 if name == "age" else 1
    means = [sign * p["mean"] for p in both[name].metrics["learning_curve"]["scores"]["embeddings"]]

    assert means[0] < means[2]
    assert means[1] < means[3]
    assert both[name].summary()["half"] == sign * means[2]


def test_a_point_is_what_cross_validation_on_the_labeled_rows_gives(both):
    design = design_of(AGE, PEOPLE, n_repeats=2)
    rows = labeled_groups(design, 0.25, seed=0)
    _, folds, _ = cross_validate(design, Features(X), ProgressCounter(None, 2), rows)
    learned = [rows[r, design.fold[r] != k].sum() for r in range(2) for k in range(5)]

    curve = both["age"].metrics["learning_curve"]

    assert curve["scores"]["embeddings"][1]["mean"] == np.mean([f["mae"] for f in folds])
    assert curve["n_participants"][1] == np.mean(learned)


def test_intervals_grow_with_fewer_to_learn_from(both):
    points = both["age"].metrics["learning_curve"]["scores"]["dummy"]
    widths = [high - low for low, high in (p["ci95"] for p in points)]

    assert widths[0] > widths[-1]


def test_participants_are_counted_once_whatever_their_images():
    two = np.repeat(np.arange(80), 2)

    curve = predict_phenotype(X[two], AGE[two], PEOPLE[two], **FEW).metrics["learning_curve"]

    assert curve["n_participants"] == [8, 16, 32, 64]


@pytest.mark.parametrize(
    ("features", "voxels", "words"),
    [
        (
            X,
            X[:, 2:],
            "With 8 labeled participants, the embeddings predict age as well, on average",
        ),
        (X[:, 2:], X, "With all 64 labeled participants, the embeddings do not predict age"),
        (X, X, "It takes all 64 labeled participants for the embeddings to predict age"),
    ],
)
def test_the_sentence_says_how_many_are_needed(features, voxels, words):
    curve = predict_phenotype(
        features, AGE, PEOPLE, target="age", baselines={"voxels": voxels}, **FEW
    ).metrics["learning_curve"]

    assert curve["sentence"].startswith(words)
    assert (
        "From 32 to 64 participants, the mean absolute error of the embeddings goes from"
        in (curve["sentence"])
    )


def test_a_small_cohort_has_one_size_and_a_sentence_that_says_so():
    curve = predict_phenotype(X[:12], AGE[:12], PEOPLE[:12], **FEW).metrics["learning_curve"]

    assert curve["shares"] == [1.0]
    assert "too few participants for a learning curve" in curve["sentence"]


def test_it_can_be_turned_off_and_changes_nothing_else(both):
    off = predict_phenotype(X, AGE, PEOPLE, learning_curve=False, **FEW)
    some = predict_phenotype(X, AGE, PEOPLE, learning_curve=[0.3, 0.01, 1], **FEW)

    assert off.metrics["learning_curve"] is None
    assert off.summary()["half"] is None
    assert off.metrics["scores"] == both["age"].metrics["scores"] == some.metrics["scores"]
    assert some.metrics["learning_curve"]["shares"] == [0.3, 1.0]
    pd.testing.assert_frame_equal(off.predictions, some.predictions)


@pytest.mark.parametrize("shares", [[0.0], [1.5], ["half"], [float("nan")], "half", [True]])
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(UsageError, match="learning_curve is True, False, or shares"):
        predict_phenotype(X, AGE, PEOPLE, learning_curve=shares)


def test_progress_counts_every_step_of_the_curve():
    told = []

    predict_phenotype(
        X,
        AGE,
        PEOPLE,
        baselines={"u": [X, X]},
        site=["a", "b"] * 40,
        progress=lambda done, steps: told.append((done, steps)),
        **(FEW | {"n_permutations": 19}),
    )

    steps = told[0][1]
    assert told == [(i + 1, steps) for i in range(steps)]
    # Two repeats of four features (the site alone is one) at four sizes and a permutation step; the
    # site, decoded before and after harmonization, the same; four features at two new sites, and a
    # permutation step within sites.
    assert steps == (2 * 4 * 4 + 1) + 2 * (2 + 1) + 4 * 2 + 1

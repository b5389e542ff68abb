from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from nidl_dcl.evaluation.bootstrap import bootstrap_groups, bootstrap_units
from nidl_dcl.evaluation.folds import Units, make_units
from nidl_dcl.evaluation.metrics import prediction_scores


def units_of(values, groups=None) -> Units:
    """Return a unit for each value, of a participant each; groups default to these."""
    people = np.array([f"sub-{i:03}" for i in range(len(values))], dtype=object)
    groups = people if groups is None else np.asarray(groups, dtype=object)
    return make_units(np.asarray(values, dtype=float), people, groups)


def scored(values, predicted, labels=(), groups=None, key="test"):
    units = units_of(values, groups)
    by_unit = units.by_unit(np.asarray(predicted, dtype=float))

    def score(rows, weight):
        return prediction_scores(units.value[rows], by_unit[rows], weight, labels)

    return bootstrap_units(score, units, bool(labels), key)


def classes(*sizes):
    """Return positions of classes, and probabilities that are wrong for every third of each."""
    truth = np.repeat(np.arange(len(sizes)), sizes)
    right = np.concatenate([np.arange(n) % 3 > 0 for n in sizes])
    said = np.where(right, truth, (truth + 1) % len(sizes))
    return truth, 0.1 + 0.8 * np.eye(len(sizes))[said]


def test_the_interval_of_a_mean_error_is_that_of_scipy():
    rng = np.random.default_rng(0)
    errors = rng.exponential(size=50)

    found = scored(np.zeros(50), errors)["mae"]

    expected = bootstrap(
        (errors,), np.mean, method="percentile", n_resamples=5000, rng=rng
    ).confidence_interval
    assert found["mean"] == pytest.approx(errors.mean())
    np.testing.assert_allclose(found["ci95"], expected, rtol=0.05)
    assert found == scored(np.zeros(50), errors)["mae"]
    assert found != scored(np.zeros(50), errors, key="another")["mae"]


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_fewer_than_five_participants_have_scores_and_no_interval(n):
    values = np.arange(n) * 10.0

    found = scored(values, values + np.arange(n))["mae"]

    assert found["mean"] == pytest.approx((n - 1) / 2)
    assert (found["ci95"] is None) == (n < 5)


@pytest.mark.parametrize(("n", "known"), [(2, False), (4, False), (5, True)])
def test_a_class_of_fewer_than_five_has_scores_and_no_interval(n, known):
    found = scored(*classes(40, n), labels=("a", "b"))

    assert all(score["mean"] is not None for score in found.values())
    assert [score["ci95"] is not None for score in found.values()] == [known] * len(found)


def test_families_count_once_for_the_classes_that_they_have():
    truth, said = classes(12, 12)
    few, many = np.arange(24) // 6, np.arange(24) % 6

    assert scored(truth, said, ("a", "b"), few)["balanced_accuracy"]["ci95"] is None
    assert scored(truth, said, ("a", "b"), many)["balanced_accuracy"]["ci95"] is not None


def test_a_draw_that_lacks_a_class_is_left_out():
    rare = np.array([1] * 5 + [0] * 100)
    units, lacking = units_of(rare), []

    def score(rows, weight):
        lacking.append(len(np.unique(units.value[rows])) < 2)
        return {"all classes": 0.0 if lacking[-1] else 1.0 + weight.max()}

    found = bootstrap_units(score, units, True, "test")

    assert any(lacking)
    assert found["all classes"]["ci95"][0] > 1


def test_a_score_that_a_tenth_of_the_draws_do_not_define_has_no_interval():
    def score(count):
        missing = {name: count[:n].sum() == 0 for name, n in (("two", 2), ("three", 3))}
        return {name: np.nan if gone else float(count[0]) for name, gone in missing.items()}

    found = bootstrap_groups(score, 20, "test")  # lacking two: 12 % of the draws, three: 4 %

    assert found["two"] == {"mean": 1.0, "ci95": None}
    assert found["three"]["ci95"] is not None


def test_a_constant_target_has_an_error_with_an_interval_and_nothing_else():
    found = scored(np.full(12, 0.1), np.arange(12.0))  # whose mean is not 0.1 but for rounding

    assert found["mae"]["ci95"][0] < found["mae"]["mean"] < found["mae"]["ci95"][1]
    assert found["r2"] == found["r"] == {"mean": None, "ci95": None}


def test_a_score_that_no_draw_changes_has_no_interval():
    truth = np.repeat([0, 1], 10)

    found = scored(truth, np.eye(2)[truth], labels=("a", "b"))

    assert set(map(str, found.values())) == {"{'mean': 1.0, 'ci95': None}"}

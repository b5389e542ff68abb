from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.evaluation.folds import make_design
from nidl_dcl.evaluation.targets import read_target


def _design(y, groups, participants=None, **options):
    groups = np.array([str(g) for g in groups], dtype=object)
    people = groups if participants is None else np.array(participants, dtype=object)
    target = read_target(y, groups, name="age")
    return make_design(
        target, people, groups, **({"n_splits": 5, "n_repeats": 3, "seed": 0} | options)
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 14), min_size=40, max_size=80), st.integers(0, 5))
def test_groups_never_straddle_and_every_row_is_tested_once_per_repeat(members, seed):
    groups = np.array([*range(15), *members])
    y = np.random.default_rng(seed).normal(size=len(groups))

    design = _design(y, groups, seed=seed)

    for repeat in range(3):
        fold = design.row_folds[repeat]
        for g in np.unique(groups):
            assert len(set(fold[groups == g])) == 1
        assert set(fold) == set(range(5))


def test_every_fold_holds_every_class_in_proportion():
    y = np.array(["a"] * 50 + ["b"] * 10)

    design = _design(y, range(60))

    for fold in design.fold:
        for k in range(5):
            assert list(np.bincount(design.value[fold == k].astype(int))) == [10, 2]


def test_every_fold_covers_the_range_of_a_number():
    y = np.random.default_rng(0).uniform(20, 80, size=50)

    design = _design(y, range(50))

    for fold in design.fold:
        for k in range(5):
            ranks = np.sort(np.argsort(np.argsort(y))[fold[design.group[design.unit]] == k])
            assert (ranks // 5 == np.arange(10)).all()


def test_the_order_of_rows_changes_nobodys_fold():
    rng = np.random.default_rng(0)
    groups, y = np.arange(40), rng.normal(size=40)
    order = rng.permutation(40)

    straight, mixed = _design(y, groups), _design(y[order], groups[order])

    np.testing.assert_array_equal(straight.row_folds[0][order], mixed.row_folds[0])


def test_repeats_and_seeds_give_other_folds():
    y = np.random.default_rng(0).normal(size=40)
    design = _design(y, range(40))

    assert (design.fold[0] != design.fold[1]).any()
    assert (design.fold != _design(y, range(40), seed=1).fold).any()


@pytest.mark.parametrize(
    ("y", "n_folds"),
    [
        (np.arange(8) + 0.5, 4),
        (np.arange(6) + 0.5, 3),
        (np.arange(50) + 0.5, 5),
        (["a"] * 30 + ["b"] * 4, 4),
        (["a"] * 3 + ["b"] * 3, 3),
    ],
)
def test_few_participants_mean_fewer_folds(y, n_folds):
    assert _design(y, range(len(y))).n_folds == n_folds


def test_fewer_than_six_participants_are_an_error():
    with pytest.raises(InputsUnusableError, match=r"known for 5 participants.*needs 6"):
        _design(np.arange(10) + 0.5, np.arange(10) // 2)


def test_images_that_share_a_value_are_scored_once_and_participants_weigh_the_same():
    groups = np.array([0, 0, 0, 1, 1, 1, *range(2, 10)])
    y = np.array([50.5, 50.5, 50.5, 60.5, 61.5, 61.5, *np.arange(20, 28)])

    design = _design(y, groups)

    assert len(set(design.unit[:3])) == 1
    assert len(set(design.unit[3:6])) == 2
    assert design.weight[design.unit[0]] == 1
    assert design.weight[design.unit[3]] == 0.5
    assert design.weight.sum() == design.n_participants == 10
    predictions = np.arange(14.0)
    assert design.by_unit(predictions)[design.unit[0]] == 1.0
    assert design.by_unit(predictions)[design.unit[4]] == 4.5


def test_the_ratio_is_that_of_the_actual_folds():
    y = np.arange(11) + 0.5

    expected = np.mean([3 / 8, 2 / 9, 2 / 9, 2 / 9, 2 / 9])
    assert _design(y, range(11)).ratio == pytest.approx(expected)

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.confounds import confound_reasons, encode_confounds, read_confounds

N = 60
RNG = np.random.default_rng(0)
PEOPLE = np.array([f"sub-{i:02}" for i in range(N)], dtype=object)
AGE = RNG.uniform(20, 80, N)
SEX = np.array(["F", "M"], dtype=object)[RNG.integers(0, 2, N)]
NOBODY = np.zeros(N, dtype=bool)


def _confounds(table):
    return encode_confounds(read_confounds(table, PEOPLE, NOBODY, "target"), np.arange(N), PEOPLE)


def test_a_category_that_training_has_not_is_taken_as_an_average_row():
    group = np.where(np.arange(N) < 50, SEX, "X")
    confounds = _confounds(pd.DataFrame({"group": group}))
    train, test = np.arange(50), np.arange(50, N)

    np.testing.assert_allclose(
        confounds.rows(train, test), np.tile(confounds.matrix[train].mean(axis=0), (10, 1))
    )
    np.testing.assert_array_equal(confounds.rows(train, train), confounds.matrix[train])


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (AGE, "numeric"),
        ([*map(str, AGE.round(1))], "numeric"),
        (SEX, "categorical"),
        (np.arange(N) % 2, "categorical"),
        (np.arange(N) % 4, "categorical"),
        (np.arange(N) % 2 == 0, "categorical"),
    ],
    ids=["numbers", "text of numbers", "text", "two codes", "four codes", "bool"],
)
def test_confounds_are_told_apart_by_the_rules_for_targets(values, kind):
    read = read_confounds(pd.DataFrame({"x": values}), PEOPLE, NOBODY, "target")

    confounds = encode_confounds(read, np.arange(N), PEOPLE)

    assert confounds.columns["x"]["kind"] == kind
    assert confounds.matrix.shape[1] == (1 if kind == "numeric" else len(set(values)))


def test_rows_held_out_decide_nothing_about_a_confound():
    few = np.arange(N) < 50
    table = pd.DataFrame({"group": np.where(few, np.arange(N) % 2, AGE), "scanner": SEX})
    table.loc[~few, "scanner"] = "new"

    read = read_confounds(table, PEOPLE, ~few, "target")
    confounds = encode_confounds(read, np.arange(N), PEOPLE, 50)

    assert confounds.names == ("group=0", "group=1", "scanner=F", "scanner=M")
    train = np.arange(50)
    np.testing.assert_allclose(
        confounds.rows(train, np.flatnonzero(~few)), [confounds.matrix[:50].mean(axis=0)] * 10
    )


def test_a_row_without_a_confound_has_a_reason():
    table = pd.DataFrame({"age": [None, *AGE[1:]], "sex": [None, None, *SEX[2:]]})

    reasons = confound_reasons(read_confounds(table, PEOPLE, NOBODY, "target"), N)

    assert list(reasons[:3]) == ["confound missing: age", "confound missing: sex", ""]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pd.DataFrame({"target": AGE}), "is the target"),
        (pd.DataFrame({"age": np.ones(N)}), "is constant"),
        (pd.DataFrame({"who": PEOPLE}), "60 participants: too little would be left"),
        (pd.DataFrame(np.column_stack([AGE, AGE]), columns=["age", "age"]), "given twice"),
    ],
    ids=["target", "constant", "as many categories as participants", "twice"],
)
def test_confounds_that_cannot_be_removed_are_refused(table, said):
    with pytest.raises(UsageError, match=said):
        _confounds(table)

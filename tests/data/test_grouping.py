from __future__ import annotations

import numpy as np
import pytest

from nidl_dcl.data.grouping import connected_groups


@pytest.mark.parametrize(
    ("people", "labels", "expected"),
    [
        ("abc", [], "abc"),
        ("aab", [], "aab"),
        ("abc", [["x", None, "x"]], "aba"),
        ("abc", [["x", "x", None], [None, "y", "y"]], "aaa"),  # a chain over two labels
        ("abca", [[None, "x", None, "x"]], "aaca"),  # one image of a participant is enough
        ("cba", [["x", "y", "x"]], "aba"),
        ("ab", [[np.nan, np.nan]], "ab"),  # not known is not the same
        ("ab", [["a", "b"], ["b", "a"]], "ab"),  # labels of two kinds have nothing in common
    ],
)
def test_rows_that_share_a_label_are_one_group_named_by_its_first(people, labels, expected):
    assert connected_groups(list(people), *labels) == list(expected)


def test_nobody_is_a_group_of_none():
    assert connected_groups([]) == []

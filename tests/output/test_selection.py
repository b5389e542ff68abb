from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from nidl_dcl.output.embeddings import COLUMNS, Embeddings
from nidl_dcl.output.selection import Selection, merge_embeddings, merge_inputs, merge_matches

INPUTS = ("participant_id", "session_id", "path", "status", "code", "message")
MATCHES = ("participant_id", "id", "rule", "source")


def rows(*ids: tuple[str, str | None, int]) -> pd.DataFrame:
    """Return a table of embeddings of (participant, session, run)."""
    names = [f"bids:raw:{p}/{p}_{s or 'x'}_run-{r}_T1w.nii.gz" for p, s, r in ids]
    listed = [
        (p, s, str(r), name, "holdout", "0") for (p, s, r), name in zip(ids, names, strict=True)
    ]
    return pd.DataFrame(listed, columns=list(COLUMNS), dtype=object)


def test_embeddings_of_selections_are_sorted_and_complete_in_any_order() -> None:
    ids = [(f"sub-{p:02d}", "ses-1", r) for p in range(1, 5) for r in (1, 2, 10)]
    matrix = np.arange(len(ids), dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    wanted = Embeddings(rows(*ids), matrix, {"model_sha256": "a"})
    for order in itertools.permutations(range(4)):
        found = None
        for person in order:
            own = slice(3 * person, 3 * person + 3)
            part = Embeddings(wanted.table.iloc[own], matrix[own], wanted.config)
            found = merge_embeddings(found, part, Selection.of([f"{person + 1:02d}"], []))
        assert found is not None
        assert found.table["source"].tolist() == wanted.table["source"].tolist()
        assert np.array_equal(found.matrix, matrix)


def test_an_image_that_is_gone_loses_its_row_within_the_selection_only() -> None:
    ids = [("sub-01", "ses-1", 1), ("sub-01", "ses-2", 1), ("sub-02", "ses-1", 1)]
    before = Embeddings(rows(*ids), np.eye(3, dtype=np.float32))
    now = Embeddings(rows(("sub-01", "ses-2", 2)), np.full((1, 3), 7, np.float32))
    found = merge_embeddings(before, now, Selection.of(["01"], ["2"]))
    assert list(found.table["source"]) == list(
        rows(ids[0], ("sub-01", "ses-2", 2), ids[2])["source"]
    )
    assert found.matrix[:, 0].tolist() == [1, 7, 0]


def test_inputs_of_sessions_list_nobody_with_an_image_as_one_without() -> None:
    def table(*found: tuple[str, str | None, str | None, str]) -> pd.DataFrame:
        return pd.DataFrame([(*row, row[3], "x") for row in found], columns=list(INPUTS))

    first = table(("sub-1", "ses-a", "sub-1_a", "ok"), ("sub-2", None, None, "skip"),
                  ("sub-3", None, None, "skip"))  # fmt: skip
    second = table(("sub-1", None, None, "skip"), ("sub-2", "ses-b", "sub-2_b", "ok"),
                   ("sub-3", None, None, "skip"))  # fmt: skip
    a, b = Selection.of([], ["a"]), Selection.of([], ["ses-b"])
    found = merge_inputs(merge_inputs(None, first, a), second, b)
    assert found["participant_id"].tolist() == ["sub-1", "sub-2", "sub-3"]
    assert found["status"].tolist() == ["ok", "ok", "skip"]
    again = merge_inputs(merge_inputs(None, second, b), first, a)
    pd.testing.assert_frame_equal(found, again)
    pd.testing.assert_frame_equal(merge_inputs(found, first, a), found)


def test_matches_of_selections_make_those_of_the_whole_in_any_order() -> None:
    people = ["sub-2", "sub-10", "sub-1"]
    table = [(p, p, "exact", "participants.tsv") for p in people]
    absent = [
        ("sub-1", None, "none", "phenotype/x.tsv"),
        ("sub-2", None, "none", "phenotype/x.tsv"),
    ]
    for order in itertools.permutations(people):
        found = None
        for person in order:
            own = [row for row in absent if row[0] == person]
            sessions = (person, person, "exact", "sub-*_sessions.tsv")
            part = pd.DataFrame([*table, *own, sessions], columns=list(MATCHES), dtype=object)
            found = merge_matches(found, part, Selection.of([person], []))
        assert found is not None
        names = found["participant_id"].tolist()
        assert names == [*people, "sub-1", "sub-2", *sorted(people)]

from __future__ import annotations

import numpy as np
import pytest

from nidl_dcl.evaluation.retrieval import distance_to_others, retrieve_participants


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("n", [3, 30, 700])
def test_distance_is_the_mean_of_the_five_nearest_images_of_others(n: int) -> None:
    rng = np.random.default_rng(0)
    rows, persons = rng.normal(size=(n, 6)), [f"sub-{i // 2}" for i in range(n)]
    found = distance_to_others(rows, persons)
    for i in rng.choice(n, 3, replace=False):
        others = [1 - cosine(rows[i], rows[j]) for j in range(n) if persons[j] != persons[i]]
        assert found[i] == pytest.approx(np.mean(sorted(others)[:5]), abs=1e-5)


def test_whoever_is_alone_has_no_distance() -> None:
    assert np.isnan(distance_to_others(np.ones((3, 2)), ["sub-1"] * 3)).all()


def test_retrieval_is_what_a_loop_over_images_finds() -> None:
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(40), 2)[:-7]
    session = np.tile(["ses-1", "ses-2"], 40)[: len(who)]
    rows = rng.normal(size=(40, 8))[who] + 0.9 * rng.normal(size=(len(who), 8))
    table, words = retrieve_participants(
        {"embeddings": [rows]}, [f"sub-{w}" for w in who], list(session), [""] * len(who)
    )
    hits, chances = [], []
    for i in range(len(who)):
        asked = [
            j for j in range(len(who)) if j != i and (who[j], session[j]) != (who[i], session[i])
        ]
        if not any(who[j] == who[i] for j in asked):
            continue
        best = max(asked, key=lambda j: cosine(rows[i], rows[j]))
        hits.append(who[best] == who[i])
        chances.append(np.mean([who[j] == who[i] for j in asked]))
    row = table.iloc[0]
    assert 0.1 < row["share"] < 0.95
    assert row["share"] == pytest.approx(np.mean(hits))
    assert row["chance"] == pytest.approx(np.mean(chances))
    assert row["n_images"] == len(hits) == 72
    assert row["n_participants"] == 36
    assert row["low"] < row["share"] < row["high"]
    assert words["unit"] == "session"
    assert f"(chance {100 * row.chance:.2g}%)" in words["sentence"]


def test_images_of_the_same_session_do_not_count_where_there_are_sessions() -> None:
    rows = np.array([[1, 0], [1, 0.01], [0, 1], [0.6, 0.7]], dtype=float)
    persons, sessions = ["a", "a", "a", "b"], ["1", "1", "2", "1"]
    table, _ = retrieve_participants({"x": [rows]}, persons, sessions, [""] * 4)
    assert table["share"].item() == 0  # the nearest is b, twins within the session are barred
    table, words = retrieve_participants({"x": [rows]}, persons, [None] * 4, [""] * 4)
    assert table["share"].item() == pytest.approx(2 / 3)
    assert words["unit"] == "image"


def test_copies_of_an_image_count_once() -> None:
    rows = np.array([[1.0, 0], [1, 0], [0, 1]])
    table, words = retrieve_participants(
        {"x": [rows]}, ["a", "a", "b"], ["1", "2", "1"], ["same", "same", "other"]
    )
    assert table.empty
    assert "No participant has a second image" in words["sentence"]


def test_several_seeds_are_averaged() -> None:
    good, bad = np.eye(4)[[0, 0, 1, 1]], np.eye(4)[[0, 1, 0, 1]]
    persons, sessions = ["a", "a", "b", "b"], ["1", "2", "1", "2"]
    table, words = retrieve_participants(
        {"embeddings": [good], "untrained": [good, bad]}, persons, sessions, [""] * 4
    )
    assert table["share"].tolist() == [1.0, 0.5]
    assert table["chance"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert "untrained 50%" in words["sentence"]


def test_the_interval_is_of_the_seed() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(150, 8)), 2, axis=0) + rng.normal(size=(300, 8))
    given = ({"x": [rows]}, [f"sub-{i // 2}" for i in range(300)], ["1", "2"] * 150, [""] * 300)
    first, again = (retrieve_participants(*given, seed=3)[0] for _ in range(2))
    assert first.equals(again)
    assert not first.equals(retrieve_participants(*given, seed=4)[0])

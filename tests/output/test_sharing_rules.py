from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from nidl_dcl.io.formats import write_tsv
from nidl_dcl.output.pseudonyms import Pseudonyms
from nidl_dcl.output.sharing_rules import SharingRules, hide_few, largest_share, n_changed


@pytest.mark.parametrize(
    ("images", "many"),
    [
        ([1] * 20, True),
        ([1] * 19, False),
        ([2] * 20, True),
        ([2] + [1] * 20, False),  # 2 of 22
        ([2] + [1] * 38, True),
        ([100] + [1] * 30, False),
    ],
)
def test_an_average_is_of_many_if_nobody_has_more_than_a_twentieth(
    images: list[int], many: bool
) -> None:
    participants = pd.Series([f"sub-{i}" for i, n in enumerate(images) for _ in range(n)])
    assert (largest_share(participants) <= 1 / 20) is many


def average_of(volumes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return mean and standard deviation, as they are kept."""
    return np.stack([volumes.mean(axis=0), volumes.std(axis=0)])


@pytest.mark.parametrize("n", [20, 57, 400])
def test_a_voxel_is_shown_only_where_ten_participants_have_signal(n: int) -> None:
    rng = np.random.default_rng(n)
    there = np.arange(n)[:, None] < np.arange(n + 1)  # in voxel k, k of the n
    volumes = (there * rng.uniform(0.2, 1.5, there.shape)).astype(np.float32)[:, :, None, None]
    shown = hide_few(average_of(volumes), 1 / n)[:, 0, 0]
    assert (shown[:10] == 0).all()
    np.testing.assert_array_equal(shown[shown > 0], volumes.mean(axis=0)[:, 0, 0][shown > 0])
    assert (shown[-n // 4 :] > 0).all()


def test_a_head_that_lies_askew_is_not_seen_in_the_average() -> None:
    heads = np.zeros((40, 12, 12, 12), np.float32)
    heads[:, 4:8, 4:8, 4:8] = np.random.default_rng(0).uniform(0.5, 1.0, (40, 4, 4, 4))
    heads[7] = 0
    heads[7, :4, :4, :4] = 1.0
    assert heads.mean(axis=0)[0, 0, 0] > 0
    shown = hide_few(average_of(heads), 1 / 40)
    assert (shown[:4, :4, :4] == 0).all()
    assert (shown[4:8, 4:8, 4:8] > 0).all()


def test_the_images_of_one_participant_count_as_one() -> None:
    volumes = np.zeros((40, 1, 1, 1), np.float32)
    volumes[:18] = 1.0  # nine participants with two images each
    average = average_of(volumes)
    assert hide_few(average, 1 / 40).max() > 0
    assert hide_few(average, 2 / 40).max() == 0


def test_participants_are_counted_who_came_went_or_have_other_images() -> None:
    def images(*pairs: tuple[str, str]) -> pd.DataFrame:
        return pd.DataFrame(pairs, columns=["participant_id", "source"])

    before = images(("a", "1"), ("a", "2"), ("b", "1"), ("c", "1"))
    assert n_changed(before, before.iloc[::-1]) == 0
    assert n_changed(before, images(("a", "1"), ("a", "2"), ("b", "1"), ("d", "1"))) == 2
    assert n_changed(before, images(("a", "1"), ("a", "3"), ("b", "1"), ("c", "1"))) == 1


def test_rows_of_folds_follow_the_predictions_to_their_new_places(tmp_path: Path) -> None:
    names = Pseudonyms(b"k" * 32)
    ids = [f"sub-{i:02d}" for i in range(8)]
    columns = {"participant_id": ids, "target": range(8), "reason": "n/a", "status": "ok"}
    predictions = tmp_path / "desc-dclAge_predictions.tsv"
    write_tsv(predictions, pd.DataFrame(columns))
    folds = {"test": "fold", "features": "embeddings", "source": 0, "repeat": 0, "fold": 0}
    folds |= {"site": None, "row": range(8), "unit": range(8), "weight": 1.0}
    write_tsv(tmp_path / "desc-dclAge_folds.tsv", pd.DataFrame(folds | {"observed": range(8)}))
    rules = SharingRules(tmp_path, names)

    shared, table = (
        pd.read_csv(io.BytesIO(rules.apply(name) or b""), sep="\t")
        for name in ("desc-dclAge_predictions.tsv", "desc-dclAge_folds.tsv")
    )

    assert list(shared["target"]) != list(range(8))
    assert list(table["row"]) == list(range(8))
    assert list(table["unit"]) == list(range(8))  # not in the order of the names any more
    assert list(shared["target"].iloc[table["row"]]) == list(table["observed"])

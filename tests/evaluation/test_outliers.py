from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.evaluation.outliers import rank_outliers, robust_z


def measured(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "participant_id": [f"sub-{i:02d}" for i in range(n)],
            "embedding_distance": rng.normal(0.3, 0.02, n),
            "brain_distance": rng.normal(0.2, 0.02, n),
            "noise": rng.normal(1, 0.05, n),
            "sharpness": rng.normal(2, 0.1, n),
        }
    )


def test_robust_z_of_normal_values_is_about_their_z() -> None:
    values = pd.Series(np.random.default_rng(0).normal(3, 2, 20_000))
    np.testing.assert_allclose(robust_z(values), (values - 3) / 2, atol=0.1)


@pytest.mark.parametrize("values", [[1.0, 2, 3, 4], [1.0] * 9 + [2], [np.nan] * 8])
def test_without_a_usual_range_there_is_no_z(values: list[float]) -> None:
    assert robust_z(pd.Series(values)).isna().all()


def test_planted_faults_come_first_with_their_reasons() -> None:
    table = measured()
    table.loc[7, "noise"] = 2.5
    table.loc[7, "sharpness"] = 1.2
    table.loc[31, "embedding_distance"] = 0.45
    ranked = rank_outliers(table)
    assert ranked["participant_id"].tolist()[:2] == ["sub-07", "sub-31"]
    assert ranked["rank"].tolist() == list(range(1, 61))
    assert ranked["reasons"][0].startswith("noisy (z ")
    assert "; blurred (z " in ranked["reasons"][0]
    assert ranked["reasons"][1].startswith("far from all others in the embeddings")
    assert ranked["flagged"].tolist()[:2] == ["yes", "yes"]


def test_good_quality_is_no_fault_and_nobody_is_removed() -> None:
    table = measured()
    table.loc[7, "noise"] = 0.1
    table.loc[8, "sharpness"] = 5.0
    ranked = rank_outliers(table)
    assert set(ranked["flagged"]) == {"no"}
    assert sorted(ranked["participant_id"]) == sorted(table["participant_id"])
    assert ranked["reasons"].isna().all()


def test_worst_z_is_the_largest_and_missing_measures_are_left_out() -> None:
    table = measured().drop(columns="brain_distance")
    table.loc[3, ["embedding_distance", "noise", "sharpness"]] = np.nan
    ranked = rank_outliers(table)
    z = ranked[[c for c in ranked if c.endswith("_z") and c != "worst_z"]]
    assert list(z) == ["embedding_distance_z", "noise_z", "sharpness_z"]
    np.testing.assert_allclose(ranked["worst_z"], z.max(axis=1))
    assert ranked["participant_id"].iloc[-1] == "sub-03"

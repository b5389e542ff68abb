from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.evaluation.cohort import cohort_columns, compare_cohorts, describe_cohort
from nidl_dcl.volumes.quality import QUALITY_METRICS


def test_a_cohort_counts_each_participant_once() -> None:
    images = pd.DataFrame({"age": [20.0, 40.0, 50.0], "Sex": ["F", "F", pd.NA]})
    who = np.array(["sub-1", "sub-1", "sub-2"], dtype=object)
    quality = pd.DataFrame({name: [1.0, 3.0, np.nan] for name in QUALITY_METRICS})
    told = describe_cohort(images, who, cohort_columns(images, None), quality)
    assert told["n_participants"] == 2
    assert told["age"] == {"mean": 40.0, "sd": pytest.approx(np.std([30, 50], ddof=1)), "n": 2}
    assert told["sex"] == {"F": 1}
    assert told["site"] is None
    assert told["quality"]["noise"] == {"mean": 2.0, "sd": None, "n": 1}
    told["target"] = {"name": "x", "classes": {"a": 1}}
    assert compare_cohorts(told, told)["age"]["standardized_difference"] == 0.0

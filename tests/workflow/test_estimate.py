from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from nidl_dcl.workflow import estimate
from nidl_dcl.workflow.factory import new_model
from nidl_dcl.workflow.options import PredictionOptions, TrainingOptions


@pytest.fixture
def images() -> pd.DataFrame:
    """Return a table of thirty images with an age and a site."""
    people = [f"sub-{i:02d}" for i in range(30)]
    table = {"group_id": people, "age": np.arange(30.0), "site": ["a", "b"] * 15}
    return pd.DataFrame(table)


def test_one_repeat_and_a_few_permutations_stand_for_all(
    images: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([3.0, 1.0, 1.5])  # a repeat with baselines, one without, one with 20 permutations
    monkeypatch.setattr(estimate, "_timed", lambda call: (next(times), None))
    options = PredictionOptions()
    seconds = estimate.prediction_seconds(images, "age", None, options, n_features=4, n_voxels=9)
    assert seconds == pytest.approx(5 * 3.0 + 200 * 0.5 / 20)


def test_a_prediction_is_really_tried(
    images: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    original = estimate.predict_phenotype

    def seen(*args: Any, **more: Any) -> Any:
        calls.append(more)
        return original(*args, **more)

    seen.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(estimate, "predict_phenotype", seen)
    options = PredictionOptions()
    seconds = estimate.prediction_seconds(images, "age", "site", options, n_features=4, n_voxels=9)
    assert 0 < seconds < 600
    assert set(calls[0]["baselines"]) == {"untrained", "voxels"}
    assert list(calls[0]["site"]) == list(images["site"])
    tiny = images.iloc[:4]
    assert estimate.prediction_seconds(tiny, "age", None, options, n_features=4, n_voxels=9) == 0


def test_encoding_reading_and_hidden_blocks_are_measured_on_volumes() -> None:
    axis = torch.linspace(-1, 1, 24)
    volume = ((axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) < 0.8).float()[None]
    seconds, n_features = estimate.measure_encoding(new_model(TrainingOptions(), 0), [volume])
    assert 0 < seconds < 10
    assert n_features == 64 * new_model(TrainingOptions(), 0).encoder.n_features
    seconds, n_voxels = estimate.measure_reading([volume], (4.0, 4.0, 4.0))
    assert 0 < seconds < 10
    assert n_voxels == 12**3
    one, two = (estimate.occlusion_images(volume, (8.0, 8.0, 8.0), n) for n in (1, 2))
    assert 0 < two - one < one < 20_000


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.234, "0.23 s"), (42.1, "42 s"), (282, "5 min"), (7300, "2.0 h")]
)
def test_durations_are_said_in_words(seconds: float, words: str) -> None:
    assert estimate.duration(seconds) == words

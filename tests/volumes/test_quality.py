from __future__ import annotations

import numpy as np
import pytest

from nidl_dcl.volumes.quality import QUALITY_METRICS, measure_quality


def ball(noise: float, blur: float = 0.0) -> np.ndarray:
    """Return a smooth ball in an empty field, with white noise inside."""
    grid = np.stack(np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    white = np.random.default_rng(0).normal(scale=noise, size=radius.shape)
    inside = 0.65 + 0.15 * np.sin(radius / (2.0 + blur))
    return ((inside + white) * (radius < 16)).astype(np.float32)


def test_image_quality_measures_what_its_names_say() -> None:
    clean, noisy = (measure_quality(ball(noise), (2.0, 2.0, 2.0)) for noise in (0.0, 0.1))
    assert noisy["noise"] == pytest.approx(0.1, rel=0.1)
    assert clean["noise"] < 0.02
    assert clean["contrast_to_noise"] > 5 * noisy["contrast_to_noise"]
    blurred = measure_quality(ball(0.0, blur=4.0), (2.0, 2.0, 2.0))
    assert blurred["sharpness"] < 0.6 * clean["sharpness"]
    half = measure_quality(ball(0.0), (1.0, 1.0, 1.0))
    assert half["sharpness"] == pytest.approx(2 * clean["sharpness"])
    empty = measure_quality(np.zeros((8, 8, 8), np.float32), (1.0, 1.0, 1.0))
    assert {*clean} == {*QUALITY_METRICS} - {"voxel_mm"} == {*empty}
    assert all(np.isnan(value) for value in empty.values())

from __future__ import annotations

import math

import pytest
import torch

from nidl_dcl.models.collapse import CollapseMonitor, alignment, effective_rank, uniformity


def test_alignment_is_zero_for_the_same_and_four_for_opposite_views() -> None:
    h = torch.randn(6, 3)
    assert alignment(h, 2 * h) == pytest.approx(0, abs=1e-12)
    assert alignment(h, -h) == pytest.approx(4, rel=1e-6)


def test_uniformity_is_zero_at_collapse_and_falls_as_rows_move_apart() -> None:
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(apart) == pytest.approx(-8, rel=1e-5)
    assert uniformity(torch.ones(1, 3)) == 0


def test_effective_rank_counts_directions() -> None:
    orthogonal = torch.cat([torch.eye(4), -torch.eye(4)])
    assert effective_rank(orthogonal) == pytest.approx(4, rel=1e-6)
    line = torch.arange(5.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_rank(line) == pytest.approx(1, rel=1e-6)
    assert effective_rank(torch.full((7, 3), 0.1)) == 0


def test_a_monitor_measures_what_it_kept_and_names_the_level_of_collapse() -> None:
    monitor = CollapseMonitor()
    assert monitor.measure() == {}
    for _ in range(4):
        monitor.add(torch.ones(400, 3), torch.ones(400, 3), 400)
    found = monitor.measure()
    assert monitor.kept == 1200
    assert found["collapse_loss"] == pytest.approx(math.log(798))
    assert found["alignment"] == found["effective_rank"] == 0


def test_measures_of_regions_are_means_of_those_of_each() -> None:
    h1, h2 = torch.randn(2, 20, 3, 4).unbind()
    monitor = CollapseMonitor()
    monitor.add(h1, h2, 20)
    found = monitor.measure()
    each = []
    for k in range(3):
        alone = CollapseMonitor()
        alone.add(h1[:, k], h2[:, k], 20)
        each.append(alone.measure())
    for name, value in found.items():
        assert value == pytest.approx(sum(m[name] for m in each) / 3, rel=1e-6), name


def test_measuring_regions_is_limited_to_some_samples_and_regions() -> None:
    monitor = CollapseMonitor()
    for _ in range(20):
        monitor.add(torch.randn(32, 1000, 2), torch.randn(32, 1000, 2), 32)
    kept = torch.cat([h for h, _ in monitor.views])
    assert kept.shape[0] == 128
    assert 32 < kept.shape[1] <= 64
    assert monitor.measure()["effective_rank"] == pytest.approx(2, abs=0.1)

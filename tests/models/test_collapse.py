from __future__ import annotations

import math

import pytest
import torch

from nidl_dcl.models import collapse
from nidl_dcl.models.collapse import CollapseMonitor
from nidl_dcl.models.metrics import effective_rank


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


def test_the_cost_of_measuring_long_embeddings_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def measured(h: torch.Tensor) -> float:
        sizes.append(tuple(h.shape))
        return effective_rank(h[:8])

    monkeypatch.setattr(collapse, "effective_rank", measured)
    for length in (512, 2048):
        monitor = CollapseMonitor()
        monitor.add(torch.randn(1500, length), torch.randn(1500, length), 1500)
        monitor.measure()
    assert sizes == [(2048, 512), (1024, 2048)]


def test_one_process_measures_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = CollapseMonitor()
    monitor.add(torch.randn(5, 3), torch.randn(5, 3), 5)
    monkeypatch.setattr(collapse, "world", lambda: (1, 2))
    monkeypatch.setattr(collapse, "gather_rows", lambda h: (h, 0))
    monkeypatch.setattr(collapse, "first_value", lambda value: value or {"alignment": 0.5})
    assert monitor.measure() == {"alignment": 0.5}

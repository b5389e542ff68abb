from __future__ import annotations

from typing import Any

import pytest
import torch
from made_images import head
from monai.transforms import Compose, RandGaussianNoise

from nidl_dcl.data import datasets
from nidl_dcl.data.batched_views import draw_pairs, is_batched
from nidl_dcl.data.datasets import LazyViews
from nidl_dcl.data.transforms import RandBlur, RandSpatial
from nidl_dcl.data.views import STRENGTHS, PairedViews, draw_pair, volume_views

KEYS = [(3, 0, f"sub-{i:02d}") for i in range(8)]


@pytest.fixture(scope="module")
def heads() -> torch.Tensor:
    return torch.stack([head() * (1 + 0.1 * i) for i in range(len(KEYS))])


def each(views: Any, volumes: torch.Tensor) -> list[torch.Tensor]:
    pairs = [draw_pair(views, x, *key) for x, key in zip(volumes, KEYS, strict=True)]
    return [torch.stack(list(view)) for view in zip(*pairs, strict=True)]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", ["intensity", "signed"])
@pytest.mark.parametrize("flip", ["view", "pair", "none"])
def test_views_of_a_batch_are_those_of_each_volume(strength, kind, flip, heads):
    views = volume_views(strength, kind, flip)
    assert is_batched(views)
    for found, expected in zip(draw_pairs(views, heads, KEYS), each(views, heads), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if kind == "intensity" and strength != "strong":
            assert (found[expected == 0].abs() < 1e-6).all()


def test_a_view_does_not_depend_on_the_others_of_its_batch(heads):
    views = volume_views("strong")
    together = draw_pairs(views, heads, KEYS)
    for at in ([0], [5, 2], [7, 6, 5, 4, 3, 2, 1]):
        apart = draw_pairs(views, heads[at], [KEYS[i] for i in at])
        for found, expected in zip(apart, together, strict=True):
            torch.testing.assert_close(found, expected[at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "views",
    [
        RandSpatial(degrees=0.0, prob=1.0),
        RandBlur(prob=1.0, sigma=2.0),
        volume_views().transforms[3],
        Compose([RandSpatial(prob=0.5), RandBlur(prob=0.5)]),
    ],
)
@pytest.mark.parametrize("channel", [True, False])
def test_parts_of_the_views_are_drawn_alike(views, channel, heads):
    volumes = heads if channel else heads[:, 0]
    for found, expected in zip(draw_pairs(views, volumes, KEYS), each(views, volumes), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Harder(RandBlur):
    pass


@pytest.mark.parametrize(
    "views",
    [
        torch.abs,
        Harder(),
        Compose([RandBlur(), RandGaussianNoise()]),
        PairedViews(torch.abs, volume_views()),
    ],
)
def test_other_views_are_drawn_one_by_one(views):
    assert not is_batched(views)


def test_a_batch_on_another_device_is_drawn_at_once(monkeypatch, heads):
    calls = []

    def drawn(views: Any, x: torch.Tensor, keys: Any) -> list[torch.Tensor]:
        calls.append((x.device.type, keys))
        return [x, x]

    monkeypatch.setattr(datasets, "draw_pairs", drawn)
    batch = LazyViews(heads, KEYS, torch.arange(8), volume_views())
    assert calls == []
    batch.to("meta").draw()
    assert calls == [("meta", KEYS)]
    assert batch.draw()[0][0].device.type == "cpu"
    assert len(calls) == 1

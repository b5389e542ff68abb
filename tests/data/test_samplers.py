from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandCoarseDropout, RandGaussianNoise, RandRotate
from torch import nn

from nidl_dcl import DCL
from nidl_dcl.data.datasets import ArraySamples, LazyViews, TwoViewSamples
from nidl_dcl.data.samplers import EpochBatches, two_view_loader

X = torch.rand(6, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
WORKERS = pytest.mark.parametrize("workers", [0, 2])


class Own:
    """Views from a generator that no key reaches."""

    def __init__(self):
        self.generator = np.random.default_rng(0)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + float(self.generator.normal())


def by_key(x):
    return x + torch.randn(x.shape)


def samples_of(views, **more):
    return TwoViewSamples(ArraySamples(X), views, seed=3, **more)


def drawn(loader):
    return [batch.draw() if isinstance(batch, LazyViews) else batch for batch in loader]


def fit(views, workers, x=X.numpy()):  # noqa: B008
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(512, 4, bias=False))
    nn.init.eye_(encoder[1].weight)
    return DCL(
        encoder,
        proj_input_dim=4,
        max_epochs=2,
        lr_scheduler=None,
        random_state=0,
        views=views,
        num_workers=workers,
        batch_size=3,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(x, None, x)


@WORKERS
@pytest.mark.parametrize("lazy", [False, True])
def test_views_that_differ_under_one_key_are_warned_of_once(workers, lazy):
    loader = two_view_loader(samples_of(Own(), lazy=lazy), 2, num_workers=workers)
    with pytest.warns(UserWarning, match="The views Own gave two different results") as caught:
        passes = [drawn(loader) for _ in range(2)]
    assert [len(batches) for batches in passes] == [3, 3]
    assert len(caught) == 1


@WORKERS
def test_a_fit_warns_once(workers):
    with pytest.warns(UserWarning, match="The views Own gave") as caught:
        fit(Own(), workers)
    assert sum("The views Own" in str(w.message) for w in caught) == 1


def test_one_sample_of_a_fit_is_drawn_once_more(monkeypatch):
    views = Own()
    samples = samples_of(views)
    loader = two_view_loader(samples, 2)
    with pytest.warns(UserWarning, match="The views Own"):
        drawn(loader)
    assert views.calls == 2 * (6 + 1)
    drawn(two_view_loader(samples, 2))  # another loader of the same samples, as in a fit
    drawn(two_view_loader(samples_of(views), 2, shuffle=False))  # validation
    monkeypatch.setattr("nidl_dcl.data.samplers.world", lambda: (1, 2))
    drawn(two_view_loader(samples_of(views), 2))  # not the first process
    assert views.calls == 2 * (6 + 1) + 2 * (6 + 6 + 3)


@WORKERS
@pytest.mark.parametrize("lazy", [False, True])
def test_the_check_changes_no_view_and_no_generator(workers, lazy):
    found = []
    for checked in (True, False):
        loader = two_view_loader(samples_of(by_key, lazy=lazy), 2, num_workers=workers)
        loader.dataset.check = loader.dataset.check if checked else None
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append([torch.stack(pair) for pair in drawn(loader)] + [torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("processes", [1, 3])
def test_an_order_is_drawn_once_an_epoch(processes, monkeypatch):
    drawn = []

    def permutation(n, *key):
        drawn.append(key)
        return np.random.default_rng(0).permutation(n)

    monkeypatch.setattr("nidl_dcl.data.samplers.permutation", permutation)
    batches = EpochBatches(50, 7, seed=3, rank=processes - 1, processes=processes)
    epochs = [list(batches) for _ in range(2)]
    assert drawn == [(3, 0), (3, 1)]
    for epoch, found in enumerate(epochs):
        for number, batch in enumerate(found):
            whole = np.array_split(batches.batch(epoch, number), processes)[-1]
            assert batch == [(epoch, i) for i in whole]


def test_no_sample_is_no_batch():
    assert list(EpochBatches(0, 4, seed=0)) == []


def test_views_that_are_drawn_already_are_left_alone():
    pairs = TwoViewSamples([[X[0], X[1]], [X[2], X[3]]], Own(), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(two_view_loader(pairs, 2))) == 1


def test_an_estimator_trains_on_views_of_monai_with_any_number_of_workers():
    views = Compose(
        [
            RandRotate(0.3, prob=0.9),
            RandCoarseDropout(1, (3, 3, 3), prob=0.9),
            RandGaussianNoise(prob=0.9),
        ]
    )
    found = [fit(views, workers).transform(X.numpy()) for workers in (0, 2)]
    assert np.array_equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"])
def test_a_program_ends_while_workers_of_a_loader_wait(end, tmp_path):
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "from nidl_dcl.data.datasets import ArraySamples, TwoViewSamples\n"
        "from nidl_dcl.data.samplers import two_view_loader\n"
        "samples = TwoViewSamples(ArraySamples(torch.rand(6, 4)), torch.abs, seed=0)\n"
        "loader = two_view_loader(samples, 2, num_workers=2)\n"
        f"for batch in loader:\n    {end or 'pass'}\n"
    )
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True, timeout=300)

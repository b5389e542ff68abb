from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import ONE_EPOCH
from torch import nn

from nidl_dcl import DCL
from nidl_dcl.data.datasets import ArraySamples, TwoViewSamples
from nidl_dcl.data.samplers import two_view_loader
from nidl_dcl.models import context_managers
from nidl_dcl.models.context_managers import isolate_rng
from nidl_dcl.models.probe import Probe


def make(**options: Any) -> DCL:
    return DCL(nn.Linear(4, 3), proj_input_dim=3, **{**ONE_EPOCH, **options})


# -- CUDA --------------------------------------------------------------------------------------


@pytest.fixture
def machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look like a machine whose CUDA must not be initialized."""

    def forbidden() -> None:
        raise AssertionError("CUDA was initialized")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)
    for home in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(home, "_lazy_init", forbidden)


@pytest.mark.usefixtures("machine_with_a_gpu")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_on_the_cpu_never_initializes_cuda(workers: int) -> None:
    from sklearn.linear_model import Ridge

    x = torch.randn(10, 4)
    probe = Probe(Ridge(), x, x[:, 0].numpy(), cv=2, untrained=True)
    model = make(num_workers=workers, callbacks=[probe]).fit(x, None, x)
    assert model.transform(x).shape == (10, 3)
    assert not torch.cuda.is_initialized()


@pytest.mark.usefixtures("machine_with_a_gpu")
@pytest.mark.parametrize(("kind", "pinned"), [("cpu", False), ("cuda", True), (None, False)])
def test_memory_is_pinned_for_a_trainer_that_uses_cuda(kind: str | None, pinned: bool) -> None:
    class Strategy:
        root_device = torch.device(kind or "cpu")

    class Trainer:
        strategy = Strategy
        limit_train_batches, accumulate_grad_batches, global_step = 1.0, 1, 0

    samples = TwoViewSamples(ArraySamples(torch.rand(6, 4)), torch.abs, seed=0)
    loader = two_view_loader(samples, 2, trainer=kind and Trainer)
    assert loader.pin_memory is pinned


def test_generators_of_cuda_wait_with_the_callers_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(17)
        state = torch.get_rng_state()
        with isolate_rng(1, "fit") as _:
            inside = torch.initial_seed()
        assert torch.equal(torch.get_rng_state(), state)
    assert seeds == [inside, 17]
    assert inside != 17


def test_generators_of_cuda_are_restored_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    with isolate_rng(1, "fit"):
        pass
    assert restored == [["state"]]


# -- messages of Lightning ---------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """Return what Lightning has logged since the last time that it was asked for."""
    monkeypatch.setattr(context_managers, "_told", False)
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)

    def since() -> str:
        text = "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return text

    yield since
    logger.removeHandler(caplog.handler)


def test_lightning_speaks_of_hardware_once_if_a_bar_is_asked_for(said: Any) -> None:
    x = torch.randn(6, 4)
    make(enable_progress_bar=False).fit(x).transform(x)
    assert said() == ""
    model = make(enable_progress_bar=True).fit(x)
    first = said()
    assert first.count("GPU available") == first.count("Tip") == 1
    model.fit(x).transform(x)
    again = said()
    assert "stopped" in again
    assert "available" not in again
    assert "Tip" not in again


def test_lightning_speaks_where_details_are_asked_for(
    said: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nidl_dcl"):
        make(enable_progress_bar=False).fit(torch.randn(6, 4))
    assert said().count("GPU available") == 1

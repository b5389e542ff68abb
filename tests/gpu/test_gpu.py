"""What only a GPU can show; skipped without one.

NIDL_DCL_TEST_DEVICE=cpu runs what does not need one on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import os
import pickle
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ONE_EPOCH
from torch import nn

from nidl_dcl import DCL, DCLLoss, load_model
from nidl_dcl.data.datasets import ArraySamples, TwoViewSamples
from nidl_dcl.data.samplers import two_view_loader
from nidl_dcl.data.views import volume_views
from nidl_dcl.errors import NonFiniteError
from nidl_dcl.models.encoders import StridedCNN

DEVICE = os.environ.get("NIDL_DCL_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"
)
CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")


@pytest.fixture
def volumes() -> torch.Tensor:
    return torch.rand(12, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))


def make(**options: Any) -> DCL:
    given = {
        **ONE_EPOCH,
        "encoder": StridedCNN,
        "encoder_kwargs": {"width": 4},
        "proj_input_dim": 64,
        "accelerator": "gpu" if DEVICE == "cuda" else DEVICE,
        "devices": 1,
        "batch_size": 6,
        **options,
    }
    return DCL(**given)


def vector(model: DCL) -> torch.Tensor:
    return torch.cat([p.detach().cpu().ravel() for p in model.parameters()])


class Losses(L.Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.found.append(float(outputs["loss"]))


def test_a_model_trained_on_a_device_encodes_the_same_on_the_cpu(volumes, tmp_path):
    model = make(max_epochs=2).fit(volumes)
    there = model.transform(volumes)
    folder = model.save(tmp_path / "model")
    for again in (load_model(folder, accelerator="cpu"), pickle.loads(pickle.dumps(model))):
        here = again.set_params(accelerator="cpu").transform(volumes)
        torch.testing.assert_close(here, there, rtol=1e-2, atol=1e-3)


def test_two_fits_of_one_seed_end_close_and_leave_the_generators_alone(volumes):
    torch.manual_seed(3)
    drawn = torch.rand(4, device=DEVICE)
    first = make(max_epochs=2).fit(volumes)
    torch.manual_seed(3)
    again = make(max_epochs=2).fit(volumes)
    torch.testing.assert_close(vector(again), vector(first), rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.rand(4, device=DEVICE), drawn)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_losses_of_other_precisions_are_close(precision, volumes):
    if DEVICE != "cuda" and precision == "16-mixed":
        pytest.skip("needs CUDA")
    found = []
    for wanted in ("32-true", precision):
        losses = Losses()
        make(precision=wanted, callbacks=[losses]).fit(volumes)
        found.append(losses.found)
    assert found[1] == pytest.approx(found[0], rel=0.2)


@CUDA
def test_a_compiled_encoder_trains(volumes):
    encoder = StridedCNN(width=4)
    losses = []
    for used in (encoder, torch.compile(encoder)):
        recorded = Losses()
        make(encoder=used, encoder_kwargs=None, callbacks=[recorded]).fit(volumes)
        losses.append(recorded.found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


class Spoil:
    def __init__(self, mark: torch.Tensor) -> None:
        self.mark = float(mark)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.nan if float(x.ravel()[0]) == self.mark else x + 0.1 * torch.randn_like(x)


def test_a_nan_stops_training_names_the_sample_and_spares_the_state(volumes):
    model = make(views=Spoil(volumes[7].ravel()[0]))
    with pytest.raises(NonFiniteError, match=r"\(7\)"):
        model.fit(volumes)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("n", [64, 1024])
def test_the_loss_is_that_of_the_cpu(n):
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(2, n, 32, generator=draw)
    found = []
    for device in ("cpu", DEVICE):
        a, b = z.to(device).requires_grad_().unbind()
        loss = DCLLoss()(a, b)
        found.append([loss.cpu(), *(g.cpu() for g in torch.autograd.grad(loss, (a, b)))])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-6)


def test_views_drawn_on_the_device_are_those_of_the_loader(volumes):
    def batch(lazy: bool) -> list[torch.Tensor]:
        samples = TwoViewSamples(ArraySamples(volumes), volume_views(), seed=0, lazy=lazy)
        first = next(iter(two_view_loader(samples, 6)))
        return first.to(DEVICE).draw() if lazy else first

    for there, here in zip(batch(True), batch(False), strict=True):
        assert there.device.type == DEVICE
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


@CUDA
def test_a_step_waits_for_the_device_once(volumes):
    counts: list[int] = []

    class Count(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            self.caught = warnings.catch_warnings(record=True)
            self.said = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

        def on_after_backward(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            counts.append(sum("synchronizing" in str(w.message) for w in self.said))

    # The callback's hook comes before the module's, which is where the one flag is read.
    make(callbacks=[Count()]).fit(volumes)
    assert counts == [0, 0]


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="there are no two GPUs"
)
@pytest.mark.parametrize("strategy", ["ddp_spawn"])
def test_two_devices_give_what_one_gives(strategy, volumes):
    options = {"encoder": Plain, "encoder_kwargs": None, "optimizer": "sgd", "proj_input_dim": 8}
    alone = make(**options).fit(volumes)
    both = make(**options, devices=2, strategy=strategy).fit(volumes)
    torch.testing.assert_close(vector(both), vector(alone), rtol=1e-3, atol=1e-5)


class Plain(nn.Sequential):
    """No batch statistics."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(32**3, 8))

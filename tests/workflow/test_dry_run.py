from __future__ import annotations

import pytest

from nidl_dcl import BIDSDataModule
from nidl_dcl.workflow.dry_run import Cost, choose_workers, measure_cost
from nidl_dcl.workflow.options import RunOptions, TrainingOptions


@pytest.mark.parametrize("workers", [0, 1])
def test_a_few_real_steps_tell_what_a_training_costs(workers, heads_made, tmp_path):
    training = TrainingOptions(spacing=[8.0], batch_size=4, max_epochs=2)
    module = BIDSDataModule(heads_made, spacing=8.0, batch_size=4, num_workers=workers)
    cost = measure_cost(module, training, RunOptions(nprocs=workers))
    assert 0 < cost.prepare_seconds < 5
    assert cost.steps == 3
    assert 0 < cost.step_seconds < 5
    assert 100 < cost.memory_mb < 50_000
    assert cost.device == "cpu"
    assert list(tmp_path.iterdir()) == []


def test_measuring_starts_no_other_process(heads_made, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.Popen", refuse)
    training = TrainingOptions(spacing=[8.0], batch_size=8, devices="2", strategy="ddp")
    module = BIDSDataModule(heads_made, spacing=8.0, batch_size=8)
    assert measure_cost(module, training, RunOptions()).steps == 2


def test_the_real_training_is_as_before(heads_made, make_heads):
    """Measuring leaves no trace in what is trained afterwards."""
    from nidl_dcl import DCL
    from nidl_dcl.models.encoders import StridedCNN

    def weights(*, measured):
        module = BIDSDataModule(heads_made, spacing=8.0, batch_size=8)
        if measured:
            measure_cost(module, TrainingOptions(spacing=[8.0], batch_size=8), RunOptions())
        model = DCL(StridedCNN, proj_input_dim=512, max_epochs=1, random_state=0, lr_scheduler=None,
                    enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        return next(model.fit(module).parameters())

    assert weights(measured=True).equal(weights(measured=False))


@pytest.mark.parametrize(
    ("device", "step", "draw", "cores", "expected"),
    [
        ("cpu", 1.0, 0.5, 16, 0),  # they would take the encoder's cores
        ("cuda", 1.0, 0.0, 16, 0),  # drawn on the device
        ("cuda", 1.0, 0.2, 16, 1),
        ("cuda", 1.0, 0.8, 16, 4),
        ("cuda", 1.0, 0.99, 16, 15),
        ("cuda", 1.0, 1.2, 16, 15),  # a measured step can be shorter than its drawing alone
        ("cuda", 1.0, 0.8, 2, 1),
        ("cuda", 1.0, 0.8, 1, 0),
    ],
)
def test_as_many_workers_as_keep_a_gpu_busy(device, step, draw, cores, expected):
    assert choose_workers(Cost(0.1, 3, step, draw, 1000.0, device), cores) == expected

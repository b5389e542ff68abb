"""Optimizers, weight-decay groups and schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nidl_dcl.models.optimization import (
    WarmupCosine,
    build_optimizer,
    build_scheduler,
    weight_decay_groups,
)

RATES = {  # base 3e-4, warm-up 50 of 500 steps from 1e-6
    0: 1e-6,
    1: 7.102040816e-6,
    2: 1.320408163e-5,
    25: 1.535510204e-4,
    48: 2.938979592e-4,
    49: 3e-4,
    50: 3e-4,
    51: 2.999963446e-4,
    275: 1.5e-4,
    499: 3.6554e-9,
}


def sgd(lr=3e-4):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def make(optimizer, module, **kwargs):
    options = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "exclude_bias_and_norm_wd": True,
        "optimizer_kwargs": None,
        "copies": {},
    }
    return build_optimizer(optimizer, module, **{**options, **kwargs})


def schedule(kind, optimizer, kwargs=None, total=500.0, per_epoch=5.0):
    return build_scheduler(
        kind,
        optimizer,
        lr_scheduler_kwargs=kwargs,
        total_steps=total,
        steps_per_epoch=per_epoch,
        given_optimizer=None,
    )


def test_warmup_cosine_in_closed_form():
    optimizer = sgd()
    scheduler = schedule("warmup_cosine", optimizer)["scheduler"]
    for step in range(500):
        if step in RATES:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(RATES[step], rel=1e-5)
        optimizer.step()
        scheduler.step()


def test_a_resumed_schedule_has_the_length_of_the_new_run():
    first = WarmupCosine(sgd(), 10, 100)
    for _ in range(40):
        first.optimizer.step()
        first.step()
    longer = WarmupCosine(sgd(), 10, 400)
    longer.load_state_dict(first.state_dict())
    straight = WarmupCosine(sgd(), 10, 400)
    for _ in range(40):
        straight.optimizer.step()
        straight.step()
    assert longer.get_last_lr() == straight.get_last_lr()
    assert longer.optimizer.param_groups[0]["lr"] == straight.get_last_lr()[0]


def test_a_warmup_longer_than_the_run_warns_and_only_rises():
    optimizer = sgd()
    with pytest.warns(UserWarning, match="as long as"):
        scheduler = schedule("warmup_cosine", optimizer, total=10.0)["scheduler"]
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == sorted(rates)


@pytest.mark.parametrize("warmup", [0, 0.1, 0.3])
def test_short_warmups_never_overshoot(warmup):
    optimizer = sgd()
    scheduler = schedule("warmup_cosine", optimizer, {"warmup_epochs": warmup}, 20.0)["scheduler"]
    for _ in range(20):
        assert 0 <= optimizer.param_groups[0]["lr"] <= 3e-4
        optimizer.step()
        scheduler.step()


def test_an_interval_of_epochs_counts_epochs():
    config = schedule("warmup_cosine", sgd(), {"interval": "epoch", "warmup_epochs": 2})
    assert (config["interval"], config["scheduler"].warmup_steps) == ("epoch", 2)
    assert config["scheduler"].total_steps == 100


@pytest.mark.parametrize("kind", ["none", None])
def test_no_schedule(kind):
    assert schedule(kind, sgd()) is None


@pytest.mark.parametrize(
    ("kind", "kwargs", "error"),
    [
        ("cosine", None, "lr_scheduler must be"),
        ("warmup_cosine", {"warm": 1}, "unknown names"),
        ("warmup_cosine", {"interval": "batch"}, "interval"),
    ],
)
def test_wrong_schedules_are_value_errors(kind, kwargs, error):
    with pytest.raises(ValueError, match=error):
        schedule(kind, sgd(), kwargs)


def test_an_endless_cosine_is_an_error():
    with pytest.raises(ValueError, match="needs an end"):
        schedule("warmup_cosine", sgd(), total=float("inf"))


def test_schedule_classes_and_instances():
    optimizer = sgd(0.1)
    made = schedule(torch.optim.lr_scheduler.StepLR, optimizer, {"step_size": 3})
    assert made["interval"] == "epoch"
    assert made["scheduler"].optimizer is optimizer
    given = torch.optim.lr_scheduler.ExponentialLR(sgd(0.1), gamma=0.5)
    own = schedule(given, optimizer)["scheduler"]
    assert own is not given
    assert own.optimizer is optimizer
    optimizer.step()
    own.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert given.optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(TypeError, match="lr_scheduler"):
        schedule(3, optimizer)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.norm = nn.LayerNorm((4, 4))
        self.batch = nn.BatchNorm1d(4)
        self.b = nn.Linear(4, 3)
        self.b.weight = nn.Parameter(self.a.weight.T.detach().T)
        self.tied = nn.Linear(3, 4, bias=False)
        self.tied.weight = self.a.weight
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def test_weight_decay_groups():
    module = Mixed()
    decayed, free = weight_decay_groups(module, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(module.a.weight), id(module.b.weight)]
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert {id(p) for p in free["params"]} == {
        id(p)
        for p in (
            module.a.bias,
            module.b.bias,
            module.norm.weight,
            module.norm.bias,
            module.batch.weight,
            module.batch.bias,
        )
    }


@pytest.mark.parametrize("name", ["sgd", "ADAM", "adamW", "AdamW", torch.optim.RMSprop])
def test_names_and_classes(name):
    optimizer = make(name, nn.Linear(2, 2))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_every_parameter_decays_when_asked():
    optimizer = make("sgd", nn.Linear(2, 2), exclude_bias_and_norm_wd=False)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1]


def test_a_class_without_weight_decay_gets_none():
    optimizer = make(torch.optim.LBFGS, nn.Linear(2, 2))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("wrong", "error"), [("adagrad2", ValueError), (3, TypeError), (nn.Linear, TypeError)]
)
def test_wrong_optimizers(wrong, error):
    with pytest.raises(error, match="optimizer must be"):
        make(wrong, nn.Linear(2, 2))


def test_an_instance_is_copied_onto_the_copies_and_completed():
    caller, own = nn.Linear(2, 2), nn.Linear(2, 2)
    both = nn.ModuleList([own, nn.Linear(2, 3)])
    given = torch.optim.SGD(caller.parameters(), lr=0.7, momentum=0.9)
    copies = {id(a): b for a, b in zip(caller.parameters(), own.parameters(), strict=True)}
    with pytest.warns(UserWarning, match="lacks 2 parameters"):
        optimizer = make(given, both, copies=copies)
    assert optimizer.param_groups[0]["params"][0] is own.weight
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in both.parameters()
    }
    assert len(given.param_groups) == 1
    assert given.param_groups[0]["params"][0] is caller.weight


def test_an_instance_over_foreign_parameters_is_an_error():
    with pytest.raises(ValueError, match="neither"):
        make(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1), nn.Linear(2, 2))

"""Optimizers, weight-decay groups and schedules."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from nidl_dcl import DCL
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
        kind, optimizer, lr_scheduler_kwargs=kwargs, total_steps=total, steps_per_epoch=per_epoch
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


def sequential(optimizer):
    parts = [LinearLR(optimizer, 0.1, total_iters=2), ExponentialLR(optimizer, 0.5)]
    return SequentialLR(optimizer, parts, milestones=[3])


def nested(optimizer):
    return ChainedScheduler([sequential(optimizer), ConstantLR(optimizer, 0.5, 2)], optimizer)


SCHEDULES = {
    "StepLR": lambda o: StepLR(o, 2),
    "MultiStepLR": lambda o: MultiStepLR(o, [1, 3]),
    "LambdaLR": lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda t: 0.7),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 6),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=8),
    "CyclicLR": lambda o: CyclicLR(o, base_lr=0.01, max_lr=0.3, step_size_up=2),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: ChainedScheduler([StepLR(o, 1), ExponentialLR(o, 0.5)], o),
    "nested": nested,
}


def rates(optimizer, scheduler, steps=6):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("by_name", [False, True])
def test_an_instance_of_a_schedule_sets_the_rates_that_it_would_set(make_schedule, by_name):
    encoder, own = nn.Linear(2, 2), nn.Linear(2, 2)
    both = nn.ModuleList([own, nn.Linear(2, 3)])
    caller = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    given = make_schedule(caller)
    before = copy.deepcopy([given.state_dict(), *({**g, "params": 0} for g in caller.param_groups)])
    copies = {id(a): b for a, b in zip(encoder.parameters(), own.parameters(), strict=True)}
    if by_name:
        optimizer = make("sgd", both, optimizer_kwargs={"momentum": 0.9})
    else:
        with pytest.warns(UserWarning, match="lacks 2 parameters"):
            optimizer = make(caller, both, copies=copies)
    scheduler = schedule(given, optimizer)["scheduler"]
    assert type(scheduler) is type(given)
    alone = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    expected = rates(alone, make_schedule(alone))
    assert len({tuple(rate) for rate in expected}) > 1
    assert rates(optimizer, scheduler) == [pytest.approx(rate * 2) for rate in expected]
    after = [given.state_dict(), *({**g, "params": 0} for g in caller.param_groups)]
    assert repr(after) == repr(before)


def test_a_plateau_given_as_an_instance_lowers_the_rate():
    given = ReduceLROnPlateau(sgd(0.1), patience=0, factor=0.5)
    optimizer = make("sgd", nn.Linear(2, 2))
    config = schedule(given, optimizer)
    for _ in range(3):
        optimizer.step()
        config["scheduler"].step(1.0)
    assert config["monitor"] == "loss/train"
    assert [g["lr"] for g in optimizer.param_groups] == [pytest.approx(0.025)] * 2
    assert given.optimizer.param_groups[0]["lr"] == 0.1


class PerGroup(LRScheduler):
    """Holds a factor for each group, under a name of its own."""

    def __init__(self, optimizer):
        self.factors = [0.5] * len(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self):
        pairs = zip(self.base_lrs, self.factors, strict=True)
        return [base * factor**self.last_epoch for base, factor in pairs]


def test_an_instance_that_does_not_fit_is_refused_and_the_callable_shown():
    with pytest.raises(ValueError, match=r"PerGroup.*lr_scheduler=lambda optimizer: PerGroup\("):
        schedule(PerGroup(sgd(0.1)), make("sgd", nn.Linear(2, 2)))
    two = torch.optim.SGD([{"params": [p]} for p in nn.Linear(2, 2).parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"LambdaLR.*2 group\(s\).*with 1"):
        schedule(LambdaLR(two, lambda t: 1.0), sgd(0.1))


def test_a_callable_that_makes_a_schedule_for_another_optimizer_is_refused():
    other = StepLR(sgd(0.1), 1)
    with pytest.raises(ValueError, match="for another optimizer"):
        schedule(lambda optimizer: other, sgd(0.1))


@pytest.mark.parametrize("twice", [False, True])
def test_a_fit_follows_a_sequence_of_schedules(twice):
    x, encoder = torch.randn(12, 4), nn.Linear(4, 3)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    given = sequential(optimizer)
    model = DCL(
        encoder,
        proj_input_dim=3,
        optimizer=optimizer,
        lr_scheduler=given,
        max_epochs=5,
        random_state=0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    for _ in range(1 + twice):
        with pytest.warns(UserWarning, match="lacks"):
            model.fit(x)
        assert [g["lr"] for g in model.optimizer.param_groups] == [pytest.approx(0.025)] * 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert given.last_epoch == 0


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


def test_a_callable_gets_the_parameters_and_chooses_the_rest():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    optimizer = make(
        lambda params, nesterov: torch.optim.SGD(params, 0.5, 0.9, nesterov=nesterov),
        module,
        optimizer_kwargs={"nesterov": True},
    )
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(module.weight)]
    assert (group["lr"], group["weight_decay"], group["nesterov"]) == (0.5, 0, True)


def test_a_partial_of_a_class_is_the_class_with_those_options():
    optimizer = make(functools.partial(torch.optim.SGD, momentum=0.9), nn.Linear(2, 2))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert {(g["lr"], g["momentum"]) for g in optimizer.param_groups} == {(1e-3, 0.9)}
    slower = make(functools.partial(torch.optim.SGD, lr=0.5), nn.Linear(2, 2))
    assert slower.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda params: None, TypeError),
        ("adagrad2", ValueError),
        (3, TypeError),
        (nn.Linear, TypeError),
    ],
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

"""Encoders that are compiled or wrapped are saved and loaded by their own names."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.base import clone
from torch import nn

from nidl_dcl import DCL, load_model
from nidl_dcl.models.encoders import StridedCNN
from nidl_dcl.models.wrapped import inner_module, inner_name, is_wrapped, match_names

OPTIONS = {
    "proj_input_dim": 4,
    "lr_scheduler": None,
    "max_epochs": 1,
    "random_state": 0,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def compiled(module):
    return torch.compile(module, backend="eager")


class Wrapper(nn.Module):
    """Runs a network in its own way."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


WRAPPERS = [compiled, nn.DataParallel, Wrapper, lambda m: compiled(Wrapper(m))]


def net(n=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, n))


@pytest.fixture(scope="module")
def rows():
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def test_names_and_networks_inside():
    assert inner_name("encoder._orig_mod.module.0.weight") == "encoder.0.weight"
    encoder = net()
    assert inner_module(compiled(nn.DataParallel(encoder))) is encoder
    assert is_wrapped(Wrapper(encoder), encoder)
    assert not is_wrapped(Wrapper(net()), encoder)
    assert not is_wrapped(nn.ReLU(), nn.ReLU())
    one, two = torch.zeros(1), torch.ones(1)
    assert match_names({"a._orig_mod.b": one, "c": two}, ["module.a.b"]) == {
        "module.a.b": one,
        "c": two,
    }
    # Two parts that differ by such a name alone keep theirs.
    both = {"a.module.b": one, "a.b": two}
    assert match_names(both, ["a.b", "a.module.b"]) == both


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_encoder_fits_and_is_saved_by_its_own_names(wrap, rows, tmp_path):
    plain = DCL(net(), **OPTIONS).fit(rows)
    model = DCL(wrap(net()), **OPTIONS).fit(rows)
    assert torch.equal(model.transform(rows), plain.transform(rows))
    folder = model.save(tmp_path / "model")
    for encoder in (net(), wrap(net())):
        again = load_model(folder, encoder=encoder, **OPTIONS)
        assert torch.equal(again.transform(rows), model.transform(rows))
    again = load_model(plain.save(tmp_path / "plain"), encoder=wrap(net()))
    assert torch.equal(again.transform(rows), model.transform(rows))


def test_a_wrapped_encoder_is_described_by_the_class_inside(tmp_path):
    encoder = compiled(StridedCNN(width=2))
    folder = DCL(encoder, proj_input_dim=encoder.n_features).save(tmp_path / "model")
    assert type(load_model(folder).encoder) is StridedCNN


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_an_encoder_wrapped_after_the_fit_is_the_same_model(wrap, rows, tmp_path):
    model = DCL(net(), **OPTIONS).fit(rows)
    before = model.transform(rows)
    model.encoder = wrap(model.encoder)
    assert model.fitted
    assert torch.equal(model.transform(rows), before)
    folder = model.save(tmp_path / "model")
    assert torch.equal(load_model(folder, encoder=net(), **OPTIONS).transform(rows), before)
    assert torch.equal(model.fit(rows).transform(rows), before)  # from the weights at the start
    assert not clone(model).fitted
    other = DCL(net(), **OPTIONS).start_from(model)
    assert torch.equal(other.encoder[0].weight, inner(model.encoder)[0].weight)


def inner(module):
    module = inner_module(module)
    return module.module if isinstance(module, Wrapper) else module


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_weights_of_wrapped_networks_are_loaded(wrap, prefix, rows, tmp_path):
    model = DCL(wrap(net()), **OPTIONS).fit(rows)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.ckpt")
    for encoder in (net(), compiled(net())):
        other = DCL(encoder, **OPTIONS).load_weights(tmp_path / "weights.ckpt")
        assert torch.equal(other.transform(rows), model.transform(rows))


def test_a_compiled_encoder_resumes_what_a_plain_one_began(rows, tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1)
    DCL(net(), **{**OPTIONS, "callbacks": [keep], "max_epochs": 1}).fit(rows)
    longer = {**OPTIONS, "max_epochs": 2}
    resumed = DCL(compiled(net()), **longer).fit(rows, ckpt_path=keep.best_model_path)
    assert torch.equal(resumed.transform(rows), DCL(net(), **longer).fit(rows).transform(rows))


def test_an_optimizer_trains_an_encoder_that_was_compiled_later(rows):
    encoder = net()
    model = DCL(encoder, optimizer=torch.optim.SGD(encoder.parameters(), lr=0.1), **OPTIONS)
    model.encoder = compiled(model.encoder)
    before = inner(model.encoder)[0].weight.clone()
    with pytest.warns(UserWarning, match="lacks 4 parameters"):
        model.fit(rows)
    assert not torch.equal(inner(model.encoder)[0].weight, before)

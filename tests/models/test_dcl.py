"""The estimator: fitting, encoding, its arguments and what it refuses."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from monai.data import MetaTensor
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nidl_dcl import DCL, BIDSDataModule, DCLLoss, DCLWLoss, load_model
from nidl_dcl.data.batches import single_view, two_views
from nidl_dcl.data.datasets import ArraySamples, TwoViewSamples
from nidl_dcl.data.samplers import two_view_loader
from nidl_dcl.data.views import volume_views
from nidl_dcl.errors import NonFiniteError
from nidl_dcl.models.encoders import StridedCNN

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def make(**kwargs):
    options = {
        "encoder": nn.Linear,
        "encoder_kwargs": {"in_features": 25, "out_features": 10},
        "proj_input_dim": 10,
        "proj_hidden_dim": 8,
        "proj_output_dim": 4,
        "max_epochs": 2,
        "lr_scheduler": None,
        "random_state": 0,
        **QUIET,
        **kwargs,
    }
    return DCL(**options)


@pytest.fixture
def rows():
    return torch.randn(20, 25, generator=torch.Generator().manual_seed(0))


def pairs(rows, labels=None):
    views = [[x, x + 0.1] for x in rows]
    items = views if labels is None else list(zip(views, labels, strict=True))
    return DataLoader(items, batch_size=2)


class Jitter:
    def __call__(self, x):
        return x + 0.1 * torch.randn_like(x)


# -- the peer's way ---------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, list(range(20))])
def test_two_view_loaders_under_the_default_warmup(rows, labels):
    encoder = nn.Linear(25, 10)
    for _ in range(2):  # one instance, several estimators
        model = make(
            encoder=encoder, lr_scheduler="warmup_cosine", limit_train_batches=3, random_state=42
        )
        with pytest.warns(UserWarning, match="warm-up of 10 epochs"):
            model.fit(pairs(rows, labels), pairs(rows, labels))
        z = model.transform(DataLoader(rows, batch_size=2))
        assert z.shape == (20, 10)
        assert isinstance(z, torch.Tensor)
        assert z.dtype == torch.float32


def test_a_length_in_steps_alone_gives_the_same_weights(rows):
    def weights(**length):
        given = {"lr_scheduler_kwargs": {"warmup_epochs": 1}, "lr_scheduler": "warmup_cosine"}
        return make(**given, **length).fit(pairs(rows)).encoder.weight

    assert torch.equal(weights(max_epochs=-1, max_steps=30), weights(max_epochs=3))


@pytest.mark.parametrize("workers", [0, 1])
def test_views_drawn_after_the_transfer_are_those_of_the_loader(heads_made, workers):
    def weights(**more):
        module = BIDSDataModule(heads_made, spacing=8.0, batch_size=4, validation=0.3, **more)
        model = make(encoder=StridedCNN, encoder_kwargs=None, proj_input_dim=512, random_state=0)
        return torch.cat([p.detach().ravel() for p in model.fit(module).parameters()])

    assert torch.equal(weights(views_on_device=True, num_workers=workers), weights())


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["array", "dataset", "loader", "data module"])
def test_views_drawn_after_the_transfer_have_the_precision_of_the_loader(
    kind, precision, heads_made
):
    volumes = torch.rand(6, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def weights(lazy):
        options = {"views_on_device": lazy}
        data = {"array": volumes, "dataset": TensorDataset(volumes)}.get(kind)
        if kind == "data module":
            data = BIDSDataModule(heads_made, spacing=16.0, batch_size=5, **options)
            options = {}
        if kind == "loader":
            samples = TwoViewSamples(ArraySamples(volumes), volume_views(), seed=0, lazy=lazy)
            data, options = two_view_loader(samples, 3), {}
        if kind == "dataset":
            data = ArraySamples(volumes)
        model = make(encoder=Flat, encoder_kwargs=None, proj_input_dim=4, batch_size=3,
                     precision=precision, **options)  # fmt: skip
        return torch.cat([p.detach().ravel() for p in model.fit(data).parameters()])

    assert torch.equal(weights(True), weights(False))


class Flat(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.LazyLinear(4))


def test_pairs_that_a_dataset_gives_need_no_drawing(rows):
    pairs = Rows([[row, row + 0.1] for row in rows])
    lazy, loaded = (make(views_on_device=lazy).fit(pairs) for lazy in (True, False))
    assert torch.equal(lazy.transform(rows), loaded.transform(rows))


def test_undrawn_views_keep_targets_and_go_where_they_are_sent():
    samples = TwoViewSamples(
        [(torch.ones(2), i) for i in range(3)], lambda x: x + torch.rand(2), seed=0, lazy=True
    )
    batch = next(iter(two_view_loader(samples, 3, shuffle=False))).to("cpu", non_blocking=True)
    (first, second), y = batch.draw()
    assert y.tolist() == [0, 1, 2]
    assert first.shape == second.shape == (3, 2)
    assert not torch.equal(first, second)
    assert torch.equal(first, batch.draw()[0][0])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_chunks_change_memory_and_not_the_gradient(size):
    volumes = torch.randn(8, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    encoder = nn.Sequential(
        nn.Conv3d(1, 4, 3, stride=2),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(108, 10),
    )

    def trained(**more):
        model = make(encoder=encoder, encoder_kwargs=None, max_epochs=1, views=Jitter(),
                     batch_size=8, optimizer="sgd", learning_rate=0.1, **more)  # fmt: skip
        calls = []
        model.encoder[0].register_forward_hook(lambda module, x, y: calls.append(len(x[0])))
        return torch.cat([p.detach().ravel() for p in model.fit(volumes).parameters()]), calls

    whole, _ = trained()
    parts, calls = trained(chunk_size=size)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)  # of a step of 0.1
    assert max(calls) == size


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_a_chunk_is_a_positive_number_of_samples(size, rows):
    with pytest.raises(ValueError, match="chunk_size"):
        make(chunk_size=size).fit(rows)


def test_chunks_of_a_batch_normalizing_encoder_are_warned_of():
    volumes = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    model = make(encoder=StridedCNN, encoder_kwargs=None, proj_input_dim=512, max_epochs=1,
                 chunk_size=2)  # fmt: skip
    with pytest.warns(UserWarning, match="batch normalization"):
        model.fit(volumes)


def test_steps_return_loss_projections_and_targets(rows):
    seen = {}

    class Spy(DCL):
        def training_step(self, batch, batch_idx, dataloader_idx=0):
            out = super().training_step(batch, batch_idx, dataloader_idx)
            seen.update(out)
            return out

    model = Spy(**make().get_params())
    model.fit(pairs(rows, list(range(20))))
    assert seen["z1"].shape == seen["z2"].shape == (2, 4)
    assert seen["loss"].ndim == 0
    assert seen["y"].tolist() == [18, 19]
    assert not seen["z1"].requires_grad
    assert model.test_step(None, 0) is None


def test_attributes_before_and_after_fit(rows):
    model = make(optimizer="SGD", lr_scheduler=torch.optim.lr_scheduler.ConstantLR)
    assert (model.optimizer, model.fitted) == ("SGD", False)
    model.fit(pairs(rows))
    assert isinstance(model.optimizer, torch.optim.SGD)
    assert isinstance(model.lr_scheduler, torch.optim.lr_scheduler.ConstantLR)
    assert model.get_params()["optimizer"] == "SGD"
    assert isinstance(model.loss, DCLLoss)
    assert model.fitted
    assert {n for n, _ in model.projection_head.named_parameters()} == {
        "layers.0.weight",
        "layers.0.bias",
        "layers.2.weight",
        "layers.2.bias",
    }


def test_weighting_sigma_selects_the_weighted_loss():
    loss = make(weighting_sigma=0.3, temperature=0.2).loss
    assert isinstance(loss, DCLWLoss)
    assert (loss.sigma, loss.temperature) == (0.3, 0.2)


# -- inputs -----------------------------------------------------------------------------------


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda x: x, torch.Tensor),
        (lambda x: x.numpy(), np.ndarray),
        (lambda x: x.tolist(), np.ndarray),
        (Rows, np.ndarray),
        (TensorDataset, np.ndarray),
        (lambda x: DataLoader(Rows(x), batch_size=3), torch.Tensor),
        (lambda x: DataLoader(TensorDataset(x, torch.arange(20)), batch_size=7), torch.Tensor),
    ],
)
def test_transform_gives_the_encoders_output_in_input_order(rows, wrap, kind):
    fitted = make().fit(rows)
    out = fitted.transform(wrap(rows))
    assert isinstance(out, kind)
    want = fitted.encoder(rows).detach()
    torch.testing.assert_close(torch.as_tensor(out), want)


@pytest.mark.parametrize("shape", [(6, 1, 16, 16, 16), (6, 16, 16, 16)])
def test_volumes_with_and_without_channel(shape):
    volumes = np.random.default_rng(0).random(shape, dtype=np.float32)
    model = make(encoder=StridedCNN, encoder_kwargs={"width": 2}, proj_input_dim=32, max_epochs=1)
    assert model.fit(volumes).transform(volumes).shape == (6, 32)


def test_image_paths_and_nibabel_images(tmp_path):
    rng = np.random.default_rng(0)
    images = [
        nib.Nifti1Image(rng.random((20, 22, 18), np.float32), 4 * np.eye(4)) for _ in range(4)
    ]
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"image{i}.nii.gz")
        nib.save(image, paths[-1])
    model = make(
        encoder=StridedCNN, encoder_kwargs={"width": 2}, proj_input_dim=32, max_epochs=1
    ).fit(paths)
    out = model.transform(paths)
    assert out.shape == (4, 32)
    assert model.preparation.shape == (24, 24, 24)
    for same in (
        images,
        pd.Series(list(map(str, paths))),
        pd.DataFrame({"path": paths}),
        np.array(paths),
    ):
        np.testing.assert_array_equal(model.transform(same), out)
    np.testing.assert_array_equal(model.transform(paths[::-1]), out[::-1])


def test_transform_with_targets_keeps_strings(rows):
    names = [f"sub-{i:02d}" for i in range(20)]
    loader = DataLoader(list(zip(rows, names, strict=True)), batch_size=6)
    features, targets = make().fit(rows).transform_with_targets(loader)
    assert list(targets) == names
    assert features.shape == (20, 10)


def test_lazy_modules_take_their_shape_from_the_first_batch(rows):
    model = make(encoder=nn.LazyLinear, encoder_kwargs={"out_features": 10})
    assert model.fit(pairs(rows)).encoder.weight.shape == (10, 25)


# -- randomness -------------------------------------------------------------------------------


def test_fits_with_one_seed_are_identical_and_leave_the_global_generators_alone(rows):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    state = torch.get_rng_state()
    first = make().fit(rows)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = make().fit(rows)
    assert torch.equal(first.transform(rows), again.transform(rows))


def test_no_seed_is_random(rows):
    a, b = (make(random_state=None).fit(rows).transform(rows) for _ in range(2))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_result(rows, workers):
    alone = make(views=Jitter()).fit(rows).transform(rows)
    assert torch.equal(make(views=Jitter(), num_workers=workers).fit(rows).transform(rows), alone)


@pytest.mark.slow
def test_the_way_workers_start_changes_no_result(rows, tmp_path):
    script = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_dcl import Jitter, make\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.set_start_method('spawn')\n"
        "    rows = torch.randn(20, 25, generator=torch.Generator().manual_seed(0))\n"
        "    model = make(views=Jitter(), num_workers=2, max_epochs=1).fit(rows)\n"
        f"    torch.save(model.transform(rows), {str(tmp_path / 'found.pt')!r})\n"
    )
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True, timeout=300)
    alone = make(views=Jitter(), max_epochs=1).fit(rows).transform(rows)
    assert torch.equal(torch.load(tmp_path / "found.pt"), alone)


# -- collapse ---------------------------------------------------------------------------------


def test_measures_of_collapse_are_logged(rows, tmp_path):
    logger = CSVLogger(tmp_path)
    make(logger=logger).fit(rows)
    table = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    for name in ("loss/train", "alignment", "uniformity", "effective_rank", "collapse_loss"):
        assert table[name].notna().sum() == 2


def test_measures_of_collapse_are_left_out_if_asked(rows, tmp_path):
    logger = CSVLogger(tmp_path)
    make(logger=logger, monitor_collapse=False).fit(rows)
    assert not {"alignment", "effective_rank"} & set(
        pd.read_csv(Path(logger.log_dir) / "metrics.csv").columns
    )


def test_a_collapse_is_warned_of_once(rows):
    class Constant(nn.Linear):
        def forward(self, x):
            return super().forward(0 * x)

    model = make(encoder=Constant, learning_rate=0.0)
    with pytest.warns(UserWarning, match="In epoch 1 .* it has collapsed") as caught:
        model.fit(rows)
    assert len(caught) == 1


def test_a_second_fit_starts_afresh_unless_warm(rows):
    model = make().fit(rows)
    once = model.transform(rows)
    assert torch.equal(model.fit(rows).transform(rows), once)
    warm = model.set_params(warm_start=True).fit(rows).transform(rows)
    assert not torch.equal(warm, once)


def test_training_starts_from_the_weights_of_another_model_and_with_its_exposure(rows):
    other = make(random_state=1).fit(rows)
    other._restore(preparation=None, exposure={"n_participants": 20})
    model = make(max_epochs=1, learning_rate=0.0).fit(rows)
    model.start_from(other).fit(rows)
    assert torch.equal(model.encoder.weight, other.encoder.weight)
    assert model.exposure["before"] == [{"n_participants": 20}]
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(proj_hidden_dim=5).start_from(other)


def test_untrained_weights_encode_when_asked_to(rows):
    model = make()
    model.fitted = True
    torch.testing.assert_close(model.transform(rows), model.encoder(rows).detach())


def test_a_learned_temperature_is_trained_and_does_not_hinder_saving(rows, tmp_path):
    model = make(learning_rate=0.1)
    model.loss = DCLLoss(nn.Parameter(torch.tensor(0.5)))
    model.fit(rows)
    assert model.loss.temperature.item() != 0.5
    again = load_model(model.save(tmp_path / "model"), **QUIET)
    assert torch.equal(again.transform(rows), model.transform(rows))


# -- pickles ----------------------------------------------------------------------------------


class Wide(nn.Sequential):
    def __init__(self, random=False):
        super().__init__(nn.Linear(25, 2000), nn.ReLU(), nn.Linear(2000, 10), nn.BatchNorm1d(10))
        if random:  # from where no seed reaches
            nn.init.constant_(self[0].weight, float(np.random.default_rng().normal()))


def size(model):
    return sum(value.nbytes for value in model.state_dict().values())


@pytest.mark.parametrize("random_state", [0, None, np.random.RandomState(0)])
@pytest.mark.parametrize("instance", [False, True])
def test_a_pickle_holds_little_more_than_the_parameters(instance, random_state, rows):
    encoder = {"encoder": Wide() if instance else Wide, "encoder_kwargs": None}
    model = make(**encoder, optimizer="adamW", random_state=random_state).fit(rows)
    pickled = pickle.dumps(model)
    # An instance stays as an argument, untrained, for clones.
    assert len(pickled) < (1 + instance) * size(model) + 50_000
    assert torch.equal(pickle.loads(pickled).transform(rows), model.transform(rows))


@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
@pytest.mark.parametrize(
    "encoder", [Wide, Wide(), functools.partial(Wide, True), functools.partial(nn.LazyLinear, 10)]
)
def test_a_second_fit_of_a_copy_begins_where_the_first_did(encoder, copied, rows):
    built = encoder() if isinstance(encoder, functools.partial) else encoder
    kind = {"encoder": built, "encoder_kwargs": None, "random_state": None}
    model = make(**kind, max_epochs=1).fit(rows)
    if isinstance(built, nn.Module):
        model.encoder.load_state_dict({k: v + 1 for k, v in model.encoder.state_dict().items()})
    again = copied(copied(model))
    again.set_params(learning_rate=0.0).fit(rows)
    for name, value in model._first_weights.items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(again.state_dict()[name], value), name


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"temperature": 0}, ValueError, "temperature must be"),
        ({"learning_rate": -1}, ValueError, "learning_rate must be"),
        ({"encoder": 3}, TypeError, "encoder must be"),
        ({"optimizer": "adagrad2"}, ValueError, "optimizer must be"),
        ({"lr_scheduler": "cos"}, ValueError, "lr_scheduler must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"num_workers": -1}, ValueError, "num_workers must be"),
        ({"views": 3}, TypeError, "views must be callable"),
        ({"weighting_sigma": 0}, ValueError, "sigma must be"),
        ({"temperature": nn.Parameter(torch.tensor(0.1))}, ValueError, "temperature .* number"),
        ({"proj_hidden_dim": 0}, ValueError, "proj_hidden_dim must be"),
        ({"proj_input_dim": 11}, ValueError, "gives 10 features .* takes 11"),
    ],
)
def test_values_are_checked_in_fit_not_before(rows, change, error, match):
    model = make(**change)
    with pytest.raises(error, match=match):
        model.fit(rows)


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (torch.ones(2, 25), TypeError),
        ([torch.ones(2, 25)], ValueError),
        ([torch.ones(2, 25)] * 3, ValueError),
        ([torch.ones(2, 25), torch.ones(3, 25)], ValueError),
        ([torch.ones(2, 25), "y"], TypeError),
        ({"x": torch.ones(2, 25)}, TypeError),
        (([torch.ones(2, 25)], 1), ValueError),
    ],
)
def test_other_batches_are_refused_with_what_came(batch, error):
    with pytest.raises(error, match="got"):
        make().training_outputs(batch)


def test_monais_tensors_lose_their_metadata_before_the_encoder_sees_them():
    (x1, x2), _ = two_views([MetaTensor(torch.zeros(2, 3)), MetaTensor(torch.ones(2, 3))])
    assert type(x1) is type(x2) is type(single_view(MetaTensor(torch.zeros(2)))[0]) is torch.Tensor
    assert x2.sum() == 6


def test_transform_refuses_two_views_and_warns_of_a_shuffling_loader(rows):
    model = make().fit(rows)
    with pytest.raises(ValueError, match="two views"):
        model.transform(pairs(rows))
    with pytest.raises(TypeError, match="takes batches"):
        model.transform(pairs(rows, list(range(20))))
    with pytest.warns(UserWarning, match="shuffles"):
        model.transform(DataLoader(rows, batch_size=4, shuffle=True))


def test_not_fitted(rows):
    with pytest.raises(NotFittedError):
        make().transform(rows)


class Spoil:
    """Views that turn one sample into NaN."""

    def __init__(self, mark):
        self.mark = mark

    def __call__(self, x):
        return x * torch.nan if x[0] == self.mark else x + 0.1


def test_a_nan_stops_training_names_the_sample_and_spares_the_weights(rows):
    model = make(views=Spoil(rows[7, 0]), batch_size=4)
    with pytest.raises(NonFiniteError, match=r"\(7\)"):
        model.fit(rows)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not model.fitted


def test_a_gradient_that_explodes_never_reaches_the_weights(rows):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.inf

    class Bad(nn.Linear):
        def forward(self, x):
            return Explode.apply(super().forward(x))

    model = make(encoder=Bad(25, 10))
    with pytest.raises(NonFiniteError, match="gradient"):
        model.fit(rows)
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Reads(L.Callback):
    """Counts how often a step waits for the device: where a number is read from a tensor."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        self.counts, self.mode = [], None

    def on_train_batch_start(self, *args):
        counts = self.counts
        counts.append(0)

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                counts[-1] += function.overloadpacket.__name__ in Reads.WAITING
                return function(*args, **(kwargs or {}))

        self.mode = Count()
        self.mode.__enter__()

    def on_train_batch_end(self, *args):
        self.mode.__exit__(None, None, None)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("encoder", [nn.Linear, None])
def test_a_step_waits_for_the_device_once(accumulated, encoder, rows):
    reads, built = Reads(), {} if encoder else {"encoder": Regional, "encoder_kwargs": None}
    options = {"optimizer": "sgd", "batch_size": 5, "accumulate_grad_batches": accumulated}
    make(**built, **options, callbacks=[reads]).fit(rows)
    assert reads.counts == [1] * 8


def reading(reader):
    class Subclass(DCL):
        def training_step(self, batch, batch_idx, dataloader_idx=0):
            return super().training_step(batch, batch_idx, dataloader_idx)

    class Reader(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *args):
            assert len(outputs["y"]) == 2

    return {
        "no one": (DCL, []),
        "callbacks of Lightning": (DCL, [L.pytorch.callbacks.Timer()]),
        "a callback": (DCL, [Reader()]),
        "a function": (DCL, [LambdaCallback(on_train_batch_end=lambda *args: None)]),
        "a subclass": (Subclass, []),
    }[reader]


@pytest.mark.parametrize(
    ("reader", "gathered"),
    [
        ("no one", False),
        ("callbacks of Lightning", False),
        ("a callback", True),
        ("a function", True),
        ("a subclass", True),
    ],
)
def test_targets_are_gathered_only_if_someone_reads_them(reader, gathered, rows, monkeypatch):
    calls = []
    monkeypatch.setattr("nidl_dcl.models.dcl.gather_targets", lambda y, n: calls.append(n) or y)
    kind, callbacks = reading(reader)
    kind(**{**make(max_epochs=1).get_params(), "callbacks": callbacks}).fit(
        pairs(rows, list(range(20)))
    )
    assert bool(calls) is gathered
    make().training_step(([rows, rows + 1], torch.arange(20)), 0)  # in a loop of the caller's
    assert calls[-1] == 20


class Normalized(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(25, 10), nn.BatchNorm1d(10))


@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_nan_spares_running_means_too_and_is_found_while_gradients_accumulate(accumulated, rows):
    options = {"encoder": Normalized, "encoder_kwargs": None, "views": Spoil(rows[7, 0])}
    model = make(**options, batch_size=4, accumulate_grad_batches=accumulated)
    with pytest.raises(NonFiniteError, match=r"Sample \d+ \(7\) of training batch"):
        model.fit(rows)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_finite_numbers_whose_sum_is_not_are_taken(rows):
    make(views=lambda x: x * 1e37, max_epochs=1, learning_rate=0.0, encoder=Scaled).fit(rows)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x / 1e37)


def test_validation_and_bare_steps_are_checked_at_once(rows):
    spoiled = rows.clone()
    spoiled[3, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="Sample 3 of training batch 0"):
        make().training_step([rows, spoiled], 0)
    with pytest.raises(NonFiniteError, match="Sample 1 of validation batch 1"):
        make().fit(rows, DataLoader([[x, x] for x in spoiled], batch_size=2))


def test_non_finite_rows_are_refused_by_number(rows):
    volumes = np.zeros((3, 1, 8, 8, 8), np.float32)
    volumes[1, 0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="Sample 1"):
        make().fit(volumes)
    rows[4, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="Sample 4"):
        make().fit(torch.randn(20, 25)).transform(DataLoader(rows, batch_size=20))


# -- regions ----------------------------------------------------------------------------------


class Regional(nn.Sequential):
    """Three regions of ten features, which it does not say."""

    def __init__(self, n_in=25):
        super().__init__(nn.Linear(n_in, 30), nn.Tanh(), nn.Unflatten(1, (3, 10)))


class Stating(Regional):
    """The same, which says so."""

    n_regions = 3


REGIONAL = {"encoder_kwargs": None, "views": Jitter(), "batch_size": 5}


@pytest.mark.parametrize("encoder", [Regional, Stating])
@pytest.mark.parametrize("sigma", [None, 0.5])
def test_the_loss_of_an_encoder_of_regions_is_the_mean_of_that_of_each(encoder, sigma, rows):
    model = make(encoder=encoder, weighting_sigma=sigma, **REGIONAL)
    if encoder is Stating:
        nn.init.normal_(model.projection_head.region_bias)
    x1, x2 = rows, rows + 0.1 * torch.randn_like(rows)
    out = model.training_step([x1, x2], 0)
    bias = model.projection_head.region_bias if encoder is Stating else torch.zeros(3, 10)
    z1, z2 = (
        torch.stack(
            [model.projection_head.layers(model.encoder(x)[:, k] + bias[k]) for k in range(3)]
        )
        for x in (x1, x2)
    )
    each = [model.loss(a, b) for a, b in zip(z1, z2, strict=True)]
    torch.testing.assert_close(out["loss"], torch.stack(each).mean())
    torch.testing.assert_close(out["z1"], z1.detach().transpose(0, 1))


@pytest.mark.parametrize("encoder", [Regional, Stating])
def test_embeddings_of_regions_stand_side_by_side_and_are_named(encoder, rows):
    model = make(encoder=encoder, **REGIONAL)
    start = model.encoder[0].weight.clone()
    embedded = model.fit(rows).transform(rows)
    assert not torch.equal(model.encoder[0].weight, start)
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded, model.encoder(rows).detach().flatten(1))
    names = model.get_feature_names_out()
    assert len(names) == len(set(names)) == 30
    assert (names[12], names[29]) == ("dcl_region001_feature002", "dcl_region002_feature009")
    table = model.set_output(transform="pandas").transform(rows.numpy())
    assert list(table.columns) == list(names)


def test_the_vectors_of_regions_are_learned_and_do_not_decay(rows):
    model = make(encoder=Stating, optimizer="sgd", weight_decay=0.5, **REGIONAL).fit(rows)
    bias = model.projection_head.region_bias
    assert bias.shape == (3, 10)
    assert (bias != 0).any()
    decays = {id(p): g["weight_decay"] for g in model.optimizer.param_groups for p in g["params"]}
    assert decays[id(bias)] == 0
    assert not [n for n, _ in make().projection_head.named_parameters() if "region" in n]


@pytest.mark.parametrize("encoder", [Regional, Stating])
def test_a_folder_of_a_model_with_regions_gives_the_same_embeddings_and_names(
    encoder, rows, tmp_path
):
    model = make(encoder=encoder, **REGIONAL).fit(rows)
    again = load_model(model.save(tmp_path / "model"), encoder=encoder, **QUIET)
    assert list(again.get_feature_names_out()) == list(model.get_feature_names_out())
    assert torch.equal(again.transform(rows), model.transform(rows))


def test_a_training_with_regions_resumes_and_takes_chunks(rows, tmp_path):
    options = {**REGIONAL, "encoder": Stating, "max_epochs": 3}
    whole = make(**options, callbacks=[SaveEachStep(tmp_path)]).fit(rows)
    assert_identical(make(**options).fit(rows, ckpt_path=tmp_path / "5.ckpt"), whole)
    chunked = make(**options, chunk_size=2).fit(rows)
    torch.testing.assert_close(chunked.transform(rows), whole.transform(rows))


@pytest.mark.parametrize("shape", [(3, 5, 2), (30,)])
@pytest.mark.parametrize("stage", ["fit", "transform"])
def test_an_output_that_is_neither_a_matrix_nor_regions_is_refused(shape, stage, rows):
    flat = [nn.Flatten(0)] if shape == (30,) else [nn.Unflatten(1, shape)]
    model = make(encoder=nn.Sequential(nn.Linear(25, 30), *flat), encoder_kwargs=None)
    model.fitted = True
    with pytest.raises(
        ValueError, match=r"\(n, features\), or \(n, regions, features\), got Tensor"
    ):
        getattr(model, stage)(rows)


def test_an_encoder_that_states_another_number_of_regions_is_an_error(rows):
    class Wrong(Stating):
        n_regions = 4

    with pytest.raises(ValueError, match=r"n_regions=4 and returned Tensor\(20, 3, 10\)"):
        make(encoder=Wrong, encoder_kwargs=None).fit(rows)


def test_features_of_a_region_that_do_not_fit_the_head_are_an_error(rows):
    with pytest.raises(ValueError, match="gives 10 features and the projection head takes 30"):
        make(encoder=Regional, encoder_kwargs=None, proj_input_dim=30).fit(rows)


# -- checkpoints ------------------------------------------------------------------------------


def test_resuming_gives_the_same_weights_as_never_stopping(rows, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True

    options = {
        "batch_size": 5,
        "max_epochs": 3,
        "views": Jitter(),
        "default_root_dir": str(tmp_path),
    }
    whole = make(**options).fit(rows).transform(rows)
    with_checkpoints = make(**options, callbacks=[Stop(), ModelCheckpoint(tmp_path)])
    with_checkpoints.fit(rows)
    resumed = make(**options, num_workers=1).fit(rows, ckpt_path=tmp_path / "middle.ckpt")
    assert torch.equal(resumed.transform(rows), whole)
    with pytest.raises(ValueError, match=r"temperature was 0\.1, is 0\.2"):
        make(**options, temperature=0.2).fit(rows, ckpt_path=tmp_path / "middle.ckpt")


WARM = {
    "batch_size": 4,
    "max_epochs": 3,
    "views": Jitter(),
    "lr_scheduler": "warmup_cosine",
    "lr_scheduler_kwargs": {"warmup_epochs": 1},
}


class SaveEachStep(L.Callback):
    """Saves a checkpoint after each optimizer step, and kills the process after one of them."""

    def __init__(self, folder, killed_after=None):
        self.folder, self.killed_after = folder, killed_after

    def on_train_batch_end(self, trainer, module, *args):
        file = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step and not file.exists():
            trainer.save_checkpoint(file)
        if trainer.global_step == self.killed_after:
            os.kill(os.getpid(), signal.SIGKILL)


def assert_identical(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_after_any_step_equals_an_uninterrupted_one(
    accumulated, workers, rows, tmp_path
):
    options = {**WARM, "accumulate_grad_batches": accumulated}
    saving = make(**options, callbacks=[SaveEachStep(tmp_path)])
    whole = saving.fit(rows, None, rows[:6])
    steps = len(list(tmp_path.glob("*.ckpt")))
    assert steps == {1: 15, 2: 9}[accumulated]
    for step in range(1, steps, 1 if workers == 0 else 4):
        again = make(**options, num_workers=workers)
        again.fit(rows, None, rows[:6], ckpt_path=tmp_path / f"{step}.ckpt")
        assert_identical(again, whole)


class Order(L.Callback):
    """Notes the first number of each sample of an epoch; ends a run after a batch, like a SIGTERM."""

    def __init__(self, ended_after=None, folder=None):
        self.epochs, self.ended_after, self.folder = {}, ended_after, folder

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        seen = self.epochs.setdefault(trainer.current_epoch, [])
        seen += batch[0][:, 0].int().tolist()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.ended_after:
            trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.folder / "ended.ckpt")


@pytest.mark.parametrize("scheduling", [{0: 2, 1: 1}, {0: 1, 1: 3}, {2: 2}, 2])
@pytest.mark.parametrize("ended_after", [None, (0, 0), (1, 0), (1, 1), (2, 3)])
def test_each_epoch_visits_every_sample_once_however_steps_are_accumulated(
    scheduling, ended_after, tmp_path
):
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    rows = torch.arange(20.0)[:, None].expand(20, 25).contiguous()

    def fitted(order, **where):
        options = {"accumulate_grad_batches": scheduling}
        callbacks = [order]
        if isinstance(scheduling, dict):
            options = {}
            callbacks.append(GradientAccumulationScheduler(dict(scheduling)))
        model = make(**{**WARM, **options, "views": torch.clone}, callbacks=callbacks)
        return model.fit(rows, **where)

    whole = Order()
    model = fitted(whole)
    assert [sorted(seen) for seen in whole.epochs.values()] == [list(range(20))] * 3
    assert len({tuple(seen) for seen in whole.epochs.values()}) == 3
    if ended_after is None:
        return
    with pytest.raises(SIGTERMException):
        fitted(Order(ended_after, tmp_path))
    rest = Order()
    again = fitted(rest, ckpt_path=tmp_path / "ended.ckpt")
    assert_identical(again, model)
    for epoch, seen in rest.epochs.items():
        assert seen == whole.epochs[epoch][-len(seen) :]


def test_the_schedule_of_the_rate_counts_steps_as_they_are_accumulated(rows):
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    class Rates(L.Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.found.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    callbacks = [rates, GradientAccumulationScheduler({0: 5, 1: 1})]
    options = {**WARM, "max_epochs": 2, "lr_scheduler_kwargs": {"warmup_epochs": 0}}
    make(**options, callbacks=callbacks).fit(rows)
    assert rates.found[:5] == [rates.found[0]] * 5  # one step of the first epoch
    shares = [(1 + np.cos(np.pi * step / 6)) / 2 for step in range(1, 6)]
    np.testing.assert_allclose(rates.found[5:], np.array(shares) * rates.found[0], rtol=1e-6)


@pytest.mark.slow
def test_a_run_killed_by_the_system_goes_on_and_ends_the_same(rows, tmp_path):
    script = (
        "import sys, pathlib, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_dcl import WARM, SaveEachStep, make\n"
        "rows = torch.randn(20, 25, generator=torch.Generator().manual_seed(0))\n"
        f"saving = SaveEachStep(pathlib.Path({str(tmp_path)!r}), killed_after=8)\n"
        "make(**WARM, callbacks=[saving]).fit(rows, None, rows[:6])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = make(**WARM).fit(rows, None, rows[:6])
    again = make(**WARM, num_workers=1).fit(rows, None, rows[:6], ckpt_path=tmp_path / "8.ckpt")
    assert_identical(again, whole)

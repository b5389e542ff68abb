"""Estimators of one's own, their arguments, and what stays of a fit."""

from __future__ import annotations

import copy
import functools
import inspect
import multiprocessing
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nidl_dcl import DCL, BaseEstimator, load_model
from nidl_dcl.errors import UsageError
from nidl_dcl.models.transformer import TransformerMixin

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
SIZES = {"proj_input_dim": 4, "proj_hidden_dim": 4, "proj_output_dim": 3}
OPTIONS = {**SIZES, **QUIET, "max_epochs": 2, "lr_scheduler": None}


class Rows(nn.Sequential):
    """Encodes rows of six numbers."""

    def __init__(self, n_features: int = 4) -> None:
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, n_features))


class Mine(DCL):
    """Adds an argument, in scikit-learn's way."""

    def __init__(self, encoder, alpha=1.0, **kwargs):
        super().__init__(encoder, **kwargs)
        self.alpha = alpha

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        outputs = super().training_step(batch, batch_idx)
        outputs["loss"] = self.alpha * outputs["loss"]
        return outputs


class Fixed(DCL):
    """Fixes arguments of its base."""

    def __init__(self, alpha=1.0, **kwargs):
        super().__init__(Rows, **SIZES, temperature=0.5, **kwargs)
        self.alpha = alpha


class Own(BaseEstimator):
    """Predicts one view from the other."""

    def __init__(self, encoder, width=4, lr=1e-2, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.head = nn.Linear(width, 6)
        self.width = width
        self.lr = lr

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        (x1, x2) = batch
        loss = nn.functional.mse_loss(self.head(self.encoder(x1)), x2)
        self.log("loss", loss)
        return loss

    def transform_step(self, batch, batch_idx, dataloader_idx=0):
        return self.encoder(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Widths(BaseEstimator):
    """Builds its network in the constructor, from an argument of the same name as the network."""

    def __init__(self, layers=(4,), **kwargs):
        super().__init__(**kwargs)
        sizes = [6, *layers]
        self.layers = nn.Sequential(*map(nn.Linear, sizes[:-1], sizes[1:]))

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        return self.layers(batch[0]).square().mean()

    def transform_step(self, batch, batch_idx, dataloader_idx=0):
        return self.layers(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make(kind=DCL, **kwargs):
    return kind(Rows, **{**OPTIONS, "random_state": 0, **kwargs})


@pytest.fixture(scope="module")
def rows():
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def weights(model):
    return torch.cat([p.detach().ravel() for p in model.parameters()])


# -- subclasses -------------------------------------------------------------------------------


def test_a_subclass_with_an_argument_fits_clones_and_takes_parameters(rows):
    model = make(Mine, alpha=2.0, temperature=0.3).fit(rows)
    params = model.get_params()
    assert (params["alpha"], params["temperature"], params["max_epochs"]) == (2.0, 0.3, 2)
    assert params["learning_rate"] == 3e-4
    twin = clone(model)
    assert (twin.alpha, twin.temperature, twin.fitted) == (2.0, 0.3, False)
    assert torch.equal(weights(twin.fit(rows)), weights(model))
    assert twin.set_params(alpha=3.0, temperature=0.7).alpha == 3.0
    assert twin.get_params()["alpha"] == 3.0
    assert twin.fitted
    assert float(twin.loss.temperature) == 0.7
    assert clone(twin).alpha == 3.0


def test_an_argument_of_a_subclass_acts(rows):
    still = make(Mine, alpha=0.0, weight_decay=0.0).fit(rows)
    assert torch.equal(weights(still), weights(clone(still)))
    assert not torch.equal(weights(make(Mine).fit(rows)), weights(still))


def test_a_subclass_that_fixes_arguments(rows):
    model = Fixed(alpha=2, random_state=0, **QUIET, max_epochs=1, lr_scheduler=None).fit(rows)
    assert model.temperature == 0.5
    assert "encoder" not in model.get_params()
    twin = clone(model)
    assert (twin.alpha, twin.temperature, twin.max_epochs) == (2, 0.5, 1)
    assert torch.equal(weights(twin.fit(rows)), weights(model))


def test_another_encoder_of_a_subclass_brings_its_weights(rows):
    model = make(Mine).fit(rows)
    encoder = Rows()
    model.set_params(encoder=encoder)
    assert torch.equal(model.encoder[0].weight, encoder[0].weight)
    assert not model.fitted
    model.fit(rows).encoder = Rows
    assert model.get_params()["encoder"] is Rows
    assert not model.fitted


def test_unknown_arguments_of_subclasses_name_the_closest_one():
    with pytest.raises(TypeError, match=r"Mine got an unknown option 'alhpa'.*'alpha'"):
        make(Mine, alhpa=1)
    with pytest.raises(ValueError, match="Invalid parameter 'beta'"):
        make(Mine).set_params(beta=1)


def test_a_constructor_without_further_options_takes_none_later():
    class Closed(DCL):
        def __init__(self, encoder):
            super().__init__(encoder, temperature=0.2, max_epochs=1)

    model = Closed(nn.Linear(6, 2048))
    assert (model.temperature, model.max_epochs) == (0.2, 1)
    with pytest.raises(ValueError, match="Invalid parameter 'max_epochs'"):
        model.set_params(max_epochs=3)
    with pytest.raises(ValueError, match="Invalid parameter 'temperature'"):
        model.temperature = 3
    clone(model)


@pytest.mark.parametrize("kind", [Mine, Fixed])
def test_a_subclass_is_saved_and_loaded_with_its_class(kind, rows, tmp_path):
    options = {**QUIET, "max_epochs": 1, "lr_scheduler": None, "alpha": 2.0}
    model = kind(**options) if kind is Fixed else kind(Rows, **SIZES, **options)
    folder = model.fit(rows).save(tmp_path / "model")
    own = None if kind is Fixed else Rows
    with pytest.raises(UsageError, match=rf"estimator={kind.__name__}.*trust=\["):
        load_model(folder, encoder=own)
    again = load_model(folder, estimator=kind, encoder=own, **QUIET)
    assert (type(again), again.alpha, again.fitted) == (kind, 2.0, True)
    assert torch.equal(again.transform(rows), model.transform(rows))
    assert f"estimator={kind.__name__}" in (folder / "README.md").read_text()


def test_a_local_class_is_loaded_by_the_class_alone(rows, tmp_path):
    class Local(Mine):
        pass

    folder = make(Local, alpha=5).fit(rows).save(tmp_path / "model")
    with pytest.raises(UsageError, match="estimator=Local"):
        load_model(folder)
    assert load_model(folder, estimator=Local, encoder=Rows).alpha == 5


def test_a_trusted_package_may_hold_the_estimators_class(rows, tmp_path):
    folder = make(Mine, alpha=2.0).fit(rows).save(tmp_path / "model")
    again = load_model(folder, trust=[Mine.__module__.partition(".")[0]], **QUIET)
    assert (type(again), again.alpha) == (Mine, 2.0)
    assert type(again.encoder) is Rows


# -- estimators of one's own ------------------------------------------------------------------


def test_a_transform_step_may_come_from_another_base(rows):
    class Identity:
        def transform_step(self, batch, batch_idx, dataloader_idx=0):
            return batch

    class Both(Identity, BaseEstimator):
        pass

    model = Both(**QUIET)
    model.fitted = True
    assert torch.equal(model.transform(rows), rows)
    assert not hasattr(BaseEstimator(), "transform")


def own(**kwargs):
    torch.manual_seed(0)
    return Own(Rows(), **{**QUIET, "max_epochs": 2, "random_state": 0, **kwargs})


def test_an_estimator_of_ones_own_is_a_transformer(rows):
    model = own()
    assert isinstance(model, TransformerMixin)
    assert model.fit(rows).transform(rows).shape == (24, 4)
    assert model.fit_transform(rows.numpy()).shape == (24, 4)
    assert {"encoder", "width", "lr", "max_epochs"} <= model.get_params().keys()
    predicted = cross_val_predict(make_pipeline(own(), Ridge()), rows.numpy(), rows[:, 0], cv=2)
    assert predicted.shape == (24,)


def test_a_clone_of_ones_own_estimator_has_the_weights_before_the_fit(rows):
    model = own(lr=0.5)
    before = weights(model)
    model.fit(rows)
    assert not torch.equal(weights(model), before)
    assert torch.equal(weights(clone(model))[:-30], before[:-30])  # of the encoder that was given
    assert clone(model).lr == 0.5


def test_a_second_fit_of_ones_own_estimator_is_the_same(rows):
    model = own()
    first = weights(model.fit(rows))
    assert torch.equal(weights(model.fit(rows)), first)


def test_ones_own_estimator_is_saved_and_loaded(rows, tmp_path):
    model = own(lr=0.5).fit(rows)
    folder = model.save(tmp_path / "model")
    again = load_model(folder, estimator=Own, encoder=Rows(), **QUIET)
    assert again.lr == 0.5
    assert torch.equal(again.transform(rows), model.transform(rows))
    folder = Widths([5, 4], **QUIET, max_epochs=1).fit(rows).save(tmp_path / "widths")
    assert len(load_model(folder, estimator=Widths).layers) == 2


def test_what_a_folder_lacks_is_named(rows, tmp_path):
    class Two(Own):
        def __init__(self, encoder, decoder, **kwargs):
            super().__init__(encoder, **kwargs)
            self.decoder = decoder

    folder = Two(Rows(), nn.Linear(2, 2), **QUIET, max_epochs=1).fit(rows).save(tmp_path / "m")
    with pytest.raises(UsageError, match=r"load_model\(folder, decoder=…\)"):
        load_model(folder, estimator=Two, encoder=Rows())
    load_model(folder, estimator=Two, encoder=Rows(), decoder=nn.Linear(2, 2))


def test_parameters_that_shape_the_network_rebuild_it(rows):
    model = Widths(random_state=0, max_epochs=1, **QUIET).fit(rows)
    assert model.set_params(max_epochs=2).fitted
    model.set_params(layers=(5, 3))
    assert not model.fitted
    assert model.fit(rows).transform(rows).shape == (24, 3)
    assert clone(model).get_params()["layers"] == (5, 3)
    search = GridSearchCV(
        make_pipeline(Widths(max_epochs=1, **QUIET), Ridge()),
        {"widths__layers": [(2,), (3,)]},
        cv=2,
    ).fit(rows.numpy(), rows[:, 0].numpy())
    assert search.best_estimator_[0].transform(rows.numpy()).shape[1] in (2, 3)


def test_parameters_that_do_not_shape_the_network_leave_what_was_fitted(rows):
    model = own().fit(rows)
    before = weights(model)
    model.set_params(lr=0.3)
    assert model.fitted
    assert model.lr == 0.3
    assert torch.equal(weights(model), before)


def test_lazy_networks_of_ones_own_learn_their_shapes(rows):
    model = Own(nn.LazyLinear(4), max_epochs=1, **QUIET).fit(rows)
    assert model.encoder.weight.shape == (4, 6)


def test_signatures_are_those_of_the_constructors():
    assert list(inspect.signature(DCL).parameters)[:2] == ["encoder", "encoder_kwargs"]
    assert list(inspect.signature(Mine).parameters) == ["encoder", "alpha", "kwargs"]


# -- seeds and attributes ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", [L.seed_everything, np.random.seed])
def test_the_global_seed_repeats_a_fit_without_random_state(rows, seed):
    def fit():
        seed(42)
        return weights(make(random_state=None).fit(rows))

    first = fit()
    assert torch.equal(fit(), first)
    assert not torch.equal(weights(make(random_state=None).fit(rows)), first)


def test_two_fits_in_a_row_differ_without_random_state(rows):
    L.seed_everything(42)
    model = make(random_state=None).fit(rows)
    first = weights(model)
    assert not torch.equal(weights(model.fit(rows)), first)


def test_loading_leaves_the_global_generators(rows, tmp_path):
    folder = make(random_state=None).fit(rows).save(tmp_path / "model")
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(())  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    load_model(folder, encoder=Rows)
    assert (np.random.rand(), torch.rand(())) == expected  # noqa: NPY002


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", 0.5), ("learning_rate", 0.1), ("optimizer", "sgd"), ("batch_size", 5)],
        *[("max_epochs", 1), ("random_state", 3), ("proj_output_dim", 2), ("logger", False)],
        *[("weighting_sigma", 0.7), ("views", abs), ("encoder_kwargs", {"n_features": 4})],
        *[("callbacks", []), ("lr_scheduler_kwargs", {"gamma": 1})],
    ],
)
def test_an_assigned_attribute_is_an_argument(name, value, rows):
    model = make()
    setattr(model, name, value)
    assert model.get_params()[name] is value
    assert clone(model).get_params()[name] == value
    expected = make(**{name: value})
    assert torch.equal(weights(model), weights(expected))
    assert repr(model.loss) == repr(expected.loss)
    assert vars(model.loss).get("temperature") == vars(expected.loss).get("temperature")


def test_assigned_attributes_act_in_the_next_fit(rows):
    model = make().fit(rows)
    model.temperature, model.batch_size, model.max_epochs = 0.5, 6, 1
    expected = make(temperature=0.5, batch_size=6, max_epochs=1).fit(rows)
    assert model.fitted
    assert torch.equal(weights(model.fit(rows)), weights(expected))
    assert model.trainer.num_training_batches == 4


def test_an_assigned_encoder_is_an_argument_too(rows):
    model, encoder = make().fit(rows), Rows()
    model.encoder = encoder
    assert model.get_params()["encoder"] is encoder
    assert not model.fitted
    assert torch.equal(model.encoder[0].weight, encoder[0].weight)


def test_an_assigned_argument_of_ones_own_acts(rows):
    model = Widths(max_epochs=1, **QUIET)
    model.layers = (5, 3)
    assert model.get_params()["layers"] == (5, 3)
    assert model.fit(rows).transform(rows).shape == (24, 3)


# -- what stays of a fit ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_trainer_of_the_fit_stays_and_is_in_no_copy(rows, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="loss/train")
    model = make(callbacks=[keep, TQDMProgressBar()], enable_progress_bar=True).fit(rows)
    assert model.trainer.current_epoch == 2
    assert float(model.trainer.callback_metrics["loss/train"]) > 0
    assert model.trainer.checkpoint_callback.best_model_path == keep.best_model_path != ""
    before = model.trainer
    model.transform(rows)
    assert model.trainer is before
    for twin in (clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._trainer is None
        held = [v for c in twin.get_params()["callbacks"] for v in vars(c).values()]
        assert not any(isinstance(value, L.Trainer) for value in held)
        twin.fit(rows)
    outputs = model.training_step([rows, rows + 0.1], 0)  # nobody logs, outside of a trainer
    assert outputs["loss"] > 0


@pytest.mark.slow
def test_no_worker_outlives_the_fit(rows):
    others = set(multiprocessing.active_children())
    model = make(num_workers=1, max_epochs=1).fit(rows)
    assert model.trainer is not None
    assert set(multiprocessing.active_children()) == others


def test_names_of_nidl(rows):
    pairs = DataLoader([[x, x + 0.1] for x in rows], batch_size=6)
    loader = DataLoader(TensorDataset(rows, rows[:, 0]), batch_size=6)
    model = make().fit(train_dataloader=pairs, val_dataloader=pairs)
    assert model.fitted_
    assert model.trainer_params["max_epochs"] == 2
    features, targets = model.transform_with_targets(test_dataloader=loader)
    assert torch.equal(model.transform(test_dataloader=DataLoader(rows, batch_size=6)), features)
    assert torch.equal(targets, rows[:, 0])
    with torch.no_grad():
        step = model.eval().transform_step_with_targets((rows[:6], rows[:6, 0]), 0)
    assert torch.equal(step["features"], features[:6])
    assert torch.equal(step["targets"], targets[:6])
    with pytest.raises(ValueError, match=r"needs \(x, y\)"):
        model.transform_step_with_targets(rows, 0)
    (x1, x2), y = model.parse_batch(([rows, rows + 1], targets), device="cpu")
    assert torch.equal(x1 + 1, x2)
    assert y is not None
    with pytest.raises(TypeError, match="both X and train_dataloader"):
        model.fit(X=pairs, train_dataloader=pairs)


def test_an_estimator_that_needs_no_fit_says_so_by_either_name(rows):
    for name in ("fitted", "fitted_"):
        model = Own(Rows(), **QUIET)
        setattr(model, name, True)
        assert model.transform(rows).shape == (24, 4)


def test_a_data_module_may_be_named(rows):
    class Module(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader([[x, x + 0.1] for x in rows], batch_size=6)

    assert make().fit(datamodule=Module()).fitted


# -- hyperparameters and logs -----------------------------------------------------------------


def test_hyperparameters_of_the_fit_reach_loggers_and_checkpoints(rows, tmp_path):
    logger = CSVLogger(tmp_path)
    keep = ModelCheckpoint(tmp_path / "checkpoints", filename="end")
    model = make(Mine, alpha=2.0, logger=logger, callbacks=[keep], ignore=["weight_decay"])
    model.set_params(temperature=0.7, optimizer=torch.optim.SGD).fit(rows)
    logged = (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()
    checkpoint = torch.load(keep.best_model_path, weights_only=True)["hyper_parameters"]
    for found in (logged, checkpoint, model.hparams):
        assert "alpha" in found
        assert "\nweight_decay" not in str(found)
        assert "optimizer" not in found  # a class now
    assert "temperature: 0.7" in logged
    assert (checkpoint["temperature"], model.hparams.max_epochs) == (0.7, 2)


def test_hyperparameters_are_left_out_where_asked(rows, tmp_path):
    model = make(save_hparams=False, logger=CSVLogger(tmp_path)).fit(rows)
    assert not (tmp_path / "lightning_logs/version_0/hparams.yaml").exists()
    assert model.hparams == {}


def test_a_checkpoint_is_loaded_in_lightnings_way(rows, tmp_path):
    keep = ModelCheckpoint(tmp_path / "checkpoints")
    model = make(Mine, alpha=2.0, temperature=0.7, callbacks=[keep]).fit(rows)
    again = Mine.load_from_checkpoint(keep.best_model_path, encoder=Rows, weights_only=True)
    assert (again.alpha, again.temperature, again.fitted) == (2.0, 0.7, True)
    assert torch.equal(again.transform(rows), model.transform(rows))


def test_a_constructor_may_save_its_own_hyperparameters(rows):
    class Saving(Own):
        def __init__(self, encoder, note="n", **kwargs):
            super().__init__(encoder, **kwargs)
            self.save_hyperparameters(ignore=["encoder"])

    model = Saving(Rows(), note="m", lr=0.3, max_epochs=1, **QUIET).fit(rows)
    assert (model.hparams.note, model.hparams.lr) == ("m", 0.3)


def test_a_data_modules_hyperparameters_do_not_collide(rows, tmp_path):
    class Module(L.LightningDataModule):
        def __init__(self, batch_size):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return DataLoader([[x, x + 0.1] for x in rows], batch_size=self.hparams.batch_size)

    make(batch_size=8, logger=CSVLogger(tmp_path)).fit(Module(6))
    assert "batch_size: 6" in (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()


class Seen(L.Callback):
    """Keeps the metrics after each step and epoch."""

    def __init__(self):
        self.steps, self.epochs, self.bar = [], [], []

    def on_train_batch_end(self, trainer, *args):
        self.steps.append(float(trainer.callback_metrics["loss/train_step"]))
        self.bar.append(set(trainer.progress_bar_metrics))

    def on_train_epoch_end(self, trainer, *args):
        self.epochs.append(float(trainer.callback_metrics["loss/train"]))


def test_the_loss_is_in_the_progress_bar_from_the_first_step(rows, tmp_path):
    seen = Seen()
    logger = CSVLogger(tmp_path)
    make(callbacks=[seen], batch_size=6, logger=logger, log_every_n_steps=1).fit(rows)
    assert "loss/train_step" in seen.bar[0]
    assert "loss/train" in seen.bar[4]
    assert seen.epochs == pytest.approx(np.reshape(seen.steps, (2, 4)).mean(1), rel=1e-5)
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split("\n")[0]
    assert {"loss/train", "loss/train_step"} <= set(header.split(","))


# -- Lightning's tuners -----------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


LATER = {
    "random_state": 0,
    "batch_size": 6,
    "max_epochs": 4,
    "lr_scheduler": "warmup_cosine",
    "lr_scheduler_kwargs": {"warmup_epochs": 1},
}


@pytest.mark.parametrize("view", [DCL, Mine])
@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore:.*(epochs|steps|scheduler).*")
def test_the_rate_that_a_callback_finds_is_that_of_the_fit(rows, view):
    find = LearningRateFinder(num_training_steps=16, min_lr=1e-4, max_lr=1e-2)
    model = make(view, callbacks=[find], **LATER).fit(rows)
    found = find.optimal_lr.suggestion()
    assert model.learning_rate == model.get_params()["learning_rate"] == found
    assert model.lr_scheduler.base_lrs == [found] * 2
    assert model.lr_scheduler.last_epoch == 16
    alone = make(view, learning_rate=found, **LATER).fit(rows)
    assert torch.equal(weights(model), weights(alone))


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore:.*batch size.*")
def test_the_batch_size_that_a_callback_finds_is_that_of_the_fit(rows):
    find = BatchSizeFinder(init_val=3, max_trials=2, steps_per_trial=1)
    model = make(callbacks=[find], **LATER).fit(rows)
    assert model.batch_size == model.get_params()["batch_size"] == find.optimal_batch_size == 6
    find.init_val, find._init_val = 4, 4
    model.fit(rows)
    assert model.batch_size == find.optimal_batch_size == 8
    assert (model.trainer.num_training_batches, model.lr_scheduler.total_steps) == (3, 12)


class Pairs(L.LightningDataModule):
    def __init__(self, rows, batch_size=6):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def train_dataloader(self):
        return DataLoader([[x, x + 0.1] for x in self.rows], batch_size=self.batch_size)

    def val_dataloader(self):
        return []


@pytest.mark.parametrize("kind", [DCL, functools.partial(Own, Rows())])
@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore")
def test_the_tuner_works_before_a_fit(rows, kind):
    model = make() if kind is DCL else kind(**QUIET, max_epochs=2)
    trainer = L.Trainer(max_epochs=6, logger=False, enable_checkpointing=False, **QUIET)
    before = weights(model)
    tuner = Tuner(trainer)
    found = tuner.lr_find(model, datamodule=Pairs(rows), num_training=16, max_lr=1e-2)
    rate = model.learning_rate if kind is DCL else model.lr
    assert len(found.results["loss"]) == 16
    assert rate == found.suggestion()
    size = tuner.scale_batch_size(model, datamodule=Pairs(rows), max_trials=2, init_val=3)
    assert size == 6
    assert torch.equal(weights(model), before)
    assert not model.fitted
    model.fit(Pairs(rows))
    assert model.get_params()["learning_rate" if kind is DCL else "lr"] == rate

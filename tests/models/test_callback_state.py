"""Each fit begins with callbacks as they were given."""

from __future__ import annotations

import dataclasses
import pickle
import threading

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from sklearn.base import clone
from torch import nn

from nidl_dcl import DCL
from nidl_dcl.models.callback_state import as_given, restored

OPTIONS = {
    "proj_input_dim": 4,
    "lr_scheduler": None,
    "max_epochs": 5,
    "random_state": 0,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Epochs(L.Callback):
    """Counts epochs, and notes them."""

    def __init__(self, notes=None):
        self.count = 0
        self.notes = [] if notes is None else notes
        self.head = nn.Linear(1, 1)

    def on_train_epoch_end(self, trainer, pl_module):
        self.count += 1
        self.notes.append(trainer.current_epoch)
        nn.init.zeros_(self.head.weight)


@pytest.fixture(scope="module")
def rows():
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def make(*callbacks, **options):
    return DCL(nn.Linear(6, 4), callbacks=list(callbacks), **{**OPTIONS, **options})


def stopping(after=2):
    # Nothing is lower than this threshold allows, so the fit ends after so many epochs without.
    return EarlyStopping("loss/train", patience=after, min_delta=100.0)


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_second_fit_stops_where_the_first_did(rows, warm_start):
    stop = stopping()
    model = make(stop, warm_start=warm_start).fit(rows)
    assert model.trainer.current_epoch == 3
    assert stop.stopped_epoch == 2
    assert model.fit(rows).trainer.current_epoch == 3
    assert model.get_params()["callbacks"][0] is stop


@pytest.mark.parametrize("copied", [clone, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_callbacks_as_they_were_given(rows, copied):
    model = make(stopping(), Epochs()).fit(rows)
    twin = copied(model)
    stop, epochs = twin.get_params()["callbacks"]
    assert (stop.wait_count, epochs.count, epochs.notes) == (0, 0, [])
    assert twin.fit(rows).trainer.current_epoch == 3
    assert model.get_params()["callbacks"][1].notes == [0, 1, 2] == epochs.notes


def test_estimators_that_share_a_callback_begin_alike(rows):
    stop = stopping()
    for model in [make(stop), make(stop)]:
        assert model.fit(rows).trainer.current_epoch == 3
    assert make(stop).fit(rows).trainer.current_epoch == 3


def test_checkpoints_and_timers_begin_anew(rows, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="loss/train", filename="{epoch}", save_top_k=1)
    timer = Timer("00:00:01:00")
    model = make(keep, timer, max_epochs=1).fit(rows)
    first, spent = keep.best_model_path, timer.time_elapsed()
    assert spent > 0
    with pytest.warns(UserWarning, match="exists and is not empty"):
        model.set_params(max_epochs=2, temperature=1.0).fit(rows)
    assert keep.best_model_path != first
    assert len(keep.best_k_models) == 1
    assert first not in keep.best_k_models


def test_what_is_assigned_between_fits_stays(rows):
    stop = stopping()
    model = make(stop).fit(rows)
    stop.patience = 3
    assert model.fit(rows).trainer.current_epoch == 4
    assert clone(model).fit(rows).trainer.current_epoch == 4
    assert model.fit(rows).trainer.current_epoch == 4


def test_objects_that_a_callback_was_given_stay_those_in_the_first_fit(rows):
    notes: list[int] = []
    model = make(Epochs(notes), max_epochs=2).fit(rows)
    assert notes == [0, 1]
    model.fit(rows)
    assert notes == [0, 1]
    assert model.get_params()["callbacks"][0].notes == [0, 1]


def test_networks_of_a_callback_are_restored(rows):
    epochs = Epochs()
    before = epochs.head.weight.clone()
    model = make(epochs, max_epochs=1).fit(rows)
    assert not torch.equal(epochs.head.weight, before)
    with restored([epochs], [model]):
        assert torch.equal(epochs.head.weight, before)


def test_what_cannot_be_copied_is_shared_and_the_rest_restored(rows):
    class Locked(Epochs):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    locked = Locked()
    model = make(locked, max_epochs=2).fit(rows)
    model.fit(rows)
    assert locked.notes == [0, 1]
    twin = clone(model).fit(rows)
    assert twin.get_params()["callbacks"][0].lock is locked.lock
    assert clone(make(Locked())).get_params()["callbacks"][0].count == 0


def test_callbacks_that_cannot_be_hashed_and_single_ones(rows):
    @dataclasses.dataclass
    class Count(L.Callback):
        count: int = 0

        def on_train_epoch_end(self, *args):
            self.count += 1

    count = Count()
    model = DCL(nn.Linear(6, 4), **{**OPTIONS, "callbacks": count, "max_epochs": 2})
    model.fit(rows).fit(rows)
    assert count.count == 2
    assert as_given(count).count == 0
    assert clone(model).fit(rows).get_params()["callbacks"].count == 2


def test_a_fit_that_fails_counts_as_one(rows):
    class Failing(Epochs):
        def on_train_epoch_end(self, *args):
            super().on_train_epoch_end(*args)
            raise OSError(self.count)

    failing = Failing()
    model = make(failing)
    for _ in range(2):
        with pytest.raises(OSError, match="1"):
            model.fit(rows)


def test_large_arrays_of_a_callback_are_not_copied(rows):
    class Data(Epochs):
        def __init__(self):
            super().__init__()
            self.x = torch.zeros(2**20)

    data = Data()
    kept = data.x
    make(data, max_epochs=1).fit(rows).fit(rows)
    assert data.x is kept

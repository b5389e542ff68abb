from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, KFold, cross_val_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nidl_dcl import DCL
from nidl_dcl.models.probe import Probe, embed_between_steps


class Encoder(nn.Sequential):
    """With what behaves otherwise in training."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def make(*callbacks: Any, **options: Any) -> DCL:
    options = {
        "max_epochs": 4,
        "lr_scheduler": None,
        "random_state": 0,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "batch_size": 8,
        **options,
    }
    return DCL(Encoder, proj_input_dim=4, callbacks=list(callbacks), **options)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def test_it_measures_every_few_epochs_and_at_the_last(rows: torch.Tensor) -> None:
    probe = Probe(Ridge(), rows, rows[:, 0].numpy(), every=3)
    make(probe).fit(rows)
    assert [epoch for epoch, _ in probe.scores] == [3, 4]


def test_a_run_with_a_probe_ends_as_one_without(rows: torch.Tensor) -> None:
    probe = Probe(Ridge(), DataLoader(rows, batch_size=5), rows[:, 0].numpy(), every=1)
    watched, alone = make(probe).fit(rows).state_dict(), make().fit(rows).state_dict()
    torch.testing.assert_close(watched, alone, rtol=0, atol=0)


def test_the_last_score_is_that_of_the_fitted_estimator(rows: torch.Tensor) -> None:
    y = (rows[:, 0] > 0).numpy()
    groups = np.arange(24) // 2
    probe = Probe(LogisticRegression(), rows, y, groups=groups, scoring="balanced_accuracy")
    features = make(probe).fit(rows).transform(rows).numpy()
    expected = cross_val_score(
        LogisticRegression(),
        features,
        y,
        groups=groups,
        cv=GroupKFold(5),
        scoring="balanced_accuracy",
    )
    assert probe.scores == [(4, pytest.approx(expected.mean()))]


def test_embeddings_of_regions_are_side_by_side(rows: torch.Tensor) -> None:
    encoder = nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, (3, 4)))
    probe = Probe(Ridge(), rows, rows[:, 0].numpy(), scoring="r2", cv=3)
    options = {**make(probe).get_params(), "encoder": encoder}
    features = DCL(**options).fit(rows).transform(rows).numpy()
    assert features.shape == (24, 12)
    folds = KFold(3, shuffle=True, random_state=0)
    expected = cross_val_score(Ridge(), features, rows[:, 0].numpy(), cv=folds, scoring="r2")
    assert probe.scores == [(4, pytest.approx(expected.mean()))]


def test_groups_are_never_split(rows: torch.Tensor) -> None:
    # Each pair shares a value that only its twin could tell.
    x = rows[:12].repeat_interleave(2, 0)
    y = torch.randn(12, generator=torch.Generator().manual_seed(1)).repeat_interleave(2).numpy()
    grouped = Probe(Ridge(alpha=1e-6), x, y, groups=np.arange(24) // 2, scoring="r2")
    make(grouped).fit(rows)
    assert grouped.scores[0][1] < 0


def test_checkpoints_and_early_stopping_can_follow_it(rows: torch.Tensor, tmp_path: Path) -> None:
    probe = Probe(Ridge(), rows, rows[:, 0].numpy(), name="age", every=1)
    best = ModelCheckpoint(tmp_path, monitor="probe/age", mode="max")
    patient = EarlyStopping(monitor="probe/age", mode="max", patience=50)
    make(probe, best, patient, default_root_dir=str(tmp_path)).fit(rows)
    assert float(best.best_model_score) == pytest.approx(max(s for _, s in probe.scores))


def test_the_untrained_network_and_baselines_stand_beside_it(
    rows: torch.Tensor, tmp_path: Path
) -> None:
    y = rows[:, 0].numpy()
    options = {"name": "age", "scoring": "r2", "every": 2, "untrained": True}
    probe = Probe(Ridge(), rows, y, baselines={"voxels": rows}, **options)
    model = make(probe, logger=CSVLogger(tmp_path)).fit(rows)
    folds = KFold(5, shuffle=True, random_state=0)
    voxels = cross_val_score(Ridge(), rows.numpy(), y, cv=folds, scoring="r2").mean()
    still = make(learning_rate=0.0, max_epochs=1).fit(rows).eval()
    still.encoder[1].reset_running_stats()
    before = cross_val_score(Ridge(), still.transform(rows).numpy(), y, cv=folds, scoring="r2")
    assert probe.baseline_scores == {
        "untrained": pytest.approx(before.mean(), abs=1e-5),
        "voxels": pytest.approx(voxels),
    }
    assert [epoch for epoch, _ in probe.scores] == [2, 4]
    table = pd.read_csv(next(tmp_path.rglob("metrics.csv")))
    for name, value in probe.baseline_scores.items():
        assert table[f"probe/age_{name}"].dropna().tolist() == [pytest.approx(value, abs=1e-5)] * 2
    torch.testing.assert_close(model.state_dict(), make().fit(rows).state_dict(), rtol=0, atol=0)


def test_a_resumed_fit_keeps_the_score_of_the_untrained_network(
    rows: torch.Tensor, tmp_path: Path
) -> None:
    def probe(name: str) -> Probe:
        return Probe(Ridge(), rows, rows[:, 0].numpy(), name=name, untrained=True, scoring=name)

    first = [probe("r2"), probe("neg_mean_absolute_error")]
    make(*first, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)).fit(rows)
    resumed = [probe("r2"), probe("neg_mean_absolute_error")]
    make(*resumed).fit(rows, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert [p.baseline_scores for p in resumed] == [p.baseline_scores for p in first]
    assert first[0].baseline_scores != first[1].baseline_scores


def test_a_baseline_of_another_length_is_an_error_that_names_it(rows: torch.Tensor) -> None:
    probe = Probe(Ridge(), rows, rows[:, 0].numpy(), baselines={"voxels": rows[:7]})
    with pytest.raises(ValueError, match=r"7 samples in baseline 'voxels' and 24 in y"):
        make(probe).fit(rows)


@pytest.mark.parametrize("what", ["y", "groups"])
def test_another_length_is_an_error_with_both_numbers(what: str, rows: torch.Tensor) -> None:
    wrong = {"y": rows[:, 0].numpy(), "groups": np.arange(24), what: np.arange(7)}
    with pytest.raises(ValueError, match=rf"24 samples in X and 7 in {what}"):
        make(Probe(Ridge(), rows, **wrong)).fit(rows)


def test_between_steps_rows_come_in_input_order_and_modes_stay(rows: torch.Tensor) -> None:
    model = make().fit(rows)
    model.train()
    model.encoder[1].eval()
    loader = DataLoader(TensorDataset(rows, torch.arange(24)), batch_size=7)
    found = embed_between_steps(model, loader)
    assert [module.training for module in model.encoder] == [True, False, True]
    assert np.array_equal(found, model.transform(loader).numpy())

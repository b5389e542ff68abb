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


def expected(features: Any, y: Any, scoring: str, cv: Any) -> float:
    return cross_val_score(Ridge(), features, y, cv=cv, scoring=scoring).mean()


@pytest.mark.parametrize(
    "scoring",
    [
        ["r2", "neg_mean_absolute_error"],
        {"r2": "r2", "neg_mean_absolute_error": "neg_mean_absolute_error"},
        lambda model, x, y: {
            "r2": model.score(x, y),
            "neg_mean_absolute_error": -np.abs(model.predict(x) - y).mean(),
        },
    ],
)
def test_several_scorers_are_logged_by_name(
    scoring: Any, rows: torch.Tensor, tmp_path: Path
) -> None:
    y = rows[:, 0].numpy()
    options = {"name": "age", "scoring": scoring, "untrained": True}
    probe = Probe(Ridge(), rows, y, baselines={"voxels": rows}, **options)
    model = make(probe, logger=CSVLogger(tmp_path)).fit(rows)
    folds = KFold(5, shuffle=True, random_state=0)
    ((_, scores),) = probe.scores
    table = pd.read_csv(next(tmp_path.rglob("metrics.csv")))
    for name in ("r2", "neg_mean_absolute_error"):
        known = {
            "": expected(model.transform(rows).numpy(), y, name, folds),
            "_voxels": expected(rows.numpy(), y, name, folds),
            "_untrained": probe.baseline_scores["untrained"][name],
        }
        assert scores[name] == pytest.approx(known[""])
        for ending, value in known.items():
            logged = table[f"probe/age_{name}{ending}"].dropna().tolist()
            assert logged[-1] == pytest.approx(value, abs=1e-5)


def test_a_splitter_divides_all_measurements_alike(rows: torch.Tensor) -> None:
    y = rows[:, 0].numpy()

    class Counting(KFold):
        calls = 0

        def split(self, *args: Any) -> Any:
            Counting.calls += 1
            return super().split(*args)

    probe = Probe(
        Ridge(), rows, y, cv=Counting(3, shuffle=True), every=1, scoring="r2", baselines={"x": rows}
    )
    make(probe).fit(rows)
    assert Counting.calls == 1
    halves = [(np.arange(12), np.arange(12, 24)), (np.arange(12, 24), np.arange(12))]
    for cv in (halves, iter(halves)):
        probe = Probe(Ridge(), rows, y, cv=cv, every=2, scoring="r2")
        features = make(probe).fit(rows).transform(rows).numpy()
        assert probe.scores[-1][1] == pytest.approx(expected(features, y, "r2", halves))


@pytest.mark.parametrize("kind", [TensorDataset, lambda *xy: DataLoader(TensorDataset(*xy), 7)])
def test_targets_may_be_those_of_its_own_data(kind: Any, rows: torch.Tensor) -> None:
    given = Probe(Ridge(), rows, rows[:, 0].numpy(), scoring="r2")
    own = Probe(Ridge(), kind(rows, rows[:, 0]), name="own", scoring="r2", baselines={"rows": rows})
    make(given, own).fit(rows)
    assert own.scores == [(4, pytest.approx(given.scores[0][1]))]
    names = ["old" if x > 0 else "young" for x in rows[:, 0]]
    labeled = DataLoader(list(zip(rows, names, strict=True)), 7)
    classes = Probe(LogisticRegression(), labeled, scoring="balanced_accuracy")
    make(classes).fit(rows)
    assert 0 <= classes.scores[0][1] <= 1


@pytest.mark.parametrize("untrained", [True, False])
def test_no_targets_are_an_error(untrained: bool, rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="The probe has no targets"):
        make(Probe(Ridge(), rows, untrained=untrained)).fit(rows)


def test_loggers_get_the_score_before_the_first_epoch(rows: torch.Tensor, tmp_path: Path) -> None:
    probe = Probe(Ridge(), rows, rows[:, 0].numpy(), scoring="r2", untrained=True)
    make(probe, logger=CSVLogger(tmp_path)).fit(rows)
    table = pd.read_csv(next(tmp_path.rglob("metrics.csv"))).dropna(subset="probe/score")
    assert table["step"].iloc[0] == 0
    assert table["probe/score"].iloc[0] == pytest.approx(probe.baseline_scores["untrained"])

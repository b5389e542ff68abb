from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.workflow.options import DataOptions

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_on_the_cpu_too():
    script = REPOSITORY / "benchmarks" / "gpu.py"
    done = subprocess.run(
        [sys.executable, script, "cpu"], check=True, capture_output=True, text=True, timeout=600
    )
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 6
    assert all(float(row[2]) > 0 for row in rows), done.stdout


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("quality")


def scored(quality, errors, kinds=None):
    """Return one seed's errors of an arm, of as many persons."""
    kinds = [0] * len(errors) if kinds is None else kinds
    people = [f"sub-{i:02}" for i in range(len(errors))]
    index = pd.MultiIndex.from_arrays([kinds, people], names=["kind", "person"])
    losses = [pd.Series(np.asarray(errors, dtype=float), index)]
    return quality.Scored("mae", len(errors), [float(np.mean(errors))], losses, {})


@pytest.mark.slow
def test_quality_measures_every_arm_of_a_dataset(
    quality, make_heads, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(quality, "LOOKS", (0.5,))

    rows = quality.main(
        make_heads(n=24),
        data=DataOptions(preprocess="none"),
        training={"max_epochs": 1, "spacing": [16.0], "batch_size": 8, "accelerator": "cpu"},
        seeds=1,
        repeats=1,
        arms=["regional", "nidl", "unseen"],
        changes=["grid 2 x 2 x 2", "embedding: mean over regions"],
        curve=tmp_path / "curve",
        output=tmp_path / "found.json",
    )

    own = ["dummy", "untrained", "voxels", "regional"]
    peer = ["nidl"] if importlib.util.find_spec("nidl") else []
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    for target, metric in (("age", "mae"), ("sex", "balanced_accuracy")):
        assert {r["features"] for r in rows if r["target"] == target} == {*own, "nidl"}
        assert [*found["targets"][target]] == [*own, *peer]
        regional = found["targets"][target]["regional"]
        assert regional["metric"] == metric
        assert {*regional["gain"]} == {"voxels", "untrained"}
        assert len(regional["learning_curve"]) > 1
        assert [*found["unseen"][target]] == own
        assert [*found["ablation"][target]] == [
            "as it is",
            "grid 2 x 2 x 2",
            "embedding: mean over regions",
        ]
    low, high = found["targets"]["age"]["regional"]["gain"]["voxels"]["ci95"]
    assert low < found["targets"]["age"]["regional"]["gain"]["voxels"]["mean"] < high
    # The one who has no age is in neither half, and each of the others is read out once.
    assert found["unseen"]["age"]["regional"]["n_participants"] == 23
    assert found["training"]["encoder"] == "regional"
    minutes = pd.DataFrame(found["minutes"])
    assert {*minutes["features"]} == {"global", "regional", *peer}
    assert minutes.groupby("features")["minutes"].min().eq(0).all()
    assert (tmp_path / "curve.svg").stat().st_size > 0
    assert (tmp_path / "curve.png").stat().st_size > 0
    assert "| regional " in capsys.readouterr().out


def test_a_gain_is_over_the_same_people(quality):
    errors = np.random.default_rng(0).normal(5, 2, 40)

    gain = scored(quality, errors - 1 + 0.01 * np.arange(40)).gain(scored(quality, errors))

    assert gain["mean"] == pytest.approx(1 - 0.195)
    low, high = gain["ci95"]
    assert 0.7 < low < gain["mean"] < high < 0.9


def test_a_gain_in_accuracy_counts_classes_alike(quality):
    kinds = ["F"] * 30 + ["M"] * 10
    wrong = np.array([1.0] * 30 + [0.0] * 10)

    gain = scored(quality, 0 * wrong, kinds).gain(scored(quality, wrong, kinds))

    assert gain["mean"] == 0.5


def test_images_of_a_person_that_share_a_value_are_one_answer(quality):
    images = pd.DataFrame({"person_id": ["a", "a", "b", "c"], "age": [20.0, 20.0, 30.0, np.nan]})
    predicted = np.array([[18.0, 22.0, 33.0, np.nan], [20.0, 24.0, 29.0, np.nan]])

    found = quality._losses(predicted, images, "age", {"task": "regression"})

    assert found.to_dict() == {(0, "a"): 1.0, (0, "b"): 2.0}


def test_without_a_dataset_a_row_says_so(quality, monkeypatch):
    monkeypatch.delenv("NIDL_DCL_IXI", raising=False)

    (row,) = quality.main()

    assert "dataset" in row["note"]

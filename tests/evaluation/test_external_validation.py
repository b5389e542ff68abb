from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SLOW, TWO_EPOCHS
from scipy.stats import bootstrap
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nidl_dcl import predict_phenotype
from nidl_dcl.bids.validator import validate
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.cohort import cohort_columns, compare_cohorts, describe_cohort
from nidl_dcl.evaluation.external_validation import (
    OVERLAP,
    ExternalResult,
    find_overlap,
    validate_externally,
)
from nidl_dcl.evaluation.folds import CVDesign, make_design
from nidl_dcl.evaluation.linear_models import Logistic, Ridge
from nidl_dcl.evaluation.readout import ConfoundModel, FittedReadout, fit_readout
from nidl_dcl.evaluation.readout_file import (
    ReadoutFile,
    find_readout,
    read_readout,
    readout_path,
    write_readout,
)
from nidl_dcl.evaluation.targets import read_target
from nidl_dcl.io.hashing import salted
from nidl_dcl.report.build import write_report
from nidl_dcl.volumes.quality import QUALITY_METRICS, measure_quality
from nidl_dcl.workflow.external import EmbeddedDataset, keep_readout

MODEL = "ab" * 32


# -- the readout itself ---------------------------------------------------------------------


def designed(kind: str, n: int = 60, d: int = 12) -> tuple[np.ndarray, np.ndarray, CVDesign]:
    """Return features with a constant column, a target and its folds; two images each."""
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(n, 3))
    x = hidden @ rng.normal(size=(3, d)) + rng.normal(size=(n, d)) + 2
    x[:, 4] = 7.0
    y = np.repeat(hidden[::2, 0] + 0.5 * rng.normal(size=n // 2), 2) * 10 + 50
    if kind != "numbers":
        edges = [50.0] if kind == "two" else [46.0, 54.0]
        y = np.array(["a", "b", "c"], dtype=object)[np.digitize(y, edges)]
    who = np.array([f"sub-{i // 2:02d}" for i in range(n)], dtype=object)
    read = read_target(y, who)
    return x, y, make_design(read, who, who, n_splits=5, n_repeats=2, seed=0)


def sklearn_model(kind: str, strength: float, rows: int, varying: int) -> Any:
    """Return the pipeline of scikit-learn for a strength, as the documentation defines it."""
    penalty = strength * rows * varying
    if kind == "numbers":
        return make_pipeline(StandardScaler(), SklearnRidge(alpha=penalty))
    model = LogisticRegression(C=4 / penalty, class_weight="balanced", tol=1e-8, max_iter=10000)
    return make_pipeline(StandardScaler(), model)


@pytest.mark.parametrize("kind", ["numbers", "two", "three"])
def test_the_final_read_out_is_scikit_learns_pipeline(kind: str) -> None:
    x, y, design = designed(kind)
    new = np.random.default_rng(4).normal(size=(20, x.shape[1])) + 2

    fitted = fit_readout(design, x)

    pipe = sklearn_model(kind, fitted.strength, len(x), x.shape[1] - 1).fit(x, y)
    expected = pipe.predict(new) if kind == "numbers" else pipe.predict_proba(new)
    np.testing.assert_allclose(fitted.predict(new), expected, atol=1e-6)
    assert fitted.labels == (() if kind == "numbers" else tuple(pipe.classes_))


@pytest.mark.parametrize("kind", ["numbers", "two"])
def test_its_strength_predicts_each_fold_best_from_the_others(kind: str) -> None:
    x, y, design = designed(kind)
    model = Ridge() if kind == "numbers" else Logistic(2)
    loss = np.zeros(len(model.strengths))
    for repeat in range(2):
        fold = design.row_folds(repeat)
        for k in range(design.n_folds):
            train, test = fold != k, fold == k
            for i, strength in enumerate(model.strengths):
                pipe = sklearn_model(kind, strength, int(train.sum()), x.shape[1] - 1)
                pipe.fit(x[train], y[train])
                if kind == "numbers":
                    loss[i] += ((y[test] - pipe.predict(x[test])) ** 2).sum()
                    continue
                said = np.log(pipe.predict_proba(x[test]))
                for c, label in enumerate("ab"):
                    if (y[test] == label).any():
                        loss[i] -= said[y[test] == label, c].mean()

    assert fit_readout(design, x).strength == model.strengths[loss.argmin()]


def test_confounds_are_taken_away_before_anything_else() -> None:
    rng = np.random.default_rng(0)
    confounds = ConfoundModel(("age",), np.array([40.0]), rng.normal(size=(1, 3)))
    plain = FittedReadout((), np.zeros(3), np.ones(3), rng.normal(size=(1, 3)), np.ones(1), 1.0)
    x, age = rng.normal(size=(5, 3)), rng.normal(size=(5, 1)) + 40

    freed = replace(plain, confounds=confounds)

    expected = plain.predict(x - (age - 40) @ confounds.coefficients)
    np.testing.assert_allclose(freed.predict(x, age), expected)
    with pytest.raises(UsageError, match="confounds age"):
        freed.predict(x)


@pytest.mark.parametrize("kind", ["numbers", "two"])
def test_with_confounds_it_is_scikit_learns_model_of_what_is_left(kind: str) -> None:
    x, y, design = designed(kind)
    rng = np.random.default_rng(5)
    confounds, new = rng.normal(size=(len(x), 2)) * [1, 30], rng.normal(size=(9, x.shape[1])) + 2
    confounds[:, 1] += x[:, 0] * 10
    theirs = rng.normal(size=(9, 2)) * [1, 30]

    fitted = fit_readout(design, x, names=["a", "b"], values=confounds)

    scaler = StandardScaler().fit(x)
    effect = LinearRegression().fit(confounds, scaler.transform(x))
    left = scaler.transform(x) - effect.predict(confounds)
    model = sklearn_model(kind, fitted.strength, 1, (left**2).sum())[-1].fit(left, y)
    left_new = scaler.transform(new) - effect.predict(theirs)
    expected = model.predict(left_new) if kind == "numbers" else model.predict_proba(left_new)
    np.testing.assert_allclose(fitted.predict(new, theirs), expected, atol=1e-6)
    assert fitted.confounds is not None
    assert fitted.confounds.names == ("a", "b")


# -- the file --------------------------------------------------------------------------------


def stored_for(task: str = "regression", **changes: Any) -> ReadoutFile:
    """Return a readout that says twice the first feature plus ten, or class b above zero."""
    classes = task == "classification"
    target: dict[str, Any] = {"distribution": {"mean": 50.0, "sd": 10.0, "min": 20.0, "max": 80.0}}
    if classes:
        target = {"classes": {"a": 30, "b": 10}}
    score = {"mean": 0.8 if classes else 5.0, "ci95": [0.7, 0.9] if classes else [4.0, 6.0]}
    fields: dict[str, Any] = {
        "target": "group" if classes else "age",
        "task": task,
        "units": None,
        "linear": FittedReadout(
            ("a", "b") if classes else (),
            np.zeros(2),
            np.ones(2),
            np.array([[2.0, 0.0]]),
            np.array([0.0 if classes else 10.0]),
            0.1,
        ),
        "n_participants": 40,
        "model_sha256": MODEL,
        "cohort": {
            "n_participants": 40,
            "age": {"mean": 50.0, "sd": 10.0, "n": 40},
            "sex": {"F": 20, "M": 20},
            "site": {"north": 40},
            "quality": {"noise": {"mean": 0.1, "sd": 0.02, "n": 40}},
            "target": target,
        },
        "scores": {"balanced_accuracy" if classes else "mae": score},
        "members": {
            "salt": "salt",
            "participants": salted(["sub-01", "sub-02"], "salt"),
            "images": salted(["digest-of-02"], "salt"),
        },
    }
    return ReadoutFile(**{**fields, **changes})


@pytest.mark.parametrize("kind", ["numbers", "two", "three"])
def test_a_file_gives_back_the_same_predictions_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    x, _, design = designed(kind)
    linear = fit_readout(design, x)
    target = {"classes": design.class_sizes}
    if kind == "numbers":
        target = stored_for().cohort["target"]
    stored = stored_for(
        "regression" if kind == "numbers" else "classification",
        linear=linear,
        cohort={**stored_for().cohort, "target": target},
    )
    write_readout(tmp_path / "r.json", stored)

    read = read_readout(tmp_path / "r.json")

    assert np.array_equal(read.linear.predict(x), linear.predict(x))
    assert len(read.sha256) == 64
    for name in ("target", "task", "units", "n_participants", "model_sha256", "scores"):
        assert getattr(read, name) == getattr(stored, name)
    assert read.cohort["age"] == stored.cohort["age"]


def test_confounds_go_through_the_file(tmp_path: Path) -> None:
    confounds = ConfoundModel(("age", "icv"), np.array([1.0, 2.0]), np.arange(4.0).reshape(2, 2))
    stored = stored_for(linear=replace(stored_for().linear, confounds=confounds))
    write_readout(tmp_path / "r.json", stored)
    read = read_readout(tmp_path / "r.json").linear.confounds
    assert read is not None
    assert read.names == ("age", "icv")
    assert np.array_equal(read.coefficients, confounds.coefficients)


def changed(**fields: Any) -> Callable[[dict[str, Any]], str]:
    """Return what makes a file with other fields; nested ones by a dunder."""

    def change(content: dict[str, Any]) -> str:
        for name, value in fields.items():
            *path, last = name.split("__")
            place = content
            for part in path:
                place = place[part]
            place[last] = value
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: "", "not a readout"),
        (lambda c: "[1, 2]", "not a JSON object"),
        (lambda c: "[" * 200_000, "nested too deeply"),
        (lambda c: json.dumps(c)[:-40], "not a readout"),
        (changed(kind="model"), "kind is 'model'"),
        (changed(format=2), "format 2; this version reads format 1"),
        (changed(format=True), "format True"),
        (changed(task="ranking"), "task is 'ranking'"),
        (changed(labels=["a", "b"]), "labels do not suit a regression"),
        (changed(mean=[0.0]), "scale has 2 numbers, 1 expected"),
        (changed(mean=[]), "mean is empty"),
        (changed(mean=[0.0] * 70000), "mean has 70000 numbers, at most 65536"),
        (changed(coefficients=[[1.0, 2.0, 3.0]]), "coefficients has 3 numbers, 2 expected"),
        (changed(coefficients=[[1.0, 2.0]] * 2), "coefficients is not a list of 1 rows"),
        (changed(coefficients=[1.0]), "coefficients is not a list of numbers"),
        (changed(intercept=[float("nan")]), "NaN, which is not a finite number"),
        (changed(intercept=[float("-inf")]), "-Infinity, which is not a finite number"),
        (lambda c: json.dumps(c).replace("10.0]", "1e999]"), "not a finite number in range"),
        (changed(intercept=[10**400]), "not a finite number in range"),
        (changed(intercept=["1.0"]), "an entry of intercept is not a number"),
        (changed(intercept=[True]), "an entry of intercept is not a number"),
        (changed(scale=[1.0, 0.0]), "not positive"),
        (changed(model_sha256="../../weights"), "model_sha256 is not a checksum"),
        (changed(n_participants=-3), "n_participants is not a positive whole number"),
        (changed(target=""), "target is not a text"),
        (changed(target="x" * 5000), "target is not a text"),
        (changed(confounds={"names": ["age"], "means": [1.0]}), "confounds.coefficients"),
        (changed(training__sex={"F": 1.5}), "training.sex is not a positive whole number"),
        (changed(training__age={"mean": None}), "training.age.mean is not a number"),
        (changed(training__quality={"noise": 3}), "training.quality is not a JSON object"),
        (changed(training__quality={"x": {"mean": 1, "sd": 1}}), "unknown measures"),
        (changed(internal={"mae": {"mean": 5, "ci95": [1]}}), "ci95 has 1 numbers, 2 expected"),
        (changed(members={"salt": "s", "participants": 3}), "participants is not a list of hashes"),
    ],
)
def test_a_file_that_is_not_sound_is_refused_by_name(
    change: Callable[[dict[str, Any]], str], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "desc-dclAge_readout.json"
    write_readout(file, stored_for())
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(UsageError) as refused:
        read_readout(file)
    assert str(file) in str(refused.value)
    assert words in str(refused.value)


def test_nothing_is_unpickled_and_what_is_no_file_of_this_size_is_not_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**36)
    words = {
        "pickle": "not a readout",
        "link": "cannot be read",
        "folder": "not a regular file",
        "pipe": "not a regular file",
        "huge": "68719476736 bytes",
    }
    for name, said in words.items():
        with pytest.raises(UsageError, match=said):
            read_readout(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_the_read_out_of_the_same_model_is_found_under_any_label(tmp_path: Path) -> None:
    write_readout(readout_path(tmp_path, "dcl", "Age"), stored_for(model_sha256="cd" * 32))
    write_readout(readout_path(tmp_path, "big", "Age"), stored_for())
    find = {"model": "dcl", "model_sha256": MODEL}
    assert find_readout(tmp_path, "age", "Age", **find).model_sha256 == MODEL
    with pytest.raises(UsageError, match=r"cdcdcdcdcdcd….*are of ffff.*--model .*desc-dcl"):
        find_readout(tmp_path, "age", "Age", model="dcl", model_sha256="ff" * 32)
    with pytest.raises(UsageError, match=r"target 'sex'.*there are: desc-bigAge, desc-dclAge"):
        find_readout(tmp_path, "sex", "Sex", **find)
    with pytest.raises(UsageError, match=r"reads target 'age', not 'AGE'"):
        find_readout(tmp_path, "AGE", "Age", **find)
    with pytest.raises(UsageError, match="not a folder"):
        find_readout(tmp_path / "none", "age", "Age", **find)


# -- applying it -----------------------------------------------------------------------------


def people(n: int, **columns: Any) -> pd.DataFrame:
    """Return a table of images, one for each of `n` participants who are new to the readout."""
    table = pd.DataFrame({"participant_id": [f"sub-{i + 51}" for i in range(n)]})
    return table.assign(session_id=None, run=None, source=table["participant_id"], **columns)


def applied(stored: ReadoutFile, x: Any, images: pd.DataFrame, **more: Any) -> ExternalResult:
    """Return the result of a readout for the first feature `x` of images of a cohort."""
    features = np.column_stack([x, np.zeros(len(images))])
    ids = list(images["participant_id"])
    asked = {"contents": [""] * len(images), "other_people": False} | {
        name: more.pop(name) for name in ("contents", "other_people") if name in more
    }
    overlapping, overlap = find_overlap(
        stored, ids, asked["contents"], other_people=asked["other_people"]
    )
    return validate_externally(
        stored,
        features,
        images,
        more.pop("groups", ids),
        overlapping=overlapping,
        overlap=overlap,
        columns=cohort_columns(images, "site" if "site" in images else None),
        quality=pd.DataFrame({"noise": np.full(len(images), 0.12)}),
        **more,
    )


def test_images_are_averaged_and_every_participant_counts_once() -> None:
    images = people(4, age=[30.0, 30.0, 40.0, 60.0])
    # One with two images of one age, one with two ages.
    images["participant_id"] = ["sub-51", "sub-51", "sub-52", "sub-52"]
    result = applied(stored_for(), [5.0, 15.0, 20.0, 20.0], images)
    # sub-51: (20 + 40) / 2 = 30, error 0; sub-52: errors 10 and 10, each weighing a half.
    assert result.metrics["scores"]["mae"]["mean"] == pytest.approx(5.0)
    assert result.metrics["n_participants"] == 2
    assert list(result.predictions["prediction"]) == [20.0, 40.0, 50.0, 50.0]
    assert set(result.columns) == set(result.predictions.columns)


def test_one_participant_has_predictions_and_the_scores_that_are_defined() -> None:
    metrics = applied(stored_for(), [10.0], people(1, age=[33.0])).metrics
    assert metrics["scores"]["mae"] == {"mean": 3.0, "ci95": None}
    assert metrics["scores"]["r2"]["mean"] is None
    assert metrics["scores"]["r"]["mean"] is None
    assert metrics["calibration"]["slope"]["mean"] is None
    assert "too few participants" in metrics["headline"]["sentence"]
    json.dumps(metrics, allow_nan=False)

    told = applied(stored_for("classification"), [1.0], people(1, group=["b"])).metrics
    assert told["scores"]["balanced_accuracy"]["mean"] == 1.0
    assert told["scores"]["roc_auc"]["mean"] is None
    assert told["calibration"] is None
    json.dumps(told, allow_nan=False)


def test_calibration_is_the_line_of_truth_on_prediction() -> None:
    x = np.linspace(0, 30, 12)
    metrics = applied(stored_for(), x, people(12, age=3 * (2 * x + 10) - 7)).metrics
    assert metrics["calibration"]["slope"]["mean"] == pytest.approx(3.0)
    assert metrics["calibration"]["intercept"]["mean"] == pytest.approx(-7.0)
    assert "slope" not in metrics["scores"]
    assert metrics["baselines"]["dummy"].keys() == metrics["scores"].keys()


def test_scores_and_their_intervals_agree_with_scikit_learn_and_scipy() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=60)
    truth = np.where(x + rng.normal(size=60) > 0, "b", "a")
    scores = applied(stored_for("classification"), x, people(60, group=truth)).metrics["scores"]
    said = np.where(x > 0, "b", "a")
    assert scores["balanced_accuracy"]["mean"] == pytest.approx(
        balanced_accuracy_score(truth, said)
    )
    assert scores["roc_auc"]["mean"] == pytest.approx(roc_auc_score(truth == "b", x))
    low, high = scores["roc_auc"]["ci95"]
    assert low < scores["roc_auc"]["mean"] < high

    age = 2 * x + 10 + rng.normal(size=60)
    result = applied(stored_for(), x, people(60, age=age))
    errors = np.abs(age - 2 * x - 10)
    expected = bootstrap(
        (errors,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert result.metrics["scores"]["mae"]["mean"] == pytest.approx(errors.mean())
    np.testing.assert_allclose(result.metrics["scores"]["mae"]["ci95"], expected, rtol=0.03)
    again = applied(stored_for(), x, people(60, age=age))
    assert again.metrics == result.metrics
    other = applied(stored_for(), x, people(60, age=age), random_state=1)
    assert other.metrics["scores"]["mae"] != result.metrics["scores"]["mae"]


def test_a_perfect_score_of_a_few_has_no_interval() -> None:
    x = np.array([-1.0, 1.0] * 6)
    images = people(12, group=np.where(x > 0, "b", "a"))
    metrics = applied(stored_for("classification"), x, images).metrics
    assert metrics["scores"]["balanced_accuracy"] == {"mean": 1.0, "ci95": None}
    assert "too few participants for an interval" in metrics["headline"]["sentence"]


def test_families_are_resampled_together() -> None:
    rng = np.random.default_rng(1)
    error = np.repeat(rng.normal(size=12), 5) * 5
    images = people(60, age=np.full(60, 50.0) + np.repeat(rng.normal(size=12), 5))
    x = (images["age"] + error - 10) / 2
    families = np.repeat([f"family {i}" for i in range(12)], 5)
    alone = applied(stored_for(), x, images).metrics["scores"]["mae"]["ci95"]
    together = applied(stored_for(), x, images, groups=families).metrics["scores"]["mae"]["ci95"]
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


def test_what_cannot_be_scored_has_a_reason_and_a_prediction() -> None:
    images = people(5, group=["a", "b", "unheard of", None, "b"])
    result = applied(stored_for("classification"), [-1.0, 1.0, 1.0, -1.0, -1.0], images)
    assert result.metrics["n_participants"] == 3
    assert result.metrics["n_dropped"] == {"class unknown to the readout": 1, "target missing": 1}
    table = result.predictions
    assert list(table["status"]) == ["ok", "ok", "dropped", "dropped", "ok"]
    assert table["reason"][2] == "class unknown to the readout: unheard of"
    assert list(table["prediction"]) == ["a", "b", "b", "a", "a"]
    assert table["probability_b"].notna().all()
    with pytest.raises(InputsUnusableError, match=r"unknown to the readout \(2\).*knows a, b"):
        applied(stored_for("classification"), [1.0, 2.0], people(2, group=["x", "y"]))


@pytest.mark.parametrize(
    ("other_people", "dropped"), [(False, ["sub-02", "sub-03", "sub-03"]), (True, ["sub-03"] * 2)]
)
def test_people_of_the_training_are_left_out_by_id_and_by_image(
    other_people: bool, dropped: list[str]
) -> None:
    images = people(5, age=[40.0, 50.0, 60.0, 60.0, 70.0])
    images["participant_id"] = ["sub-51", "sub-02", "sub-03", "sub-03", "sub-54"]
    contents = ["", "another", "digest-of-02", "new", "digest"]
    result = applied(
        stored_for(), [15.0, 20, 25, 25, 30], images, contents=contents, other_people=other_people
    )
    table, metrics = result.predictions, result.metrics
    out = table[table["status"] == "dropped"]
    assert list(out["participant_id"]) == dropped
    assert set(out["reason"]) == {OVERLAP}
    assert metrics["overlap"]["n_participants"] == len(set(dropped))
    assert (metrics["overlap"]["by_id"], metrics["overlap"]["by_image"]) == (1, 1)
    assert metrics["n_dropped"] == {OVERLAP: len(set(dropped))}
    assert metrics["n_participants"] == 4 - len(set(dropped))


def test_all_of_a_person_are_left_out_who_is_in_the_training_under_one_of_two_ids() -> None:
    images = people(3, age=[40.0, 50.0, 60.0]).assign(participant_id=["sub-01", "sub-90", "sub-91"])
    persons = ["sub-01", "sub-01", "sub-91"]
    overlapping, overlap = find_overlap(
        stored_for(), list(images["participant_id"]), ["x", "x", "y"], persons=persons
    )
    assert list(overlapping) == [True, True, False]
    assert overlap["n_participants"] == 1


def test_the_same_people_alone_are_no_external_validity() -> None:
    images = people(2, age=[40.0, 50.0]).assign(participant_id=["sub-01", "sub-02"])
    with pytest.raises(InputsUnusableError, match=r"2 of the 2 participants.*--other-people"):
        applied(stored_for(), [15.0, 20.0], images)
    assert applied(stored_for(), [15.0, 20.0], images, other_people=True).metrics["scores"]


def test_confounds_are_found_in_the_tables_or_the_read_out_is_refused() -> None:
    confounds = ConfoundModel(("icv",), np.array([100.0]), np.array([[0.5, 0.0]]))
    stored = stored_for(linear=replace(stored_for().linear, confounds=confounds))
    images = people(3, age=[40.0, 50.0, 60.0])
    with pytest.raises(UsageError, match="no table here has a column 'icv'"):
        applied(stored, [1.0, 2.0, 3.0], images)
    with pytest.raises(UsageError, match="'icv' of the readout is a number"):
        applied(stored, [1.0, 2.0, 3.0], images.assign(icv=["1", "big", "2"]))
    result = applied(stored, [15.0, 20.0, 25.0], images.assign(icv=[100.0, 102.0, np.nan]))
    assert result.metrics["n_dropped"] == {"confound missing": 1}
    np.testing.assert_allclose(result.predictions["prediction"], [40.0, 48.0, np.nan])


def test_categories_are_confounds_too_and_unknown_ones_an_average_row() -> None:
    names = ("sex=F", "sex=M")
    confounds = ConfoundModel(names, np.array([0.25, 0.75]), np.array([[2.0, 0.0], [-2.0, 0.0]]))
    stored = stored_for(linear=replace(stored_for().linear, confounds=confounds))
    images = people(4, age=[40.0] * 4, sex=["F", "M", "X", None])
    result = applied(stored, [10.0] * 4, images)
    # F: (1 - 0.25) * 2 - (0 - 0.75) * 2 = 3; M: -0.5 - 0.5 = -1; X: 0.
    np.testing.assert_allclose(result.predictions["prediction"], [24.0, 32.0, 30.0, np.nan])
    assert result.metrics["n_dropped"] == {"confound missing": 1}


def test_another_unit_or_another_number_of_features_is_refused() -> None:
    with pytest.raises(UsageError, match="in months here and in years"):
        applied(stored_for(units="years"), [1.0], people(1, age=[30.0]), units="months")
    assert applied(stored_for(units="years"), [1.0], people(1, age=[30.0]), units="Year").metrics
    wide = FittedReadout((), np.zeros(3), np.ones(3), np.zeros((1, 3)), np.zeros(1), 1.0)
    with pytest.raises(UsageError, match="takes 3 features"):
        applied(stored_for(linear=wide), [1.0], people(1, age=[30.0]))


def test_the_headline_says_what_the_numbers_say() -> None:
    x = np.linspace(5, 30, 20)
    good = applied(stored_for(), x, people(20, age=2 * x + 11)).metrics["headline"]
    assert good["difference"] == pytest.approx(1.0 - 5.0)
    assert "better by 4 here, and the intervals do not overlap" in good["sentence"]
    bad = applied(stored_for(), x, people(20, age=50 + 0 * x + np.arange(20) % 2)).metrics
    assert "worse by" in bad["headline"]["sentence"]
    assert "does not beat a constant guess" in bad["headline"]["sentence"]
    assert bad["baselines"]["dummy"]["mae"]["mean"] == pytest.approx(0.5)


# -- how cohorts differ ----------------------------------------------------------------------


def test_the_shift_is_the_standardized_difference_of_participants() -> None:
    images = people(
        4, age=[60.0, 62.0, 90.0, 92.0], SEX=["F", "F", "F", "M"], site=["north", "x", "y", "y"]
    )
    shift = applied(stored_for(), [20.0, 25, 40, 41], images).metrics["shift"]
    sd = np.std([60, 62, 90, 92], ddof=1)
    expected = (76 - 50) / np.sqrt((10**2 + sd**2) / 2)
    assert shift["age"]["standardized_difference"] == pytest.approx(expected)
    assert shift["sex"]["here"] == {"F": 3, "M": 1}
    assert shift["site"]["here"] == {"north": 1, "x": 1, "y": 2}
    assert shift["site"]["n_new"] == 2
    assert shift["target"]["n_outside_training_range"] == 2
    assert shift["quality"]["noise"]["standardized_difference"] == pytest.approx(
        0.02 / np.sqrt((0.02**2 + 0) / 2)
    )
    text = " ".join(shift["sentences"])
    for words in ("far higher here", "F 75 %, M 25 % here", "has not seen 2", "Image noise"):
        assert words in text


def test_what_a_cohort_does_not_tell_is_not_compared() -> None:
    shift = applied(stored_for(), [20.0, 25.0], people(2, age=[50.0, 60.0])).metrics["shift"]
    assert shift["sex"] == {"training": {"F": 20, "M": 20}, "here": None}
    assert "Not compared, since a cohort does not tell it: sex, site." in shift["sentences"]


def test_a_cohort_counts_each_participant_once() -> None:
    images = pd.DataFrame({"age": [20.0, 40.0, 50.0], "Sex": ["F", "F", pd.NA]})
    who = np.array(["sub-1", "sub-1", "sub-2"], dtype=object)
    quality = pd.DataFrame({name: [1.0, 3.0, np.nan] for name in QUALITY_METRICS})
    told = describe_cohort(images, who, cohort_columns(images, None), quality)
    assert told["n_participants"] == 2
    assert told["age"] == {"mean": 40.0, "sd": pytest.approx(np.std([30, 50], ddof=1)), "n": 2}
    assert told["sex"] == {"F": 1}
    assert told["site"] is None
    assert told["quality"]["noise"] == {"mean": 2.0, "sd": None, "n": 1}
    told["target"] = {"name": "x", "classes": {"a": 1}}
    assert compare_cohorts(told, told)["age"]["standardized_difference"] == 0.0


def ball(noise: float, blur: float = 0.0) -> np.ndarray:
    """Return a smooth ball in an empty field, with white noise inside."""
    grid = np.stack(np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    white = np.random.default_rng(0).normal(scale=noise, size=radius.shape)
    inside = 0.65 + 0.15 * np.sin(radius / (2.0 + blur))
    return ((inside + white) * (radius < 16)).astype(np.float32)


def test_image_quality_measures_what_its_names_say() -> None:
    clean, noisy = (measure_quality(ball(noise), (2.0, 2.0, 2.0)) for noise in (0.0, 0.1))
    assert noisy["noise"] == pytest.approx(0.1, rel=0.1)
    assert clean["noise"] < 0.02
    assert clean["contrast_to_noise"] > 5 * noisy["contrast_to_noise"]
    blurred = measure_quality(ball(0.0, blur=4.0), (2.0, 2.0, 2.0))
    assert blurred["sharpness"] < 0.6 * clean["sharpness"]
    half = measure_quality(ball(0.0), (1.0, 1.0, 1.0))
    assert half["sharpness"] == pytest.approx(2 * clean["sharpness"])
    empty = measure_quality(np.zeros((8, 8, 8), np.float32), (1.0, 1.0, 1.0))
    assert {*clean} == {*QUALITY_METRICS} - {"voxel_mm"} == {*empty}
    assert all(np.isnan(value) for value in empty.values())


# -- the stages ------------------------------------------------------------------------------


def test_predict_phenotype_gives_the_read_out_that_the_stage_keeps(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = people(40, age=rng.uniform(20, 80, 40), site=["north", "south"] * 20)
    images.loc[3, "age"] = np.nan
    x = rng.normal(size=(40, 6)) + np.nan_to_num(images["age"].to_numpy()[:, None]) / 20
    ids = images[["participant_id", "session_id", "run", "source"]]
    result = predict_phenotype(
        x, images["age"], images["participant_id"], target="age", ids=ids, n_permutations=0
    )
    quality = pd.DataFrame({name: rng.normal(size=40) for name in QUALITY_METRICS})
    contents = [f"digest {i}" for i in range(40)]
    cohort = EmbeddedDataset(
        images, x, images["participant_id"], contents, [False] * 40, lambda: quality, 0, MODEL
    )
    file = tmp_path / "r.json"
    keep_readout(file, result, cohort, cohort_columns(images, "site"), "years")

    stored = read_readout(file)

    assert (stored.n_participants, stored.units) == (39, "years")
    assert result.readout is not None
    assert np.array_equal(stored.linear.predict(x), result.readout.predict(x))
    assert stored.cohort["site"] == {"north": 20, "south": 19}
    overlapping, told = find_overlap(stored, list(images["participant_id"]), contents)
    assert list(np.flatnonzero(~overlapping)) == [3]
    assert (told["by_id"], told["by_image"]) == (39, 39)
    text = file.read_text()
    assert not any(who in text for who in images["participant_id"])
    assert not any(digest in text for digest in contents)


def test_the_read_out_takes_away_the_confounds_that_the_prediction_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"icv": rng.normal(1500, 100, 60), "sex": ["F", "M", "M"] * 20})
    table["icv"] += 100 * (table["sex"] == "M")
    y = rng.normal(50, 10, 60)
    x = rng.normal(size=(60, 6)) + y[:, None] / 20 + table["icv"].to_numpy()[:, None] / 50
    who = [f"sub-{i}" for i in range(60)]
    fitted = predict_phenotype(x, y, who, confounds=table, n_permutations=0, n_repeats=1).readout
    assert fitted is not None
    assert fitted.confounds is not None
    assert fitted.confounds.names == ("icv", "sex=F", "sex=M")
    numbers = np.column_stack([table["icv"], table["sex"] == "F", table["sex"] == "M"])
    scaler = StandardScaler().fit(x)
    effect = LinearRegression().fit(numbers[:, :2], scaler.transform(x))
    left = scaler.transform(x) - effect.predict(numbers[:, :2])
    model = SklearnRidge(alpha=fitted.strength * (left**2).sum()).fit(left, y)
    np.testing.assert_allclose(fitted.predict(x, numbers.astype(float)), model.predict(left))
    # Who has more of the confound alone is not predicted otherwise.
    slope = effect.coef_[:, 0] * scaler.scale_
    moved, more = x + 10 * slope, np.add(numbers, [10.0, 0.0, 0.0])
    np.testing.assert_allclose(fitted.predict(moved, more), model.predict(left))


def test_harmonized_features_keep_no_read_out(tmp_path: Path) -> None:
    pytest.importorskip("pycombat")
    rng = np.random.default_rng(0)
    images = people(30, age=rng.uniform(20, 80, 30), site=["north", "south"] * 15)
    x = rng.normal(size=(30, 4))
    result = predict_phenotype(
        *(x, images["age"], images["participant_id"]),
        target="age",
        site=images["site"],
        harmonize=True,
        n_permutations=0,
        n_repeats=1,
    )
    file = tmp_path / "r.json"
    file.write_text("of before")
    cohort = EmbeddedDataset(
        images, x, images["participant_id"], [""] * 30, [None] * 30, pd.DataFrame, 0, MODEL
    )
    keep_readout(file, result, cohort, {}, None)
    assert result.readout is None
    assert not file.exists()


@pytest.fixture(params=SLOW)
def first(studied: Path) -> Path:
    """Return the output of the study whose readouts go to other cohorts."""
    return studied


def external_files(out: Path, target: str = "Age") -> dict[str, int]:
    """Return the change times of the files about external validity."""
    return {p.name: p.stat().st_mtime_ns for p in out.glob(f"desc-dcl{target}_external*")}


def test_a_read_out_goes_to_another_cohort(
    first: Path, make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=9, first=21), tmp_path / "out"
    given = shutil.copytree(first, tmp_path / "given", ignore=shutil.ignore_patterns(".*"))
    words = ("--target", "age", "sex", "--readout", given)
    model = ("--model", first / "models" / "desc-dcl")
    done = run("study", bids, out, *words, *model)
    assert done.status == 0, done.err
    assert "in its own cohort" in done.out
    assert "voxels" in done.out

    metrics = json.loads((out / "desc-dclAge_externalmetrics.json").read_text())
    inside = json.loads((first / "desc-dclAge_metrics.json").read_text())
    assert metrics["internal"]["scores"]["mae"]["mean"] == inside["scores"]["mae"]["mean"]
    assert metrics["n_participants"] == 9
    assert metrics["overlap"]["n_participants"] == 0
    assert metrics["exposure"]["seen"] == 0
    assert metrics["cross_validation"] is None
    assert set(metrics["shift"]["quality"]) == set(QUALITY_METRICS)
    assert (out / "desc-dclAge_metrics.json").is_file()

    stored = read_readout(readout_path(first, "dcl", "Age"))
    table = pd.read_csv(out / "desc-dclAge_externalpredictions.tsv", sep="\t")
    rows = np.load(out / "desc-dcl_embeddings.npy")
    np.testing.assert_allclose(table["prediction"], stored.linear.predict(rows), rtol=1e-8)
    quality = pd.read_csv(out / "logs" / "quality.tsv", sep="\t")
    assert list(quality["source"]) == list(table["source"])
    assert set(quality["voxel_mm"]) == {8.0}
    page = (out / "report.html").read_text()
    assert metrics["headline"]["sentence"] in page
    if shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent)):
        validate(out)

    documented = (Path(__file__).resolve().parents[2] / "docs" / "files.md").read_text()
    for name in external_files(out):
        assert f"`{name.replace('dclAge', '<model><Target>')}`" in documented

    before = external_files(out) | external_files(out, "Sex")
    again = run("predict", bids, out, *words)
    assert again.out.strip() in done.out
    assert external_files(out) | external_files(out, "Sex") == before
    assert json.loads((out / "logs" / "run.json").read_text())["stages"][-1]["skipped"]

    file = readout_path(given, "dcl", "Age")
    content = json.loads(file.read_text())
    content["intercept"][0] += 100
    file.write_text(json.dumps(content))
    internal = (out / "desc-dclAge_metrics.json").stat().st_mtime_ns
    assert run("predict", bids, out, *words).status == 0
    moved = json.loads((out / "desc-dclAge_externalmetrics.json").read_text())
    assert moved["scores"]["mae"]["mean"] > metrics["scores"]["mae"]["mean"] + 40
    assert external_files(out, "Sex").items() <= before.items()
    assert (out / "desc-dclAge_metrics.json").stat().st_mtime_ns == internal


def test_a_cohort_too_small_to_be_cross_validated_has_the_external_part_alone(
    first: Path, make_heads: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bids, out = make_heads(n=1, first=22), tmp_path / "out"
    words = ("study", bids, out, "--target", "sex", "--model", first / "models" / "desc-dcl")
    assert run(*words).status == 3
    for _ in range(2):
        done = run(*words, "--readout", first)
        assert done.status == 0, done.err
        assert (
            "sex: only the other cohort's readout is applied. Target 'sex' is constant" in done.err
        )
        assert "in its own cohort" in done.out
    assert json.loads((out / "logs" / "run.json").read_text())["stages"][-1]["skipped"]
    assert not (out / "desc-dclSex_metrics.json").exists()
    metrics = json.loads((out / "desc-dclSex_externalmetrics.json").read_text())
    assert metrics["n_participants"] == 1
    assert metrics["cross_validation"].startswith("Target 'sex' is constant")


def test_the_same_cohort_another_model_and_the_same_folder_are_refused(
    first: Path,
    heads_made: Path,
    make_heads: Callable[..., Path],
    tmp_path: Path,
    run: Callable[..., Any],
) -> None:
    out = tmp_path / "out"
    model = ("--model", first / "models" / "desc-dcl")
    assert run("embed", heads_made, out, *model).status == 0
    words = ("--target", "sex", "--readout", first)
    for more in ((), ("--other-people",)):
        done = run("predict", heads_made, out, *words, *more)
        assert done.status == 3
        assert "10 of the 10 participants are in the training of the readout" in done.err
    assert not external_files(out, "Sex")
    done = run("predict", heads_made, out, "--target", "sex", "--readout", out)
    assert done.status == 2
    assert "OUTPUT_DIR itself" in done.err

    bids, fresh = make_heads(n=6, first=31), tmp_path / "fresh"
    done = run("study", bids, fresh, *words, *TWO_EPOCHS)
    assert done.status == 2
    assert "--readout needs the model" in done.err
    assert not (fresh / "models").exists()
    assert run("pretrain", bids, fresh, *TWO_EPOCHS).status == 0
    assert run("embed", bids, fresh).status == 0
    done = run("predict", bids, fresh, *words)
    assert done.status == 2
    assert "Embed both cohorts by one model" in done.err


def test_the_page_escapes_what_a_read_out_of_others_says(first: Path, tmp_path: Path) -> None:
    out = shutil.copytree(first, tmp_path / "out", ignore=shutil.ignore_patterns(".*"))
    text = "<script>alert(1)</script>"
    metrics = {
        "target": "age",
        "headline": {"metric": text, "sentence": text, "external": {"mean": 1.0, "ci95": "x"}},
        "shift": {"sentences": [text, 3]},
        "overlap": {"sentence": text},
        "n_dropped": {text: 1},
    }
    (out / "desc-dclAge_externalmetrics.json").write_text(json.dumps(metrics))
    (out / "desc-dclSex_externalmetrics.json").write_text("{")
    page = write_report(out).read_text()
    assert text not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "desc-dclSex_externalmetrics.json is not JSON" in page

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import give
from evaluation.test_external_validation import applied, people
from evaluation.test_readout import sklearn_model
from made_readouts import designed, stored_for
from sklearn.preprocessing import StandardScaler

from nidl_dcl import predict_phenotype
from nidl_dcl.data.image_table import ImageTable
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.confounds import EncodedConfounds
from nidl_dcl.evaluation.extra_features import ExtraFeatures, extra_weight
from nidl_dcl.evaluation.features import Components, Features, FeaturesBeside
from nidl_dcl.evaluation.harmonization import can_harmonize
from nidl_dcl.evaluation.readout import fit_readout
from nidl_dcl.evaluation.readout_file import read_readout, readout_path, write_readout
from nidl_dcl.evaluation.summary import summary_table

TRAIN, TEST = np.arange(30), np.arange(30, 40)
PEOPLE = [f"sub-{i:02}" for i in range(80)]


def standardized(x: np.ndarray) -> np.ndarray:
    return StandardScaler().fit(x[TRAIN]).transform(x)


def products(source: Any) -> np.ndarray:
    """Return the inner products of all rows with the training rows, all that a readout uses."""
    known, new = source.coordinates(TRAIN, TEST)
    return np.concatenate([known, new]) @ known.T


@pytest.mark.parametrize("columns", [1, 2])
def test_the_block_weighs_as_much_as_fifty_standardized_columns(columns: int) -> None:
    rng = np.random.default_rng(0)
    x, size = rng.normal(2, 5, size=(40, 60)), rng.normal(1400, 100, size=(40, columns))
    block = ExtraFeatures(("a", "b")[:columns], size).as_source()

    found = products(FeaturesBeside(Features(x), block))

    z, s = standardized(x), standardized(size)
    assert (s[TRAIN] ** 2).sum() * 50 / columns == pytest.approx(50 * 30)
    np.testing.assert_allclose(found, z @ z[TRAIN].T + 50 / columns * s @ s[TRAIN].T)


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_beside_voxels_it_has_the_share_that_it_has_beside_the_embeddings_whatever_their_unit(
    unit: float,
) -> None:
    rng = np.random.default_rng(0)
    wide, size = rng.normal(size=(40, 500)), rng.normal(1400, 100, size=(40, 1))
    voxels = Components(unit**2 * wide @ wide.T)

    found = products(FeaturesBeside(voxels, ExtraFeatures(("a",), size).as_source(), columns=600))

    left = wide - wide[TRAIN].mean(axis=0)
    variance = (left[TRAIN] ** 2).sum() / 30 / 600
    s = standardized(size)
    np.testing.assert_allclose(found, left @ left[TRAIN].T / variance + 50 * s @ s[TRAIN].T)


@pytest.mark.parametrize("wide", [False, True])
def test_test_rows_change_nothing_that_is_learned(wide: bool) -> None:
    rng = np.random.default_rng(0)
    x, size = rng.normal(size=(40, 60)), rng.normal(1400, 100, size=(40, 1))

    def known(x: np.ndarray, size: np.ndarray) -> np.ndarray:
        source = Components(x @ x.T) if wide else Features(x)
        block = ExtraFeatures(("a",), size).as_source()
        return FeaturesBeside(source, block, 60 if wide else None).coordinates(TRAIN, TEST)[0]

    before = known(x, size)
    x[TEST] *= 100
    size[TEST] *= 100
    np.testing.assert_array_equal(known(x, size), before)


@pytest.mark.parametrize(("n_features", "weight"), [(3, 50), (512, 51), (12288, 1229)])
def test_it_weighs_a_tenth_of_the_columns_and_fifty_at_least(n_features: int, weight: int) -> None:
    assert extra_weight(n_features) == weight


def cohort(d: int = 300) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Return features that know nothing, a class, and brain volumes that tell it mostly."""
    rng = np.random.default_rng(0)
    male = np.arange(80) % 2
    volume = 1350 + 180 * male + rng.normal(0, 60, 80)
    size = pd.DataFrame({"log_brain_volume": np.log(volume)})
    return rng.normal(size=(80, d)), np.where(male, "M", "F"), size


def test_embeddings_and_every_baseline_are_given_it_and_it_is_a_baseline_alone() -> None:
    x, sex, size = cohort()
    rng = np.random.default_rng(1)
    baselines = {"untrained": rng.normal(size=(80, 300)), "voxels": Baseline(100 * x, pca=True)}
    given: dict[str, Any] = {"n_permutations": 19, "n_repeats": 1, "target": "sex"}

    without = predict_phenotype(x, sex, PEOPLE, baselines=baselines, **given)
    result = predict_phenotype(
        *(x, sex, PEOPLE), baselines=baselines, extra_features=size, held_out=None, **given
    )

    row, before = result.summary(), without.summary()
    assert row["log_brain_volume"] > 0.85
    for name in ("score", "untrained", "voxels", "half"):
        assert row[name] > 0.75 > before[name]
    assert row["p"] == 1 / 20
    assert result.metrics["features"][0] == {"name": "embeddings", "columns": 300}
    block = result.metrics["features"][1]
    assert (block["name"], block["columns"], block["weight"]) == ("log_brain_volume", 1, 50)
    assert "log brain volume" in block["sentence"]
    assert "300 features and log_brain_volume (weight of 50" in result.metrics["model"]
    assert set(result.metrics["learning_curve"]["scores"]) == {
        *("embeddings", "dummy", "untrained", "voxels", "log_brain_volume")
    }
    assert without.metrics["features"] == [{"name": "embeddings", "columns": 300}]
    text = summary_table([row])
    assert "brain volume" in text.splitlines()[0]
    assert "with the weight of\na tenth of the columns" in text
    assert "brain volume" not in summary_table([before])


def test_held_out_people_are_predicted_with_it() -> None:
    x, sex, size = cohort(100)
    result = predict_phenotype(
        *(x, sex, PEOPLE),
        extra_features=size,
        held_out=np.arange(80) >= 60,
        n_permutations=0,
        n_repeats=1,
    )
    scores = result.metrics["holdout"]
    assert scores["scores"]["balanced_accuracy"]["mean"] > 0.75
    assert scores["baselines"]["log_brain_volume"]["balanced_accuracy"]["mean"] > 0.75


@pytest.mark.parametrize("wide", [False, True])
def test_confounds_are_removed_from_it_as_from_other_features(wide: bool) -> None:
    x, sex, size = cohort(20)
    given: dict[str, Any] = {
        "confounds": size.rename(columns={"log_brain_volume": "icv"}),
        "baselines": {"voxels": Baseline(x, pca=wide)},
        "n_permutations": 0,
        "n_repeats": 1,
    }
    without = predict_phenotype(x, sex, PEOPLE, **given).metrics
    found = predict_phenotype(x, sex, PEOPLE, extra_features=size, **given).metrics
    for name, scores in {**without["baselines"], "embeddings": without["scores"]}.items():
        again = found["scores"] if name == "embeddings" else found["baselines"][name]
        for metric, score in scores.items():  # nothing is left of the block
            assert again[metric]["folds"] == pytest.approx(score["folds"], abs=1e-6)
    assert found["baselines"]["log_brain_volume"]["balanced_accuracy"]["mean"] == 0.5


@pytest.mark.skipif(not can_harmonize(), reason="pycombat is not installed")
def test_sites_are_harmonized_in_it_as_in_other_features() -> None:
    x, sex, size = cohort(20)
    site = np.where(sex == "M", "north", "south")
    found = predict_phenotype(
        *(x, sex, PEOPLE),
        extra_features=size,
        baselines={"voxels": Baseline(x, pca=True)},
        site=site,
        harmonize=True,
        n_permutations=0,
        n_repeats=1,
    ).metrics
    # The sites differ in nothing but size, and the sexes are the sites.
    for name in ("voxels", "log_brain_volume"):
        assert found["baselines"][name]["balanced_accuracy"]["mean"] < 0.65


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([1.0] * 80, "must be a DataFrame, got list"),
        (pd.DataFrame({"a": ["x"] * 80}), "extra features must be a table of numbers"),
        (pd.DataFrame({"a": [1.0]}), "extra_features has 1 rows, but the features have 80"),
        (pd.DataFrame({"sex": range(80)}), "none that of the target 'sex'"),
        (pd.DataFrame(np.eye(80)[:, :2], columns=["a", "a"]), "names of their own"),
        (pd.DataFrame({"dummy": range(80)}), "cannot have the name 'dummy'"),
        (pd.DataFrame({"voxels": range(80)}), "'voxels' is taken"),
    ],
)
def test_what_is_no_block_of_extra_features_is_refused(table: Any, words: str) -> None:
    x, sex, _ = cohort(3)
    with pytest.raises(UsageError, match=words):
        predict_phenotype(
            x, sex, PEOPLE, target="sex", extra_features=table, baselines={"voxels": x}
        )


def test_an_image_without_it_is_named() -> None:
    x, sex, size = cohort(3)
    size.iloc[7] = -np.inf
    with pytest.raises(InputsUnusableError, match=r"extra features are not finite.*sub-07"):
        predict_phenotype(x, sex, PEOPLE, extra_features=size)


# -- the readout -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numbers", "two", "three"])
def test_the_readout_is_scikit_learns_with_a_weighted_column(kind: str) -> None:
    x, y, design = designed(kind)
    rng = np.random.default_rng(4)
    size, new = rng.normal(7, 0.1, size=(len(x), 1)), rng.normal(size=(20, x.shape[1])) + 2
    new_size = pd.DataFrame({"other": 0.0, "size": rng.normal(7, 0.1, 20)})

    fitted = fit_readout(design, x, extra=ExtraFeatures(("size",), size))

    scaler, of_size = StandardScaler().fit(x), StandardScaler().fit(size)
    rows = [
        np.hstack([scaler.transform(a), of_size.transform(b) * 50**0.5])
        for a, b in ((x, size), (new, new_size[["size"]].to_numpy()))
    ]
    total = x.shape[1] - 1 + 50  # one column is constant
    model = sklearn_model(kind, fitted.strength, len(x), total)[-1].fit(rows[0], y)
    expected = model.predict(rows[1]) if kind == "numbers" else model.predict_proba(rows[1])
    np.testing.assert_allclose(fitted.predict(new, extra=new_size), expected, atol=1e-6)
    assert fitted.extra == ("size",)
    with pytest.raises(UsageError, match="fitted with size beside the embeddings"):
        fitted.predict(new)
    with pytest.raises(UsageError, match=f"takes {x.shape[1]} features"):
        fitted.predict(new[:, 1:], extra=new_size)


def test_hiding_a_part_of_the_image_leaves_size_as_it_is() -> None:
    x, _, design = designed("numbers")
    rng = np.random.default_rng(4)
    size = pd.DataFrame({"size": rng.normal(7, 0.1, len(x))})
    fitted = fit_readout(design, x, extra=ExtraFeatures(("size",), size.to_numpy()))
    other = x + rng.normal(size=x.shape)
    expected = fitted.predict(x, extra=size) - fitted.predict(other, extra=size)
    np.testing.assert_allclose(fitted.changes(x - other)[:, 0], expected, atol=1e-8)


def test_the_readout_frees_it_from_confounds_too() -> None:
    x, y, design = designed("numbers")
    rng = np.random.default_rng(4)
    age = rng.normal(50, 10, size=(len(x), 1))
    size = pd.DataFrame({"size": 7 + age[:, 0] / 100 + rng.normal(0, 0.1, len(x))})
    removed = EncodedConfounds(("age",), age, (), {"age": {}})
    block = ExtraFeatures(("size",), size.to_numpy())
    fitted = fit_readout(design, x, extra=block, confounds=removed)
    assert fitted.confounds is not None
    # Who is older, and smaller as the older are, is not predicted otherwise.
    slope = fitted.confounds.coefficients[0]
    moved = fitted.predict(x + slope[:-1], age + 1, size + slope[-1])
    np.testing.assert_allclose(moved, fitted.predict(x, age, size))
    assert fitted.predict(x, age, size) @ (y - y.mean()) > 0


def test_it_goes_through_the_file_and_files_of_before_have_none(tmp_path: Path) -> None:
    x, _, design = designed("numbers")
    size = pd.DataFrame({"size": np.random.default_rng(4).normal(7, 0.1, len(x))})
    linear = fit_readout(design, x, extra=ExtraFeatures(("size",), size.to_numpy()))
    file = tmp_path / "r.json"
    write_readout(file, stored_for(linear=linear))

    read = read_readout(file).linear

    assert read.extra == ("size",)
    assert np.array_equal(read.predict(x, extra=size), linear.predict(x, extra=size))
    description = json.loads(file.read_text())
    assert description["extra_features"] == ["size"]
    file.write_text(json.dumps({**description, "extra_features": ["a"] * 13}))
    with pytest.raises(UsageError, match="13 features, and 13 of them are extra ones"):
        read_readout(file)
    del description["extra_features"]
    file.write_text(json.dumps(description))
    assert read_readout(file).linear.extra == ()


def test_another_cohort_must_have_it(tmp_path: Path) -> None:
    linear = replace(
        stored_for().linear,
        mean=np.array([0.0, 0.0, 7.0]),
        scale=np.array([1.0, 1.0, 0.1]),
        coefficients=np.array([[2.0, 0.0, 3.0]]),
        extra=("log_brain_volume",),
    )
    stored, images = stored_for(linear=linear), people(2, age=[40.0, 50.0])
    size = pd.DataFrame({"log_brain_volume": [7.0, 7.1]})
    found = applied(stored, [15.0, 20.0], images, extra_features=size).predictions
    np.testing.assert_allclose(found["prediction"], [40.0, 53.0])
    with pytest.raises(UsageError, match="fitted with log_brain_volume beside the embeddings"):
        applied(stored, [15.0, 20.0], images)
    with pytest.raises(InputsUnusableError, match="not finite"):
        applied(stored, [15.0, 20.0], images, extra_features=size * np.nan)
    # A readout without it takes no notice of it.
    found = applied(stored_for(), [15.0, 20.0], images, extra_features=size).predictions
    np.testing.assert_allclose(found["prediction"], [40.0, 50.0])


# -- the stage -------------------------------------------------------------------------------


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each image a volume of its brain, as aligning does."""
    assemble = ImageTable._assemble

    def with_volumes(self: ImageTable, *given: Any) -> None:
        assemble(self, *given)
        assert self._images is not None
        self._images["brain_ml"] = 1300.0 + 7 * np.arange(len(self._images))

    monkeypatch.setattr(ImageTable, "_assemble", with_volumes)


@pytest.mark.slow
def test_brain_volumes_of_aligned_images_are_predicted_from(
    heads_made: Path,
    studied: Path,
    make_heads: Callable[..., Path],
    tmp_path: Path,
    run: Callable[..., Any],
    aligned: None,
) -> None:
    out, model = tmp_path / "out", studied / "models" / "desc-dcl"
    assert give("embed", heads_made, out, "--model", model) == 0
    words = ("predict", heads_made, out, "--target", "age", "--occlusion")
    done = run(*words)
    assert done.status == 0, done.err
    assert "with the weight of\na tenth of the columns" in done.out

    metrics = json.loads((out / "desc-dclAge_metrics.json").read_text())
    assert set(metrics["baselines"]) == {"dummy", "untrained", "voxels", "log_brain_volume"}
    stored = read_readout(readout_path(out, "dcl", "Age"))
    assert stored.linear.extra == ("log_brain_volume",)
    assert stored.linear.mean[-1] == pytest.approx(np.log(1330), abs=0.03)
    assert (out / "figures" / "desc-dclAge_occlusion.json").is_file()
    assert run("report", heads_made, out).status == 0
    page = (out / "report.html").read_text()
    assert page.count(metrics["features"][1]["sentence"].replace("'", "&#39;")) == 2
    changed = (out / "desc-dclAge_metrics.json").stat().st_mtime_ns
    assert run(*words).status == 0
    assert (out / "desc-dclAge_metrics.json").stat().st_mtime_ns == changed

    # Another cohort, aligned too; then one that is not.
    bids, other = make_heads("other", n=9, first=21), tmp_path / "other_out"
    assert give("embed", bids, other, "--model", model) == 0
    words = ("predict", bids, other, "--target", "age", "--readout", out)
    assert run(*words).status == 0
    assert (other / "desc-dclAge_externalmetrics.json").is_file()


@pytest.mark.slow
def test_a_readout_with_it_is_refused_where_brain_volumes_are_not_known(
    heads_made: Path, studied: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    given = tmp_path / "given"
    stored = read_readout(readout_path(studied, "dcl", "Age"))
    arrays = {name: np.append(getattr(stored.linear, name), 1.0) for name in ("mean", "scale")}
    wider = np.append(stored.linear.coefficients, [[1.0]], axis=1)
    linear = replace(stored.linear, **arrays, coefficients=wider, extra=("log_brain_volume",))
    file = readout_path(given, "dcl", "Age")
    file.parent.mkdir(parents=True)
    write_readout(file, replace(stored, linear=linear))
    out = tmp_path / "out"
    assert give("embed", heads_made, out, "--model", studied / "models" / "desc-dcl") == 0

    refused = run("predict", heads_made, out, "--target", "age", "--readout", given)

    assert refused.status == 2
    assert "fitted with log_brain_volume beside the embeddings" in refused.err
    assert not list(out.glob("*_metrics.json"))

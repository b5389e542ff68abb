from __future__ import annotations

import json
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
from made_readouts import MODEL, stored_for
from scipy.stats import bootstrap
from sklearn.linear_model import LinearRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from nidl_dcl import predict_phenotype
from nidl_dcl.bids.validator import validate
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.cohort import cohort_columns
from nidl_dcl.evaluation.external_validation import (
    OVERLAP,
    ExternalResult,
    find_overlap,
    validate_externally,
)
from nidl_dcl.evaluation.readout import ConfoundModel, FittedReadout
from nidl_dcl.evaluation.readout_file import ReadoutFile, read_readout, readout_path, write_readout
from nidl_dcl.evaluation.summary import summary_table
from nidl_dcl.report.build import write_report
from nidl_dcl.volumes.quality import QUALITY_METRICS
from nidl_dcl.workflow.external import EmbeddedDataset, keep_readout

# -- applying it -----------------------------------------------------------------------------


def people(n: int, **columns: Any) -> pd.DataFrame:
    """Return a table of images, one for each of `n` participants who are new to the readout."""
    table = pd.DataFrame({"participant_id": [f"sub-{i + 51}" for i in range(n)]})
    return table.assign(session_id=None, run=None, source=table["participant_id"], **columns)


def applied(stored: ReadoutFile, x: Any, images: pd.DataFrame, **more: Any) -> ExternalResult:
    """Return the result of a readout for the first feature `x` of images of a cohort."""
    features = np.column_stack([x, np.zeros(len(images))])
    ids = images[["participant_id", "session_id", "run", "source"]]
    content = more.pop("content", [""] * len(images))
    overlap = find_overlap(stored, ids, content, other_people=more.pop("other_people", False))
    return validate_externally(
        stored,
        features,
        images,
        more.pop("groups", ids["participant_id"]),
        ids=ids,
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
    assert "too few participants here, " in metrics["headline"]["sentence"]


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
    content = ["", "another", "digest-of-02", "new", "digest"]
    result = applied(
        stored_for(), [15.0, 20, 25, 25, 30], images, content=content, other_people=other_people
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
    ids = pd.DataFrame(
        {
            "participant_id": ["sub-01", "sub-90", "sub-91"],
            "person_id": ["sub-01", "sub-01", "sub-91"],
        }
    )
    overlap = find_overlap(stored_for(), ids, ["x", "x", "y"])
    assert list(overlap.rows) == [True, True, False]
    assert overlap.counts["n_participants"] == 1


def test_the_same_people_alone_are_no_external_validity() -> None:
    images = people(2, age=[40.0, 50.0]).assign(participant_id=["sub-01", "sub-02"])
    with pytest.raises(InputsUnusableError, match=r"2 of the 2 participants.*--other-people"):
        applied(stored_for(), [15.0, 20.0], images)
    assert applied(stored_for(), [15.0, 20.0], images, other_people=True).metrics["scores"]


def test_confounds_are_found_in_the_tables_or_the_readout_is_refused() -> None:
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
    assert "Not compared, since it is not known of both cohorts: sex, site." in shift["sentences"]


# -- the stages ------------------------------------------------------------------------------


def test_predict_phenotype_gives_the_readout_that_the_stage_keeps(tmp_path: Path) -> None:
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
    whose = dict.fromkeys(("person_id", "group_id"), images["participant_id"])
    known = images.assign(**whose, content=contents, seen_by="")
    cohort = EmbeddedDataset(known, x, lambda: quality, 0, MODEL)
    file = tmp_path / "r.json"
    keep_readout(file, result, cohort, cohort_columns(images, "site"), "years")

    stored = read_readout(file)

    assert (stored.n_participants, stored.units) == (39, "years")
    assert result.readout is not None
    assert np.array_equal(stored.linear.predict(x), result.readout.predict(x))
    assert stored.training["site"] == {"north": 20, "south": 19}
    overlap = find_overlap(stored, ids, contents)
    assert list(np.flatnonzero(~overlap.rows)) == [3]
    assert (overlap.counts["by_id"], overlap.counts["by_image"]) == (39, 39)
    text = file.read_text()
    assert not any(who in text for who in images["participant_id"])
    assert not any(digest in text for digest in contents)


def test_the_readout_takes_away_the_confounds_that_the_prediction_does(tmp_path: Path) -> None:
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


def test_harmonized_features_keep_no_readout(tmp_path: Path) -> None:
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
    write_readout(file, stored_for())
    cohort = EmbeddedDataset(images, x, pd.DataFrame, 0, MODEL)
    keep_readout(file, result, cohort, {}, None)
    assert result.readout is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=SLOW)
def first(studied: Path) -> Path:
    """Return the output of the study whose readouts go to other cohorts."""
    return studied


def external_files(out: Path, target: str = "Age") -> dict[str, int]:
    """Return the change times of the files about external validity."""
    return {p.name: p.stat().st_mtime_ns for p in out.glob(f"desc-dcl{target}_external*")}


def test_a_readout_goes_to_another_cohort(
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
    write_readout(
        file,
        replace(stored, linear=replace(stored.linear, intercept=stored.linear.intercept + 100)),
    )
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


def test_the_page_escapes_what_a_readout_of_others_says(first: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("n", "few"), [(19, True), (20, False)])
def test_scores_of_fewer_than_twenty_are_in_the_file_but_no_finding(
    n: int, few: bool, tmp_path: Path
) -> None:
    x = np.linspace(5, 30, n)
    result = applied(stored_for(), x, people(n, age=2 * x + 11 + np.arange(n) % 3))
    headline, mae = result.metrics["headline"], result.metrics["scores"]["mae"]["mean"]
    slope = result.metrics["calibration"]["slope"]["mean"]
    (tmp_path / "desc-dclAge_externalmetrics.json").write_text(json.dumps(result.metrics))

    page = write_report(tmp_path).read_text()
    printed = summary_table([{"target": "age", "external": result.summary()}])

    assert headline["too_few"] is few
    assert mae > 0
    for text in (headline["sentence"], printed):
        assert (f"{mae:.3g}" in text or f"{mae:.2f}" in text) is not few
        assert ("too few" in text) is few
    assert (f'data-value="{slope}"' in page) is not few

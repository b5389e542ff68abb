from __future__ import annotations

import json
import random

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.evaluation.site_effects import AuditedSites, site_audit
from nidl_dcl.io.formats import write_json, write_tsv

CONTRACT = {
    "target",
    "task",
    "n_participants",
    "n_dropped",
    "cv",
    "groups",
    "scores",
    "permutation",
    "baselines",
    "exposure",
    "site",
}
FEW = {"n_permutations": 19, "n_repeats": 2}


def _cohort(n=60, d=10, seed=0):
    """Return features, a number and a class that they carry, and participants."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    signal = x[:, 0] + x[:, 1] + 0.5 * rng.normal(size=n)
    return x, 50 + 10 * signal, np.where(signal > 0, "M", "F"), [f"sub-{i:03}" for i in range(n)]


@pytest.fixture(scope="module")
def regression():
    x, age, _, people = _cohort()
    noise = np.random.default_rng(1).normal(size=(3, 60, 10))
    return predict_phenotype(
        x,
        age,
        people,
        target="age",
        baselines={"untrained": list(noise), "voxels": Baseline(x.astype(np.float32), pca=True)},
        n_permutations=99,
    )


@pytest.fixture(scope="module")
def classification():
    x, _, sex, people = _cohort()
    return predict_phenotype(x, sex, people, target="sex", n_permutations=99)


def test_a_planted_number_is_found(regression):
    scores = regression.metrics["scores"]

    assert scores["r"]["mean"] > 0.8
    assert scores["mae"]["ci95"][1] < regression.metrics["baselines"]["dummy"]["mae"]["mean"]
    assert regression.metrics["permutation"]["p"] == 1 / 100


def test_planted_classes_are_found(classification):
    scores = classification.metrics["scores"]

    assert set(scores) == {"balanced_accuracy", "roc_auc", "recall_F", "recall_M"}
    assert scores["balanced_accuracy"]["ci95"][0] > 0.6
    assert classification.metrics["permutation"]["p"] == 1 / 100
    assert classification.metrics["permutation"]["chance"] == pytest.approx(0.5, abs=0.05)


def test_repeats_are_what_tables_and_scores_are_made_of(regression, classification):
    found, table = regression.repeats, regression.predictions

    assert {name: v.shape for name, v in found.items()} == {
        "embeddings": (1, 5, 60),
        "untrained": (3, 5, 60),
        "voxels": (1, 5, 60),
    }
    assert found["embeddings"][0].mean(axis=0) == pytest.approx(table["prediction"])
    errors = np.abs(found["untrained"] - table["target"].to_numpy()).mean()
    assert errors == pytest.approx(regression.metrics["baselines"]["untrained"]["mae"]["mean"])
    chances = classification.predictions[["probability_F", "probability_M"]]
    assert classification.repeats["embeddings"][0].mean(axis=0) == pytest.approx(chances.to_numpy())


def test_repeats_have_no_number_where_an_image_is_not_used():
    x, age, _, people = _cohort()
    age[7] = np.nan

    found = predict_phenotype(x, age, people, **FEW, learning_curve=False).repeats["embeddings"]

    assert np.flatnonzero(np.isnan(found[0, 0])).tolist() == [7]


@pytest.mark.parametrize("which", [1, 2], ids=["number", "class"])
def test_shuffled_labels_give_chance(which):
    data = _cohort(n=80)
    y = np.random.default_rng(3).permutation(data[which])

    metrics = predict_phenotype(data[0], y, data[3], n_permutations=99).metrics

    low, high = metrics["permutation"]["range95"]
    assert low <= metrics["permutation"]["observed"] <= high
    assert metrics["permutation"]["p"] > 0.05
    assert not metrics["headline"]["beats"]
    assert (
        "not shown to predict target better than the best baseline, dummy"
        in metrics["headline"]["sentence"]
    )


def test_a_leak_by_images_of_one_participant_is_closed_by_grouping():
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(30), 4)
    x = rng.normal(size=(30, 40))[person] + 0.1 * rng.normal(size=(120, 40))
    y = rng.normal(size=30)[person]

    grouped = predict_phenotype(x, y, person, **FEW).metrics
    leaking = predict_phenotype(x, y, np.arange(120), **FEW).metrics

    assert leaking["scores"]["r"]["mean"] > 0.9
    assert leaking["permutation"]["p"] == 1 / 20
    assert grouped["scores"]["r"]["mean"] < 0.4
    assert grouped["permutation"]["p"] > 0.05
    assert grouped["n_participants"] == 30
    assert grouped["n_images"] == 120


def test_metrics_hold_the_keys_of_the_contract_and_are_json(regression, classification):
    for result in (regression, classification):
        metrics = result.metrics
        assert set(metrics) >= CONTRACT
        for scores in (metrics["scores"], *metrics["baselines"].values()):
            assert set(scores) == set(metrics["scores"])
            for score in scores.values():
                assert set(score) == {"mean", "ci95", "folds"}
                assert len(score["folds"]) == 25
        assert {"metric", "chance", "p"} <= set(metrics["permutation"])
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_baselines_see_the_same_folds(regression):
    baselines = regression.metrics["baselines"]

    assert set(baselines) == {"dummy", "untrained", "voxels"}
    assert baselines["untrained"]["mae"]["mean"] > 1.3 * regression.metrics["scores"]["mae"]["mean"]
    # Same matrix, so the same up to scaling: fold by fold close to the embeddings.
    own = np.array(regression.metrics["scores"]["mae"]["folds"])
    np.testing.assert_allclose(baselines["voxels"]["mae"]["folds"], own, rtol=0.2)


def test_scores_of_several_matrices_are_averaged_fold_by_fold():
    x, age, _, people = _cohort(n=30)
    seeds = list(np.random.default_rng(1).normal(size=(2, 30, 5)))
    options = FEW | {"n_permutations": 0}

    both = predict_phenotype(x, age, people, baselines={"u": seeds}, **options)
    each = [predict_phenotype(x, age, people, baselines={"u": s}, **options) for s in seeds]

    mean = np.mean([r.metrics["baselines"]["u"]["mae"]["folds"] for r in each], axis=0)
    np.testing.assert_allclose(both.metrics["baselines"]["u"]["mae"]["folds"], mean)


def test_features_that_hardly_vary_are_not_blown_up_by_a_shared_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 40))
    y = x[:, :5].sum(axis=1) + rng.normal(size=60) * 0.1
    quiet = np.zeros((60, 40))
    quiet[:, 0] = 1e-6 * rng.normal(size=60)
    quiet[7, 0] = 0.1  # unlike all others
    noisy = np.hstack([x, quiet])
    who = [f"sub-{i}" for i in range(60)]

    def error(x, scaling):
        result = predict_phenotype(
            *(x, y, who), scaling=scaling, baselines={"same": x}, n_permutations=0, n_repeats=1
        )
        same = result.metrics["baselines"]["same"]["mae"]["mean"]
        assert result.metrics["scores"]["mae"]["mean"] == pytest.approx(same)
        assert ("plus the mean variance" in result.metrics["model"]) == (scaling == "shared")
        return same

    assert error(noisy, "each") > 10 * error(x, "each")
    assert error(noisy, "shared") < 1.1 * error(x, "shared")
    with pytest.raises(UsageError, match="each, shared"):
        predict_phenotype(x, y, who, scaling="both")


def test_embeddings_that_lose_are_said_to_lose():
    x, age, _, people = _cohort()
    noise = np.random.default_rng(1).normal(size=(60, 10))

    headline = predict_phenotype(
        noise, age, people, target="age", baselines={"voxels": Baseline(x, pca=True)}, **FEW
    ).metrics["headline"]

    assert headline["best_baseline"] == "voxels"
    assert not headline["beats"]
    assert headline["sentence"].startswith("The embeddings predict age worse than")


def test_the_dummy_says_the_mean_or_the_most_frequent_class(regression, classification):
    dummy = classification.metrics["baselines"]["dummy"]
    assert dummy["balanced_accuracy"]["mean"] == 0.5
    assert dummy["roc_auc"]["mean"] == 0.5
    assert {dummy["recall_F"]["mean"], dummy["recall_M"]["mean"]} == {0.0, 1.0}
    assert regression.metrics["baselines"]["dummy"]["r"]["mean"] is None
    assert regression.metrics["baselines"]["dummy"]["r2"]["mean"] < 0


def test_the_same_seed_gives_the_same_numbers_and_leaves_global_generators_alone():
    x, age, _, people = _cohort(n=30)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    before, plain = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    first, second, other = (
        predict_phenotype(x, age, people, random_state=seed, **FEW) for seed in (3, 3, 4)
    )

    assert first.metrics == second.metrics
    pd.testing.assert_frame_equal(first.predictions, second.predictions)
    assert first.metrics["scores"] != other.metrics["scores"]
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert random.getstate() == plain


def test_scores_do_not_depend_on_permutations_baselines_or_row_order():
    x, age, _, people = _cohort(n=30)
    order = np.random.default_rng(0).permutation(30)

    plain = predict_phenotype(x, age, people, **FEW)
    more = predict_phenotype(x, age, people, baselines={"b": x}, **(FEW | {"n_permutations": 0}))
    mixed = predict_phenotype(x[order], age[order], np.array(people)[order], **FEW)

    assert plain.metrics["scores"] == more.metrics["scores"]
    np.testing.assert_allclose(
        plain.metrics["scores"]["mae"]["folds"], mixed.metrics["scores"]["mae"]["folds"]
    )


def test_data_frames_text_targets_and_odd_indices_are_matched_by_their_labels():
    x, _, sex, people = _cohort(n=30)
    odd = range(130, 100, -1)
    table = pd.DataFrame(x, index=odd, columns=[f"dcl{i}" for i in range(10)])
    y = pd.Series(sex, index=odd).sort_index()

    framed = predict_phenotype(table, y, pd.Series(people, index=odd), **FEW)

    assert framed.metrics["scores"] == predict_phenotype(x, sex, people, **FEW).metrics["scores"]
    assert list(framed.predictions["target"]) == list(sex)


def test_every_row_has_a_row_with_its_reason():
    x, age, _, people = _cohort(n=40)
    y = np.array([str(round(a, 1)) for a in age], dtype=object)
    y[3], y[4], y[5] = None, "89+", "inf"
    ids = pd.DataFrame({"participant_id": people, "session_id": ["ses-1"] * 40})

    result = predict_phenotype(x, y, people, ids=ids, **FEW)

    table = result.predictions
    assert list(table["participant_id"]) == people
    assert list(table["session_id"]) == ["ses-1"] * 40
    assert list(table["status"][2:7]) == ["ok", "dropped", "dropped", "dropped", "ok"]
    assert list(table["reason"][3:6]) == [
        "target missing",
        "target not a number: 89+",
        "target not finite: inf",
    ]
    assert table.loc[3:5, "prediction"].isna().all()
    assert (table["n_folds"] == np.where(table["status"] == "ok", 2, 0)).all()
    assert result.metrics["n_participants"] == 37
    assert result.metrics["n_dropped"] == {
        "target missing": 1,
        "target not a number": 1,
        "target not finite": 1,
    }


def test_predictions_are_the_mean_over_repeats_and_every_column_is_described(
    regression, classification
):
    numbers, classes = regression.predictions, classification.predictions

    assert np.corrcoef(numbers["target"], numbers["prediction"])[0, 1] > 0.8
    assert (numbers["prediction_sd"] > 0).all()
    assert (numbers["n_folds"] == 5).all()
    likely = classes[["probability_F", "probability_M"]]
    np.testing.assert_allclose(likely.sum(axis=1), 1)
    assert (likely.idxmax(axis=1).str.removeprefix("probability_") == classes["prediction"]).all()
    for result in (regression, classification):
        assert list(result.columns) == list(result.predictions.columns)
        assert all(entry["Description"] for entry in result.columns.values())
    assert set(classification.columns["target"]["Levels"]) == {"F", "M"}


def test_participants_with_one_usable_image_are_not_counted_as_dropped():
    x, age, _, _ = _cohort(n=40)
    people = np.repeat([f"sub-{i}" for i in range(20)], 2)
    y = age.copy()
    y[::2] = np.nan
    y[:2] = np.nan

    metrics = predict_phenotype(x, y, people, **FEW).metrics

    assert metrics["n_dropped"] == {"target missing": 1}
    assert metrics["n_images_dropped"] == {"target missing": 21}
    assert metrics["n_participants"] == 19


def test_a_target_that_changes_between_sessions_is_scored_per_value_and_weighs_once():
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(20), 2)
    age = rng.uniform(20, 80, size=20)[person] + np.tile([0, 3.5], 20)
    x = np.stack([age, rng.normal(size=40)], axis=1)

    result = predict_phenotype(x, age, person, **FEW)

    assert result.metrics["n_participants"] == 20
    assert result.metrics["scores"]["mae"]["mean"] < 1
    assert result.predictions["prediction"].nunique() == 40


def test_families_are_kept_together_and_participants_scored():
    x, age, _, people = _cohort(n=40)
    family = [f"family-{i // 2}" for i in range(40)]

    result = predict_phenotype(x, age, family, ids=pd.DataFrame({"participant_id": people}), **FEW)

    assert result.metrics["groups"]["n"] == 20
    assert result.metrics["n_participants"] == 40


@pytest.mark.parametrize(
    ("seen", "expected", "words"),
    [
        (None, (0, 0, 30), "not known"),
        ([False] * 30, (0, 30, 0), "saw none of the 30"),
        ([True] * 12 + [False] * 18, (12, 18, 0), "saw 12 of the 30"),
        ([True] * 12 + [None] * 18, (12, 0, 18), "Of 18 it is not known"),
    ],
)
def test_exposure_counts_the_test_participants_that_pretraining_saw(seen, expected, words):
    x, age, _, people = _cohort(n=30)

    ids = pd.DataFrame({"participant_id": people})
    if seen is not None:
        ids["seen"] = seen

    result = predict_phenotype(x, age, people, ids=ids, **(FEW | {"n_permutations": 0}))

    exposure = result.metrics["exposure"]
    assert (exposure["seen"], exposure["not_seen"], exposure["unknown"]) == expected
    assert words in exposure["sentence"]
    column = result.predictions["seen_in_pretraining"]
    assert column.isna().sum() == expected[2]


def test_one_seen_image_makes_the_participant_seen():
    x, age, _, _ = _cohort(n=30)
    person = np.repeat(np.arange(15), 2)

    ids = pd.DataFrame({"seen": np.arange(30) == 1})

    result = predict_phenotype(x, age, person, ids=ids, **FEW)

    assert result.metrics["exposure"]["seen"] == 1
    assert list(result.predictions["seen_in_pretraining"][:3]) == [True, True, False]


@pytest.mark.slow
def test_site_is_audited_against_chance_and_can_be_computed_once():
    x, age, _, people = _cohort(n=60)
    site = np.array(["a", "b", "c"])[np.arange(60) % 3]
    marked = x + 2 * np.eye(3, 10)[np.arange(60) % 3]

    carried = predict_phenotype(marked, age, people, site=site, **FEW).metrics["site"]
    clean = site_audit(_cohort(seed=1)[0], site, people, **(FEW | {"n_permutations": 99}))
    known = AuditedSites(site, {**carried, "sentence": "as it was given"})
    again = predict_phenotype(marked, age, people, site=known, **FEW).metrics["site"]

    assert carried["permutation"]["p"] == 1 / 20
    assert carried["balanced_accuracy"]["mean"] > 0.6
    assert carried["sites"] == {"a": 20, "b": 20, "c": 20}
    assert "carry site" in carried["sentence"]
    assert clean["permutation"]["p"] > 0.05
    assert "no more than by chance" in clean["sentence"]
    assert again == {**carried, "sentence": "as it was given"}


def test_one_site_is_said_not_to_be_decodable():
    x, age, _, people = _cohort(n=30)

    site = predict_phenotype(x, age, people, site=["a"] * 30, **FEW).metrics["site"]

    assert site["balanced_accuracy"] is None
    assert "constant" in site["sentence"]


def test_a_missing_column_of_sites_and_no_site_are_null():
    x, age, _, people = _cohort(n=30)

    assert predict_phenotype(x, age, people, **FEW).metrics["site"] is None


def test_the_summary_is_one_row_of_a_table(regression, classification):
    row = regression.summary()

    assert row["target"] == "age"
    assert row["metric"] == "mae"
    assert row["low"] < row["score"] < row["high"] < row["chance"]
    assert row["score"] < row["untrained"]
    assert {"dummy", "voxels"} < set(row)
    assert row["n"] == 60
    assert classification.summary()["untrained"] is None


def test_progress_counts_up_to_the_end():
    x, age, _, people = _cohort(n=30)
    told = []

    predict_phenotype(
        x,
        age,
        people,
        baselines={"u": [x, x]},
        site=["a", "b"] * 15,
        progress=lambda done, steps: told.append((done, steps)),
        **FEW,
    )

    steps = told[0][1]
    assert told == [(i + 1, steps) for i in range(steps)]


def test_odd_class_names_make_unique_columns():
    x, _, sex, people = _cohort(n=30)
    y = np.where(sex == "M", "a b", "a/b")

    table = predict_phenotype(x, y, people, **FEW).predictions

    assert {"probability_a_b_0", "probability_a_b_1"} < set(table.columns)


def test_the_tables_are_written_and_read_back(regression, classification, tmp_path):
    for result in (regression, classification):
        write_tsv(tmp_path / "t.tsv", result.predictions)
        write_json(tmp_path / "m.json", result.metrics)

        read = pd.read_csv(tmp_path / "t.tsv", sep="\t", keep_default_na=False)
        assert list(read.columns) == list(result.predictions.columns)
        assert set(read["reason"]) == set(read["seen_in_pretraining"]) == {"n/a"}
        assert json.loads((tmp_path / "m.json").read_text()) == result.metrics


@pytest.mark.parametrize("n", [6, 7, 9])
def test_small_cohorts_get_fewer_folds(n):
    x, age, _, people = _cohort(n=n)

    metrics = predict_phenotype(x, age, people, **FEW).metrics

    assert metrics["cv"]["n_splits"] == max(3, n // 2)
    assert metrics["cv"]["n_splits_asked"] == 5


def test_more_features_than_images_and_constant_features_are_fine():
    x, age, sex, people = _cohort(n=20, d=60)
    x[:, 5:] = 1.0
    for y in (age, sex):
        assert predict_phenotype(x, y, people, **FEW).metrics["n_participants"] == 20


def _poisoned(value, where=(4, 2)):
    x = _cohort(n=30)[0].copy()
    x[where] = value
    return x


X30, AGE30, SEX30, PEOPLE30 = _cohort(n=30)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"features": _poisoned(np.nan)}, InputsUnusableError, r"row 4 \(participant_id sub-004\)"),
        (
            {
                "features": _poisoned(np.inf),
                "ids": pd.DataFrame({"participant_id": PEOPLE30, "session_id": "ses-2"}),
            },
            InputsUnusableError,
            "participant_id sub-004, session_id ses-2",
        ),
        (
            {"baselines": {"u": _poisoned(np.nan)}},
            InputsUnusableError,
            "'u' are not finite in 1 of 30",
        ),
        (
            {"baselines": {"v": Baseline(_poisoned(np.inf, (0, 0)), pca=True)}},
            InputsUnusableError,
            "'v' are not finite in 1 of 30 rows, first in row 0",
        ),
        ({"y": AGE30[:29]}, UsageError, "y has 29 values"),
        ({"groups": PEOPLE30[:29]}, UsageError, "groups has 29 values"),
        ({"groups": [None, *PEOPLE30[1:]]}, UsageError, "missing in row 0"),
        ({"features": X30[:, 0]}, UsageError, "shape"),
        ({"features": np.empty((0, 3))}, UsageError, "shape"),
        ({"features": pd.DataFrame({"a": ["x"] * 30})}, UsageError, "table of numbers"),
        ({"baselines": {"u": X30[:29]}}, UsageError, "expected 30 rows"),
        ({"baselines": {"u": []}}, UsageError, "empty list"),
        ({"baselines": {"dummy": X30}}, UsageError, "taken"),
        ({"baselines": {"embeddings": X30}}, UsageError, "taken"),
        ({"ids": pd.DataFrame({"participant_id": ["a"]})}, UsageError, "ids has 1 rows"),
        ({"ids": pd.DataFrame({"target": PEOPLE30})}, UsageError, "Rename"),
        ({"ids": pd.DataFrame({"participant_id": ["a"] * 30})}, UsageError, "several groups"),
        ({"n_splits": 2}, UsageError, "n_splits"),
        ({"n_repeats": 0}, UsageError, "n_repeats"),
        ({"n_permutations": -1}, UsageError, "n_permutations"),
        ({"task": "clustering"}, UsageError, "Unknown task"),
        ({"y": [np.nan] * 30}, InputsUnusableError, "no value"),
        ({"y": [1.0] * 30}, InputsUnusableError, "constant"),
        ({"y": ["a"] * 29 + ["b"]}, InputsUnusableError, "fewer than two classes"),
        ({"y": [*AGE30[:5], *[np.nan] * 25]}, InputsUnusableError, "needs 6"),
    ],
)
def test_what_cannot_work_is_one_clear_message(changed, error, words):
    with pytest.raises(error, match=words):
        predict_phenotype(**({"features": X30, "y": AGE30, "groups": PEOPLE30} | FEW | changed))


def _ages(changed):
    y = np.array([f"{a:.1f}" for a in AGE30], dtype=object)
    y[: len(changed)] = changed
    return y


@pytest.mark.parametrize(
    ("y", "task", "n", "dropped"),
    [
        (_ages(["89+", "89+"]), "regression", 28, {"target not a number": 2}),
        ([np.inf, -np.inf, *AGE30[2:]], "regression", 28, {"target not finite": 2}),
        ([*SEX30[:29], "X"], "classification", 29, {"class with fewer than 3 participants": 1}),
        (SEX30 == "M", "classification", 30, {}),
        (
            pd.array([True, False, None] * 10, "boolean"),
            "classification",
            20,
            {"target missing": 10},
        ),
        ([*AGE30[:6], *[None] * 24], "regression", 6, {"target missing": 24}),
    ],
    ids=["89+", "infinite", "a class of one", "bool", "bool with missing", "six known"],
)
def test_odd_targets_that_can_be_predicted(y, task, n, dropped):
    metrics = predict_phenotype(X30, y, PEOPLE30, **FEW).metrics

    assert metrics["task"] == task
    assert metrics["n_participants"] == n
    assert metrics["n_dropped"] == dropped
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (_ages(["89+"] * 10), r"texts that are none: '89\+'\. Write n/a .* and numbers as 1\.5"),
        (PEOPLE30, "30 different texts for 30 participants: an identifier"),
        ([1] * 29 + [2], "fewer than two classes .* '1' 29, '2' 1"),
        ([True] * 28 + [False] * 2, "'True' 28, 'False' 2"),
        ([np.inf] * 30, "no finite number"),
        ([1.5, 2.5, *[None] * 28], "known for 2 participants"),
        (["a", "b", *[None] * 28], "known for 2 participants"),
        ([*AGE30[:4], *[None] * 26], "known for 4 participants .* needs 6"),
    ],
)
def test_odd_targets_that_cannot_be_predicted_say_why(y, words):
    with pytest.raises(InputsUnusableError, match=words):
        predict_phenotype(X30, y, PEOPLE30, **FEW)


@pytest.mark.parametrize("n", [2, 4])
def test_fewer_participants_than_two_to_a_fold_are_refused(n):
    with pytest.raises(InputsUnusableError, match=f"known for {n} participants"):
        predict_phenotype(X30[:n], AGE30[:n] + 0.5, PEOPLE30[:n], task="regression", **FEW)

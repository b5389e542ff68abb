from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TWO_EPOCHS, give

from nidl_dcl.evaluation.missing_values import describe_missing
from nidl_dcl.evaluation.prediction import predict_phenotype

N = 48


def test_missing_sites_and_confounds_are_counted_and_it_is_said_what_becomes_of_the_rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 4))
    site = pd.Series(["a", "b"] * (N // 2), name="scanner")
    site[:6] = None
    iq = pd.Series(rng.normal(size=N))
    iq[4:9] = np.nan
    y = x[:, 0] * 3
    y[0] = np.nan  # no target: not among those who are spoken of

    metrics = predict_phenotype(
        x,
        y,
        [f"sub-{i // 2}" for i in range(N)],
        site=site,
        confounds=pd.DataFrame({"iq": iq, "size": rng.normal(size=N)}),
        n_repeats=1,
        n_permutations=0,
        learning_curve=False,
    ).metrics

    assert set(metrics["missing"]) == {"site", "iq"}
    assert metrics["missing"]["iq"]["n_images"] == 5
    assert metrics["missing"]["iq"]["sentence"].startswith(
        "3 of 24 participants (5 images) have no value of the confound column 'iq'. They are left out"
    )
    assert metrics["missing"]["site"]["sentence"].startswith(
        "2 of 22 participants (3 images) have no value of the site column 'scanner'. They are part of"
    )
    assert metrics["site"]["n_images_without"] == 3


def test_nothing_is_said_where_nothing_is_missing():
    who = np.array(["a", "b"], dtype=object)
    assert describe_missing("group", "family", np.zeros(2, dtype=bool), who) is None


@pytest.mark.slow
def test_the_command_says_what_missing_families_sites_and_confounds_mean(
    make_heads: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bids = make_heads(n=14)
    table = pd.read_csv(bids / "participants.tsv", sep="\t", keep_default_na=False)
    table["family"] = [str(i // 2) if i % 3 else "n/a" for i in range(14)]
    table["site"] = ["n/a", "n/a", *"ABABABABABAB"]
    table["iq"] = ["n/a", *(str(90 + 7 * i % 31) for i in range(13))]
    table.to_csv(bids / "participants.tsv", sep="\t", index=False)
    words = ["--target", "sex", "--group", "family", "--site", "site", "--confounds", "iq"]

    assert give("study", bids, tmp_path / "out", *words, *TWO_EPOCHS, page="last") == 0

    said = "".join(capsys.readouterr())
    page = (tmp_path / "out" / "report.html").read_text()
    metrics = json.loads((tmp_path / "out" / "desc-dclSex_metrics.json").read_text())
    assert set(metrics["missing"]) == {"group", "site", "iq"}
    for kind, found in metrics["missing"].items():
        assert found["sentence"] in said, kind
        assert found["sentence"].split("'")[0] in page, kind
    assert "5 of 14 participants" in metrics["missing"]["group"]["sentence"]
    assert said.index("of the group column") < said.index("Training")
    assert metrics["baselines"]["site"]
    folds = pd.read_csv(tmp_path / "out" / "desc-dclSex_folds.tsv", sep="\t")
    assert set(folds["features"]) == {"embeddings", *metrics["baselines"]}

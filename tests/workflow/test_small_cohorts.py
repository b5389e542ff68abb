"""Too few participants, or too few with a target: a defined answer, never an epoch without a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

TWO_EPOCHS = ("--spacing", "8", "--max-epochs", "2")


def change_table(bids: Path, columns: dict[str, list[str]]) -> None:
    """Write a participants table with columns of text, a value for each participant in order."""
    people = [f"sub-{i:02d}" for i in range(1, 1 + len(next(iter(columns.values()))))]
    table = pd.DataFrame({"participant_id": people, **columns})
    table.to_csv(bids / "participants.tsv", sep="\t", index=False)


@pytest.mark.parametrize(
    ("n", "status", "said"),
    [(0, 3, "no usable image"), (1, 3, "at least 2"), (2, 0, ""), (3, 0, "")],
)
def test_pretraining_needs_two_participants_and_steps_in_every_epoch(
    n: int, status: int, said: str, run: Callable[..., Any], make_heads: Any, tmp_path: Path
) -> None:
    bids, out = make_heads(n=n, masks=False), tmp_path / "out"
    done = run("pretrain", bids, out, *TWO_EPOCHS, "--batch-size", "32")
    assert done.status == status, done.err
    assert said in done.err
    assert (out / "models").exists() == (status == 0)
    assert json.loads((out / "logs" / "run.json").read_text())["exit_status"] == status
    if status == 0:
        curve = pd.read_csv(out / "logs" / "metrics.csv")
        assert list(curve["step"]) == [1, 2]
        assert np.isfinite(curve["loss/train"]).all()


@pytest.mark.parametrize(("n", "batch"), [(5, 4), (5, 2), (3, 2), (4, 32)])
def test_nobody_is_left_out_by_a_batch_that_does_not_divide(
    n: int, batch: int, run: Callable[..., Any], make_heads: Any, tmp_path: Path
) -> None:
    from nidl_dcl import BIDSDataModule

    bids = make_heads(n=n, masks=False)
    module = BIDSDataModule(bids, spacing=8.0, batch_size=batch)
    sizes = [len(views[0]) for views in module.train_dataloader()]
    assert sum(sizes) == n
    assert min(sizes) >= 2
    assert len(sizes) >= 1


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_a_study_of_too_few_is_refused_before_training(
    n: int, run: Callable[..., Any], make_heads: Any, tmp_path: Path
) -> None:
    bids, out = make_heads(n=n, masks=False), tmp_path / "out"
    done = run("study", bids, out, "--target", "age", *TWO_EPOCHS)
    assert done.status == 3, done.err
    assert len(done.err.splitlines()) == 1
    assert not (out / "models").exists()
    assert not (out / "desc-dcl_embeddings.tsv").exists()
    if n:
        inputs = pd.read_csv(out / "logs" / "inputs.tsv", sep="\t")
        assert set(inputs["code"]) == {"ok"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["A"] * 10, "constant"),
        (["A"] + ["B"] * 9, "A"),
        (["n/a"] * 10, "x"),
        (["n/a"] * 9 + ["A"], "x"),
        (["3"] * 10, "constant"),
        ([f"id{i}" for i in range(10)], "x"),
        (["1.5", "2.5", *["n/a"] * 8], "x"),
    ],
    ids=["one class", "one member", "nothing", "one value", "one number", "all differ", "two"],
)
def test_a_target_that_cannot_be_predicted_is_refused_by_name_before_training(
    values: list[str], said: str, run: Callable[..., Any], make_heads: Any, tmp_path: Path
) -> None:
    bids, out = make_heads(n=10, masks=False), tmp_path / "out"
    change_table(bids, {"x": values})
    done = run("study", bids, out, "--target", "x", *TWO_EPOCHS)
    assert done.status in (2, 3), done.err
    assert "'x'" in done.err
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not (out / "models").exists()


def test_one_participant_is_embedded_by_a_model_that_is_there(
    run: Callable[..., Any], make_heads: Any, tmp_path: Path
) -> None:
    bids, out = make_heads(n=4, masks=False), tmp_path / "out"
    assert run("pretrain", bids, out, *TWO_EPOCHS).status == 0
    one = make_heads("one", n=1, masks=False, first=9)
    (one / "participants.tsv").unlink()
    done = run("embed", one, tmp_path / "new", "--model", out / "models" / "desc-dcl")
    assert done.status == 0, done.err
    assert np.load(tmp_path / "new" / "desc-dcl_embeddings.npy").shape[0] == 2

"""The study scripts, run as a scientist runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import predict_quickly

PIPELINES = Path(__file__).resolve().parent.parent / "pipelines"


def script(name: str) -> ModuleType:
    """Return a script as a module, not yet run."""
    spec = importlib.util.spec_from_file_location(f"pipeline_{name}", PIPELINES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_model_a_table_and_a_prediction_one_script_after_another(
    heads_made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, table = tmp_path / "model", tmp_path / "embeddings.tsv"
    script("pretrain").main(str(heads_made), str(model), max_epochs=2)
    script("embed").main(str(heads_made), str(model), str(table))
    rows = pd.read_csv(table, sep="\t")
    assert len(rows) == 13
    assert rows.filter(regex=r"^dcl_region\d+_feature\d+$").shape == (13, 64 * 192)
    capsys.readouterr()
    script("predict").main(str(table), str(heads_made), "sex")
    said = capsys.readouterr().out
    assert "target: sex" in said
    assert "metric: balanced_accuracy" in said


@pytest.mark.slow
def test_the_study_script_and_the_command_give_the_same_files(
    studied: Path, heads_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"target": ["age", "sex"], "spacing": [8.0], "max_epochs": 2, "batch_size": 8}
    settings["preprocess"] = "none"  # variables, as the tests set one, are the command line's
    outs = {"script": tmp_path / "script", "command": studied}
    text = {"bids_dir": str(heads_made), "output_dir": str(outs["script"]), **settings}
    (tmp_path / "script.yaml").write_text(yaml.safe_dump(text))
    predict_quickly(monkeypatch)
    script("study").main(str(tmp_path / "script.yaml"))
    ours, theirs = (
        {
            p.relative_to(out).as_posix()
            for p in out.rglob("*")
            if ".work" not in p.parts and p.suffix != ".log"  # named by time and command
        }
        for out in outs.values()
    )
    assert ours == theirs
    for file in ("desc-dclSex_predictions.tsv", "models/desc-dcl/weights.safetensors"):
        assert (outs["script"] / file).read_bytes() == (outs["command"] / file).read_bytes()
    matrices = [np.load(out / "desc-dcl_embeddings.npy") for out in outs.values()]
    assert np.array_equal(*matrices)


def test_one_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    from nidl_dcl.workflow.options import read_study

    file = tmp_path / "study.yaml"
    file.write_text("bids_dir: b\noutput_dir: o\ntarget: age\nspacing: 8\nphenotypes: p.tsv\n")
    options = read_study(file)
    assert options.target == ["age"]
    assert options.training.spacing == [8]
    assert options.data.phenotypes == [Path("p.tsv")]


@pytest.mark.parametrize("file", sorted(PIPELINES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_yaml_file_holds_known_options(file: Path) -> None:
    from nidl_dcl.workflow.options import read_study

    options = read_study(file)
    assert options.target == ["age", "sex"]
    assert options.training.max_steps == 300

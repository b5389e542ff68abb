"""The baselines of the command, in Python."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TWO_EPOCHS, give, write_heads
from torch import nn

from nidl_dcl import DCL, BIDSDataModule, load_model, predict_phenotype
from nidl_dcl.errors import UsageError
from nidl_dcl.models.serialization import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dataset and the output of a study of it."""
    folder = tmp_path_factory.mktemp("baselines")
    bids = write_heads(folder / "bids", 12)
    assert give("study", bids, folder / "out", "--target", "age", *TWO_EPOCHS, page="none") == 0
    return folder


@pytest.mark.slow
def test_python_has_the_numbers_of_the_command_and_prints_them_as_a_table(folder: Path) -> None:
    written = json.loads((folder / "out" / "desc-dclAge_metrics.json").read_text())
    model = load_model(folder / "out" / "models" / "desc-dcl")
    stored = json.loads((folder / "out" / "models" / "desc-dcl" / "model.json").read_text())
    contract = stored["input_contract"]
    data = BIDSDataModule(
        folder / "bids", spacing=contract["spacing"], shape=contract["shape"], random_state=0
    )
    embeddings = model.transform(data)

    result = predict_phenotype(
        embeddings,
        data.images["age"],
        data.images["participant_id"],
        target="age",
        scaling="shared",
        baselines="default",
        model=model,
        data=data,
        n_repeats=2,
        n_permutations=19,  # as `give` has them
    )

    assert set(result.metrics["baselines"]) == {"dummy", "untrained", "voxels"}
    for key in ("scores", "baselines", "permutation", "headline", "learning_curve", "cv"):
        assert json.dumps(result.metrics[key]) == json.dumps(written[key]), key
    table = str(result).splitlines()
    assert table[0].split()[:3] == ["target", "metric", "score"]
    assert f"{written['summary']['score']:.2f} [" in table[1]
    assert f"{written['summary']['voxels']:.2f}" in table[1]
    assert result.metrics["headline"]["sentence"] in str(result)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"baselines": "default"}, "needs the model and the data module"),
        ({"baselines": "all"}, "baselines is a dict or 'default'"),
        ({"data": 1}, "for baselines='default' alone"),
    ],
)
def test_what_is_missing_for_the_default_baselines_is_said(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        predict_phenotype(np.eye(9), range(9), range(9), **given)


def test_the_default_baselines_need_a_data_module() -> None:
    with pytest.raises(UsageError, match="reads voxels from a BIDSDataModule; data is a list"):
        DCL(nn.Identity, proj_input_dim=4).baseline_features([1])  # type: ignore[arg-type]


def test_saving_an_encoder_of_a_script_says_what_loading_will_need(tmp_path: Path) -> None:
    class Net(nn.Linear):
        pass

    model = DCL(Net, {"in_features": 3, "out_features": 4}, proj_input_dim=4)
    with pytest.warns(UserWarning, match=r"inside a function.*load_model\(folder, encoder=Net"):
        model.save(tmp_path / "local")
    Net.__module__, Net.__qualname__ = "__main__", "Net"
    with pytest.warns(UserWarning, match=r"in the script that runs now.*__main__:Net.*trust="):
        folder = save_model(model, tmp_path / "script")
    again = load_model(folder, encoder=Net(3, 4))
    assert (again.encoder.weight == model.encoder.weight).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DCL(nn.Linear, {"in_features": 3, "out_features": 4}, proj_input_dim=4).save(tmp_path / "a")

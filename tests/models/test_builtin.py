"""The model that the package ships, whatever its weights are, and the script that writes it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from nidl_dcl import load_model
from nidl_dcl.models.encoders import RegionalEncoder
from nidl_dcl.models.model_card import model_card
from nidl_dcl.models.model_source import folder_of
from nidl_dcl.models.serialization import read_description
from nidl_dcl.workflow.options import DataOptions, TrainingOptions

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "builtin.py"
FOLDER = folder_of("builtin")


def script() -> ModuleType:
    """Return the script as a module, not yet run."""
    spec = importlib.util.spec_from_file_location("benchmark_builtin", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_holds_a_small_trained_model_with_card_and_license() -> None:
    files = {p.name: p.stat().st_size for p in FOLDER.iterdir() if p.name != "__pycache__"}
    assert set(files) == {"LICENSE", "README.md", "model.json", "weights.safetensors"}
    assert sum(files.values()) < 10**6
    about = read_description(FOLDER)
    assert (FOLDER / "README.md").read_text("utf-8") == model_card(about)
    license_text = (FOLDER / "LICENSE").read_text("utf-8")
    for text in ("https://brain-development.org/ixi-dataset/", "licenses/by-sa/3.0/"):
        assert text in license_text
        assert any(text in sentence for sentence in about["provenance"]["credits"])


def test_it_embeds_aligned_t1w_brains() -> None:
    model = load_model("builtin")
    assert model.fitted
    contract = model.preparation
    assert contract.masked
    assert contract.origin.contrast == "T1w"
    assert contract.origin.space.startswith("MNI152")
    assert contract.origin.preprocessing == "align"
    found = model.transform(torch.rand(2, 1, *contract.shape, generator=torch.manual_seed(0)))
    assert found.shape == (2, read_description("builtin")["n_features"])
    assert bool(torch.isfinite(torch.as_tensor(found)).all())


def test_it_can_be_built_whatever_the_defaults_of_its_encoder_become() -> None:
    assert read_description("builtin")["encoder"]["arguments"].keys() == {
        *("in_channels", "widths", "grid")
    }


def test_it_says_whom_it_saw_by_hashes_alone_and_nothing_of_this_or_any_machine() -> None:
    text = (FOLDER / "model.json").read_text("utf-8")
    exposure = json.loads(text)["exposure"]
    assert exposure["n_participants"] == len(exposure["participants"]) > 0
    hashes = exposure["participants"] + exposure["images"] + exposure["validation"]
    assert all(re.fullmatch("[0-9a-f]{24}", one) for one in hashes)
    for file in FOLDER.glob("[!w]*"):
        said = file.read_text("utf-8")
        assert not re.search(r"sub-|IXI\d|/home|/work|/tmp|/Users|\\\\", said), file


def test_its_card_says_license_credits_and_what_it_is_good_for() -> None:
    _, head, text = (FOLDER / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "cc-by-sa-3.0"
    assert "--model builtin" in text
    assert 'load_model("builtin")' in text
    use = text.split("## Intended use")[1].split("## Limits")[0]
    told = script()
    for title, sentences in (("Good for", told.GOOD_FOR), ("Not for", told.NOT_FOR)):
        assert len(sentences) > 1
        assert f"{title}:\n" in use
        assert use.count("\n- ") == len(told.GOOD_FOR) + len(told.NOT_FOR)
    assert "Not stated" not in text
    assert read_description("builtin")["provenance"]["credits"] == told.CREDITS
    assert (FOLDER / "LICENSE").read_text("utf-8") == told.LICENSE_TEXT


@pytest.mark.slow
def test_the_script_trains_as_study_would_and_writes_such_a_folder(
    make_heads: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builtin, folder, asked = script(), tmp_path / "model", []
    real = builtin.pretrain

    def short(study, training):
        asked.append(training)
        return real(study, TrainingOptions(encoder=training.encoder, spacing=[8.0], max_epochs=1))

    monkeypatch.setattr(builtin, "pretrain", short)
    heads = make_heads(n=4)
    assert builtin.main(heads, folder, data=DataOptions(preprocess="none")) == folder
    assert asked == [TrainingOptions(encoder="regional")]
    assert {p.name for p in folder.iterdir()} == {p.name for p in FOLDER.iterdir()}
    model, about = load_model(folder), read_description(folder)
    assert isinstance(model.encoder, RegionalEncoder)
    assert about["exposure"]["n_participants"] == 4
    assert about["provenance"].keys() == read_description("builtin")["provenance"].keys()
    text = "".join((folder / name).read_text("utf-8") for name in ("model.json", "README.md"))
    assert str(tmp_path) not in text
    assert "sub-0" not in text

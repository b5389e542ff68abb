from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE_EPOCH
from torch import nn

from nidl_dcl import DCL, load_model
from nidl_dcl.errors import UsageError
from nidl_dcl.models.encoders import StridedCNN
from nidl_dcl.volumes.preparation import Preparation

OPTIONS = {"proj_hidden_dim": 8, "proj_output_dim": 4, **ONE_EPOCH}
LINEAR = {"encoder": nn.Linear, "encoder_kwargs": {"in_features": 6, "out_features": 4}}


class Foreign(nn.Linear):
    """An encoder of nobody's package."""

    def __init__(self) -> None:
        super().__init__(6, 4)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(rows: torch.Tensor, tmp_path: Path) -> Path:
    return DCL(**LINEAR, proj_input_dim=4, **OPTIONS).fit(rows).save(tmp_path / "model")


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the description of a model folder."""
    file = folder / "model.json"
    description = json.loads(file.read_text())
    edit(description)
    file.write_text(json.dumps(description))


def test_a_model_comes_back_with_arguments_weights_and_embeddings(
    rows: torch.Tensor, tmp_path: Path
) -> None:
    model = DCL(**LINEAR, proj_input_dim=4, temperature=0.3, **OPTIONS).fit(rows)
    again = load_model(model.save(tmp_path / "model"))
    assert again.fitted
    assert torch.equal(again.transform(rows), model.transform(rows))
    assert again.get_params()["temperature"] == 0.3
    assert set(again.state_dict()) == set(model.state_dict())
    assert "accelerator" not in again.get_params()


def test_an_instance_that_says_its_arguments_is_rebuilt(tmp_path: Path) -> None:
    volumes = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    model = DCL(StridedCNN(width=4), proj_input_dim=64, **OPTIONS).fit(volumes)
    again = load_model(model.save(tmp_path / "model"), accelerator="cpu")
    assert torch.equal(again.transform(volumes), model.transform(volumes))


EARLIER = """{
  "format": 1,
  "estimator": "nidl_dcl.dcl:DCL",
  "encoder": {"class": "nidl_dcl.encoder:StridedCNN", "arguments": {"in_channels": 1, "width": 4}},
  "arguments": {
    "proj_input_dim": 64,
    "proj_hidden_dim": 8,
    "proj_output_dim": 4,
    "temperature": 0.1,
    "optimizer": "adamW",
    "learning_rate": 0.0003,
    "weight_decay": 0.0005,
    "exclude_bias_and_norm_wd": true,
    "optimizer_kwargs": null,
    "lr_scheduler": null,
    "lr_scheduler_kwargs": null,
    "max_epochs": 1,
    "random_state": 0,
    "enable_progress_bar": false,
    "enable_model_summary": false
  },
  "arguments_left_out": [],
  "fitted": true,
  "n_features": 64,
  "input_contract": {
    "spacing": [4.0, 4.0, 4.0],
    "shape": [32, 32, 32],
    "masked": false,
    "intensity": "robust",
    "version": 1,
    "orientation": "RAS",
    "origin": null
  },
  "exposure": {"salt": "00", "n_participants": 1, "participants": ["5f0c"], "images": ["a3b1"]},
  "provenance": {"config": {"encoder": "cnn"}, "source": "ixi"},
  "versions": {"python": "3.11.7", "nidl_dcl": "0.1.0"},
  "sha256": {"weights.safetensors": "SHA256"}
}
"""
"""A model.json of before the modules moved into folders."""


def test_a_folder_written_before_the_modules_moved_gives_the_same_embeddings(
    tmp_path: Path,
) -> None:
    volumes = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    model = DCL(StridedCNN(width=4), proj_input_dim=64, **OPTIONS).fit(volumes)
    folder = model.save(tmp_path / "model")
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "model.json").write_text(EARLIER.replace("SHA256", digest))

    again = load_model(folder)

    assert again.fitted
    assert torch.equal(again.transform(volumes), model.transform(volumes))
    assert again.preparation == Preparation((4.0, 4.0, 4.0), (32, 32, 32))
    assert again.exposure["participants"] == ["5f0c"]
    assert again.get_params()["max_epochs"] == 1


@pytest.mark.slow
def test_a_folder_read_by_another_process_gives_the_same(folder: Path, rows: torch.Tensor) -> None:
    script = (
        "import torch, nidl_dcl\n"
        f"model = nidl_dcl.load_model({str(folder)!r}, enable_progress_bar=False)\n"
        "x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))\n"
        "print(model.transform(x).double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    expected = load_model(folder).transform(rows).double().sum().item()
    assert float(done.stdout.split()[-1]) == expected


def test_an_encoder_that_cannot_be_rebuilt_is_asked_for(rows: torch.Tensor, tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Linear(6, 4))
    folder = DCL(encoder, proj_input_dim=4, **OPTIONS).fit(rows).save(tmp_path / "model")
    with pytest.raises(UsageError, match=r"load_model\(folder, encoder="):
        load_model(folder)
    again = load_model(folder, encoder=nn.Sequential(nn.Linear(6, 4)))
    assert again.transform(rows).shape == (12, 4)


class LooksAtValues(nn.Module):
    """Takes numbers out of tensors when it is built, as MONAI's Swin transformer does."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.arguments = {"width": width}
        self.rates = [rate.item() for rate in torch.linspace(0, 1, width)]
        self.layer = nn.Linear(6, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1)) * self.rates[-1]


def test_an_encoder_that_looks_at_values_when_built_is_rebuilt(tmp_path: Path) -> None:
    model = DCL(LooksAtValues(4), proj_input_dim=4, random_state=0)
    model.save(tmp_path)

    again = load_model(tmp_path, trust=[__name__])

    assert again.encoder.rates == model.encoder.rates
    assert torch.equal(again.encoder.layer.weight, model.encoder.layer.weight)


def test_only_trusted_packages_are_imported(rows: torch.Tensor, tmp_path: Path) -> None:
    folder = DCL(Foreign, proj_input_dim=4, **OPTIONS).fit(rows).save(tmp_path / "model")
    with pytest.raises(UsageError, match="not trusted"):
        load_model(folder)
    assert load_model(folder, trust=[Foreign.__module__]).fitted


@pytest.mark.parametrize(
    "path",
    [
        "os:system",
        "nidl_dcl.workflow.pretrain:shutil.rmtree",
        "nidl_dcl.models.dcl:torch.hub.load",
        "torch.nn:Missing",
        "nidl_dcl:load_model",
        "torch.nn.modules.linear:Linear.forward",
    ],
)
@pytest.mark.parametrize("place", ["estimator", "encoder"])
def test_a_name_in_the_file_makes_nothing_run(place: str, path: str, folder: Path) -> None:
    def edit(description: dict[str, Any]) -> None:
        if place == "estimator":
            description["estimator"] = path
        else:
            description["encoder"] = {"class": path, "arguments": {"path": "."}}

    change(folder, edit)
    with pytest.raises(UsageError):
        load_model(folder)


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_flipped_byte_of_the_weights_is_noticed(place: str, folder: Path) -> None:
    file = folder / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[{"start": 9, "middle": len(raw) // 2, "end": -1}[place]] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UsageError, match="checksum"):
        load_model(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d.update(format=99), "format 99"),
        (lambda d: d.pop("arguments"), "not the description"),
        (lambda d: d["arguments"].update(proj_input_dim=5), "do not fit"),
        (lambda d: d["arguments"].update(nonsense=5), "do not fit"),
        (lambda d: d["encoder"].update(arguments={"in_features": 7, "out_features": 4}), "not fit"),
    ],
)
def test_a_description_that_lies_is_one_error(
    edit: Callable[[dict[str, Any]], None], said: str, folder: Path
) -> None:
    change(folder, edit)
    with pytest.raises(UsageError, match=said):
        load_model(folder)


@pytest.mark.parametrize("missing", ["model.json", "weights.safetensors"])
def test_a_missing_file_is_named(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(UsageError, match=missing):
        load_model(folder)


# -- weights of other checkpoints -------------------------------------------------------------


def peers_state() -> dict[str, torch.Tensor]:
    """Return weights under the names that the reference gives them."""
    encoder, head = nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    return {**state, **{f"projection_head.layers.{k}": v for k, v in head.state_dict().items()}}


@pytest.mark.parametrize("kind", ["checkpoint", "state", "safetensors"])
def test_weights_of_a_peers_checkpoint_are_taken_by_name(
    kind: str, rows: torch.Tensor, tmp_path: Path
) -> None:
    import safetensors.torch

    state, file = peers_state(), tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(state, file)
    else:
        whole = {"state_dict": state, "epoch": 3, "hyper_parameters": {"temperature": 0.1}}
        torch.save(whole if kind == "checkpoint" else state, file)
    model = DCL(**LINEAR, proj_input_dim=4, **OPTIONS).load_weights(file)
    expected = rows @ state["encoder.weight"].T + state["encoder.bias"]
    torch.testing.assert_close(model.transform(rows), expected)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))])
def test_a_checkpoint_that_would_run_code_is_refused(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    file, mark = tmp_path / "evil.ckpt", tmp_path / "mark"
    write({"state_dict": peers_state(), "more": Evil(mark)}, file)
    with pytest.raises(UsageError, match=r"evil\.ckpt"):
        DCL(**LINEAR, proj_input_dim=4, **OPTIONS).load_weights(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s: s.pop("encoder.bias"), r"lacks encoder\.bias"),
        (lambda s: s.update({"encoder.bias": torch.ones(5)}), r"another shape of encoder\.bias"),
        (lambda s: s.update({"encoder.more": torch.ones(5)}), r"encoder\.more"),
        (lambda s: s.update({"encoder.bias": 5}), "holds no state"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    edit: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path
) -> None:
    state: dict[str, Any] = peers_state()
    edit(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=said):
        DCL(**LINEAR, proj_input_dim=4, **OPTIONS).load_weights(tmp_path / "other.pt")


@pytest.mark.parametrize("content", [b"", b"PK nonsense", b"\x80\x04garbage"])
def test_a_file_that_holds_no_weights_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.pt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"broken\.pt"):
        DCL(**LINEAR, proj_input_dim=4, **OPTIONS).load_weights(file)


@pytest.mark.parametrize(
    "odd",
    [
        {"versions": "1"},
        {"n_features": "4\n# x"},
        {"provenance": {"config": "x"}},
        {"exposure": {"before": [["x"]]}},
        {"exposure": {"before": [{"before": "x"}]}},
        {"exposure": {"n_participants": "9\n# x"}},
        {"exposure": {"images": 7}},
        {"exposure": {"participants": [None]}},
    ],
    ids=str,
)
def test_a_description_of_another_form_is_one_message(odd: dict[str, Any], folder: Path) -> None:
    change(folder, lambda description: description.update(odd))
    with pytest.raises(UsageError, match=r"model\.json is not the description of a model"):
        load_model(folder)

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nidl_dcl.errors import UsageError
from nidl_dcl.models.baselines import untrained_encoder
from nidl_dcl.models.encoders import RegionalEncoder
from nidl_dcl.workflow.factory import in_epochs, new_model, refuse_changes
from nidl_dcl.workflow.options import TrainingOptions


@pytest.mark.parametrize(
    ("given", "participants", "epochs"),
    [
        ({"max_steps": 300, "batch_size": 16}, 80, 60),
        ({"max_steps": 300, "batch_size": 16}, 90, 50),
        ({"max_steps": 300, "batch_size": 16}, 8000, 1),
        ({"max_steps": 7, "batch_size": 16}, 32, 4),
        ({"max_steps": 300, "max_epochs": 3}, 80, 3),
    ],
)
def test_a_number_of_steps_is_rounded_up_to_whole_passes(
    given: dict[str, int], participants: int, epochs: int
) -> None:
    assert in_epochs(TrainingOptions(**given), participants).max_epochs == epochs


def test_a_model_keeps_the_arguments_of_an_encoder_of_the_package() -> None:
    params = new_model(TrainingOptions(encoder="regional"), 0).get_params()
    assert params["encoder_kwargs"] == RegionalEncoder().arguments
    own = new_model(TrainingOptions(encoder="encoders_for_tests:GroupNormed"), 0).get_params()
    assert own["encoder_kwargs"] is None


def test_the_untrained_encoder_has_other_weights_and_leaves_out_the_same_regions() -> None:
    model = new_model(TrainingOptions(encoder="regional"), 0)
    model.encoder.coverage.fill_(0)
    fresh = untrained_encoder(model, 0)
    weight = "convolutions.0.0.weight"
    assert not torch.equal(fresh.encoder.state_dict()[weight], model.encoder.state_dict()[weight])
    assert not fresh.encoder.coverage.any()


def test_a_refusal_prints_what_differs_and_nothing_else() -> None:
    before = {
        "encoder": "cnn",
        "preparation": {"spacing": [3.0, 3.0, 3.0], "masked": True, "shape": [64, 64, 64]},
        "init": None,
        "gone": 1,
    }
    prepared = {"spacing": [3.0, 3.0, 3.0], "masked": False, "shape": [64, 64, 64]}
    now = {**before, "preparation": prepared, "new": 2}
    del now["gone"]
    with pytest.raises(UsageError) as refused:
        refuse_changes(before, now, Path("models/desc-dcl"), "Do this.")
    assert str(refused.value) == (
        "models/desc-dcl was made with another configuration: preparation.masked was True, is False. "
        "Do this."
    )
    refuse_changes(before, {**now, "preparation": before["preparation"]}, Path("x"))

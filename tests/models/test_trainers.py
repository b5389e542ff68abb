from __future__ import annotations

import sys
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from nidl_dcl.models.trainers import trainer_options


@pytest.mark.parametrize(
    ("system", "given", "used"),
    [("darwin", {}, "cpu"), ("darwin", {"accelerator": "mps"}, "mps"), ("linux", {}, None)],
)
def test_apples_gpu_has_to_be_asked_for(
    system: str, given: dict[str, Any], used: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert trainer_options(given).get("accelerator") == used


@pytest.mark.parametrize(
    ("given", "enabled"),
    [
        ({}, False),
        ({"callbacks": L.Callback()}, False),
        ({"callbacks": ModelCheckpoint()}, True),
        ({"callbacks": [ModelCheckpoint()], "enable_checkpointing": False}, False),
        ({"enable_checkpointing": True}, True),
    ],
)
def test_checkpoints_are_written_if_a_callback_or_the_caller_asks_for_them(
    given: dict[str, Any], enabled: bool
) -> None:
    options = trainer_options({**given, "temperature": 0.1})
    assert options["enable_checkpointing"] is enabled
    assert options["logger"] is False
    assert "temperature" not in options

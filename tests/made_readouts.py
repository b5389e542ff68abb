"""Features with a design, and readouts as they are stored, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from nidl_dcl.evaluation.folds import CVDesign, make_design
from nidl_dcl.evaluation.readout import FittedReadout
from nidl_dcl.evaluation.readout_file import ReadoutFile
from nidl_dcl.evaluation.targets import read_target
from nidl_dcl.io.hashing import salted

MODEL = "ab" * 32


def designed(kind: str, n: int = 60, d: int = 12) -> tuple[np.ndarray, np.ndarray, CVDesign]:
    """Return features with a constant column, a target and its folds; two images each."""
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(n, 3))
    x = hidden @ rng.normal(size=(3, d)) + rng.normal(size=(n, d)) + 2
    x[:, 4] = 7.0
    y = np.repeat(hidden[::2, 0] + 0.5 * rng.normal(size=n // 2), 2) * 10 + 50
    if kind != "numbers":
        edges = [50.0] if kind == "two" else [46.0, 54.0]
        y = np.array(["a", "b", "c"], dtype=object)[np.digitize(y, edges)]
    who = np.array([f"sub-{i // 2:02d}" for i in range(n)], dtype=object)
    read = read_target(y, who)
    return x, y, make_design(read, who, who, n_splits=5, n_repeats=2, seed=0)


def stored_for(task: str = "regression", **changes: Any) -> ReadoutFile:
    """Return a readout that says twice the first feature plus ten, or class b above zero."""
    classes = task == "classification"
    target: dict[str, Any] = {"distribution": {"mean": 50.0, "sd": 10.0, "min": 20.0, "max": 80.0}}
    if classes:
        target = {"classes": {"a": 30, "b": 10}}
    score = {"mean": 0.8 if classes else 5.0, "ci95": [0.7, 0.9] if classes else [4.0, 6.0]}
    fields: dict[str, Any] = {
        "target": "group" if classes else "age",
        "task": task,
        "units": None,
        "linear": FittedReadout(
            ("a", "b") if classes else (),
            np.zeros(2),
            np.ones(2),
            np.array([[2.0, 0.0]]),
            np.array([0.0 if classes else 10.0]),
            0.1,
        ),
        "n_participants": 40,
        "model_sha256": MODEL,
        "training": {
            "n_participants": 40,
            "age": {"mean": 50.0, "sd": 10.0, "n": 40},
            "sex": {"F": 20, "M": 20},
            "site": {"north": 40},
            "quality": {"noise": {"mean": 0.1, "sd": 0.02, "n": 40}},
            "target": target,
        },
        "internal": {"balanced_accuracy" if classes else "mae": score},
        "members": {
            "salt": "salt",
            "participants": salted(["sub-01", "sub-02"], "salt"),
            "images": salted(["digest-of-02"], "salt"),
        },
    }
    return ReadoutFile(**{**fields, **changes})

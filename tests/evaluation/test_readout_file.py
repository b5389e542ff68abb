from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from made_readouts import MODEL, designed, stored_for

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.readout import ConfoundModel, fit_readout
from nidl_dcl.evaluation.readout_file import (
    find_readout,
    read_readout,
    readout_exists,
    readout_path,
    remove_readout,
    write_readout,
)


@pytest.mark.parametrize("kind", ["numbers", "two", "three"])
def test_a_file_gives_back_the_same_predictions_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    x, _, design = designed(kind)
    linear = fit_readout(design, x)
    target = {"classes": design.class_sizes}
    if kind == "numbers":
        target = stored_for().training["target"]
    stored = stored_for(
        "regression" if kind == "numbers" else "classification",
        linear=linear,
        training={**stored_for().training, "target": target},
    )
    write_readout(tmp_path / "r.json", stored)

    read = read_readout(tmp_path / "r.json")

    assert np.array_equal(read.linear.predict(x), linear.predict(x))
    assert len(read.sha256) == 64
    for name in ("target", "task", "units", "n_participants", "model_sha256", "internal"):
        assert getattr(read, name) == getattr(stored, name)
    assert read.training["age"] == stored.training["age"]


def test_confounds_go_through_the_file(tmp_path: Path) -> None:
    confounds = ConfoundModel(("age", "icv"), np.array([1.0, 2.0]), np.arange(4.0).reshape(2, 2))
    stored = stored_for(linear=replace(stored_for().linear, confounds=confounds))
    write_readout(tmp_path / "r.json", stored)
    read = read_readout(tmp_path / "r.json").linear.confounds
    assert read is not None
    assert read.names == ("age", "icv")
    assert np.array_equal(read.coefficients, confounds.coefficients)


def changed(**fields: Any) -> Callable[[dict[str, Any]], str]:
    """Return what makes a description with other fields; nested ones by a dunder."""

    def change(content: dict[str, Any]) -> str:
        for name, value in fields.items():
            *path, last = name.split("__")
            inner = content
            for part in path:
                inner = inner[part]
            inner[last] = value
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: "", "not a readout"),
        (lambda c: "[1, 2]", "not a JSON object"),
        (lambda c: "[" * 200_000, "recursion"),
        (lambda c: json.dumps(c)[:-40], "not a readout"),
        (changed(kind="model"), "its kind is 'model'"),
        (changed(format=1, mean=[0.0]), "its format is 1, this version reads 2"),
        (changed(format=True), "its format is True"),
        (changed(task="ranking"), "do not suit task 'ranking'"),
        (changed(labels=["a", "b"]), "do not suit task 'regression'"),
        (changed(labels="ab"), "labels is missing, or not of the expected form"),
        (changed(strength=float("nan")), "NaN, which is not a finite number"),
        (changed(strength=float("-inf")), "-Infinity, which is not a finite number"),
        (lambda c: json.dumps(c).replace("0.1", "1e999", 1), "not of the expected form"),
        (changed(strength=10**400), "strength is missing, or not of the expected form"),
        (changed(strength="1.0"), "strength is missing, or not of the expected form"),
        (changed(strength=True), "strength is missing, or not of the expected form"),
        (changed(model_sha256=None), "model_sha256 is missing"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "units"}), "units is missing"),
        (changed(n_participants=3.5), "n_participants is missing, or not of the expected form"),
        (changed(n_participants=-3), "n_participants is missing, or not of the expected form"),
        (changed(n_participants=10**400), "n_participants is missing, or not"),
        (changed(target=""), "target is missing, or not of the expected form"),
        (changed(target="x" * 5000), "target is missing, or not of the expected form"),
        (changed(training__sex={"F": 1.5}), "training is missing, or not of the expected form"),
        (changed(training__age={"mean": None}), "training is missing, or not"),
        (changed(training__quality={"noise": 3}), "training is missing, or not"),
        (changed(training__target={"classes": {}}), "training.target does not suit its labels"),
        (changed(training__target={"classes": {"a": 1}}), "training.target does not suit"),
        (changed(internal={"mae": {"mean": 5, "ci95": [1]}}), "internal is missing, or not"),
        (changed(members={"salt": "s", "participants": 3}), "members is missing, or not"),
    ],
)
def test_a_description_that_is_not_sound_is_refused_by_name(
    change: Callable[[dict[str, Any]], str], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "desc-dclAge_readout.json"
    write_readout(file, stored_for())
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(UsageError) as refused:
        read_readout(file)
    assert str(file) in str(refused.value)
    assert words in str(refused.value)
    assert len(str(refused.value)) < len(str(file)) + 400


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("field", ["distribution", "classes"])
def test_the_target_of_the_training_is_the_one_that_the_task_needs(
    task: str, field: str, tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    write_readout(file, stored_for(task))
    content = json.loads(file.read_text())
    content["training"]["target"].pop(field, None)
    file.write_text(json.dumps(content))
    if (task == "regression") == (field == "distribution"):
        with pytest.raises(UsageError, match="training"):
            read_readout(file)
    else:
        assert read_readout(file).task == task


def header(**tensors: tuple[str, list[int], list[int]]) -> bytes:
    """Return the beginning of a safetensors file."""
    text = json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            for name, (dtype, shape, offsets) in tensors.items()
        }
    ).encode()
    return len(text).to_bytes(8, "little") + text


ARRAYS: dict[str, tuple[dict[str, np.ndarray] | bytes, str]] = {
    "none": (b"", "SafetensorError|HeaderTooSmall|eader"),
    "text": (b"no safetensors", "eader"),
    "a header beyond the file": ((2**40).to_bytes(8, "little") + b"{}", "eader"),
    "a shape beyond the file": (header(mean=("F64", [2**40], [0, 16])) + b"x" * 16, "ensor"),
    "a shape that overflows": (header(mean=("F64", [2**62, 8], [0, 16])) + b"x" * 16, "verflow"),
    "offsets beyond the file": (
        header(mean=("F64", [2], [0, 2**50])) + b"x" * 16,
        "ensor|ncomplete",
    ),
    "a type that numpy has not": (header(mean=("F8_E4M3", [16], [0, 16])) + b"x" * 16, "F8"),
    "an array too few": ({"intercept": None}, "expected are mean, scale, coefficients, intercept"),
    "no means": ({"mean": None}, "'mean'"),
    "an array too many": ({"extra": np.zeros(2)}, "it has coefficients, extra"),
    "confounds not described": ({"confound_means": np.zeros(1)}, "it has coefficients, confound"),
    "single precision": ({"mean": np.zeros(2, np.float32)}, "mean is float32 of shape (2,)"),
    "one feature": ({"mean": np.zeros(1)}, "scale is float64 of shape (2,), not float64 of (1,)"),
    "another rank": ({"mean": np.zeros((1, 2))}, "mean is float64 of shape (1, 2)"),
    "a class too many": ({"intercept": np.zeros(3)}, "intercept is float64 of shape (3,)"),
    "not a number": ({"intercept": np.array([np.nan])}, "intercept has numbers that are not"),
    "infinite": ({"coefficients": np.array([[np.inf, 0]])}, "coefficients has numbers that are"),
    "huge": ({"mean": np.array([1e200, 0])}, "mean has numbers that are not finite or too large"),
    "no scale": ({"scale": np.array([1.0, 0.0])}, "scale has numbers that are not positive"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_lie_are_refused_by_name_though_their_checksum_fits(
    kind: str, tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    write_readout(file, stored_for())
    arrays = file.with_suffix(".safetensors")
    given, words = ARRAYS[kind]
    if isinstance(given, dict):
        known = {**safetensors.numpy.load(arrays.read_bytes()), **given}
        given = safetensors.numpy.save({k: v for k, v in known.items() if v is not None})
        words = re.escape(words)
    arrays.write_bytes(given)
    content = json.loads(file.read_text())
    content["arrays_sha256"] = hashlib.sha256(given).hexdigest()
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=words) as refused:
        read_readout(file)
    assert str(arrays) in str(refused.value)


def test_arrays_of_another_readout_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    file, other = tmp_path / "r.json", tmp_path / "other.json"
    arrays = file.with_suffix(".safetensors")
    write_readout(file, stored_for())
    write_readout(other, stored_for(linear=replace(stored_for().linear, mean=np.ones(2))))
    shutil.copyfile(other.with_suffix(".safetensors"), arrays)
    with pytest.raises(
        UsageError, match=r"r\.safetensors .*does not match its checksum in r\.json"
    ):
        read_readout(file)
    arrays.unlink()
    assert not readout_exists(file)
    with pytest.raises(UsageError, match=r"r\.safetensors cannot be read: No such file"):
        read_readout(file)
    remove_readout(other)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_run_that_is_killed_half_way_leaves_no_description_of_other_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.json"
    write_readout(file, stored_for())

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nidl_dcl.evaluation.readout_file.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_readout(file, stored_for(linear=replace(stored_for().linear, mean=np.ones(2))))
    assert not readout_exists(file)


@pytest.mark.parametrize("which", [".json", ".safetensors"])
def test_nothing_is_unpickled_and_what_is_no_file_of_this_size_is_not_read(
    which: str, tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    def huge(file: Path) -> None:
        with file.open("wb") as stream:
            stream.truncate(2**36)

    kinds: dict[str, tuple[Callable[[Path], Any], str]] = {
        "pickle": (lambda file: file.write_bytes(pickle.dumps(Bomb())), "not a readout"),
        "link": (lambda file: file.symlink_to(tmp_path / "nothing"), "cannot be read"),
        "folder": (lambda file: file.mkdir(), "not a regular file"),
        "pipe": (os.mkfifo, "not a regular file"),
        "huge": (huge, "68719476736 bytes"),
    }
    for name, (make, words) in kinds.items():
        file = tmp_path / f"{name}.json"
        write_readout(file, stored_for())
        odd = file.with_suffix(which)
        odd.unlink()
        make(odd)
        with pytest.raises(UsageError, match=words) as refused:
            read_readout(file)
        assert str(odd) in str(refused.value)
    assert not (tmp_path / "exploded").exists()


def test_the_readout_of_the_same_model_is_found_under_any_label(tmp_path: Path) -> None:
    write_readout(readout_path(tmp_path, "dcl", "Age"), stored_for(model_sha256="cd" * 32))
    write_readout(readout_path(tmp_path, "big", "Age"), stored_for())
    find = {"model": "dcl", "model_sha256": MODEL}
    assert find_readout(tmp_path, "age", "Age", **find).model_sha256 == MODEL
    with pytest.raises(UsageError, match=r"cdcdcdcdcdcd….*are of ffff.*--model .*desc-dcl"):
        find_readout(tmp_path, "age", "Age", model="dcl", model_sha256="ff" * 32)
    with pytest.raises(UsageError, match=r"target 'sex'.*there are: desc-bigAge, desc-dclAge"):
        find_readout(tmp_path, "sex", "Sex", **find)
    with pytest.raises(UsageError, match=r"reads target 'age', not 'AGE'"):
        find_readout(tmp_path, "AGE", "Age", **find)
    with pytest.raises(UsageError, match="not a folder"):
        find_readout(tmp_path / "none", "age", "Age", **find)

"""Files that lie, or would run code or take all memory: options, filters, tables, models, headers."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ONE_EPOCH
from faults import AFFINE, SHAPE, bomb, head, nested, write_mask_faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_images import save, save_mgh
from models.test_serialization import Evil
from test_docs import CODES
from torch import nn

from nidl_dcl import DCL, BIDSDataModule, load_model
from nidl_dcl.bids.entities import read_filters
from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.errors import UsageError
from nidl_dcl.models.serialization import read_description
from nidl_dcl.output.embeddings import read_embeddings
from nidl_dcl.volumes.reading import UnreadableVolumeError, check_volume, read_volume
from nidl_dcl.workflow.options import read_study

# Options in YAML --------------------------------------------------------------------------------


def laughs(key: str) -> str:
    """Return YAML of a kilobyte that stands for a billion values."""
    lists = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 11)]
    return f"{key}: [{', '.join(lists)}]\n"


YAML = {
    "a billion laughs": (laughs("target"), "no option with a value"),
    "a billion laughs elsewhere": ("target: [age]\n" + laughs("x"), "no option with a value"),
    "a list that holds itself": ("target: &a [*a]\n", "no option with a value"),
    "brackets without end": (f"target: {nested(10**5)}\n", "nested too deeply"),
    "a call": ('target: !!python/object/apply:os.system ["touch MARK"]\n', "not YAML"),
    "an object": ("target: !!python/name:os.system ''\n", "not YAML"),
    "a mapping in a mapping": ("target: {a: b}\n", "no option with a value"),
    "a number for a name": ("3: 4\ntarget: [age]\n", "no option with a value"),
    "a list for a name": ("? [a]\n: 4\n", "not YAML"),
    "a number of 5000 digits": (f"max_epochs: {'9' * 5000}\n", "not YAML"),
    "two documents": ("target: [age]\n---\ntarget: [sex]\n", "not YAML"),
    "no text": ("target: [\x00\x01]\n", "not YAML"),
    "a list": ("- a\n", "must hold options"),
    "no number": ("target: [age]\nspacing: .nan\n", "--spacing"),
    "no end": ("target: [age]\nmax_epochs: .inf\n", "inf"),
    "an unknown option": ("target: [age]\neval: x\n", "eval"),
}


@pytest.mark.parametrize("kind", YAML)
def test_options_that_mean_harm_are_one_message(
    kind: str, run: Callable[..., Any], heads_made: Path, tmp_path: Path
) -> None:
    text, said = YAML[kind]
    file, mark = tmp_path / "options.yaml", tmp_path / "mark"
    file.write_text(text.replace("MARK", str(mark)))
    done = run("study", heads_made, tmp_path / "out", "--config", file, "--dry-run")
    assert done.status == 2, done.err
    assert said in done.err
    assert len(done.err) < 2000
    if said not in ("--spacing", "inf"):
        with pytest.raises(UsageError, match=re.escape(str(file))):
            read_study(file)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "terabyte", "link to itself", "nothing"])
def test_options_that_are_no_file_are_refused_at_once(
    kind: str, run: Callable[..., Any], heads_made: Path, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    make_odd(kind, file)
    done = run("study", heads_made, tmp_path / "out", "--config", file, "--target", "age")
    assert done.status == 2
    assert str(file) in done.err


def make_odd(kind: str, path: Path) -> None:
    """Put something that is no file of bearable size at a path."""
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "terabyte":
            path.touch()
            os.truncate(path, 2**40)
        case "link to itself":
            path.symlink_to(path.name)


# Filters ----------------------------------------------------------------------------------------

FILTERS = {
    "brackets": nested(10**5),
    "open brackets": "[" * 10**5,
    "no number": '{"run": NaN}',
    "no end": '{"run": 1e999}',
    "digits": '{"run": ' + "9" * 10**4 + "}",
    "a list": "[1]",
    "a word": '"run"',
    "nothing": "",
    "deep parts": '{"t1w": ' + '{"a": ' * 500 + "1" + "}" * 501,
    "a mapping for a value": '{"t1w": {"run": {"a": 1}}}',
    "a control character": '{"\\u0000": 1}',
    "no name": '{"": ""}',
}


@pytest.mark.parametrize("kind", FILTERS)
def test_a_filter_that_means_harm_is_one_message(
    kind: str, run: Callable[..., Any], heads_made: Path, tmp_path: Path
) -> None:
    file = tmp_path / "filter.json"
    file.write_text(FILTERS[kind])
    done = run("index", heads_made, "--bids-filter-file", file)
    assert done.status == 2, done.err
    assert "filter" in done.err
    assert len(done.err) < 2000


@pytest.mark.parametrize("kind", ["pipe", "folder", "terabyte", "link to itself", "nothing"])
def test_a_filter_that_is_no_file_is_refused_at_once(
    kind: str, run: Callable[..., Any], heads_made: Path, tmp_path: Path
) -> None:
    make_odd(kind, tmp_path / "filter.json")
    done = run("index", heads_made, "--bids-filter-file", tmp_path / "filter.json")
    assert done.status == 2
    assert "filter.json" in done.err


def test_a_filter_is_compared_as_text_not_as_a_pattern(
    run: Callable[..., Any], heads_made: Path, tmp_path: Path
) -> None:
    for text in ('{"suffix": "(.*a+)+$"}', '{"subject": "../.."}', '{"acquisition": "\\ud800"}'):
        (tmp_path / "filter.json").write_text(text)
        done = run("index", heads_made, "--bids-filter-file", tmp_path / "filter.json")
        assert done.status == 3  # it fits no image
        assert "\tok\t" not in done.out


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["run", "session", "suffix", "extension", "t1w", "desc"]) | st.text()


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_filter_is_read_or_refused(filters: dict[str, Any]) -> None:
    try:
        wanted = read_filters(filters, PRESETS["raw-t1w"])
    except UsageError:
        return
    assert all(value == "*" or isinstance(value, list) for value in wanted.values())


# Tables -----------------------------------------------------------------------------------------

TABLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "no ids": (b"age\n3\n", "no column participant_id"),
    "blanks for tabs": (b"participant_id  age\nsub-01  3\n", "has blanks between"),
    "an image": (b"\x1f\x8b\x00\x00", "no text file"),
    "a longer row": (b"participant_id\tage\nsub-01\t3\t4\n", "line 2"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "points to its content"),
    "rows that contradict": (b"participant_id\tage\nsub-01\t3\nsub-01\t4\n", "contradict"),
    "a header alone": (b"participant_id\tage\n", ""),
    "no line end, BOM, CRLF": (b"\xef\xbb\xbfparticipant_id\tage\r\nsub-01\t3", ""),
    "UTF-16": ("participant_id\tage\nsub-01\t3\n".encode("utf-16"), ""),
    "Latin-1": (b"participant_id\tage\tname\nsub-01\t3\tJos\xe9\n", ""),
    "ids from everywhere": (
        "participant_id\tage\n../../etc/passwd\t1\n=cmd|'/c calc'!A0\t2\n@SUM(1)\t3\n"
        "<script>alert(1)</script>\t4\n\x1b[2J\t5\n\u202esub-01\t6\nsub-01\t7\n".encode(),
        "",
    ),
    "columns from everywhere": (
        b"participant_id\t=1+1\t<img src=x>\t../x\t\x1b[2J\tpath\trow\t__class__\nsub-01\t1\n",
        "",
    ),
    "infinities": (b"participant_id\tage\nsub-01\t1e999\nsub-02\t-inf\nsub-03\tNaN\n", ""),
    "many columns": (b"participant_id\t" + b"\t".join(b"c%d" % i for i in range(5000)) + b"\n", ""),
    "a long cell": (b"participant_id\tage\nsub-01\t" + b"9" * 10**6 + b"\n", ""),
}


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of two heads whose table tests replace."""
    root = tmp_path_factory.mktemp("two") / "bids"
    for i in (1, 2):
        (root / f"sub-0{i}" / "anat").mkdir(parents=True)
        save(root / f"sub-0{i}" / "anat" / f"sub-0{i}_T1w.nii.gz", head(i), AFFINE)
    return root


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_with_a_defect_is_read_or_refused_by_name(kind: str, two_heads: Path) -> None:
    content, said = TABLES[kind]
    (two_heads / "participants.tsv").write_bytes(content)
    module = BIDSDataModule(two_heads)
    if said:
        with pytest.raises(UsageError, match=said) as caught:
            module.check()
        assert "participants.tsv" in str(caught.value)
    else:
        module.check()
    inputs = module.inputs
    assert list(inputs.loc[inputs["path"] != "n/a", "code"]) == ["ok", "ok"]
    (two_heads / "participants.tsv").unlink()


@pytest.mark.parametrize("kind", ["pipe", "folder", "terabyte", "link to itself"])
def test_a_table_that_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    (tmp_path / "sub-01/anat").mkdir(parents=True)
    save(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz", head(1), AFFINE)
    make_odd(kind, tmp_path / "participants.tsv")
    with pytest.raises(UsageError, match=r"participants\.tsv"):
        BIDSDataModule(tmp_path).check()


def test_ids_are_written_as_they_are_but_cannot_leave_their_cell(
    two_heads: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    (two_heads / "participants.tsv").write_text(
        "participant_id\tage\n=cmd|'/c calc'!A0\t2\n<b>\x1b[2J</b>\t3\nsub-01\t7\n"
    )
    try:
        text = run("index", two_heads).out
        matches = BIDSDataModule(two_heads)
        matches.check()
    finally:
        (two_heads / "participants.tsv").unlink()
    # No cell of inputs.tsv begins like a formula: ids begin with sub-, paths with a folder.
    cells = [cell for line in text.splitlines() for cell in line.split("\t")]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert "sub-=cmd|'/c calc'!A0" in cells
    assert "sub-<b>\\x1b[2J</b>" in cells
    assert "=cmd|'/c calc'!A0" in set(matches.table.matches["id"].dropna())


@pytest.mark.parametrize("kind", ["pipe", "folder", "brackets", "terabyte"])
def test_a_description_of_the_dataset_that_is_odd_stops_nothing(
    kind: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "bids"
    root.mkdir()
    if kind == "brackets":
        (root / "dataset_description.json").write_text(nested(10**5))
    else:
        make_odd(kind, root / "dataset_description.json")
    done = run("study", root, tmp_path / "out", "--target", "age")
    assert done.status == 3
    assert "no usable image" in done.err


# Masks ------------------------------------------------------------------------------------------


def test_an_image_whose_mask_has_a_fault_has_its_row(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    expected = write_mask_faults(tmp_path / "bids")
    done = run("index", tmp_path / "bids", "--check")
    assert done.status == 0
    rows = [line.split("\t") for line in done.out.splitlines()[1:]]
    elsewhere = "sub-melsewhere"  # known only when the mask is laid on the image
    assert {r[0]: (r[3], r[4]) for r in rows} == expected | {elsewhere: ("warn", "mask")}
    options = {"spacing": 8.0, "max_skipped": 1.0, "work_dir": tmp_path / "work"}
    module = BIDSDataModule(tmp_path / "bids", **options)
    module.setup()
    told = module.inputs.set_index("participant_id")
    assert {str(who): (r.status, r.code) for who, r in told.iterrows()} == expected
    assert len(module.volumes or ()) == sum(status != "skip" for status, _ in expected.values())


# Models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder that no test may change."""
    made = DCL(
        nn.Linear,
        encoder_kwargs={"in_features": 6, "out_features": 4},
        proj_input_dim=4,
        proj_hidden_dim=8,
        **ONE_EPOCH,
    )
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    return made.fit(rows).save(tmp_path_factory.mktemp("model") / "model")


def lying(model: Path, to: Path, edit: Callable[[dict[str, Any]], Any], raw: bytes | None) -> Path:
    """Copy a model folder with another description, and other weights under the right checksum."""
    shutil.copytree(model, to)
    described = json.loads((to / "model.json").read_text())
    if raw is not None:
        (to / "weights.safetensors").write_bytes(raw)
        described["sha256"]["weights.safetensors"] = hashlib.sha256(raw).hexdigest()
    edit(described)
    (to / "model.json").write_text(json.dumps(described))
    return to


def packed(tensors: Any, data: int = 96, length: int | None = None) -> bytes:
    """Return a safetensors file with whatever header, and a length of it that may lie."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def tensor(dtype: str = "F32", shape: Any = (4, 6), ends: Any = (0, 96)) -> dict[str, Any]:
    """Return what a safetensors header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


WEIGHTS = {
    "no bytes": b"",
    "no JSON": packed(b"x" * 50),
    "a header longer than the file": packed({}, length=2**40),
    "a header of 2^63 bytes": packed({}, length=2**63),
    "numbers behind the file": packed({"encoder.weight": tensor(ends=(0, 10**9))}),
    "numbers before the file": packed({"encoder.weight": tensor(ends=(-96, 0))}),
    "numbers twice": packed({"a": tensor(), "b": tensor(ends=(48, 144))}, 144),
    "a shape that overflows": packed({"a": tensor(shape=(2**32, 2**32))}),
    "a shape of nothing": packed({"a": tensor(shape=(2**62, 0), ends=(0, 0))}, 0),
    "an unknown type": packed({"a": tensor("OBJECT")}),
    "a rare type": packed({"encoder.weight": tensor("F8_E4M3", (96,))}),
    "a name twice": packed(b'{"a": %b, "a": %b}' % (2 * (json.dumps(tensor()).encode(),))),
    "brackets": packed(b'{"a": ' + nested(10**5).encode() + b"}"),
    "a name from everywhere": packed({"../../x": tensor()}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_with_a_lying_header_are_refused(kind: str, model: Path, tmp_path: Path) -> None:
    folder = lying(model, tmp_path / "model", lambda d: None, WEIGHTS[kind])
    with pytest.raises(UsageError, match=re.escape(str(folder))):
        load_model(folder)


def encoder(**arguments: Any) -> Callable[[dict[str, Any]], Any]:
    """Return an edit of the encoder's arguments."""
    return lambda d: d["encoder"]["arguments"].update(arguments)


def contract(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """Return an edit of the input contract."""
    whole = {"spacing": [4, 4, 4], "shape": [8, 8, 8], "masked": False, "intensity": "robust"}
    return lambda d: d.update(input_contract={**whole, **fields})


ENDLESS = {
    "class": "monai.networks.nets:ResNet",
    "arguments": {"block": "basic", "layers": [10**9, 1, 1, 1], "block_inplanes": [4, 4, 4, 4]},
}
DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an encoder of 34 GB": encoder(in_features=2**15, out_features=2**18),
    "an encoder of 1 GB": encoder(in_features=2**14, out_features=2**14),
    "an encoder of 1 GB on a device": encoder(in_features=2**14, out_features=2**14, device="cpu"),
    "an encoder beyond counting": encoder(in_features=2**40, out_features=2**40),
    "an encoder that is a little larger": encoder(in_features=7),
    "an encoder without end": lambda d: d.update(encoder=ENDLESS),
    "a head of 8 GB": lambda d: d["arguments"].update(proj_hidden_dim=2**28),
    "a head of a word": lambda d: d["arguments"].update(proj_hidden_dim="x"),
    "no class": lambda d: d["encoder"].pop("class"),
    "a number for a class": lambda d: d["encoder"].update({"class": 3}),
    "a path for a class": lambda d: d["encoder"].update({"class": "torch.nn.../../x:Y"}),
    "another class": lambda d: d["encoder"].update({"class": "torch.nn:Module"}),
    "a list of arguments": lambda d: d["encoder"].update(arguments=[1]),
    "no checksum": lambda d: d.update(sha256={}),
    "a number for a checksum": lambda d: d.update(sha256={"weights.safetensors": 3}),
    "a list for a contract": lambda d: d.update(input_contract=[1]),
    "a list for the exposure": lambda d: d.update(exposure=[1, 2]),
    "a contract of words": contract(spacing="x"),
    "a contract of nothing": contract(spacing=None),
    "a contract without measure": contract(spacing=[1e-9] * 3),
    "a contract of NaN": contract(spacing=[float("nan")] * 3),
    "a contract of too many voxels": contract(shape=[10**5] * 3),
    "a contract of fewer than no voxels": contract(shape=[-8, -8, 8]),
    "a contract of an unknown rule": contract(intensity="eval"),
    "a contract of an unknown origin": contract(origin={"x": {}}),
    "a contract with more": contract(more=1),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_a_description_that_lies_costs_no_memory_and_is_refused(
    kind: str, model: Path, tmp_path: Path
) -> None:
    folder = lying(model, tmp_path / "model", DESCRIPTIONS[kind], None)
    before = resident()
    with pytest.raises(UsageError):
        load_model(folder)
    assert resident() - before < 300e6


def resident() -> float:
    """Return the largest resident size of this process so far, in bytes."""
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


def test_a_stored_device_or_trainer_option_does_not_count(model: Path, tmp_path: Path) -> None:
    def edit(description: dict[str, Any]) -> None:
        description["encoder"]["arguments"]["device"] = "cuda:9"
        description["arguments"] |= {"accelerator": "tpu", "strategy": "evil", "devices": 99}

    again = load_model(lying(model, tmp_path / "model", edit, None))
    assert next(again.encoder.parameters()).device.type == "cpu"
    assert "strategy" not in again.get_params()


@pytest.mark.parametrize("text", [nested(10**5), "NaN", "[]", "9" * 10**4, "\x00", ""])
def test_a_description_that_is_none_is_refused(text: str, model: Path, tmp_path: Path) -> None:
    folder = lying(model, tmp_path / "model", lambda d: None, None)
    (folder / "model.json").write_text(text)
    with pytest.raises(UsageError, match=r"model\.json"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself"])
def test_a_part_of_a_model_that_is_no_file_is_refused_at_once(
    kind: str, name: str, model: Path, tmp_path: Path
) -> None:
    folder = lying(model, tmp_path / "model", lambda d: None, None)
    (folder / name).unlink()
    make_odd(kind, folder / name)
    with pytest.raises(UsageError, match=re.escape(name)):
        load_model(folder)
    if name != "model.json":
        with pytest.raises(UsageError, match=re.escape(name)):
            load_model(model).load_weights(folder / name)


@settings(
    derandomize=True,
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["estimator", "encoder", "arguments", "sha256", "input_contract", "exposure"]),
    VALUES,
)
def test_any_value_in_a_description_is_read_or_refused(
    model: Path, tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("any") / "model"
    lying(model, folder, lambda d: d.update({key: value}), None)
    with suppress(UsageError):
        read_description(folder)
        load_model(folder)


@pytest.mark.parametrize("command", ["study", "embed"])
def test_a_model_of_pickles_runs_nothing(
    command: str, model: Path, heads_made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    mark = tmp_path / "mark"
    raw = pickle.dumps({"encoder.weight": Evil(mark)})
    folder = lying(model, tmp_path / "model", lambda d: None, raw)
    words: list[object] = [command, heads_made, tmp_path / "out"]
    more = ["--target", "age", "--spacing", "8", "--init", folder]
    words += more if command == "study" else ["--model", folder]
    done = run(*words)
    assert done.status == 2, done.err
    assert "safetensors" in done.err
    assert not mark.exists()


def test_a_checkpoint_that_would_run_code_runs_nothing_when_training_goes_on(
    tmp_path: Path,
) -> None:
    file, mark = tmp_path / "step-00000001.ckpt", tmp_path / "mark"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "x": Evil(mark)}, file)
    made = DCL(
        nn.Linear,
        encoder_kwargs={"in_features": 6, "out_features": 4},
        proj_input_dim=4,
        **ONE_EPOCH,
    )
    with pytest.raises(Exception, match=r"[Ww]eights"):
        made.fit(torch.zeros(8, 6), ckpt_path=file)
    assert not mark.exists()


def test_embeddings_of_pickles_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "desc-dcl_embeddings.tsv").write_text("row\n0\n")
    objects = np.empty((1, 1), object)
    objects[0, 0] = Evil(mark)
    np.save(tmp_path / "desc-dcl_embeddings.npy", objects, allow_pickle=True)
    with pytest.raises(UsageError, match=r"desc-dcl_embeddings\.npy"):
        read_embeddings(tmp_path, "dcl")
    assert not mark.exists()


# Headers ----------------------------------------------------------------------------------------

OPENED = CODES - {"sidecar", "duplicate", "ambiguous", "bad_name", "part", "no_image", "bad_id"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the content of a sound image in each format, by ending."""
    folder = tmp_path_factory.mktemp("sound")
    data = np.zeros((121, 145, 121), np.uint8)
    data[50:60, 50:60, 50:60] = 1
    np.save(folder / "a.npy", data)
    return {
        ".nii": save(folder / "a.nii", head(0), AFFINE, np.int16).read_bytes(),
        ".mgh": save_mgh(folder / "a.mgh", head(0), AFFINE, np.int16).read_bytes(),
        ".npy": (folder / "a.npy").read_bytes(),
    }


PATCHES = st.lists(st.tuples(st.integers(0, 359), st.binary(min_size=1, max_size=8)), max_size=4)


@settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from([".nii", ".mgh", ".npy"]),
    PATCHES,
    st.none() | st.integers(0, 2000),
    st.booleans(),
)
def test_any_header_is_an_image_or_a_fault_with_a_code(
    sound: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    ending: str,
    patches: list[tuple[int, bytes]],
    cut: int | None,
    squeeze: bool,
) -> None:
    content = bytearray(sound[ending])
    for place, patch in patches:
        content[place : place + len(patch)] = patch
    raw = bytes(content[:cut])
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    path.write_bytes(gzip.compress(raw, 1) if squeeze and ending != ".npy" else raw)
    check = check_volume(path)
    assert check.code in OPENED
    assert check.code != "unreadable", check.message
    if check.status == "skip":
        with pytest.raises(UnreadableVolumeError) as caught:
            read_volume(path)
        assert caught.value.code == check.code
    else:
        image = read_volume(path)
        assert np.isfinite(np.asanyarray(image.dataobj)).all()
        assert np.isfinite(image.affine).all()
    path.unlink()


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.binary(max_size=700), st.sampled_from([".nii", ".nii.gz", ".mgz", ".npy"]))
def test_any_bytes_are_an_image_or_a_fault_with_a_code(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, ending: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"bytes{ending}"
    path.write_bytes(raw)
    assert check_volume(path).status == "skip"
    assert check_volume(path).code in OPENED
    path.unlink()


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", head(0), AFFINE, np.uint8)
    (tmp_path / "b.nii.gz").write_bytes(bomb(path.read_bytes(), 10 * 2**30))
    assert head(0).shape == SHAPE
    before = resident()
    assert check_volume(tmp_path / "b.nii.gz").code == "too_large"
    assert resident() - before < 50e6

"""A readout as two files, arrays (safetensors) and what they mean (JSON); reading trusts neither.

Fitting and applying it are for `readout`, scoring it in another cohort for `external_validation`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.readout import ConfoundModel, FittedReadout
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.formats import write_json

FORMAT = 2
"""Of the files; another one is refused rather than guessed at."""

KIND = "linear readout of nidl_dcl"

_MAX_BYTES = 64 * 2**20
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadoutFile:
    """A readout with what must be known to apply it honestly.

    Attributes
    ----------
    linear : FittedReadout
    target : str
        The column.
    task : {"classification", "regression"}
    units : str or None
        Of the target, where its table says so.
    n_participants : int
        Whom it was fitted on.
    model_sha256 : str
        Checksum of the weights whose embeddings it reads.
    training : dict
        Of these participants: see `nidl_dcl.evaluation.cohort.describe_cohort`, and ``target``:
        ``distribution`` or ``classes``.
    internal : dict
        Metric to ``mean`` and ``ci95``, cross-validated in its own cohort.
    members : dict
        ``salt``; ``participants`` and ``images``: salted hashes of the ids, and of the images' voxels.
    sha256 : str
        Checksum of the description, which holds that of the arrays; empty if it comes from no file.
    """

    linear: FittedReadout
    target: str
    task: str
    units: str | None
    n_participants: int
    model_sha256: str
    training: dict[str, Any]
    internal: dict[str, Any]
    members: dict[str, Any]
    sha256: str = ""


_FIELDS = (
    *("target", "task", "units", "n_participants", "model_sha256"),
    *("training", "internal", "members"),
)
"""Attributes that the description holds as they are."""

_ARRAYS = ("mean", "scale", "coefficients", "intercept")
"""Attributes of the readout that are arrays."""


def readout_path(output_dir: Path, model: str, label: str) -> Path:
    """Return where the description of a readout stands; its arrays stand beside it.

    Parameters
    ----------
    output_dir : Path
    model, label : str
        Of the model and of the target, in file names.
    """
    return output_dir / "models" / f"desc-{model}" / f"desc-{model}{label}_readout.json"


def write_readout(path: Path, stored: ReadoutFile) -> None:
    """Write the arrays of a readout and, last, their description."""
    linear, confounds = stored.linear, stored.linear.confounds
    arrays = {name: getattr(linear, name) for name in _ARRAYS}
    if confounds is not None:
        arrays["confound_means"] = confounds.means
        arrays["confound_coefficients"] = confounds.coefficients
    content = safetensors.numpy.save(
        {name: np.ascontiguousarray(array, dtype=np.float64) for name, array in arrays.items()}
    )
    path.unlink(missing_ok=True)  # a killed run leaves no description of other arrays
    write_bytes(_arrays_path(path), content)
    write_json(
        path,
        {
            "format": FORMAT,
            "kind": KIND,
            **{name: getattr(stored, name) for name in _FIELDS},
            "labels": list(linear.labels),
            "strength": linear.strength,
            "confounds": None if confounds is None else list(confounds.names),
            "extra_features": list(linear.extra),
            "arrays_sha256": hashlib.sha256(content).hexdigest(),
        },
    )


def readout_exists(path: Path) -> bool:
    """Return whether both files of a readout are there."""
    return path.is_file() and _arrays_path(path).is_file()


def remove_readout(path: Path) -> None:
    """Remove both files of a readout, where they are."""
    for file in (path, _arrays_path(path)):
        file.unlink(missing_ok=True)


def _arrays_path(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def find_readout(
    output_dir: Path, target: str, label: str, *, model: str, model_sha256: str | None
) -> ReadoutFile:
    """Return the readout of a target in another output folder.

    Parameters
    ----------
    output_dir : Path
        A folder that `predict` wrote to.
    target, label : str
        The column, and its label in file names.
    model : str
        Label of the model here; tried first, any other one is as good if its weights are equal.
    model_sha256 : str or None
        Of the weights that gave the embeddings here.

    Raises
    ------
    UsageError
        When there is none, naming those that are there; when none is of the same model; when a
        file cannot be used.
    """
    if not output_dir.is_dir():
        raise UsageError(f"--readout {output_dir} is not a folder; give the OUTPUT_DIR of a study.")
    folders = sorted(
        (output_dir / "models").glob("desc-*"), key=lambda f: (f.name != f"desc-{model}", f.name)
    )
    files = [readout_path(output_dir, f.name.removeprefix("desc-"), label) for f in folders]
    files = [file for file in files if file.exists()]
    if not files:
        there = sorted(
            path.name.removesuffix("_readout.json")
            for folder in folders
            for path in folder.glob("desc-*_readout.json")
        )
        raise UsageError(
            f"--readout {output_dir} has no readout of target {target!r} "
            f"(models/desc-*/desc-*{label}_readout.json); there are: {', '.join(there) or 'none'}. "
            f"Run `nidl-dcl predict` with --target {target} there first, without --harmonize, which "
            "keeps none."
        )
    read = [read_readout(file) for file in files]
    stored = next((one for one in read if one.model_sha256 == model_sha256), None)
    if stored is None:
        raise UsageError(
            f"{files[0]} reads embeddings of the model with weights {read[0].model_sha256[:12]}…, "
            f"the embeddings here are of {str(model_sha256)[:12]}…. Embed both cohorts by one "
            f"model: nidl-dcl embed BIDS_DIR OUTPUT_DIR --model {folders[0]}"
        )
    if stored.target != target:
        raise UsageError(
            f"{files[0]} reads target {stored.target!r}, not {target!r}. Name the columns "
            "of both cohorts alike (--phenotypes FILE adds a table)."
        )
    return stored


def read_readout(file: Path) -> ReadoutFile:
    """Return what `write_readout` wrote, all of it checked.

    Raises
    ------
    UsageError
        Naming the file and what is wrong: too large, not JSON, another format, arrays that do not
        belong to it or whose shapes do not fit, numbers that are not finite.
    """
    description, arrays = file, _arrays_path(file)
    raw = _read_bytes(description)
    try:
        fields = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        if isinstance(fields, dict):
            fields.setdefault("extra_features", [])  # which files of before do not name
        _check_fields(fields)
        file = arrays
        content = _read_bytes(arrays)
        if hashlib.sha256(content).hexdigest() != fields["arrays_sha256"]:
            _refuse(f"it does not match its checksum in {description.name}")
        linear = _make_linear(safetensors.numpy.load(content), fields)
    except (ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        raise UsageError(
            f"{file} is not a readout that can be applied: {error}. Copy both of its files again, or "
            "run `nidl-dcl predict` with this version where they come from."
        ) from error
    known = {name: fields[name] for name in _FIELDS}
    return ReadoutFile(linear=linear, sha256=hashlib.sha256(raw).hexdigest(), **known)


def _read_bytes(file: Path) -> bytes:
    """Return the content of a regular file of bounded size."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block
            raise OSError(errno.EINVAL, "it is not a regular file")
        if status.st_size > _MAX_BYTES:
            too_large = f"it has {status.st_size} bytes, and a readout at most {_MAX_BYTES}"
            raise OSError(errno.EFBIG, too_large)
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from error


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not a finite number")


_MOMENTS = {"mean": float, "sd": (float, None)}
_COUNTS = {str: int}

_FORMS: dict[str, Any] = {
    "target": str,
    "task": str,
    "units": (str, None),
    "labels": [str],
    "n_participants": int,
    "model_sha256": str,
    "arrays_sha256": str,
    "strength": float,
    "confounds": ([str], None),
    "extra_features": [str],
    "training": {
        "target": (
            {"distribution": {**_MOMENTS, "min": float, "max": float}},
            {"classes": _COUNTS},
        ),
        "age": (_MOMENTS, None),
        "sex": (_COUNTS, None),
        "site": (_COUNTS, None),
        "quality": {str: _MOMENTS},
    },
    "internal": {str: {"mean": (float, None), "ci95": ([float, float], None)}},
    "members": {"salt": str, "participants": [str], "images": [str]},
}
"""What a description holds: a tuple lists alternatives, ``{str: form}`` is an object of any names."""


def _check_fields(fields: Any) -> None:
    """Refuse a description that is not of the expected form."""
    if not isinstance(fields, dict):
        _refuse("it is not a JSON object")
    for name, expected in (("kind", KIND), ("format", FORMAT)):
        found = fields.get(name)
        if type(found) is not type(expected) or found != expected:
            _refuse(f"its {name} is {found!r:.50}, this version reads {expected!r}")
    for name, form in _FORMS.items():
        if name not in fields or not _fits(fields[name], form):
            _refuse(f"its {name} is missing, or not of the expected form")
    task, labels, target = fields["task"], fields["labels"], fields["training"]["target"]
    if task != ("classification" if labels else "regression") or len(labels) == 1:
        _refuse(f"its labels do not suit task {task!r:.50}")
    suits = sorted(target.get("classes", ())) == sorted(labels)
    if not suits or ("distribution" in target) == bool(labels):
        _refuse("its training.target does not suit its labels")


def _fits(value: Any, form: Any) -> bool:
    """Return whether a value from JSON is of a form (see `_FORMS`)."""
    if isinstance(form, tuple):
        return any(_fits(value, each) for each in form)
    if isinstance(form, dict | list) and not isinstance(value, type(form)):
        return False
    if isinstance(form, dict) and str in form:
        return all(_fits(each, form[str]) for each in value.values())
    if isinstance(form, dict):
        return all(name in value and _fits(value[name], each) for name, each in form.items())
    if isinstance(form, list):
        forms = form if len(form) > 1 else form * len(value)
        return len(value) == len(forms) and all(map(_fits, value, forms))
    if form is float:  # beyond this, products overflow
        return type(value) in (int, float) and abs(value) < 1e100
    if form is str:
        return type(value) is str and 0 < len(value) <= 1000
    if form is int:  # all of them count somebody
        return type(value) is int and 0 < value < 2**53
    return value is None


def _make_linear(arrays: dict[str, Array], fields: dict[str, Any]) -> FittedReadout:
    """Return the readout of arrays whose shapes suit one another and the description."""
    labels, names = tuple(fields["labels"]), fields["confounds"]
    n_outputs, n_features = len(labels) if len(labels) > 2 else 1, np.size(arrays["mean"])
    sizes = ((n_features,), (n_features,), (n_outputs, n_features), (n_outputs,))
    shapes: dict[str, tuple[int, ...]] = dict(zip(_ARRAYS, sizes, strict=True))
    if names is not None:
        shapes["confound_means"] = (len(names),)
        shapes["confound_coefficients"] = (len(names), n_features)
    extra = tuple(fields["extra_features"])
    if len(extra) >= n_features:
        _refuse(f"it has {n_features} features, and {len(extra)} of them are extra ones")
    if set(arrays) != set(shapes):
        _refuse(f"it has {', '.join(sorted(arrays))[:200]}; expected are {', '.join(shapes)}")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.dtype != np.float64 or array.shape != shape:
            _refuse(f"its {name} is {array.dtype} of shape {array.shape}, not float64 of {shape}")
        if not (np.abs(array) < 1e100).all():
            _refuse(f"its {name} has numbers that are not finite or too large")
    if not (arrays["scale"] > 0).all():
        _refuse("its scale has numbers that are not positive")
    confounds = None
    if names is not None:
        confounds = ConfoundModel(
            tuple(names), arrays.pop("confound_means"), arrays.pop("confound_coefficients")
        )
    return FittedReadout(
        labels=labels, strength=fields["strength"], confounds=confounds, extra=extra, **arrays
    )

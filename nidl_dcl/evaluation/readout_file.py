"""A readout as a JSON file of numbers, to be applied to another cohort; reading trusts nothing.

Fitting is `linear_readout`'s business, applying and scoring `external`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.readout import ConfoundModel, FittedReadout
from nidl_dcl.io.formats import write_json
from nidl_dcl.volumes.quality import QUALITY_METRICS

__all__ = ["ReadoutFile", "find_readout", "read_readout", "readout_path", "write_readout"]

FORMAT = 1
"""Of the file; another one is refused rather than guessed at."""


KIND = "linear readout of nidl_dcl"


_MAX_BYTES = 64 * 2**20


_MAX_FEATURES = 2**16


_MAX_CLASSES = 1000


_MAX_TEXT = 1000


Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ReadoutFile:
    """A readout with what must be known to apply it honestly.

    Attributes
    ----------
    target : str
        The column.
    task : {"classification", "regression"}
    units : str or None
        Of the target, where its table says so.
    linear : FittedReadout
    n_participants : int
        Whom it was fitted on.
    model_sha256 : str
        Checksum of the weights whose embeddings it reads.
    cohort : dict
        See `nidl_dcl.evaluation.cohort.describe_cohort`, and ``target``: ``distribution`` or ``classes``.
    scores : dict
        Metric to ``mean`` and ``ci95``, cross-validated in its own cohort.
    members : dict
        ``salt``; ``participants`` and ``images``: salted hashes of the ids, and of the images' voxels.
    sha256 : str
        Checksum of the file; empty if it comes from none.
    """

    target: str
    task: str
    units: str | None
    linear: FittedReadout
    n_participants: int
    model_sha256: str
    cohort: dict[str, Any]
    scores: dict[str, Any]
    members: dict[str, Any]
    sha256: str = ""


def readout_path(output_dir: Path, model: str, label: str) -> Path:
    """Return where the readout of a target (its label in file names) stands in an output folder."""
    return output_dir / "models" / f"desc-{model}" / f"desc-{model}{label}_readout.json"


def write_readout(path: Path, stored: ReadoutFile) -> None:
    """Write a readout; floating-point numbers keep all their digits."""
    linear, confounds = stored.linear, stored.linear.confounds
    write_json(
        path,
        {
            "format": FORMAT,
            "kind": KIND,
            "target": stored.target,
            "task": stored.task,
            "units": stored.units,
            "labels": list(linear.labels),
            "n_participants": stored.n_participants,
            "model_sha256": stored.model_sha256,
            "strength": linear.strength,
            "mean": linear.mean,
            "scale": linear.scale,
            "coefficients": linear.coefficients,
            "intercept": linear.intercept,
            "confounds": confounds
            and {
                "names": list(confounds.names),
                "means": confounds.means,
                "coefficients": confounds.coefficients,
            },
            "training": stored.cohort,
            "internal": stored.scores,
            "members": stored.members,
        },
    )


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
        file is not sound.
    """
    if not output_dir.is_dir():
        raise UsageError(f"--readout {output_dir} is not a folder; give the OUTPUT_DIR of a study.")
    folders = sorted((output_dir / "models").glob("desc-*"), key=lambda f: f.name)
    folders.sort(key=lambda folder: folder.name != f"desc-{model}")
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
    for stored in read:
        if stored.model_sha256 == model_sha256:
            if stored.target != target:
                raise UsageError(
                    f"{files[0]} reads target {stored.target!r}, not {target!r}. Name the columns "
                    "of both cohorts alike (--phenotypes FILE adds a table)."
                )
            return stored
    raise UsageError(
        f"{files[0]} reads embeddings of the model with weights {read[0].model_sha256[:12]}…, the "
        f"embeddings here are of {str(model_sha256)[:12]}…. Embed both cohorts by one model: "
        f"nidl-dcl embed BIDS_DIR OUTPUT_DIR --model {folders[0]}"
    )


def read_readout(file: Path) -> ReadoutFile:
    """Return what a file of `write_readout` holds, all of it checked.

    Raises
    ------
    UsageError
        Naming the file and what is wrong: too large, not JSON, another format, lengths that do not
        fit, numbers that are not finite.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            _refuse("it is not a regular file")
        if status.st_size > _MAX_BYTES:
            _refuse(f"it has {status.st_size} bytes, and a readout at most {_MAX_BYTES}")
        raw = file.read_bytes()
        content = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        return _read(content, hashlib.sha256(raw).hexdigest())
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except RecursionError as error:
        raise UsageError(f"{file} is not a readout: it is nested too deeply.") from error
    except ValueError as error:
        raise UsageError(
            f"{file} is not a readout that can be applied: {error}. Have it written again by "
            "`nidl-dcl predict`."
        ) from error


def _read(content: Any, sha256: str) -> ReadoutFile:
    fields = _mapping(content, "the file")
    if fields.get("kind") != KIND:
        _refuse(f"its kind is {str(fields.get('kind'))[:50]!r}, not {KIND!r}")
    if fields.get("format") != FORMAT or isinstance(fields["format"], bool):
        _refuse(f"it has format {fields.get('format')!r:.50}; this version reads format {FORMAT}")
    task = fields.get("task")
    if task not in ("regression", "classification"):
        _refuse(f"task is {task!r:.50}")
    labels = fields.get("labels")
    if not isinstance(labels, list) or len(labels) > _MAX_CLASSES:
        _refuse("labels is not a list of classes")
    names = tuple(_text(label, "a label") for label in labels)
    if len(set(names)) != len(names) or (len(names) < 2 if task == "classification" else names):
        _refuse(f"labels do not suit a {task}")
    mean = _numbers(fields.get("mean"), "mean")
    if not len(mean):
        _refuse("mean is empty")
    scale = _numbers(fields.get("scale"), "scale", len(mean))
    if scale.min() <= 0:
        _refuse("scale holds numbers that are not positive")
    outputs = len(names) if len(names) > 2 else 1
    coefficients = _matrix(fields.get("coefficients"), "coefficients", outputs, len(mean))
    linear = FittedReadout(
        names,
        mean,
        scale,
        coefficients,
        _numbers(fields.get("intercept"), "intercept", outputs),
        _number(fields.get("strength"), "strength", 0.0),
        _confounds(fields.get("confounds"), len(mean)),
    )
    digest = fields.get("model_sha256")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        _refuse("model_sha256 is not a checksum")
    units = fields.get("units")
    return ReadoutFile(
        target=_text(fields.get("target"), "target"),
        task=task,
        units=None if units is None else _text(units, "units"),
        linear=linear,
        n_participants=_count(fields.get("n_participants"), "n_participants"),
        model_sha256=digest,
        cohort=_cohort(fields.get("training"), task, names),
        scores=_counted(fields.get("internal"), "internal", _score),
        members=_members(fields.get("members")),
        sha256=sha256,
    )


def _cohort(value: Any, task: str, labels: tuple[str, ...]) -> dict[str, Any]:
    training = _mapping(value, "training")
    target = _mapping(training.get("target"), "training.target")
    if task == "regression":
        told: dict[str, Any] = _moments(target.get("distribution"), "training.target.distribution")
        for end in ("min", "max"):
            told[end] = _number(target["distribution"].get(end), f"training.target {end}")
        told = {"distribution": told}
    else:
        told = {"classes": _counted(target.get("classes"), "training.target.classes", _count)}
        if set(told["classes"]) != set(labels):
            _refuse("training.target.classes are not the labels")
    quality = _counted(training.get("quality"), "training.quality", _moments)
    if set(quality) - set(QUALITY_METRICS):
        _refuse("training.quality holds unknown measures")
    found: dict[str, Any] = {"target": told, "quality": quality}
    found["age"] = None
    if training.get("age") is not None:
        found["age"] = _moments(training["age"], "training.age")
    for what in ("sex", "site"):
        counts = training.get(what)
        found[what] = None if counts is None else _counted(counts, f"training.{what}", _count)
    return found


def _confounds(value: Any, n_features: int) -> ConfoundModel | None:
    if value is None:
        return None
    fields = _mapping(value, "confounds")
    names = fields.get("names")
    if not isinstance(names, list) or not 0 < len(names) <= _MAX_CLASSES:
        _refuse("confounds.names is not a list of columns")
    return ConfoundModel(
        tuple(_text(name, "a confound") for name in names),
        _numbers(fields.get("means"), "confounds.means", len(names)),
        _matrix(fields.get("coefficients"), "confounds.coefficients", len(names), n_features),
    )


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not a finite number")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{what} is not a JSON object")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT:
        _refuse(f"{what} is not a text of 1 to {_MAX_TEXT} characters")
    return value


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**53:
        _refuse(f"{what} is not a positive whole number")
    return value


def _number(value: Any, what: str, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(f"{what} is not a number")
    # Beyond this, products overflow; a whole number may be larger than any float.
    if not abs(value) < 1e100 or value < least:
        _refuse(f"{what} is not a finite number in range")
    return float(value)


def _numbers(value: Any, what: str, length: int | None = None) -> Array:
    if not isinstance(value, list):
        _refuse(f"{what} is not a list of numbers")
    if len(value) != length if length is not None else len(value) > _MAX_FEATURES:
        _refuse(f"{what} has {len(value)} numbers, {length or f'at most {_MAX_FEATURES}'} expected")
    return np.array([_number(v, f"an entry of {what}") for v in value], dtype=np.float64)


def _matrix(value: Any, what: str, rows: int, columns: int) -> Array:
    if not isinstance(value, list) or len(value) != rows:
        _refuse(f"{what} is not a list of {rows} rows")
    return np.stack([_numbers(row, what, columns) for row in value])


def _moments(value: Any, what: str) -> dict[str, Any]:
    fields = _mapping(value, what)
    sd = fields.get("sd")
    found: dict[str, Any] = {"mean": _number(fields.get("mean"), f"{what}.mean")}
    found["sd"] = None if sd is None else _number(sd, f"{what}.sd", 0.0)
    if "n" in fields:
        found["n"] = _count(fields["n"], f"{what}.n")
    return found


def _score(value: Any, what: str) -> dict[str, Any]:
    fields = _mapping(value, what)
    mean, ends = fields.get("mean"), fields.get("ci95")
    return {
        "mean": None if mean is None else _number(mean, f"{what}.mean"),
        "ci95": None if ends is None else _numbers(ends, f"{what}.ci95", 2).tolist(),
    }


def _counted(value: Any, what: str, read: Callable[[Any, str], Any]) -> dict[str, Any]:
    fields = _mapping(value, what)
    return {_text(key, f"a name in {what}"): read(entry, what) for key, entry in fields.items()}


def _members(value: Any) -> dict[str, Any]:
    fields = _mapping(value, "members")
    found: dict[str, Any] = {"salt": _text(fields.get("salt"), "members.salt")}
    for what in ("participants", "images"):
        hashes = fields.get(what)
        if not isinstance(hashes, list) or not all(isinstance(h, str) for h in hashes):
            _refuse(f"members.{what} is not a list of hashes")
        found[what] = hashes
    return found

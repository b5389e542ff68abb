"""What the stages can be told: one small group of options per concern, with the help text of each.

The command line, YAML files and scripts share them; defaults and meanings stand here alone.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from nidl_dcl.errors import UsageError, did_you_mean
from nidl_dcl.models.model_source import BUILTIN, ModelSource
from nidl_dcl.models.trust import refuse_untrusted


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(
    name: str,
    value: float,
    least: float,
    most: float = math.inf,
    *,
    open_start: bool = False,
    open_end: bool = False,
) -> None:
    """Refuse a number outside of a range, which may exclude its ends."""
    inside = least <= value <= most and value < math.inf
    if not inside or (open_start and value == least) or (open_end and value == most):
        start = f"above {least:g}" if open_start else f"{least:g} or more"
        end = "" if most == math.inf else f", {'below' if open_end else 'at most'} {most:g}"
        raise UsageError(f"{_option(name)} takes a number {start}{end}; got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images of the dataset are used."""

    participant_label: list[str] = field(default_factory=list)
    """Only these participants, with or without 'sub-'."""

    session_label: list[str] = field(default_factory=list)
    """Only these sessions, with or without 'ses-'."""

    exclude_participant_label: list[str] = field(default_factory=list)
    """Not these participants, with or without 'sub-'. Their images stay in logs/inputs.tsv."""

    exclude: Path | None = None
    """Table of images that are not to be used (TSV or CSV): participant_id, and if wanted session_id, run and reason."""

    bids_filter_file: Path | None = None
    """JSON file of entities and values; null is none, "*" is any."""

    preset: str = "raw-t1w"
    """Which images: raw-t1w, mp2rage, preprocessed, preprocessed-native, fmriprep-mni, fmriprep-native, fmriprep-gm, clinica-t1-linear, brainprep-quasiraw, openbhb-vbm, openbhb-quasiraw, cat12-vbm, freesurfer."""

    derivatives: list[str] = field(default_factory=list)
    """Folders of derivatives (images of the preset, brain masks), as PATH or NAME=PATH."""

    phenotypes: list[Path] = field(default_factory=list)
    """Tables of phenotypes besides those of the dataset (TSV or CSV with participant_id)."""

    id_column: str | None = None
    """Column of ids in tables of phenotypes; default: participant_id, participant, subject_id, subject, sub or id."""

    id_map: Path | None = None
    """Table of two columns: ids as the tables of phenotypes have them, and participant_id as the images have them."""

    mask: str = "auto"
    """Brain mask: auto (a desc-brain_mask derivative, if all images have one), none, or its NAME."""

    preprocess: Literal["auto", "none", "strip", "rigid", "align"] = "auto"
    """What is done to scans first: align (bias field, brain extraction, affine registration to MNI space), rigid (as align, but size is kept), strip (no registration), none; auto: as the model's images, or align where packages for it are installed. Brain masks of derivatives are used."""

    select: Literal["all", "first", "last"] = "all"
    """Of several images in a session, sorted by acquisition, run and path."""

    intensity: Literal["auto", "robust", "probability", "signed"] = "auto"
    """What the values are: robust (a scan, of any unit), probability (a tissue map), signed (a map with negative values); auto: as the preset says."""

    max_skipped: float = 0.1
    """Largest share of the candidate images that may be unusable."""

    strict: bool = False
    """Stop if any candidate image is unusable."""

    holdout: float | None = None
    """Share of participants kept out of training and cross-validation, and scored once; default: as the model was trained, else 0."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        _require("max_skipped", self.max_skipped, 0, 1)
        if self.holdout is not None:
            _require("holdout", self.holdout, 0, 1, open_end=True)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the encoder is trained."""

    init: ModelSource | None = None
    """Start from the weights of this model folder; builtin: of the model that nidl_dcl ships."""

    encoder: str = "regional"
    """regional, cnn, resnet18, resnet50, densenet121, or package.module:Class of your own."""

    spacing: list[float] = field(default_factory=lambda: [3.0])
    """Voxel size in mm, one or three numbers."""

    shape: list[int] = field(default_factory=list)
    """Voxels along three axes; default: field of view / spacing."""

    views: Literal["light", "default", "strong"] = "light"
    """Strength of the augmentations that make the two views."""

    views_on_device: bool = False
    """Draw the views where the encoder is, such as on a GPU, and not in the loading workers."""

    max_steps: int = 300
    """Batches to train on, of few or many participants; the last pass over the participants is completed."""

    max_epochs: int | None = None
    """Passes over the participants, in place of a number of steps."""

    batch_size: int = 16
    """Participants of a batch, all processes together."""

    chunk_size: int | None = None
    """Encode so many volumes at a time, and again for their gradients: the memory of a chunk, the contrast of the batch."""

    temperature: float = 0.1
    """Temperature of the loss."""

    learning_rate: float = 2e-3
    """Highest learning rate, reached after a tenth of the steps."""

    accelerator: str = "auto"
    """Lightning's accelerator: auto (on macOS the CPU), cpu, gpu, mps."""

    devices: str = "auto"
    """Lightning's devices: a number, or auto."""

    num_nodes: int = 1
    """Lightning's number of nodes."""

    strategy: str = "auto"
    """Lightning's strategy, such as ddp."""

    precision: str = "32-true"
    """Lightning's precision, such as bf16-mixed."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        for name, least in (("max_steps", 1), ("batch_size", 2), ("num_nodes", 1)):
            _require(name, getattr(self, name), least)
        for name in ("max_epochs", "chunk_size"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), 1)
        for name in ("temperature", "learning_rate"):
            _require(name, getattr(self, name), 0, open_start=True)
        for name, lengths, said in (
            ("spacing", (1, 3), "one or three numbers"),
            ("shape", (0, 3), "three numbers"),
        ):
            numbers = getattr(self, name)
            if len(numbers) not in lengths:
                raise UsageError(f"{_option(name)} takes {said}, got {len(numbers)}.")
            for number in numbers:
                _require(name, number, 0, open_start=True)


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """How phenotypes are predicted."""

    group: str | None = None
    """Column whose equal values (a family) stay on one side of every split."""

    task: list[str] = field(default_factory=list)
    """What a target is, as COLUMN=regression or COLUMN=classification; default: as its unit and its values say."""

    confounds: list[str] = field(default_factory=list)
    """Columns whose linear effect is removed from the features, learned inside the folds."""

    site: str | None = None
    """Column of sites or scanners; default: the first called site, scanner, site_id, center or centre."""

    harmonize: bool = False
    """Harmonize features by site (ComBat, package pycombat), learned inside the folds."""

    readout: Path | None = None
    """OUTPUT_DIR of another cohort, whose readouts of the same model are applied to this one."""

    other_people: bool = False
    """With --readout: participants of this cohort are other people, even where ids are equal."""

    occlusion: bool = False
    """Also map where each readout looks: by how much hiding a block changes the prediction."""

    @property
    def tasks(self) -> dict[str, str]:
        """The task of each column that one was asked for."""
        pairs = (text.rpartition("=") for text in self.task)
        return {column: task for column, _, task in pairs}

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        for text in self.task:
            column, equals, task = text.rpartition("=")
            if not (column and equals and task in ("regression", "classification")):
                raise UsageError(
                    f"--task takes COLUMN=regression or COLUMN=classification, got {text!r}."
                )
        if self.harmonize and self.occlusion:
            raise UsageError(
                "--occlusion needs a readout of all participants, and --harmonize keeps none. "
                "Leave one of them out."
            )
        if self.harmonize and importlib.util.find_spec("pycombat") is None:
            raise UsageError(
                "--harmonize needs the package pycombat: pip install 'nidl_dcl[harmonize]'."
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the command runs."""

    work_dir: Path | None = None
    """Where prepared volumes and features are kept; default OUTPUT_DIR/.work (index: none)."""

    nprocs: int | None = None
    """Number of loading workers, and of images that are preprocessed at a time; changes no result. Default: 0, or measured where there is a GPU; for images, as many as cores and memory allow."""

    threads: int | None = None
    """Threads of torch; recorded, since it may change the last digits."""

    random_seed: int = 0
    """Seed of splits, weights, order, views and folds."""

    model_name: str = "dcl"
    """Label of the model in file names, letters and digits."""

    dry_run: bool = False
    """Say what would be done and write nothing."""

    parquet: bool = False
    """Also write ids and embeddings as one Parquet table (package pyarrow)."""

    validate: bool = False
    """Run the BIDS validator on the output at the end (package bids-validator-deno)."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.nprocs is not None:
            _require("nprocs", self.nprocs, 0)
        _require("random_seed", self.random_seed, 0, 2**32 - 1)
        if self.threads is not None:
            _require("threads", self.threads, 1)
        if not (self.model_name.isalnum() and self.model_name.isascii()):
            raise UsageError(f"--model-name takes letters and digits, got {self.model_name!r}.")
        if self.parquet and importlib.util.find_spec("pyarrow") is None:
            raise UsageError(
                "--parquet needs the package pyarrow: pip install 'nidl_dcl[parquet]'."
            )


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a YAML file of a study says; its keys are the command line's options."""

    bids_dir: Path
    output_dir: Path
    target: list[str] = field(default_factory=list)
    model: ModelSource | None = None
    trust: list[str] = field(default_factory=list)
    data: DataOptions = DataOptions()
    training: TrainingOptions = TrainingOptions()
    prediction: PredictionOptions = PredictionOptions()
    run: RunOptions = RunOptions()


_GROUPS = {
    "data": DataOptions,
    "training": TrainingOptions,
    "prediction": PredictionOptions,
    "run": RunOptions,
}

_SHARE = "share a finished output by `nidl-dcl share OUTPUT_DIR SHARED_DIR`."
_GONE = {"share": _SHARE, "share_key": _SHARE}
_LARGEST = 10**6

_OWN = ("bids_dir", "output_dir", "target", "model", "trust")

_MODELS = ("model", "init")

_PATHS = (
    *("bids_dir", "output_dir", "model", "bids_filter_file", "exclude", "init", "work_dir"),
    *("readout", "id_map"),
)


def refuse_gone(names: Iterable[str]) -> None:
    """Refuse options that are gone, naming what does their work now.

    Raises
    ------
    UsageError
    """
    for name in names:
        plain = str(name).lstrip("-").replace("-", "_")
        if plain in _GONE:
            raise UsageError(f"{_option(plain)} is gone: {_GONE[plain]}")


def read_options(file: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file by name, each a plain value or a list of such.

    Parameters
    ----------
    file : path
        A flat mapping of at most a megabyte; tags that would make objects are refused.

    Raises
    ------
    UsageError
        When the file cannot be read or holds anything else.
    """
    path = Path(file)
    try:
        if not path.is_file():  # a pipe would block
            raise UsageError(f"{file} is not a file.")
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{file} is larger than any list of options.")
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from error
    except RecursionError as error:
        raise UsageError(f"{file} is not YAML of options: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file} is not YAML: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold options, one per line, such as 'bids_dir: data'.")
    refuse_gone(name for name, value in content.items() if value is not False)
    content = {name: value for name, value in content.items() if name not in _GONE}
    for name, value in content.items():
        values = value if isinstance(value, list) else [value]
        # Lists in lists are no option, and by aliases they can be endless.
        if not isinstance(name, str) or any(isinstance(v, list | dict | set) for v in values):
            raise UsageError(
                f"{file}: {str(name)[:40]!r} is no option with a value or a list of values."
            )
    return content


def read_study(file: str | Path, trust: Iterable[str] = ()) -> StudyOptions:
    """Return the options in a YAML file, such as a study's ``code/config.yaml``.

    Parameters
    ----------
    file : path
        A flat mapping of options; relative paths are relative to the current folder.
    trust : iterable of str
        Packages, besides nidl_dcl, monai and torch.nn, whose encoders the file may name.

    Raises
    ------
    UsageError
        When the file cannot be read, lacks ``bids_dir`` or ``output_dir``, has an unknown option, or
        names code that is not trusted.
    """
    content = {name.replace("-", "_"): value for name, value in read_options(file).items()}
    own: dict[str, Any] = {}
    grouped: dict[str, dict[str, Any]] = {name: {} for name in _GROUPS}
    home = {f.name: name for name, group in _GROUPS.items() for f in fields(group)}
    kinds = {
        f.name: str(f.type) for group in (StudyOptions, *_GROUPS.values()) for f in fields(group)
    }
    for name, value in content.items():
        if kinds.get(name, "").startswith("list[") and not isinstance(value, list):
            value = [] if value is None else [value]
        if name in _PATHS and value is not None and not (name in _MODELS and value == BUILTIN):
            value = Path(str(value))
        if name == "phenotypes":
            value = [Path(str(v)) for v in value]
        if name in _OWN:
            own[name] = value
        elif name in home:
            grouped[home[name]][name] = value
        else:
            hint = did_you_mean(name, [*_OWN, *home])
            raise UsageError(f"{file} has an unknown option {name!r}.{hint}")
    for name in ("bids_dir", "output_dir"):
        if name not in own:
            raise UsageError(f"{file} must name {name}.")
    groups: dict[str, Any] = {name: kind(**grouped[name]) for name, kind in _GROUPS.items()}
    options = StudyOptions(**own, **groups)
    refuse_untrusted(file, code_named(options.training, options.trust), trust)
    return options


def code_named(training: TrainingOptions | None, trust: Iterable[str] | None) -> list[str]:
    """Return the packages and the class that options name to be imported."""
    named = list(trust or ())
    return [*named, training.encoder] if training and ":" in training.encoder else named


def refuse_training(
    training: TrainingOptions, model: ModelSource, named: Iterable[str] = ()
) -> None:
    """Refuse options of a training beside a model, which is trained already.

    Parameters
    ----------
    training : TrainingOptions
        Any value that is not the default was meant.
    model : Path or "builtin"
        The model.
    named : iterable of str
        Options that were given, whatever their values.

    Raises
    ------
    UsageError
        Naming each of them.
    """
    plain = {name.lstrip("-").replace("-", "_") for name in named}
    default = TrainingOptions()
    given = [
        _option(f.name)
        for f in fields(TrainingOptions)
        if f.name in plain or getattr(training, f.name) != getattr(default, f.name)
    ]
    if given:
        raise UsageError(
            f"{', '.join(given)}: for a training, and --model {model} is trained already. Leave "
            f"{'it' if len(given) == 1 else 'them'} out (also of --config and of the environment), or "
            "train a model without --model; --init starts from the weights of another."
        )


def study_yaml(options: StudyOptions) -> str:
    """Return the YAML from which `read_study`, or ``--config``, gets the same options."""
    values: dict[str, Any] = {name: getattr(options, name) for name in _OWN}
    for name in _GROUPS:
        if name == "training" and options.model is not None:
            continue  # nothing is trained, and the defaults of another version may be others
        values.update(asdict(getattr(options, name)))
    if isinstance(options.model, Path):
        values["model"] = options.model.resolve()
    values["readout"] = options.prediction.readout and options.prediction.readout.resolve()
    values["exclude"] = options.data.exclude and options.data.exclude.resolve()
    del values["dry_run"]
    return as_yaml(values)


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return options as YAML, without those that are not set."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or value == []:
            continue
        if isinstance(value, list | tuple):
            value = [_path_text(v) if isinstance(v, Path) else v for v in value]
        plain[name] = _path_text(value) if isinstance(value, Path) else value
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text


def _path_text(path: Path) -> str:
    """Return a path as text that is not taken for the model that nidl_dcl ships."""
    return f"./{path}" if str(path) == BUILTIN else str(path)

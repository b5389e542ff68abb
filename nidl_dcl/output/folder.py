"""The output folder: a BIDS derivative with one writer, and the record of what was run in it."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

import nidl_dcl
from nidl_dcl._version import __version__
from nidl_dcl.errors import OutputInUseError, UsageError, describe, exit_status
from nidl_dcl.io.atomic import remove_stale
from nidl_dcl.io.console import NullReporter
from nidl_dcl.io.formats import read_json, write_json, write_text, write_tsv
from nidl_dcl.models.model_card import METHOD
from nidl_dcl.models.serialization import versions
from nidl_dcl.output.lock import Lock, held
from nidl_dcl.output.run_log import Logged, RunLog
from nidl_dcl.output.sharing import ABOUT, Sharing, is_shared

__all__ = ["CITATION", "PATIENCE", "Output", "check_places", "write_descriptions"]

CITATION = """\
# How to cite

- The method: {method}.
- The augmentations and networks: MONAI (Cardoso et al., 2022, arXiv:2211.02701).
- The dataset index: PyBIDS (Yarkoni et al., 2019, doi:10.21105/joss.01294) and BIDS (Gorgolewski
  et al., 2016, doi:10.1038/sdata.2016.44).
- The predictions: scikit-learn (Pedregosa et al., 2011, JMLR 12); intervals after Nadeau and Bengio
  (2003, doi:10.1023/A:1024068626366).
- This software: nidl_dcl {version}.

## Methods text

Brain images were turned into embeddings by an encoder trained without labels by decoupled
contrastive learning (Yeh et al., 2022), as implemented in nidl_dcl {version}. Settings stand in
`code/config.yaml`, training curves in `logs/metrics.csv`. Phenotypes were predicted from the
embeddings by linear models, cross-validated by participant; each metrics file states its folds,
its chance level and its baselines.
"""


_README = """\
# Embeddings and predictions by nidl_dcl

Derived from the BIDS dataset {source} by decoupled contrastive learning.

| file | what it is |
|---|---|
| `report.html` | the page to look at first |
| `desc-<model>_embeddings.tsv`, `.npy` | which image each row is, and the rows |
| `desc-<model><Target>_predictions.tsv` | cross-validated predictions, one row per image |
| `desc-<model><Target>_metrics.json` | scores, intervals, chance level, baselines |
| `desc-<model><Target>_externalmetrics.json` | scores of a readout that another cohort gave |
| `models/desc-<model>/` | the model: weights (safetensors) and description (JSON) |
| `logs/inputs.tsv` | every candidate image and what became of it |
| `logs/phenotypes.tsv` | whom each row of the phenotype tables belongs to (not where ids are pseudonyms) |
| `logs/metrics.csv` | training curves |
| `logs/run.json` | what was run, when, with which versions |
| `logs/<UTC time>_<command>.log` | what each run said and did |
| `logs/CITATION.md` | what to cite |
| `code/config.yaml` | the configuration that runs the study again |
| `figures/` | the figures of the report with their data |
"""


_IGNORED = (
    "README.md",
    "report.html",
    "descriptions.*",
    "desc-*_embeddings.*",
    "desc-*_predictions.*",
    "desc-*_metrics.*",
    "desc-*_externalpredictions.*",
    "desc-*_externalmetrics.*",
    "models",
    "logs",
    "figures",
    ".work",
    ".lock",
    "**/.*",
)


_COMMANDS = ("pretrain", "embed", "predict", "report", "study", "demo", "participant", "group")


_REMEMBERED = 50
"""Earlier commands that ``logs/run.json`` tells of."""


PATIENCE = 600.0
"""Seconds that a part waits for the folder."""


_TOLD_OF_PARTS = (
    "selection",
    "command",
    "host",
    "log",
    "started",
    "stages",
    "exit_status",
    "error",
)


class Output:
    """An output folder that this process writes to.

    Parameters
    ----------
    bids_dir, output_dir : Path
        The dataset and the folder; see `check_places`.
    work_dir : Path or None
        Default: ``.work`` in the folder.
    command : sequence of str
        For the record.
    config : mapping
        For the record.
    share : bool, default=False
        Write to a private folder, and to `output_dir` what can be given away.
    share_key : Path, optional
        See `Sharing`.

    Attributes
    ----------
    path : Path
        Where stages read and write.
    public : Path
        `output_dir`: the same folder unless it is shared.
    """

    def __init__(
        self,
        bids_dir: Path,
        output_dir: Path,
        *,
        work_dir: Path | None = None,
        command: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        share: bool = False,
        share_key: Path | None = None,
    ) -> None:
        check_places(bids_dir, output_dir)
        self.bids_dir = bids_dir.resolve()
        self.path = self.public = output_dir.resolve()
        self.work = self.path / ".work" if work_dir is None else work_dir.resolve()
        self.sharing: Sharing | None = None
        if share:
            self.sharing = Sharing(bids_dir, output_dir, work_dir=work_dir, key_file=share_key)
            self.path, self.work = self.sharing.private, self.sharing.work
        elif is_shared(self.path):
            raise UsageError(
                f"{output_dir} was made with another configuration: share was True, is False. Give "
                "--share, or choose another OUTPUT_DIR."
            )
        self.record: dict[str, Any] = {
            "command": list(command),
            "config": dict(config or {}),
            "versions": versions(),
            "commit": _commit(Path(nidl_dcl.__file__).resolve().parent.parent),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _now(),
            "log": None,
            "stages": [],
            "exit_status": None,
            "earlier": [],
        }
        self.worked = False
        self.log: RunLog | None = None
        self._folder: tuple[int, int] | None = None
        self._lock: Lock | None = None

    def model_folder(self, name: str) -> Path:
        """Return where the model of this name is, or will be."""
        return self.path / "models" / f"desc-{name}"

    @contextmanager
    def writing(self, say: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the folder's lock, and keep ``logs/run.json`` true to the end.

        Parameters
        ----------
        say : callable, optional
            Told when it takes a while to know whether the folder is free.

        Raises
        ------
        OutputInUseError
            When another run holds it.
        """
        with self._held(say) as self._lock:
            self._folder = _identity(self.path)
            self._describe()
            before = self._record_before()
            self.record["earlier"] = _earlier_runs(before)
            self.record["parts"] = before.get("parts", [])
            try:
                with self._logging():
                    yield
            finally:
                self._lock = None

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Log a run that holds the folder at its end only, in `joining`."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._logging():
            yield

    @contextmanager
    def _logging(self) -> Iterator[None]:
        self.log = RunLog(self.path / "logs", _name_of(self.record["command"]))
        self.record["log"] = f"logs/{self.log.path.name}"
        try:
            with self.log.with_warnings():
                self._begin()
                yield
                self.end_record()
                self.save_record()
                self.log.stage = "end"
                self.log.write("Done: exit status 0.")
        except BaseException as error:
            self._tell_failure(error)
            raise
        finally:
            self.log.close()
            self.log = None

    @contextmanager
    def joining(
        self,
        say: Callable[[str], None],
        done: Callable[[], bool],
        patience: float = PATIENCE,
    ) -> Iterator[bool]:
        """Hold the folder's lock for a merge of parts, after those who hold it now.

        Parameters
        ----------
        say : callable
            Told of waiting.
        done : callable
            Asked while waiting: whether another run has merged what there is to merge.
        patience : float
            Seconds to wait at most.

        Yields
        ------
        bool
            Whether the lock is held; False when there is nothing left to do.

        Raises
        ------
        OutputInUseError
            When the folder stays in use.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + patience
        told = False
        while not done():
            with ExitStack() as stack:
                try:
                    self._lock = stack.enter_context(held(self.path / ".lock", say))
                except OutputInUseError as error:
                    if time.monotonic() > end:
                        raise OutputInUseError(
                            f"{error} This part of the embeddings is kept, and merged by the next "
                            f"run of `nidl-dcl embed` there; it waited {patience:.0f} s."
                        ) from error
                    if not told and time.monotonic() > end - patience + 1:
                        say(f"{error} Waiting {patience:.0f} s at most to merge this part.")
                        told = True
                    # Of several who wait, none shall ask at the same times.
                    time.sleep(0.1 + 0.4 * secrets.randbelow(1000) / 1000)
                    continue
                try:
                    self._describe()
                    yield True
                    self._lock.check()
                finally:
                    self._lock = None
                return
        yield False

    def add_part_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell of parts in ``logs/run.json``, each under its selection; the rest of it stays.

        Parameters
        ----------
        records : sequence of mapping
            Records of runs with a ``selection``.
        """
        told = self._record_before()
        for record in records:
            if not told:
                told = {**record, "earlier": []}
                del told["selection"]
            part = {name: record.get(name) for name in _TOLD_OF_PARTS}
            others = told.get("parts", [])
            told["parts"] = [
                *(other for other in others if other.get("selection") != part["selection"]),
                part,
            ]
        told["parts"] = sorted(told["parts"], key=lambda part: json.dumps(part["selection"]))
        write_json(self.path / "logs" / "run.json", told)

    def _begin(self) -> None:
        """Say what is run, and remove what killed runs left half-written."""
        assert self.log is not None
        self.log.write(" ".join(self.record["command"]))
        told = ("versions", "commit", "host", "pid", "config")
        self.log.write(
            "\n".join(f"{name}: {json.dumps(self.record[name], default=str)}" for name in told)
        )
        self.save_record()
        if self._lock is None:
            return
        apart = [] if self.path in self.work.parents else [self.work]
        stale = remove_stale({self.path, self.public, *apart})
        if stale:
            self.log.write(f"Removed {len(stale)} temporary files of runs that were killed.")

    def _tell_failure(self, error: BaseException) -> None:
        """Record and log why a run ends, as far as the disk lets it."""
        assert self.log is not None
        self.end_record(error)
        with suppress(OSError, ValueError, OutputInUseError):
            self.save_record()
        self.log.write_traceback(error)
        self.log.write(f"Exit status {exit_status(error)}: {' '.join(describe(error).split())}")

    def heard(self, console: NullReporter | None) -> NullReporter:
        """Return a console that shows what `console` does, and logs it while the folder is held."""
        console = console or NullReporter()
        if self.log is None or isinstance(console, Logged):
            return console
        return Logged(console, self.log)

    @contextmanager
    def _held(self, say: Callable[[str], None] | None) -> Iterator[Lock]:
        """Hold the folder, or both folders of a study that is shared."""
        self.public.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if self.sharing is not None:
                stack.enter_context(_locked(self.public / ".lock"))
                self.sharing.begin()
            yield stack.enter_context(held(self.path / ".lock", say))

    @contextmanager
    def stage(self, name: str, *, share: bool = False) -> Iterator[dict[str, Any]]:
        """Record a stage: name, start, seconds, the step it resumed from, whether it was skipped.

        Raises
        ------
        UsageError
            When it is to be shared, and this output is not.
        OSError
            When the folder is not the one that was locked any more.
        """
        if share and self.sharing is None:
            raise UsageError("--share is for the whole output: make it by Output(…, share=True).")
        entry: dict[str, Any] = {
            "name": name,
            "started": _now(),
            "seconds": None,
            "resumed_from_step": None,
            "skipped": False,
        }
        self.record["stages"].append(entry)
        start = time.monotonic()
        self._enter(name)
        try:
            yield entry
            self._require_folder()
        except BaseException:
            entry["seconds"] = round(time.monotonic() - start, 2)
            with suppress(OSError, ValueError, OutputInUseError):  # the error under way says more
                self.save_record()
            raise
        entry["seconds"] = round(time.monotonic() - start, 2)
        self.worked = self.worked or not entry["skipped"]
        self.save_record()
        if self.log is not None:
            what = "nothing to do" if entry["skipped"] else "done"
            self.log.write(f"{name}: {what} in {entry['seconds']} s")

    def _enter(self, name: str) -> None:
        """Note that a stage begins, so that a killed run shows where it was."""
        self.save_record()
        if self.log is not None:
            self.log.stage = name
            self.log.write(f"{name}: begins")

    def end_record(self, error: BaseException | None = None) -> None:
        """Note how the command ended."""
        self.record["exit_status"] = 0 if error is None else exit_status(error)
        if error is not None:
            self.record["error"] = describe(error)

    def save_record(self) -> None:
        """Write ``logs/run.json``, while this process holds the folder.

        With it, OUTPUT_DIR gets what can be given away by now, where the study is shared.

        Raises
        ------
        OutputInUseError
            When another run has taken it over.
        """
        if self._lock is not None:
            self._require_folder()
            self._lock.check()
            write_json(self.path / "logs" / "run.json", self.record)
            if self.sharing is not None:
                self.sharing.publish()

    def _require_folder(self) -> None:
        """Refuse to go on in a folder that was removed, or whose disk is gone, since it was locked."""
        if self._folder is not None and _identity(self.path) != self._folder:
            raise OSError(errno.ESTALE, "it is another folder than before", str(self.path))

    def _record_before(self) -> dict[str, Any]:
        """Return what ``logs/run.json`` says now; empty when it is missing or damaged."""
        try:
            before = read_json(self.path / "logs" / "run.json")
        except (OSError, ValueError):
            return {}
        return before if isinstance(before, dict) else {}

    def _describe(self) -> None:
        """Write what makes the folder a BIDS derivative, where it is missing."""
        name = _dataset_name(self.bids_dir)
        self._describe_as(self.path, name, os.path.relpath(self.bids_dir, self.path))
        if self.sharing is not None:
            self._describe_as(self.public, "(not named)", self.sharing.names.dataset, ABOUT)

    @staticmethod
    def _describe_as(folder: Path, name: str, link: str, more: str = "") -> None:
        files: dict[str, Any] = {
            "dataset_description.json": {
                "Name": "nidl_dcl embeddings" + ("" if more else f" of {name}"),
                "BIDSVersion": "1.10.0",
                "DatasetType": "derivative",
                "License": "n/a",
                "GeneratedBy": [
                    {
                        "Name": "nidl_dcl",
                        "Version": __version__,
                        "Description": "Decoupled contrastive learning of brain MRI",
                    }
                ],
                "SourceDatasets": [{"URL": link}],
                "DatasetLinks": {"raw": link},
            },
            "README.md": _README.format(source=name) + more,
            "CHANGES": f"{__version__} {_now()[:10]}\n - Written by nidl_dcl {__version__}.\n",
            ".bidsignore": "\n".join(_IGNORED) + "\n",
            "logs/CITATION.md": CITATION.format(version=__version__, method=METHOD),
        }
        for file, content in files.items():
            target = folder / file
            if not target.exists():
                if isinstance(content, str):
                    write_text(target, content)
                else:
                    write_json(target, content)


def check_places(bids_dir: Path, output_dir: Path) -> None:
    """Refuse places that would write into the dataset.

    Raises
    ------
    UsageError
        When the dataset is missing, or the output is the dataset, around it, or inside it
        elsewhere than under ``derivatives/``; or is not a folder.
    """
    if not bids_dir.is_dir():
        raise UsageError(f"BIDS_DIR {bids_dir} is not a folder.")
    source, target = bids_dir.resolve(), output_dir.resolve()
    there = next(path for path in (target, *target.parents) if path.exists())
    if not there.is_dir():
        within = "is" if there == target else f"is in {there}, which is"
        raise UsageError(f"OUTPUT_DIR {output_dir} {within} a file: choose another folder.")
    if target == source or target in source.parents:
        raise UsageError(
            f"OUTPUT_DIR {output_dir} is, or holds, BIDS_DIR {bids_dir}: choose another folder."
        )
    if source in target.parents and target.relative_to(source).parts[0] != "derivatives":
        raise UsageError(
            f"OUTPUT_DIR {output_dir} is inside BIDS_DIR, which is never written to; inside it, "
            f"only {bids_dir}/derivatives/… is allowed."
        )
    if source / "derivatives" == target:
        raise UsageError(f"OUTPUT_DIR {output_dir} holds all derivatives: choose a folder in it.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a folder that may be given away, by a lock that names nobody."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputInUseError(
                f"{path.parent} is being written by another run. Wait for it, or choose another "
                "OUTPUT_DIR."
            ) from error
        _HELD.add(handle)
        yield
    finally:
        _HELD.discard(handle)
        os.close(handle)


_HELD: set[int] = set()
"""Locks of this process; a loading worker that outlives it for a moment must not hold them."""


def _let_go() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def _earlier_runs(before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what earlier commands did, oldest first."""
    try:
        told = {name: before[name] for name in ("command", "started", "stages", "exit_status")}
        return [*before["earlier"], told][-_REMEMBERED:]
    except (KeyError, TypeError):
        return []


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _name_of(command: Sequence[str]) -> str:
    """Return the word of a command that names its log."""
    script = re.sub(r"[^A-Za-z0-9]", "", Path(command[0]).stem) if command else ""
    return next((word for word in command if word in _COMMANDS), script or "run")


def _commit(folder: Path) -> str | None:
    """Return the Git commit of a source tree, ``-dirty`` when files differ; None elsewhere."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    return None


def _dataset_name(bids_dir: Path) -> str:
    try:
        name = read_json(bids_dir / "dataset_description.json")["Name"]
    except (OSError, ValueError, KeyError, TypeError):
        return bids_dir.name
    return str(name)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_descriptions(folder: Path, label: str) -> None:
    """Write the BIDS table that says what ``desc-<label>`` means."""
    path, sidecar = folder / "descriptions.tsv", folder / "descriptions.json"
    rows = {label: "Decoupled contrastive learning embeddings and their predictions"}
    if path.is_file():
        known = pd.read_csv(path, sep="\t", dtype=str)
        before = dict(zip(known["desc_id"].str[5:], known["description"], strict=True))
        if label in before and sidecar.is_file():
            return
        rows = {**before, **rows}
    table = pd.DataFrame(
        {"desc_id": [f"desc-{name}" for name in rows], "description": list(rows.values())}
    )
    write_tsv(path, table)
    write_json(
        sidecar,
        {
            "desc_id": {"Description": "Label in file names"},
            "description": {"Description": "What files with the label hold"},
        },
    )

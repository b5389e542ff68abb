"""The output folder: one writer at a time, its work folder and where its models are."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nidl_dcl.errors import OutputInUseError, UsageError, describe, exit_status
from nidl_dcl.io.atomic import remove_stale
from nidl_dcl.output.description import describe_folder
from nidl_dcl.output.lock import Lock, held
from nidl_dcl.output.run_log import RunLog
from nidl_dcl.output.run_record import RunRecord
from nidl_dcl.output.sharing_rules import is_shared

_COMMANDS = (
    "preprocess",
    "pretrain",
    "embed",
    "predict",
    "report",
    "study",
    "demo",
    "participant",
    "group",
)


class Output:
    """An output folder that this process writes to.

    The lock is `lock`'s, the log file `run_log`'s, the record `run_record`'s, and what makes the
    folder a BIDS derivative `description`'s: this class holds them together for a run.

    Parameters
    ----------
    bids_dir, output_dir : Path
        The dataset and the folder; see `check_paths`.
    work_dir : Path or None
        Default: ``.work`` in the folder.
    command : sequence of str
        For the record.
    config : mapping
        For the record.
    describe : callable
        Writes the description of the derivative; called with the folder and the dataset.
    """

    def __init__(
        self,
        bids_dir: Path,
        output_dir: Path,
        *,
        work_dir: Path | None = None,
        command: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        describe: Callable[[Path, Path], None] = describe_folder,
    ) -> None:
        check_paths(bids_dir, output_dir)
        if is_shared(output_dir):
            raise UsageError(
                f"{output_dir} was written by `nidl-dcl share`, and real ids must not get into it. "
                "Choose another OUTPUT_DIR."
            )
        self.bids_dir = bids_dir.resolve()
        self.path = output_dir.resolve()
        self.work = self.path / ".work" if work_dir is None else work_dir.resolve()
        self.record = RunRecord(command, config)
        self.worked = False  # whether any stage had something to do
        self._describe = describe
        self._log: RunLog | None = None
        self._lock: Lock | None = None
        self._folder: tuple[int, int] | None = None

    def model_folder(self, name: str) -> Path:
        """Return where the model of this name is, or will be."""
        return self.path / "models" / f"desc-{name}"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's lock, and keep ``logs/run.json`` true to the end.

        Raises
        ------
        OutputInUseError
            When another run holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with held(self.path / ".lock") as self._lock:
            self._folder = _identity(self.path)
            self._describe(self.path, self.bids_dir)
            self.record.follow_earlier(self._record_file)
            try:
                with self.logging():
                    yield
            finally:
                self._lock = None

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Log a run in ``logs/``; without `writing`, one that does not hold the folder."""
        self._log = log = RunLog(self.path / "logs", _name_of(self.record.content["command"]))
        self.record.content["log"] = f"logs/{log.path.name}"
        with log.active():
            try:
                self._begin(log)
                yield
                self.record.end()
                self.save_record()
                log.stage = "end"
                log.write("Done: exit status 0.")
            except BaseException as error:
                self.record.end(error)
                with suppress(OSError, ValueError, OutputInUseError):
                    self.save_record()
                log.write_traceback(error)
                log.write(f"Exit status {exit_status(error)}: {' '.join(describe(error).split())}")
                raise
            finally:
                self._log = None

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Record and log a stage; see `RunRecord.stage`.

        Raises
        ------
        OSError
            When the folder is not the one that was locked any more.
        """
        try:
            with self.record.stage(name) as entry:
                self.save_record()  # so that a killed run shows where it was
                before = self._log.stage if self._log is not None else ""
                if self._log is not None:
                    self._log.stage = name
                    self._log.write(f"{name}: begins")
                yield entry
                self._require_folder()
        except BaseException:
            with suppress(OSError, ValueError, OutputInUseError):  # the error itself says more
                self.save_record()
            raise
        self.worked = self.worked or not entry["skipped"]
        self.save_record()
        if self._log is not None:
            what = "nothing to do" if entry["skipped"] else "done"
            self._log.write(f"{name}: {what} in {entry['seconds']} s")
            self._log.stage = before  # of a stage around this one

    def save_record(self) -> None:
        """Write ``logs/run.json``, while this process holds the folder.

        Raises
        ------
        OutputInUseError
            When another run has taken it over.
        """
        if self._lock is not None:
            self._require_folder()
            self._lock.check()
            self.record.save(self._record_file)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the folder for writing."""
        return self._lock is not None

    @property
    def _record_file(self) -> Path:
        return self.path / "logs" / "run.json"

    def _begin(self, log: RunLog) -> None:
        """Log what is run, and remove what killed runs left half-written."""
        content = self.record.content
        log.write(" ".join(content["command"]))
        names = ("versions", "commit", "host", "pid", "config")
        log.write("\n".join(f"{name}: {json.dumps(content[name], default=str)}" for name in names))
        self.save_record()
        if self._lock is None:
            return
        apart = [] if self.path in self.work.parents else [self.work]
        if stale := remove_stale([self.path, *apart]):
            log.write(f"Removed {len(stale)} temporary files of runs that were killed.")

    def _require_folder(self) -> None:
        """Refuse to continue in a folder that was removed, or whose disk is gone, since it was locked."""
        if self._folder is not None and _identity(self.path) != self._folder:
            raise OSError(errno.ESTALE, "it is another folder than before", str(self.path))


def check_paths(bids_dir: Path, output_dir: Path) -> None:
    """Refuse an output folder that would write into the dataset.

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


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _name_of(command: Sequence[str]) -> str:
    """Return the word of a command that names its log."""
    script = re.sub(r"[^A-Za-z0-9]", "", Path(command[0]).stem) if command else ""
    return next((word for word in command if word in _COMMANDS), script or "run")

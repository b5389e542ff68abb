"""The output folder: a BIDS derivative with one writer, and the record of what was run in it."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nidl_dcl import __version__
from nidl_dcl.errors import OutputInUseError, UsageError
from nidl_dcl.json_files import read_json
from nidl_dcl.model_folder import versions
from nidl_dcl.writing import write_json, write_text

__all__ = ["CITATION", "Output", "check_places"]

CITATION = """\
# How to cite

- The method: Yeh, C.-H., Hong, C.-Y., Hsu, Y.-C., Liu, T.-L., Chen, Y., LeCun, Y. (2022).
  Decoupled Contrastive Learning. ECCV 2022.
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
| `desc-<model><Target>_predictions.tsv` | cross-validated predictions, one row per participant |
| `desc-<model><Target>_metrics.json` | scores, intervals, chance level, baselines |
| `desc-<model><Target>_externalmetrics.json` | scores of a read-out that another cohort gave |
| `models/desc-<model>/` | the model: weights (safetensors) and description (JSON) |
| `logs/inputs.tsv` | every candidate image and what became of it |
| `logs/phenotypes.tsv` | whom each row of the phenotype tables belongs to |
| `logs/metrics.csv` | training curves |
| `logs/run.json` | what was run, when, with which versions |
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

_REMEMBERED = 50
"""Earlier commands that ``logs/run.json`` tells of."""


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
    """

    def __init__(
        self,
        bids_dir: Path,
        output_dir: Path,
        *,
        work_dir: Path | None = None,
        command: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_places(bids_dir, output_dir)
        self.bids_dir = bids_dir.resolve()
        self.path = output_dir.resolve()
        self.work = self.path / ".work" if work_dir is None else work_dir.resolve()
        self.record: dict[str, Any] = {
            "command": list(command),
            "config": dict(config or {}),
            "versions": versions(),
            "host": socket.gethostname(),
            "started": _now(),
            "stages": [],
            "exit_status": None,
            "earlier": [],
        }
        self.worked = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's lock, and keep ``logs/run.json`` true to the end.

        Raises
        ------
        OutputInUseError
            When another run holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path / ".lock"):
            self._describe()
            self.record["earlier"] = self._earlier_runs()
            self.save_record()
            try:
                yield
            except BaseException as error:
                self.record["exit_status"] = exit_status(error)
                self.record["error"] = str(error)
                self.save_record()
                raise
            self.record["exit_status"] = 0
            self.save_record()

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Record a stage: name, start, seconds, the step it resumed from, whether it was skipped."""
        entry: dict[str, Any] = {
            "name": name,
            "started": _now(),
            "seconds": None,
            "resumed_from_step": None,
            "skipped": False,
        }
        self.record["stages"].append(entry)
        start = time.monotonic()
        try:
            yield entry
        finally:
            entry["seconds"] = round(time.monotonic() - start, 2)
            self.worked = self.worked or not entry["skipped"]
            self.save_record()

    def save_record(self) -> None:
        """Write ``logs/run.json``."""
        write_json(self.path / "logs" / "run.json", self.record)

    def _earlier_runs(self) -> list[dict[str, Any]]:
        """Return what earlier commands did here, oldest first."""
        try:
            before = read_json(self.path / "logs" / "run.json")
            told = {name: before[name] for name in ("command", "started", "stages", "exit_status")}
            return [*before["earlier"], told][-_REMEMBERED:]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _describe(self) -> None:
        """Write what makes the folder a BIDS derivative, where it is missing."""
        source = self.bids_dir
        link = os.path.relpath(source, self.path)
        name = _dataset_name(source)
        files: dict[str, Any] = {
            "dataset_description.json": {
                "Name": f"nidl_dcl embeddings of {name}",
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
            "README.md": _README.format(source=name),
            "CHANGES": f"{__version__} {_now()[:10]}\n - Written by nidl_dcl {__version__}.\n",
            ".bidsignore": "\n".join(_IGNORED) + "\n",
            "logs/CITATION.md": CITATION.format(version=__version__),
        }
        for file, content in files.items():
            target = self.path / file
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
    if target.exists() and not target.is_dir():
        raise UsageError(f"OUTPUT_DIR {output_dir} is a file.")
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


def exit_status(error: BaseException) -> int:
    """Return the exit status that an exception stands for."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 143
    return int(getattr(error, "exit_status", 1))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip() or "another run"
            raise OutputInUseError(
                f"{path.parent} is being written by {holder}. Wait for it, or choose another "
                "OUTPUT_DIR."
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _dataset_name(bids_dir: Path) -> str:
    try:
        name = read_json(bids_dir / "dataset_description.json")["Name"]
    except (OSError, ValueError, KeyError, TypeError):
        return bids_dir.name
    return str(name)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

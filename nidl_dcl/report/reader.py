"""What an output folder holds so far, read for the report: missing or broken files are no error.

Reads and checks form; nothing is computed, and pictures and pages are made elsewhere.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.io.formats import camel_case


@dataclass(frozen=True)
class Score:
    """A mean with its interval; None where undefined."""

    mean: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TargetResult:
    """The files of one predicted target: `label` is its column's `name` as it stands in file names."""

    label: str
    name: str
    metrics: dict[str, Any]
    predictions: pd.DataFrame
    units: str


class Results:
    """The files of one model in an output folder; `problems` tells what could not be read so far."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.problems: list[str] = []

    def has(self, name: str) -> bool:
        """Return whether the folder holds the file `name`."""
        return (self.folder / name).is_file()

    def text(self, name: str) -> str:
        """Return the content of a text file, empty where there is none."""
        return (self._bytes(name) or b"").decode("utf-8-sig", errors="replace")

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file, empty where there is none."""
        text = self.text(name)
        try:
            value = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{name} is not JSON: {error}")
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{name} holds a {type(value).__name__}, not an object.")
            return {}
        return value

    def table(self, name: str) -> pd.DataFrame:
        """Return a TSV or CSV file as text with missing values, empty where there is none."""
        if not self.text(name).strip():
            return pd.DataFrame()
        comma = name.endswith(".csv")
        try:
            with warnings.catch_warnings():
                # Rows longer than the header would be cut in silence.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                return pd.read_csv(
                    self.folder / name,
                    sep="," if comma else "\t",
                    dtype="str",
                    keep_default_na=False,
                    na_values=["n/a", ""],
                    quoting=csv.QUOTE_MINIMAL if comma else csv.QUOTE_NONE,
                    encoding="utf-8-sig",
                    encoding_errors="replace",
                    index_col=False,
                )
        except (ValueError, pd.errors.ParserWarning) as error:
            self.problems.append(f"{name} is not a table: {error}")
            return pd.DataFrame()

    def numbers(self, name: str) -> pd.DataFrame:
        """Return a table like `table`, with the columns that hold only numbers as float64."""
        table = self.table(name)
        for column in table.columns:
            if table[column].notna().any():
                values = pd.to_numeric(table[column], errors="coerce").astype("float64")
                if values.notna().equals(table[column].notna()):
                    table[column] = values
        return table

    def png(self, name: str) -> bytes:
        """Return the bytes of a PNG file, empty where there is none."""
        raw = self._bytes(name)
        if raw is not None and (raw[:8] != b"\x89PNG\r\n\x1a\n" or len(raw) < 33):
            self.problems.append(f"{name} is not a PNG.")
            return b""
        return raw or b""

    def _bytes(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.problems.append(f"{name}: {error.strerror}.")
            return None

    def array(self, name: str) -> NDArray[Any] | None:
        """Return the array of an NPY file, mapped from disk; None where there is none."""
        if not self.has(name):
            return None
        try:
            array: NDArray[Any] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            self.problems.append(f"{name} is not an array: {error}")
            return None
        return array

    def targets(self) -> list[TargetResult]:
        """Return the targets that were predicted from this model, by file name."""
        found = []
        for label, name, metrics in self._metrics("metrics"):
            stem = f"desc-{self.model}{label}_predictions"
            units = str(as_dict(self.json(f"{stem}.json").get("target")).get("Units", ""))
            found.append(TargetResult(label, name, metrics, self.table(f"{stem}.tsv"), units))
        return found

    def external(self) -> list[dict[str, Any]]:
        """Return what readouts of another cohort gave, the content of each file by its name."""
        found = self._metrics("externalmetrics")
        return [metrics for _, _, metrics in found if metrics.get("target") is not None]

    def _metrics(self, kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield label, target and content of the metrics files of this model."""
        pattern = re.compile(rf"desc-{re.escape(self.model)}([A-Z0-9][A-Za-z0-9]*)_{kind}\.json")
        names = sorted(path.name for path in self.folder.iterdir())
        for match in filter(None, map(pattern.fullmatch, names)):
            label, metrics = match[1], self.json(match[0])
            name = str(metrics.get("target") or label)
            # With a model `dcl` and a model `dclBig`, `desc-dclBigAge` is a target of the second.
            if metrics and _label(name) in (label, None):
                yield label, name, metrics


def as_dict(value: Any) -> dict[str, Any]:
    """Return `value` if it is a mapping, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """Return `value` if it is a list, else an empty one."""
    return list(value) if isinstance(value, list | tuple) else []


def as_number(value: Any) -> float | None:
    """Return `value` as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if np.isfinite(value) else None


def as_spacing(value: Any) -> list[float]:
    """Return the three sizes of a voxel in mm, 1 where they are not given."""
    sizes = [abs(as_number(size) or 1.0) for size in as_list(value)]
    return sizes if len(sizes) == 3 else [1.0, 1.0, 1.0]


def as_score(value: Any) -> Score:
    """Return the mean and interval of an entry of a metrics file."""
    if not isinstance(value, Mapping):
        return Score(as_number(value))
    ends = as_list(value.get("ci95"))
    low, high = ends if len(ends) == 2 else (None, None)
    return Score(as_number(value.get("mean")), as_number(low), as_number(high))


def _label(name: str) -> str | None:
    try:
        return camel_case(name)
    except ValueError:
        return None

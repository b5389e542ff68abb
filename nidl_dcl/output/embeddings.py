"""The table of a dataset's embeddings on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import finish_together, replacing, write_together
from nidl_dcl.io.formats import to_json, to_npy, to_tsv

_DESCRIPTIONS = {
    "participant_id": "Participant, as in participants.tsv",
    "session_id": "Session of the image",
    "run": "Run of the image",
    "source": "BIDS URI of the image (of the source dataset named in DatasetLinks)",
    "split": "What pretraining did with the participant: train, val, holdout (kept out of it) or not_in_training (came later, or is of another dataset); n/a if unknown",
    "row": "Row of the array in the .npy file of the same name, from 0",
}

COLUMNS = tuple(_DESCRIPTIONS)


class Embeddings:
    """A table of images with a matrix of embeddings, row by row.

    Parameters
    ----------
    table : DataFrame
        Columns `COLUMNS`.
    matrix : ndarray of shape (n, d), float32
        One row per row of the table.
    config : mapping
        Where they come from: model checksum and preparation.
    """

    def __init__(
        self, table: pd.DataFrame, matrix: np.ndarray, config: Mapping[str, Any] | None = None
    ) -> None:
        self.table = table.reset_index(drop=True)
        self.matrix = matrix
        self.config = dict(config or {})


def write_embeddings(folder: Path, label: str, embeddings: Embeddings) -> None:
    """Write ``desc-<label>_embeddings`` as TSV, JSON and NPY.

    Parameters
    ----------
    folder : Path
        The output folder.
    label : str
        The model's label.
    embeddings : Embeddings
        What is written.
    """
    sidecar = {
        **{name: {"Description": text} for name, text in _DESCRIPTIONS.items()},
        "Description": "One embedding per image; the matrix is in the .npy file of the same name",
        "Shape": list(embeddings.matrix.shape),
        "Config": embeddings.config,
    }
    files = {
        "npy": bytes(to_npy(embeddings.matrix.astype(np.float32))),
        "tsv": _table_text(embeddings).encode("utf-8", "backslashreplace"),
        "json": to_json(sidecar).encode("utf-8", "backslashreplace"),
    }
    stem = _stem(label)
    write_together(folder, stem, {f"{stem}.{kind}": content for kind, content in files.items()})


def is_written(folder: Path, label: str, embeddings: Embeddings) -> bool:
    """Return whether `write_embeddings` would change nothing.

    Parameters
    ----------
    folder : Path
        The output folder.
    label : str
        The model's label.
    embeddings : Embeddings
        What would be written.
    """
    tsv, npy, note = _finished(folder, label)
    return (
        all(file.is_file() for file in (tsv, npy, note))
        and tsv.read_text("utf-8") == _table_text(embeddings)
        and np.array_equal(np.load(npy, allow_pickle=False), embeddings.matrix)
    )


def _table_text(embeddings: Embeddings) -> str:
    table = embeddings.table
    return to_tsv(table.assign(row=range(len(table)))[list(COLUMNS)])


def write_parquet(folder: Path, label: str, embeddings: Embeddings) -> None:
    """Write ids and embeddings as one table, ``desc-<label>_embeddings.parquet``.

    Parameters
    ----------
    folder : Path
        The output folder.
    label : str
        The model's label.
    embeddings : Embeddings
        What is written: the columns of the TSV, then ``<label>000``, ``<label>001``, … (float32).
    """
    names = [f"{label}{i:03d}" for i in range(embeddings.matrix.shape[1])]
    matrix = pd.DataFrame(embeddings.matrix, columns=names)
    ids = embeddings.table[list(COLUMNS)].astype({"row": int})
    with replacing(folder / f"{_stem(label)}.parquet") as beside:
        pd.concat([ids, matrix], axis=1).to_parquet(beside, engine="pyarrow", index=False)


def read_embeddings(folder: Path, label: str) -> Embeddings | None:
    """Return the embeddings written for a model, None where there are none.

    Raises
    ------
    UsageError
        When the files are damaged, or do not belong together.
    """
    tsv, npy, note = _finished(folder, label)
    if not (tsv.is_file() and npy.is_file()):
        return None
    file = tsv
    try:
        table = pd.read_csv(
            tsv, sep="\t", dtype=str, keep_default_na=False, na_values=["n/a"], quoting=3
        )
        file = npy
        matrix = np.load(npy, allow_pickle=False)
        file = note
        config = json.loads(note.read_text("utf-8")).get("Config", {}) if note.is_file() else {}
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise UsageError(
            f"{file} is damaged ({str(error).splitlines()[0]}). Delete the .tsv, .npy and .json of "
            "that name and run `nidl-dcl embed` again."
        ) from error
    shape = np.shape(matrix)
    if len(shape) != 2 or len(table) != shape[0] or list(table.columns) != list(COLUMNS):
        raise UsageError(
            f"{tsv} and {npy.name} do not belong together ({len(table)} rows, and an array of shape "
            f"{shape}). Delete both and run `nidl-dcl embed` again."
        )
    return Embeddings(table, matrix, config)


def _stem(label: str) -> str:
    return f"desc-{label}_embeddings"


def _finished(folder: Path, label: str) -> tuple[Path, Path, Path]:
    """Return the TSV, NPY and JSON, once a killed `write_embeddings` was brought to its end."""
    stem = _stem(label)
    finish_together(folder, stem)
    return folder / f"{stem}.tsv", folder / f"{stem}.npy", folder / f"{stem}.json"

"""Participants held out until one last score: who they are, that no model saw them, how often used.

The split itself is made in `datamodule`, the score in `prediction`.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nidl_dcl.errors import UsageError
from nidl_dcl.exposure import recognise
from nidl_dcl.writing import to_tsv, write_bytes

__all__ = ["LEDGER", "note_score", "recorded_share", "refuse_seen"]

LEDGER = ("time", "target", "n_participants", "predicted_from", "metric", "score", "config")
"""Columns of ``logs/holdout.tsv``."""


def recorded_share(
    description: Mapping[str, Any], dataset: str, how: Sequence[str | None]
) -> float | None:
    """Return the share that a model was trained with, if that was on this dataset; else None.

    Parameters
    ----------
    description : mapping
        Content of ``model.json``.
    dataset : str
        Name of the folder of the dataset.
    how : sequence of (str or None)
        How each of its images is recognised (`nidl_dcl.exposure.recognise`). One of the same voxels
        tells that the dataset is the same; of model folders without images, the name does.
    """
    provenance = description.get("provenance") or {}
    config = provenance.get("config") or {}
    if "holdout" not in config:
        return None
    knows_images = "images" in (description.get("exposure") or {})
    same = "image" in how if knows_images else provenance.get("source") == dataset
    return float(config["holdout"]) if same else None


def refuse_seen(
    images: pd.DataFrame, contents: Sequence[str], exposure: Mapping[str, Any], model: Path
) -> None:
    """Refuse to hold out participants whom a model has seen.

    Parameters
    ----------
    images : DataFrame
        Columns ``participant_id`` and ``split``.
    contents : sequence of str
        Checksum of the voxels of each image.
    exposure : mapping
        Of the model.
    model : Path
        Its folder, for the message.

    Raises
    ------
    UsageError
        Saying how many there are, how they were recognised, and what to do.
    """
    aside = images["split"] == "holdout"
    how = pd.Series(recognise(images["participant_id"], contents, exposure), index=images.index)
    seen = how[aside & how.isin(["image", "id"])].groupby(images["participant_id"])
    by_image = seen.agg(lambda rows: "image" in set(rows))
    if by_image.empty:
        return
    n, n_image = len(by_image), int(by_image.sum())
    raise UsageError(
        f"{n} of {images.loc[aside, 'participant_id'].nunique()} participants to be held out were "
        f"seen when {model} was trained: {n_image} by their images, {n - n_image} by their id alone "
        f"(first: {by_image.index[0]}). Their scores would not be those of new participants. Train "
        "a model that leaves them out: `nidl-dcl pretrain --holdout FRACTION` with another "
        "--model-name or OUTPUT_DIR (and the same --random-seed), without --init of a model that "
        "saw them; or do without --holdout. An id alone may be another person of the same name: "
        "it counts as seen, to be safe."
    )


def note_score(folder: Path, row: Mapping[str, Any]) -> int:
    """Add a row to ``logs/holdout.tsv``, and return how often its target has been scored now.

    What stands in the file is kept, byte by byte.

    Parameters
    ----------
    folder : Path
        The output folder.
    row : mapping
        The columns of `LEDGER` but the time.
    """
    path = folder / "logs" / "holdout.tsv"
    before = path.read_bytes() if path.is_file() else b""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header, line = to_tsv(pd.DataFrame([{"time": now, **row}], columns=list(LEDGER))).splitlines()
    if not before:
        before = header.encode() + b"\n"
    if not before.endswith(b"\n"):
        before += b"\n"
    whole = before + line.encode("utf-8", "backslashreplace") + b"\n"
    write_bytes(path, whole)
    target = line.split("\t")[1].encode("utf-8", "backslashreplace")
    return sum(one.split(b"\t")[1:2] == [target] for one in whole.split(b"\n")[1:])

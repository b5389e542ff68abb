"""Who is trained on, held out or tested, and who is one person under several ids."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.data.exposure import recognize, validated
from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.missing_values import describe_missing
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.formats import to_tsv, utc_now
from nidl_dcl.models.model_source import ModelSource, folder_of
from nidl_dcl.models.serialization import read_description
from nidl_dcl.output.folder import Output
from nidl_dcl.workflow.factory import refuse_changes
from nidl_dcl.workflow.options import RunOptions

_LOGGER = logging.getLogger(__name__)


def hold_out(
    module: BIDSDataModule, share: float | None, model: ModelSource, group: str | None
) -> None:
    """Hold out the share of participants that was asked for, else whom the model's training did.

    Parameters
    ----------
    module : BIDSDataModule
        Divided anew.
    share : float or None
        As asked for; None: as the model was trained.
    model : Path or "builtin"
        Folder of the model, where it is trained already.
    group : str, optional
        Column whose equal values (a family) are held out together.

    Raises
    ------
    UsageError
        When the model has seen one of them, or was trained on this dataset with another share.
    """
    if not (folder_of(model) / "model.json").is_file():
        module.hold_out(share or 0.0, group)
        return
    description = read_description(model)
    exposure = description.get("exposure") or {}
    config = (description.get("provenance") or {}).get("config") or {}
    images = module.images
    how = recognize(images["participant_id"], images["content"], exposure)
    recorded = recorded_share(description, module.bids_dir.name, how)
    share = (recorded or 0.0) if share is None else share
    if recorded:
        refuse_changes(config, {"random_seed": module.random_state}, model)
        group = config.get("group")
    module.hold_out(share, group)
    refuse_seen(module.images, exposure, model)
    if recorded is not None:
        refuse_changes({"holdout": recorded}, {"holdout": share}, model)


def held_out_rows(images: pd.DataFrame) -> np.ndarray:
    """Return which images are held out: those of groups of which everybody is.

    Parameters
    ----------
    images : DataFrame
        Columns ``participant_id``, ``group_id`` and ``split``.
    """
    alone = images["split"] == "holdout"
    held_out = alone.groupby(images["group_id"].to_numpy()).transform("all")
    if moved := images.loc[alone & ~held_out, "participant_id"].nunique():
        _LOGGER.info(
            f"{moved} participants are not held out after all: others of their --group are not. "
            "Give --group when pretraining, too."
        )
    return np.asarray(held_out, dtype=bool)


def missing_groups(images: pd.DataFrame, group: str | None) -> dict[str, Any] | None:
    """Return whose value of the column of groups is missing, and what that means; None if nobody's."""
    if group is None:
        return None
    who = images["participant_id"].to_numpy(dtype=object)
    return describe_missing("group", group, images[group].isna().to_numpy(), who)


def pretraining_splits(images: pd.DataFrame, description: Mapping[str, Any]) -> list[str | None]:
    """Return what a model's pretraining did with the person of each image; None if not known.

    "holdout" are those who are held out on purpose; who came later, or is of another dataset, is
    "not_in_training".

    Parameters
    ----------
    images : DataFrame
        Columns ``participant_id``, ``person_id``, ``content`` and ``split``, as of a data module
        that holds out whom the model's training does.
    description : mapping
        Content of ``model.json``.
    """
    exposure = description.get("exposure") or {}
    people = images["participant_id"]
    how = pd.Series(recognize(people, images["content"], exposure), dtype=object)
    val = pd.Series(validated(people, exposure))
    held_out = (images["split"] == "holdout").to_numpy() & how.notna().to_numpy()
    table = pd.DataFrame({"seen": how.isin(["image", "id"]), "known": how.notna(), "val": val})
    table = table.assign(held_out=held_out).groupby(images["person_id"].to_numpy()).transform("max")
    split = np.select(
        [table["val"], table["seen"], table["held_out"], table["known"]],
        ["val", "train", "holdout", "not_in_training"],
        "",
    )
    return [str(s) or None for s in split]


def excluded_but_seen(inputs: pd.DataFrame, description: Mapping[str, Any], dataset: str) -> str:
    """Return that the training of a model saw people whose images are excluded; empty if it did not.

    Parameters
    ----------
    inputs : DataFrame
        Columns ``participant_id`` and ``code``.
    description : mapping
        Content of ``model.json``.
    dataset : str
        Name of the folder of the dataset: ids of another one are other people.
    """
    people = sorted(set(inputs.loc[inputs["code"] == "excluded", "participant_id"]))
    if (description.get("provenance") or {}).get("source") != dataset:
        return ""
    seen = recognize(people, [""] * len(people), description.get("exposure") or {}).count("id")
    if not seen:
        return ""
    return (
        f"{seen} participant{'s' * (seen > 1)} with excluded images took part in the training of this "
        "model, which stays as it is. To train without these images, give another --model-name or "
        "another OUTPUT_DIR."
    )


def record_holdout(
    output: Output, metrics: dict[str, Any], run: RunOptions, provenance: Mapping[str, Any]
) -> None:
    """Log who counts once; note in the ledger, before it is known elsewhere, what was held out.

    Parameters
    ----------
    output : Output
        Held for writing.
    metrics : dict
        Of one target; told how often its held-out participants were scored.
    run : RunOptions
        The model's label.
    provenance : mapping
        ``config`` and ``data`` that the score depends on.
    """
    if metrics["duplicates"]:
        _LOGGER.info(metrics["duplicates"]["sentence"])
    for kind, found in metrics["missing"].items():
        if kind != "group":  # which is said before anything is done
            _LOGGER.info(f"{metrics['target']}: {found['sentence']}")
    last = metrics["holdout"]
    if last is None:
        return
    last["times_scored"] = None
    if last["scores"]:
        metric = metrics["headline"]["metric"]
        made_of = json.dumps({**provenance["config"], "data": provenance["data"]}, sort_keys=True)
        row = {
            "target": metrics["target"],
            "n_participants": last["n_participants"],
            "predicted_from": f"embeddings of {run.model_name} and the baselines",
            "metric": metric,
            "score": last["scores"][metric]["mean"],
            "config": checksum([made_of]),
        }
        times = last["times_scored"] = note_score(output.path, row)
        if times > 1:
            last["sentence"] += (
                f" Held-out participants were scored {times} times for {metrics['target']} here "
                "(logs/holdout.tsv): if anything was chosen in between, this score is no longer new."
            )
    _LOGGER.info(last["sentence"])


def checksum(*columns: Any) -> str:
    """Return a checksum of values as text."""
    text = "\x1f".join(str(value) for column in columns for value in column)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


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
        How each of its images is recognized (`nidl_dcl.data.exposure.recognize`). One of the same voxels
        tells that the dataset is the same; of model folders without images, the name does.
    """
    provenance = description.get("provenance") or {}
    config = provenance.get("config") or {}
    if "holdout" not in config:
        return None
    knows_images = "images" in (description.get("exposure") or {})
    same = "image" in how if knows_images else provenance.get("source") == dataset
    return float(config["holdout"]) if same else None


def refuse_seen(images: pd.DataFrame, exposure: Mapping[str, Any], model: ModelSource) -> None:
    """Refuse to hold out participants whom a model has seen.

    Parameters
    ----------
    images : DataFrame
        Columns ``participant_id``, ``content`` and ``split``.
    exposure : mapping
        Of the model.
    model : Path or "builtin"
        Its folder, for the message.

    Raises
    ------
    UsageError
        Saying how many there are, how they were recognized, and what to do.
    """
    held_out = images["split"] == "holdout"
    recognized = recognize(images["participant_id"], images["content"], exposure)
    how = pd.Series(recognized, index=images.index)
    seen = how[held_out & how.isin(["image", "id"])].groupby(images["participant_id"])
    by_image = seen.agg(lambda rows: "image" in set(rows))
    if by_image.empty:
        return
    n, n_image = len(by_image), int(by_image.sum())
    raise UsageError(
        f"{n} of {images.loc[held_out, 'participant_id'].nunique()} participants to be held out were "
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
    header, line = to_tsv(
        pd.DataFrame([{"time": utc_now(), **row}], columns=list(LEDGER))
    ).splitlines()
    if not before:
        before = header.encode() + b"\n"
    if not before.endswith(b"\n"):
        before += b"\n"
    whole = before + line.encode("utf-8", "backslashreplace") + b"\n"
    write_bytes(path, whole)
    target = line.split("\t")[1].encode("utf-8", "backslashreplace")
    return sum(one.split(b"\t")[1:2] == [target] for one in whole.split(b"\n")[1:])

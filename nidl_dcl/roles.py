"""Who is who in a study: trained on, held out, tested, one person under several ids.

Decides by options, by the images and by what a model remembers of its training; `holdout` and
`exposure` have the rules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.assembly import refuse_changes
from nidl_dcl.console import Quiet
from nidl_dcl.datamodule import BIDSDataModule
from nidl_dcl.exposure import recognise, validated
from nidl_dcl.holdout import note_score, recorded_share, refuse_seen
from nidl_dcl.model_folder import read_description
from nidl_dcl.options import DataOptions, RunOptions
from nidl_dcl.output import Output
from nidl_dcl.together import joined

__all__ = [
    "checksum",
    "held_out_rows",
    "hold_out",
    "pretraining_splits",
    "recognised",
    "tell_people",
    "undivided_groups",
]


def hold_out(
    module: BIDSDataModule, data: DataOptions, run: RunOptions, model: Path, group: str | None
) -> DataOptions:
    """Hold out whom the options say, else whom the model's training did; return what is so.

    Raises
    ------
    UsageError
        When the model has seen one of them, or was trained on this dataset with another share.
    """
    if not (model / "model.json").is_file():
        module.hold_out(data.holdout or 0.0, group if data.holdout else None)
        return replace(data, holdout=module.holdout or None)
    description = read_description(model)
    exposure = description.get("exposure") or {}
    config = (description.get("provenance") or {}).get("config") or {}
    how = recognise(module.images["participant_id"], module.contents, exposure)
    recorded = recorded_share(description, module.bids_dir.name, how)
    share = (recorded or 0.0) if data.holdout is None else data.holdout
    if recorded:
        refuse_changes(config, {"random_seed": run.random_seed}, model)
        group = config.get("group")
    module.hold_out(share, group if share else None)
    refuse_seen(module.images, module.contents, exposure, model)
    if recorded is not None:
        refuse_changes({"holdout": recorded}, {"holdout": share}, model)
    return replace(data, holdout=share or None)


def held_out_rows(images: pd.DataFrame, groups: pd.Series[Any], console: Quiet) -> np.ndarray:
    """Return which images are held out: those of groups of which everybody is."""
    alone = images["split"] == "holdout"
    aside = alone.groupby(groups.to_numpy()).transform("all")
    if moved := images.loc[alone & ~aside, "participant_id"].nunique():
        console.say(
            f"{moved} participants are not held out after all: others of their --group are not. "
            "Give --group when pretraining, too."
        )
    return np.asarray(aside, dtype=bool)


def recognised(
    module: BIDSDataModule, exposure: Mapping[str, Any], rows: Sequence[int]
) -> list[str | None]:
    """Return how pretraining knows each image's participant: by image, by id, not, or unknown."""
    images = module.images.iloc[list(rows)]
    return recognise(images["participant_id"], [module.contents[i] for i in rows], exposure)


def pretraining_splits(module: BIDSDataModule, description: Mapping[str, Any]) -> list[str | None]:
    """Return what this model's pretraining did with each person; None where it is not known."""
    exposure = description.get("exposure") or {}
    how = pd.Series(recognised(module, exposure, range(len(module.images))), dtype=object)
    val = pd.Series(validated(module.images["participant_id"], exposure))
    table = pd.DataFrame({"seen": how.isin(["image", "id"]), "known": how.notna(), "val": val})
    table = table.groupby(module.persons).transform("max")
    split = np.select(
        [table["val"], table["seen"], table["known"]], ["val", "train", "holdout"], ""
    )
    return [str(s) or None for s in split]


def undivided_groups(
    images: pd.DataFrame, shared: Sequence[str | None], column: str | None
) -> pd.Series[Any]:
    """Return the groups that no split divides: participants, those who share an image, families."""
    families = [] if column is None else [images[column]]
    return pd.Series(joined(images["participant_id"], shared, *families), dtype=object)


def tell_people(
    output: Output,
    metrics: dict[str, Any],
    run: RunOptions,
    config: Mapping[str, Any],
    fingerprint: str,
    console: Quiet,
) -> None:
    """Say who counts once; note in the ledger, before it is known elsewhere, what was held out."""
    if metrics["duplicates"]:
        console.say(metrics["duplicates"]["sentence"])
    last = metrics["holdout"]
    if last is None:
        return
    last["times_scored"] = None
    if last["scores"]:
        metric = metrics["headline"]["metric"]
        made_of = json.dumps({**config, "data": fingerprint}, sort_keys=True)
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
    console.say(last["sentence"])


def checksum(*columns: Any) -> str:
    """Return a checksum of values as text."""
    text = "\x1f".join(str(value) for column in columns for value in column)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

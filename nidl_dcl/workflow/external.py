"""Readouts between cohorts, as files: keeps the one fitted here, applies another cohort's.

The thin part of the stage `predict` about them; what is computed is in
`nidl_dcl.evaluation.external_validation`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.cohort import describe_cohort
from nidl_dcl.evaluation.external_validation import find_overlap, validate_externally
from nidl_dcl.evaluation.prediction import PhenotypeResult
from nidl_dcl.evaluation.readout_file import (
    ReadoutFile,
    find_readout,
    remove_readout,
    write_readout,
)
from nidl_dcl.evaluation.targets import target_labels
from nidl_dcl.io.formats import beside, write_json, write_tsv
from nidl_dcl.io.hashing import salted
from nidl_dcl.randomness import key_seed


@dataclass(frozen=True, eq=False)
class EmbeddedDataset:
    """The embedded images of a dataset, row by row.

    Attributes
    ----------
    images : DataFrame, shape (n_images, n_columns)
        Those of a `BIDSDataModule`, with a column ``seen_by``: how pretraining is known to have seen
        the participant (`nidl_dcl.data.exposure.recognize`).
    features : ndarray, shape (n_images, n_features)
    quality : callable
        Gives the table of image quality, once asked for.
    random_seed : int
    model_sha256 : str
        Of the weights that gave the features.
    knows_images : bool, default=True
        Whether pretraining kept a record of its images, so that ``seen_by`` can tell.
    extra_features : DataFrame or None, shape (n_images, n_columns)
        What is predicted from beside the features.
    """

    images: pd.DataFrame
    features: np.ndarray
    quality: Callable[[], pd.DataFrame]
    random_seed: int
    model_sha256: str | None
    knows_images: bool = True
    extra_features: pd.DataFrame | None = None

    @property
    def ids(self) -> pd.DataFrame:
        """Whom each image is of, as `nidl_dcl.predict_phenotype` takes it."""
        ids = self.images[["participant_id", "session_id", "run", "source"]].copy()
        seen_by = self.images["seen_by"]
        seen = [None if way is None else way != "" for way in seen_by]
        ids["seen"] = pd.array(seen, dtype="boolean")
        ids["person_id"] = self.images["person_id"]
        return ids.assign(seen_by=seen_by) if self.knows_images else ids


def find_readouts(
    output_dir: Path,
    readout: Path | None,
    targets: Sequence[str],
    *,
    model: str,
    model_sha256: str | None,
) -> dict[str, ReadoutFile]:
    """Return the readout of each target in another output folder; none without one.

    Parameters
    ----------
    output_dir : Path
        The folder of this study.
    readout : Path or None
        The other one.
    targets : sequence of str
        Columns.
    model, model_sha256
        As for `nidl_dcl.evaluation.readout_file.find_readout`.

    Raises
    ------
    UsageError
        When it is the same folder, or one is missing, damaged or of another model.
    """
    if readout is None:
        return {}
    if readout.resolve() == output_dir:
        raise UsageError(
            f"--readout {readout} is OUTPUT_DIR itself: external validity needs another cohort."
        )
    return {
        target: find_readout(readout, target, label, model=model, model_sha256=model_sha256)
        for target, label in target_labels(targets).items()
    }


def keep_readout(
    file: Path,
    result: PhenotypeResult,
    cohort: EmbeddedDataset,
    columns: Mapping[str, str],
    units: str | None,
) -> None:
    """Write the readout of all used participants, with what is needed to apply it elsewhere.

    Harmonized features have none: one of before is removed.

    Parameters
    ----------
    file : Path
        Its description.
    result : PhenotypeResult
    cohort : EmbeddedDataset
        Its rows are those of the result.
    columns : mapping
        See `nidl_dcl.evaluation.cohort.cohort_columns`.
    units : str or None
        Of the target.
    """
    if result.readout is None:
        remove_readout(file)
        return
    metrics, used = result.metrics, result.fitted_on
    images = cohort.images.iloc[used]
    participants = images["participant_id"].astype(str).to_numpy(dtype=object)
    training = describe_cohort(images, participants, columns, cohort.quality().iloc[used])
    training["target"] = {k: metrics[k] for k in ("distribution", "classes") if k in metrics}
    contents = sorted(set(images["content"]) - {""})
    # Of images, not of ids, which could be tried until the salt fits.
    salt = f"{key_seed(cohort.random_seed, 'readout', *contents):08x}"
    stored = ReadoutFile(
        target=metrics["target"],
        task=metrics["task"],
        units=units,
        linear=result.readout,
        n_participants=metrics["n_participants"],
        model_sha256=str(cohort.model_sha256),
        training=training,
        internal={
            name: {key: score[key] for key in ("mean", "ci95")}
            for name, score in metrics["scores"].items()
        },
        members={
            "salt": salt,
            "participants": salted(participants, salt),
            "images": salted(contents, salt),
        },
    )
    write_readout(file, stored)


def applied_before(stem: Path, basis: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what `apply_readout` returned, if it needs not be done again."""
    try:
        known = json.loads(_beside(stem, "metrics.json").read_text("utf-8"))
        if known["provenance"] != basis or not _beside(stem, "predictions.tsv").is_file():
            return None
        return {name: known[name] for name in ("summary", "cross_validation")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def apply_readout(
    stored: ReadoutFile,
    cohort: EmbeddedDataset,
    columns: Mapping[str, str],
    stem: Path,
    basis: Mapping[str, Any],
    why: str | None,
) -> dict[str, Any]:
    """Apply another cohort's readout to this one and write what came of it.

    Parameters
    ----------
    stored : ReadoutFile
    cohort : EmbeddedDataset
    columns : mapping
        See `nidl_dcl.evaluation.cohort.cohort_columns`.
    stem : Path
        Beginning of the files.
    basis : mapping
        What the result depends on, for `applied_before`.
    why : str or None
        Why this cohort was not cross-validated itself.

    Returns
    -------
    dict
        ``summary`` and ``cross_validation`` (the reason `why`).
    """
    overlap = find_overlap(
        stored, cohort.ids, list(cohort.images["content"]), other_people=bool(basis["other_people"])
    )
    result = validate_externally(
        stored,
        cohort.features,
        cohort.images,
        cohort.images["group_id"],
        ids=cohort.ids,
        overlap=overlap,
        columns=columns,
        quality=cohort.quality(),
        extra_features=cohort.extra_features,
        units=basis["units"],
        random_state=cohort.random_seed,
    )
    done = {"summary": result.summary(), "cross_validation": why}
    write_tsv(_beside(stem, "predictions.tsv"), result.predictions)
    write_json(_beside(stem, "predictions.json"), result.columns)
    write_json(_beside(stem, "metrics.json"), {**result.metrics, **done, "provenance": basis})
    return done


def _beside(stem: Path, ending: str) -> Path:
    return beside(stem, f"_external{ending}")

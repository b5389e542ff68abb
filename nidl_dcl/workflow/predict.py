"""The stage `predict`: phenotypes from embeddings, and all that is compared with them.

Reads and writes files, and does nothing twice; what is computed is in `nidl_dcl.evaluation`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.data.exposure import recognize, records_images
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.cohort import cohort_columns
from nidl_dcl.evaluation.extra_features import extra_weight
from nidl_dcl.evaluation.prediction import PhenotypeResult, predict_phenotype
from nidl_dcl.evaluation.readout_file import ReadoutFile, readout_exists, readout_path
from nidl_dcl.evaluation.site_effects import AuditedSites, site_audit
from nidl_dcl.io.console import progress_of
from nidl_dcl.io.formats import beside, keep_tsv, to_tsv, write_json, write_tsv
from nidl_dcl.models.baselines import baseline_features, read_voxels
from nidl_dcl.models.serialization import load_model, read_description
from nidl_dcl.output.embeddings import read_embeddings
from nidl_dcl.volumes.preparation import Preparation
from nidl_dcl.workflow.external import (
    EmbeddedDataset,
    applied_before,
    apply_readout,
    find_readouts,
    keep_readout,
)
from nidl_dcl.workflow.factory import refuse_changes
from nidl_dcl.workflow.figure_data import write_outliers, write_retrieval
from nidl_dcl.workflow.inputs import Study
from nidl_dcl.workflow.occlusion_maps import Occlusion, forget_old, occlude
from nidl_dcl.workflow.options import PredictionOptions
from nidl_dcl.workflow.participants import checksum, held_out_rows, missing_groups, record_holdout
from nidl_dcl.workflow.preflight import (
    check_targets,
    is_site_name,
    refuse_unusable,
    site_column,
    task_of,
)

_LOGGER = logging.getLogger(__name__)


def predict(
    study: Study, targets: Sequence[str], prediction: PredictionOptions | None = None
) -> list[dict[str, Any]]:
    """Predict phenotypes from the embeddings, cross-validated by participant.

    Parameters
    ----------
    study : Study
        Dataset, output folder (with embeddings) and common options.
    targets : sequence of str
        Columns of the phenotype tables.
    prediction : PredictionOptions, optional
        How to predict; its ``group`` is the study's.

    Returns
    -------
    list of dict
        One row per target: score with interval, chance level, baselines, participants. With a
        readout of another cohort its scores stand in ``external``; where this cohort cannot be
        cross-validated itself, ``target`` and ``external`` are all.
    """
    prediction = prediction or PredictionOptions(group=study.group)
    if prediction.group != study.group:
        raise UsageError(
            f"The study keeps groups of {study.group!r} together, the prediction those of "
            f"{prediction.group!r}: give both the same."
        )
    with study.output.stage("predict") as entry:
        cohort = _open_cohort(study, targets, prediction)
        found = [_predict_target(cohort, target) for target in targets]
        computed = any(one.computed for one in found)
        applied = any(one.applied for one in found)
        mapped = _map_readouts(cohort, computed)
        _write_figures(cohort, computed, applied)
        entry["skipped"] = not (computed or applied or mapped)
    return [one.row for one in found]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Cohort:
    """What all targets share; row i of the embedded images and of each list is one image."""

    study: Study
    prediction: PredictionOptions
    labels: dict[str, str]  # target to its label in file names
    readouts: dict[str, ReadoutFile]  # of another cohort, by target
    module: BIDSDataModule
    rows: list[int]  # of the images in the module
    embedded: EmbeddedDataset
    held_out: NDArray[np.bool_]
    read_voxels: Callable[[], tuple[np.ndarray, pd.DataFrame]]  # and image quality, once
    audits: dict[str, dict[str, Any]] = field(default_factory=dict)  # by column of sites

    @cached_property
    def baselines(self) -> dict[str, Any]:
        """What the embeddings have to beat: features of untrained encoders, and the voxels."""
        model = load_model(self.study.model_folder, trust=self.study.trust)
        found = baseline_features(self.module, self.rows, self.read_voxels()[0], model)
        # What is subtracted from all voxels is not held out either.
        first = int(np.argmin(self.held_out))
        return {**found, "voxels": replace(found["voxels"], origin=first)}

    def audit(self, site: str | None) -> dict[str, Any] | None:
        """Return how well sites are decoded from the embeddings."""
        if site is None:
            return None
        if site not in self.audits:
            kept = ~self.held_out
            self.audits[site] = site_audit(
                self.embedded.features[kept],
                self.embedded.images[site][kept],
                self.embedded.images["group_id"][kept],
                random_state=self.study.run.random_seed,
                progress=progress_of(f"decoding {site}"),
            )
        return self.audits[site]


def _open_cohort(study: Study, targets: Sequence[str], prediction: PredictionOptions) -> _Cohort:
    """Refuse what cannot be done, prepare the images and find out who is who."""
    run, folder = study.run, study.model_folder
    embeddings = read_embeddings(study.output.path, run.model_name)
    if embeddings is None:
        raise UsageError(
            f"{study.output.path} has no embeddings of model {run.model_name!r}. Run `nidl-dcl "
            "embed`, or look at --model-name."
        )
    digest = embeddings.config.get("model_sha256")
    description = read_description(folder)
    readouts = find_readouts(
        study.output.path, prediction.readout, targets, model=run.model_name, model_sha256=digest
    )
    labels = check_targets(study.table, targets, prediction)
    contract = Preparation.from_dict(description["input_contract"])
    module = study.data_module(folder, preparation=contract)
    study.prepare(module)
    row_of = {source: row for row, source in enumerate(embeddings.table["source"])}
    rows = [i for i, source in enumerate(module.images["source"]) if source in row_of]
    images = module.images.iloc[rows].reset_index(drop=True)
    study.announce(refuse_unusable(images, targets, prediction, study.table))
    exposure = description["exposure"]
    images["seen_by"] = pd.Series(
        recognize(images["participant_id"], images["content"], exposure), dtype=object
    )
    reading = cache(partial(read_voxels, module, rows))
    embedded = EmbeddedDataset(
        images=images,
        features=embeddings.matrix[[row_of[source] for source in images["source"]]],
        quality=lambda: reading()[1],
        random_seed=run.random_seed,
        model_sha256=digest,
        knows_images=records_images(exposure),
        extra_features=_brain_volumes(images, study.table.phenotype_columns),
    )
    for stored in readouts.values():  # refused before anything is computed
        stored.linear.with_extra(embedded.features, embedded.extra_features)
    return _Cohort(
        study=study,
        prediction=prediction,
        labels=labels,
        readouts=readouts,
        module=module,
        rows=rows,
        embedded=embedded,
        held_out=held_out_rows(images),
        read_voxels=reading,
    )


def _brain_volumes(images: pd.DataFrame, phenotypes: Sequence[str]) -> pd.DataFrame | None:
    """Return the log of each brain's volume in ml, where alignment took the size out of the images.

    Such images have a column ``brain_ml``, which is not that of a table of phenotypes.
    """
    if "brain_ml" not in images or "brain_ml" in phenotypes:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # refused later, with the image's name
        return pd.DataFrame({"log_brain_volume": np.log(images["brain_ml"].to_numpy(np.float64))})


@dataclass(frozen=True, eq=False, kw_only=True)
class _Target:
    """A phenotype to predict: its files, and what its result depends on."""

    name: str
    stem: Path  # beginning of its files
    readout: Path
    site: str | None
    columns: dict[str, str]  # of age, sex and site
    units: str | None
    task: str  # as asked, or as the tables say
    config: dict[str, Any]
    fingerprint: str

    @property
    def provenance(self) -> dict[str, Any]:
        """What is kept with a result, to tell later whether it is still right."""
        return {"config": self.config, "data": self.fingerprint}


def _describe_target(cohort: _Cohort, name: str) -> _Target:
    """Return where a target's files are, and options and data that its result depends on."""
    prediction, model, label = cohort.prediction, cohort.study.run.model_name, cohort.labels[name]
    site = site_column(cohort.study.table.phenotype_columns, prediction.site, name)
    columns = cohort_columns(cohort.embedded.images, site)
    config = {
        "random_seed": cohort.study.run.random_seed,
        "group": prediction.group,
        "site": site,
        "confounds": prediction.confounds,
        "harmonize": prediction.harmonize,
        "model_sha256": cohort.embedded.model_sha256,
        "holdout": float(cohort.module.holdout),
    }
    task = task_of(cohort.study.table, name, prediction)
    if name in prediction.tasks:
        config["task"] = task
    used = [name, *(c for c in (prediction.group, site) if c), *prediction.confounds]
    return _Target(
        name=name,
        stem=cohort.study.output.path / f"desc-{model}{label}",
        readout=readout_path(cohort.study.output.path, model, label),
        site=site,
        columns=columns,
        units=cohort.study.table.units(name),
        task=task,
        config=config,
        fingerprint=_fingerprint(cohort, [*used, *columns.values()], task),
    )


def _fingerprint(cohort: _Cohort, columns: Sequence[str], task: str) -> str:
    """Return a checksum of the embeddings, of columns beside them and of who is who."""
    embedded = cohort.embedded
    names = dict.fromkeys(["participant_id", "session_id", "source", *columns])
    table = embedded.images[list(names)]
    digest = hashlib.blake2b(to_tsv(table).encode(), digest_size=16)
    digest.update(b"shared scaling, wide grids of penalties")
    if task == "quantity":
        digest.update(b"quantity")
    if cohort.prediction.harmonize:
        digest.update(b"harmonize")
    digest.update(np.ascontiguousarray(embedded.features).tobytes())
    if embedded.extra_features is not None:
        weight = extra_weight(embedded.features.shape[1])
        digest.update(f"{weight}{to_tsv(embedded.extra_features)}".encode())
    people = checksum(
        *(embedded.images[name] for name in ("person_id", "group_id")),
        cohort.held_out,
        embedded.images["seen_by"],
    )
    return digest.hexdigest() + people


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What came of a target: its row in the table of targets, and what was done for it now."""

    row: dict[str, Any]
    computed: bool  # or tried to
    applied: bool


def _predict_target(cohort: _Cohort, name: str) -> _Found:
    """Cross-validate a target and apply another cohort's readout, where that is not done yet.

    Without that readout, a target that cannot be cross-validated is an error.
    """
    target, given = _describe_target(cohort, name), cohort.readouts.get(name)
    basis: dict[str, Any] = {
        **target.provenance,
        "readout": given and given.sha256,
        "other_people": cohort.prediction.other_people,
        "units": target.units,
    }
    outside = None if given is None else applied_before(target.stem, basis)
    why: str | None = None if outside is None else outside["cross_validation"]
    done = _done_before(cohort, target)
    computed, applied = done is None and not why, False
    if computed:
        baselines, audit = cohort.baselines, cohort.audit(target.site)
        try:
            result = _cross_validate(cohort, target, baselines, audit)
        except InputsUnusableError as error:
            if given is None:
                raise
            why = str(error)
        else:
            done = _write_result(cohort, target, result)
    if given is not None and outside is None:
        outside = apply_readout(given, cohort.embedded, target.columns, target.stem, basis, why)
        applied = True
    if why:
        _LOGGER.info(f"{name}: only the other cohort's readout is applied. {why}")
    row = dict(done or {"target": name})
    if outside is not None:
        row["external"] = outside["summary"]
    return _Found(row=row, computed=computed, applied=applied)


def _done_before(cohort: _Cohort, target: _Target) -> dict[str, Any] | None:
    """Return the summary of a prediction that needs not be done again; refuse a changed one.

    A column of sites that was found, or is gone, is new data: only a named one is configuration.
    """
    file = beside(target.stem, "_metrics.json")
    tables = (beside(target.stem, f"_{name}.tsv") for name in ("predictions", "folds"))
    if not file.is_file() or not all(table.is_file() for table in tables):
        return None
    try:
        known = json.loads(file.read_text("utf-8"))
        provenance, summary = known["provenance"], known["summary"]
    except (ValueError, KeyError, TypeError):
        return None
    before, now = dict(provenance.get("config", {})), target.config
    if cohort.prediction.site is None and is_site_name(before.get("site")):
        before.pop("site", None)
    own = cohort.study.model_folder
    refuse_changes(
        before,
        now,
        file,
        f"To keep both: `nidl-dcl study` with the new options, --model {own} and another "
        "--model-name, in the same OUTPUT_DIR; nothing is trained or embedded again. To replace "
        f"what is there: remove {target.stem.name}_*.",
    )
    if not (readout_exists(target.readout) or target.config["harmonize"]):
        return None
    return dict(summary) if provenance.get("data") == target.fingerprint else None


def _cross_validate(
    cohort: _Cohort, target: _Target, baselines: dict[str, Any], audit: dict[str, Any] | None
) -> PhenotypeResult:
    embedded, confounds = cohort.embedded, cohort.prediction.confounds
    images = embedded.images
    return predict_phenotype(
        embedded.features,
        images[target.name],
        images["group_id"],
        target=target.name,
        task=target.task,
        scaling="shared",
        baselines=baselines,
        extra_features=embedded.extra_features,
        site=None if audit is None else AuditedSites(images[target.site], audit),
        confounds=images[confounds] if confounds else None,
        harmonize=cohort.prediction.harmonize,
        held_out=cohort.held_out,
        ids=embedded.ids,
        random_state=cohort.study.run.random_seed,
        progress=progress_of(f"predicting {target.name}"),
    )


def _write_result(cohort: _Cohort, target: _Target, result: PhenotypeResult) -> dict[str, Any]:
    """Write what a cross-validation gave, the metrics last; return its summary."""
    if found := missing_groups(cohort.embedded.images, cohort.prediction.group):
        result.metrics["missing"]["group"] = found
    record_holdout(cohort.study.output, result.metrics, cohort.study.run, target.provenance)
    summary = result.summary()
    metrics = {**result.metrics, "summary": summary, "provenance": target.provenance}
    write_tsv(beside(target.stem, "_predictions.tsv"), result.predictions)
    write_json(beside(target.stem, "_predictions.json"), result.columns)
    write_tsv(beside(target.stem, "_folds.tsv"), result.folds, exact=True)
    write_json(beside(target.stem, "_folds.json"), result.fold_columns)
    keep_readout(target.readout, result, cohort.embedded, target.columns, target.units)
    write_json(beside(target.stem, "_metrics.json"), metrics)
    return summary


def _map_readouts(cohort: _Cohort, computed: bool) -> bool:
    """Write where the readouts look, if asked for; return whether any map had to be made."""
    output, run = cohort.study.output, cohort.study.run
    if not cohort.prediction.occlusion:
        forget_old(output.path, run.model_name, cohort.labels.values())
        return False
    asked = Occlusion(
        output.path,
        output.work,
        cohort.module,
        cohort.rows,
        cohort.embedded,
        cohort.held_out,
        cohort.baselines["untrained"][0] if computed else None,
    )
    return occlude(asked, cohort.labels, cohort.prediction, run, trust=cohort.study.trust)


def _write_figures(cohort: _Cohort, computed: bool, applied: bool) -> None:
    """Write image quality, outliers and retrieval, where what they show was worked out now."""
    study, features = cohort.study, cohort.embedded.features
    quality = study.output.path / "logs" / "quality.tsv"
    if computed or applied or not quality.is_file():
        keep_tsv(quality, cohort.read_voxels()[1])
        write_outliers(study.figures, cohort.module, cohort.rows, features)
    if computed:
        compared = {"embeddings": [features], "untrained": cohort.baselines["untrained"]}
        seed = study.run.random_seed
        write_retrieval(study.figures, cohort.module, cohort.rows, compared, seed)

"""The stage `predict`: phenotypes from embeddings, and all that is compared with them.

Reads and writes files, and does nothing twice; what is computed is in `prediction`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.data.exposure import records_images
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.cohort import cohort_columns
from nidl_dcl.evaluation.prediction import PhenotypeResult, predict_phenotype, site_audit
from nidl_dcl.evaluation.readout_file import ReadoutFile, readout_path
from nidl_dcl.io.console import NullReporter, progress_of
from nidl_dcl.io.formats import beside, keep_tsv, to_tsv, write_json, write_tsv
from nidl_dcl.models.serialization import read_description, weights_sha256
from nidl_dcl.output.embeddings import Embeddings, read_embeddings
from nidl_dcl.output.folder import Output
from nidl_dcl.volumes.preparation import Preparation
from nidl_dcl.workflow.baselines import baseline_features, read_voxels
from nidl_dcl.workflow.embed import merge_parts
from nidl_dcl.workflow.external import (
    EmbeddedDataset,
    applied_before,
    apply_readout,
    find_readouts,
    keep_readout,
    told,
)
from nidl_dcl.workflow.factory import data_module, refuse_changes
from nidl_dcl.workflow.figure_data import write_outliers, write_retrieval
from nidl_dcl.workflow.inputs import set_up
from nidl_dcl.workflow.occlusion_maps import Occlusion, forget_old, occlude
from nidl_dcl.workflow.options import DataOptions, PredictionOptions, RunOptions
from nidl_dcl.workflow.participants import (
    checksum,
    held_out_rows,
    hold_out,
    recognized,
    tell_people,
    undivided_groups,
)
from nidl_dcl.workflow.preflight import check_targets, refuse_unusable, site_column

__all__ = ["predict"]


def predict(
    output: Output,
    targets: Sequence[str],
    data: DataOptions,
    run: RunOptions,
    prediction: PredictionOptions | None = None,
    *,
    trust: Sequence[str] = (),
    console: NullReporter | None = None,
) -> list[dict[str, Any]]:
    """Predict phenotypes from the embeddings, cross-validated by participant.

    Parameters
    ----------
    output : Output
        Dataset and output folder, with embeddings; held for writing.
    targets : sequence of str
        Columns of the phenotype tables.
    data, run, prediction
        Options.
    trust : sequence of str
        Packages whose encoders may be imported.
    console : Quiet, optional
        Told of messages and progress.

    Returns
    -------
    list of dict
        One row per target: score with interval, chance level, baselines, participants. With a
        readout of another cohort its scores stand in ``external``; where this cohort cannot be
        cross-validated itself, ``target`` and ``external`` are all.
    """
    console = output.heard(console)
    prediction = prediction or PredictionOptions()
    with output.stage("predict", share=run.share) as entry:
        study = _open_study(output, targets, data, run, prediction, trust, console)
        found = [_predict_target(study, target) for target in targets]
        computed = any(one.computed for one in found)
        applied = any(one.applied for one in found)
        mapped = _map_readouts(study, computed)
        _write_pictures(study, computed, applied)
        entry["skipped"] = not (computed or applied or mapped)
    return [one.row for one in found]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Study:
    """What all targets share; row i of the cohort and of each list is one embedded image."""

    output: Output
    run: RunOptions
    prediction: PredictionOptions
    trust: Sequence[str]
    console: NullReporter
    labels: dict[str, str]  # target to its label in file names
    readouts: dict[str, ReadoutFile]  # of another cohort, by target
    module: BIDSDataModule
    rows: list[int]  # of the images in the module
    cohort: EmbeddedDataset
    recognized: list[str | None]  # how pretraining knows each image's participant
    held_out: NDArray[np.bool_]
    reading: Callable[[], tuple[np.ndarray, pd.DataFrame]]  # voxels and image quality, read once
    audits: dict[str, dict[str, Any]] = field(default_factory=dict)  # by column of sites

    @cached_property
    def baselines(self) -> dict[str, Any]:
        """What the embeddings have to beat: features of untrained encoders, and the voxels."""
        found = baseline_features(
            self.module,
            self.rows,
            self.reading()[0],
            self.output.model_folder(self.run.model_name),
            self.run,
            self.trust,
            self.console,
        )
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
                self.cohort.features[kept],
                self.cohort.images[site][kept],
                self.cohort.groups[kept],
                random_state=self.run.random_seed,
                progress=progress_of(self.console, f"decoding {site}"),
            )
        return self.audits[site]


def _open_study(
    output: Output,
    targets: Sequence[str],
    data: DataOptions,
    run: RunOptions,
    prediction: PredictionOptions,
    trust: Sequence[str],
    console: NullReporter,
) -> _Study:
    """Refuse what cannot be done, prepare the images and find out who is who."""
    folder = output.model_folder(run.model_name)
    embeddings = _read_embeddings(output, run)
    digest = embeddings.config.get("model_sha256")
    description = read_description(folder)
    readouts = find_readouts(
        output.public, prediction.readout, targets, model=run.model_name, model_sha256=digest
    )
    contract = Preparation.from_dict(description["input_contract"])
    module = data_module(
        output.bids_dir, data, run, preparation=contract, work=output.work, console=console
    )
    labels = check_targets(module, targets, prediction)
    set_up(output, module, console)
    hold_out(module, data, run, folder, prediction.group)
    place = {source: row for row, source in enumerate(embeddings.table["source"])}
    rows = [i for i, source in enumerate(module.images["source"]) if source in place]
    images = module.images.iloc[rows].reset_index(drop=True)
    persons = [module.persons[i] for i in rows]
    refuse_unusable(images, persons, targets, prediction)
    groups = undivided_groups(images, persons, prediction.group)
    how = recognized(module, description["exposure"], rows)
    reading = cache(partial(read_voxels, module, rows, console))
    cohort = EmbeddedDataset(
        images=images,
        features=embeddings.matrix[[place[source] for source in images["source"]]],
        groups=groups,
        contents=[module.contents[i] for i in rows],
        seen=[None if way is None else way != "" for way in how],
        quality=lambda: reading()[1],
        random_seed=run.random_seed,
        model_sha256=digest,
        persons=persons,
        seen_by=how if records_images(description["exposure"]) else None,
    )
    return _Study(
        output=output,
        run=run,
        prediction=prediction,
        trust=trust,
        console=console,
        labels=labels,
        readouts=readouts,
        module=module,
        rows=rows,
        cohort=cohort,
        recognized=how,
        held_out=held_out_rows(images, groups, console),
        reading=reading,
    )


def _read_embeddings(output: Output, run: RunOptions) -> Embeddings:
    """Return the embeddings, those of parts that wait included."""
    folder = output.model_folder(run.model_name)
    if (folder / "model.json").is_file():
        merge_parts(output, run, folder, weights_sha256(folder))
    embeddings = read_embeddings(output.path, run.model_name)
    if embeddings is None:
        raise UsageError(
            f"{output.path} has no embeddings of model {run.model_name!r}. Run `nidl-dcl "
            "embed`, or look at --model-name."
        )
    return embeddings


@dataclass(frozen=True, eq=False, kw_only=True)
class _Target:
    """A phenotype to predict: its files, and what its result depends on."""

    name: str
    stem: Path  # beginning of its files
    readout: Path
    site: str | None
    columns: dict[str, str]  # of age, sex and site
    units: str | None
    config: dict[str, Any]
    fingerprint: str

    @property
    def provenance(self) -> dict[str, Any]:
        """What is kept with a result, to tell later whether it is still right."""
        return {"config": self.config, "data": self.fingerprint}


def _describe_target(study: _Study, name: str) -> _Target:
    """Return where a target's files are, and options and data that its result depends on."""
    prediction, model, label = study.prediction, study.run.model_name, study.labels[name]
    site = site_column(study.module, prediction, name)
    columns = cohort_columns(study.cohort.images, site)
    config = {
        "random_seed": study.run.random_seed,
        "group": prediction.group,
        "site": site,
        "confounds": prediction.confounds,
        "harmonize": prediction.harmonize,
        "model_sha256": study.cohort.model_sha256,
        "holdout": float(study.module.holdout),
    }
    used = [name, *(c for c in (prediction.group, site) if c), *prediction.confounds]
    return _Target(
        name=name,
        stem=study.output.path / f"desc-{model}{label}",
        readout=readout_path(study.output.path, model, label),
        site=site,
        columns=columns,
        units=study.module.units(name),
        config=config,
        fingerprint=_fingerprint(study, [*used, *columns.values()]),
    )


def _fingerprint(study: _Study, columns: Sequence[str]) -> str:
    """Return a checksum of the embeddings, of columns beside them and of who is who."""
    cohort = study.cohort
    table = cohort.images[list(dict.fromkeys(["participant_id", "session_id", "source", *columns]))]
    digest = hashlib.blake2b(to_tsv(table).encode(), digest_size=16)
    if study.prediction.harmonize:
        digest.update(b"harmonize")
    digest.update(np.ascontiguousarray(cohort.features).tobytes())
    people = checksum(cohort.persons, cohort.groups, study.held_out, study.recognized)
    return digest.hexdigest() + people


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What came of a target: its row in the table of targets, and what was done for it now."""

    row: dict[str, Any]
    computed: bool  # or tried to
    applied: bool


def _predict_target(study: _Study, name: str) -> _Found:
    """Cross-validate a target and apply another cohort's readout, where that is not done yet.

    Without that readout, a target that cannot be cross-validated is an error.
    """
    target, given = _describe_target(study, name), study.readouts.get(name)
    basis: dict[str, Any] = {
        **target.provenance,
        "readout": given and given.sha256,
        "other_people": study.prediction.other_people,
        "units": target.units,
    }
    outside = None if given is None else applied_before(target.stem, basis)
    why: str | None = None if outside is None else outside["cross_validation"]
    done = _done_before(target)
    computed, applied = done is None and not why, False
    if computed:
        baselines, audit = study.baselines, study.audit(target.site)
        try:
            result = _cross_validate(study, target, baselines, audit)
        except InputsUnusableError as error:
            if given is None:
                raise
            why = str(error)
        else:
            done = _write_result(study, target, result)
    if given is not None and outside is None:
        outside = apply_readout(given, study.cohort, target.columns, target.stem, basis, why)
        applied = True
    if why:
        study.console.say(f"{name}: only the other cohort's readout is applied. {why}")
    row = {**(done or {"target": name}), **told(outside)}
    return _Found(row=row, computed=computed, applied=applied)


def _done_before(target: _Target) -> dict[str, Any] | None:
    """Return the summary of a prediction that needs not be done again; refuse a changed one."""
    file = beside(target.stem, "_metrics.json")
    if not file.is_file() or not beside(target.stem, "_predictions.tsv").is_file():
        return None
    try:
        known = json.loads(file.read_text("utf-8"))
        provenance, summary = known["provenance"], known["summary"]
    except (ValueError, KeyError, TypeError):
        return None
    refuse_changes(provenance.get("config", {}), target.config, file)
    if not (target.readout.is_file() or target.config["harmonize"]):
        return None
    return dict(summary) if provenance.get("data") == target.fingerprint else None


def _cross_validate(
    study: _Study, target: _Target, baselines: dict[str, Any], audit: dict[str, Any] | None
) -> PhenotypeResult:
    cohort, confounds = study.cohort, study.prediction.confounds
    images = cohort.images
    return predict_phenotype(
        cohort.features,
        images[target.name],
        cohort.groups,
        target=target.name,
        baselines=baselines,
        site=None if target.site is None else images[target.site],
        audit=audit,
        confounds=images[confounds] if confounds else None,
        harmonize=study.prediction.harmonize,
        seen=cohort.seen,
        seen_by=cohort.seen_by,
        persons=cohort.persons,
        held_out=study.held_out,
        ids=images[["participant_id", "session_id", "run", "source"]],
        random_state=study.run.random_seed,
        progress=progress_of(study.console, f"predicting {target.name}"),
    )


def _write_result(study: _Study, target: _Target, result: PhenotypeResult) -> dict[str, Any]:
    """Write what a cross-validation gave, the metrics last; return its summary."""
    tell_people(
        study.output, result.metrics, study.run, target.config, target.fingerprint, study.console
    )
    summary = result.summary()
    metrics = {**result.metrics, "summary": summary, "provenance": target.provenance}
    write_tsv(beside(target.stem, "_predictions.tsv"), result.predictions)
    write_json(beside(target.stem, "_predictions.json"), result.columns)
    keep_readout(target.readout, result, study.cohort, target.columns, target.units)
    write_json(beside(target.stem, "_metrics.json"), metrics)
    return summary


def _map_readouts(study: _Study, computed: bool) -> bool:
    """Write where the readouts look, if asked for; return whether any map had to be made."""
    output, run = study.output, study.run
    if not study.prediction.occlusion:
        forget_old(output.path, run.model_name, study.labels.values())
        return False
    asked = Occlusion(
        output.path,
        output.work,
        study.module,
        study.rows,
        study.cohort,
        study.held_out,
        study.baselines["untrained"][0] if computed else None,
    )
    return occlude(
        asked, study.labels, study.prediction, run, trust=study.trust, console=study.console
    )


def _write_pictures(study: _Study, computed: bool, applied: bool) -> None:
    """Write image quality, outliers and retrieval, where what they show was worked out now."""
    figures, quality = study.output.path / "figures", study.output.path / "logs" / "quality.tsv"
    features = study.cohort.features
    if computed or applied or not quality.is_file():
        keep_tsv(quality, study.reading()[1])
        write_outliers(figures, study.module, study.rows, features)
    if computed:
        compared = {"embeddings": [features], "untrained": study.baselines["untrained"]}
        write_retrieval(figures, study.module, study.rows, compared, study.run.random_seed)

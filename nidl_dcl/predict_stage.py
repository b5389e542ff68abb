"""The stage `predict`: phenotypes from embeddings, and all that is compared with them.

Reads and writes files, and does nothing twice; what is computed is in `prediction`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.assembly import data_module, refuse_changes
from nidl_dcl.baselines import baseline_features, read_voxels
from nidl_dcl.cohort import cohort_columns
from nidl_dcl.console import Quiet, progress_of
from nidl_dcl.embed_stage import merge_parts
from nidl_dcl.embedding import read_embeddings
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.exposure import records_images
from nidl_dcl.figure_data import write_outliers, write_retrieval
from nidl_dcl.intake import set_up
from nidl_dcl.model_folder import read_description, weights_sha256
from nidl_dcl.occlusion_files import Occlusion, forget_old, occlude
from nidl_dcl.options import DataOptions, PredictionOptions, RunOptions
from nidl_dcl.output import Output
from nidl_dcl.prediction import predict_phenotype, site_audit
from nidl_dcl.readout_file import readout_path
from nidl_dcl.refusals import check_targets, refuse_unusable, site_column
from nidl_dcl.roles import (
    checksum,
    held_out_rows,
    hold_out,
    recognised,
    tell_people,
    undivided_groups,
)
from nidl_dcl.transfer import (
    Cohort,
    applied_before,
    apply_readout,
    find_readouts,
    keep_readout,
    told,
)
from nidl_dcl.volumes import Preparation
from nidl_dcl.writing import beside, keep_tsv, to_tsv, write_json, write_tsv

__all__ = ["predict"]


def predict(
    output: Output,
    targets: Sequence[str],
    data: DataOptions,
    run: RunOptions,
    prediction: PredictionOptions | None = None,
    *,
    trust: Sequence[str] = (),
    console: Quiet | None = None,
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
        read-out of another cohort its scores stand in ``external``; where this cohort cannot be
        cross-validated itself, ``target`` and ``external`` are all.
    """
    console = output.heard(console)
    prediction = prediction or PredictionOptions()
    with output.stage("predict", share=run.share) as entry:
        folder = output.path / "models" / f"desc-{run.model_name}"
        if (folder / "model.json").is_file():
            merge_parts(output, run, folder, weights_sha256(folder))
        embeddings = read_embeddings(output.path, run.model_name)
        if embeddings is None:
            raise UsageError(
                f"{output.path} has no embeddings of model {run.model_name!r}. Run `nidl-dcl "
                "embed`, or look at --model-name."
            )
        description = read_description(folder)
        digest = embeddings.config.get("model_sha256")
        readouts = find_readouts(
            output.public, prediction.readout, targets, model=run.model_name, model_sha256=digest
        )
        contract = Preparation.from_dict(description["input_contract"])
        module = data_module(
            output.bids_dir, data, run, preparation=contract, work=output.work, console=console
        )
        labels = check_targets(module, targets, prediction)
        set_up(output, module, console)
        data = hold_out(module, data, run, folder, prediction.group)
        images = module.images
        place = {source: row for row, source in enumerate(embeddings.table["source"])}
        kept = [i for i, source in enumerate(images["source"]) if source in place]
        images = images.iloc[kept].reset_index(drop=True)
        matrix = embeddings.matrix[[place[source] for source in images["source"]]]
        persons = [module.persons[i] for i in kept]
        refuse_unusable(images, persons, targets, prediction)
        groups = undivided_groups(images, persons, prediction.group)
        how = recognised(module, description["exposure"], kept)
        knows_images = records_images(description["exposure"])
        aside = held_out_rows(images, groups, console)
        reading = cache(partial(read_voxels, module, kept, console))
        cohort = Cohort(
            images,
            matrix,
            groups,
            [module.contents[i] for i in kept],
            [None if way is None else way != "" for way in how],
            lambda: reading()[1],
            run.random_seed,
            digest,
            persons,
            how if knows_images else None,
        )
        baselines: dict[str, Any] | None = None
        audits: dict[str, dict[str, Any]] = {}
        rows = []
        skipped = True
        for target in targets:
            stem = output.path / f"desc-{run.model_name}{labels[target]}"
            own = readout_path(output.path, run.model_name, labels[target])
            site = site_column(module, prediction, target)
            about = cohort_columns(images, site)
            config = {
                "random_seed": run.random_seed,
                "group": prediction.group,
                "site": site,
                "confounds": prediction.confounds,
                "harmonize": prediction.harmonize,
                "model_sha256": digest,
                "holdout": data.holdout or 0.0,
            }
            fingerprint = _fingerprint(images, target, prediction, site, matrix, about.values())
            fingerprint += checksum(persons, groups, aside, how)
            provenance = {"config": config, "data": fingerprint}
            given, units = readouts.get(target), module.units(target)
            basis: dict[str, Any] = {
                **provenance,
                "readout": given and given.sha256,
                "other_people": prediction.other_people,
                "units": units,
            }
            outside = None if given is None else applied_before(stem, basis)
            why: str | None = None if outside is None else outside["cross_validation"]
            done = _done_before(stem, config, fingerprint)
            if not (own.is_file() or prediction.harmonize):
                done = None
            if done is None and not why:
                skipped = False
                if baselines is None:
                    baselines = baseline_features(
                        module, kept, reading()[0], folder, run, trust, console
                    )
                    # What is subtracted from all voxels is not held out either.
                    first = int(np.argmin(aside))
                    baselines["voxels"] = replace(baselines["voxels"], origin=first)
                if site is not None and site not in audits:
                    audits[site] = site_audit(
                        matrix[~aside],
                        images[site][~aside],
                        groups[~aside],
                        random_state=run.random_seed,
                        progress=progress_of(console, f"decoding {site}"),
                    )
                try:
                    result = predict_phenotype(
                        matrix,
                        images[target],
                        groups,
                        target=target,
                        baselines=baselines,
                        site=None if site is None else images[site],
                        audit=None if site is None else audits[site],
                        confounds=images[prediction.confounds] if prediction.confounds else None,
                        harmonize=prediction.harmonize,
                        seen=cohort.seen,
                        seen_by=cohort.seen_by,
                        persons=persons,
                        held_out=aside,
                        ids=images[["participant_id", "session_id", "run", "source"]],
                        random_state=run.random_seed,
                        progress=progress_of(console, f"predicting {target}"),
                    )
                except InputsUnusableError as error:
                    if given is None:
                        raise
                    why = str(error)
                else:
                    done = result.summary()
                    tell_people(output, result.metrics, run, config, fingerprint, console)
                    metrics = {**result.metrics, "summary": done, "provenance": provenance}
                    write_tsv(beside(stem, "_predictions.tsv"), result.predictions)
                    write_json(beside(stem, "_predictions.json"), result.columns)
                    keep_readout(own, result, cohort, about, units)
                    write_json(beside(stem, "_metrics.json"), metrics)
            if given is not None and outside is None:
                skipped = False
                outside = apply_readout(given, cohort, about, stem, basis, why)
            if why:
                console.say(f"{target}: only the other cohort's read-out is applied. {why}")
            rows.append({**(done or {"target": target}), **told(outside)})
        if prediction.occlusion:
            before = None if baselines is None else baselines["untrained"][0]
            seen = Occlusion(output.path, output.work, module, kept, cohort, aside, before)
            made = occlude(seen, labels, prediction, run, trust=trust, console=console)
            skipped = skipped and not made
        else:
            forget_old(output.path, run.model_name, labels.values())
        quality = output.path / "logs" / "quality.tsv"
        if reading.cache_info().currsize or not quality.is_file():
            keep_tsv(quality, reading()[1])
            write_outliers(output.path / "figures", module, kept, matrix)
        if baselines is not None:
            compared = {"embeddings": [matrix], "untrained": baselines["untrained"]}
            write_retrieval(output.path / "figures", module, kept, compared, run.random_seed)
        entry["skipped"] = skipped
    return rows


def _fingerprint(
    images: pd.DataFrame,
    target: str,
    prediction: PredictionOptions,
    site: str | None,
    matrix: np.ndarray,
    about: Iterable[str],
) -> str:
    columns = ["participant_id", "session_id", "source", target]
    columns += [c for c in (prediction.group, site) if c] + [*prediction.confounds, *about]
    digest = hashlib.blake2b(to_tsv(images[list(dict.fromkeys(columns))]).encode(), digest_size=16)
    if prediction.harmonize:
        digest.update(b"harmonize")
    digest.update(np.ascontiguousarray(matrix).tobytes())
    return digest.hexdigest()


def _done_before(stem: Path, config: Mapping[str, Any], data: str) -> dict[str, Any] | None:
    """Return the summary of a prediction that needs not be done again; refuse a changed one."""
    file = beside(stem, "_metrics.json")
    if not file.is_file() or not beside(stem, "_predictions.tsv").is_file():
        return None
    try:
        known = json.loads(file.read_text("utf-8"))
        provenance, summary = known["provenance"], known["summary"]
    except (ValueError, KeyError, TypeError):
        return None
    refuse_changes(provenance.get("config", {}), config, file)
    return dict(summary) if provenance.get("data") == data else None

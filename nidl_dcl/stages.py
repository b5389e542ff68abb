"""The stages of a study, from a BIDS dataset and an output folder to the files of the derivative.

Each can be called alone, again (it does what is missing) and after a kill (it goes on). The command
line and the scripts in `pipelines/` call these functions and nothing below them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.assembly import check_training, data_module, refuse_changes, training_config
from nidl_dcl.baselines import baseline_features, read_voxels
from nidl_dcl.cohort import cohort_columns
from nidl_dcl.console import Quiet
from nidl_dcl.embed_stage import embed, embed_part, merge_parts
from nidl_dcl.embedding import read_embeddings
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.exposure import records_images
from nidl_dcl.figure_data import write_outliers, write_retrieval
from nidl_dcl.forecast import dry_run
from nidl_dcl.intake import check_inputs, index, set_up
from nidl_dcl.live_page import LivePage
from nidl_dcl.model_folder import read_description
from nidl_dcl.occlusion_files import Occlusion, forget_old, occlude
from nidl_dcl.options import (
    DataOptions,
    PredictionOptions,
    RunOptions,
    StudyOptions,
    TrainingOptions,
    study_yaml,
)
from nidl_dcl.output import Output
from nidl_dcl.prediction import predict_phenotype, site_audit
from nidl_dcl.pretrain_stage import follow, pretrain
from nidl_dcl.processes import Team
from nidl_dcl.readout_file import readout_path
from nidl_dcl.refusals import (
    check_targets,
    is_trained,
    known_shape,
    refuse_another_model,
    refuse_unusable,
    site_column,
)
from nidl_dcl.report import write_report
from nidl_dcl.roles import (
    checksum,
    held_out_rows,
    hold_out,
    recognised,
    tell_people,
    undivided_groups,
)
from nidl_dcl.summary import summary_table
from nidl_dcl.transfer import (
    Cohort,
    applied_before,
    apply_readout,
    find_readouts,
    keep_readout,
    told,
)
from nidl_dcl.volumes import Preparation
from nidl_dcl.writing import keep_tsv, to_tsv, write_json, write_text, write_tsv

__all__ = [
    "configure",
    "demo",
    "dry_run",
    "embed",
    "embed_part",
    "follow",
    "index",
    "predict",
    "pretrain",
    "report",
    "study",
    "summary_table",
]


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
        own = output.path / "models" / f"desc-{run.model_name}"
        if (own / "model.json").is_file():
            weights = str(read_description(own)["sha256"]["weights.safetensors"])
            merge_parts(output, run, own, weights)
        embeddings = read_embeddings(output.path, run.model_name)
        if embeddings is None:
            raise UsageError(
                f"{output.path} has no embeddings of model {run.model_name!r}. Run `nidl-dcl "
                "embed`, or look at --model-name."
            )
        folder = output.path / "models" / f"desc-{run.model_name}"
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
                        progress=_named(console, f"decoding {site}"),
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
                        progress=_named(console, f"predicting {target}"),
                    )
                except InputsUnusableError as error:
                    if given is None:
                        raise
                    why = str(error)
                else:
                    done = result.summary()
                    tell_people(output, result.metrics, run, config, fingerprint, console)
                    metrics = {**result.metrics, "summary": done, "provenance": provenance}
                    write_tsv(_beside(stem, "_predictions.tsv"), result.predictions)
                    write_json(_beside(stem, "_predictions.json"), result.columns)
                    keep_readout(own, result, cohort, about, units)
                    write_json(_beside(stem, "_metrics.json"), metrics)
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


def report(output: Output, run: RunOptions) -> Path:
    """Write ``report.html`` from the files of the output folder.

    Parameters
    ----------
    output : Output
        Held for writing.
    run : RunOptions
        The model's label.
    """
    with output.stage("report", share=run.share):
        if output.sharing is not None:
            write_report(output.path, model=run.model_name)
        return write_report(output.public, model=run.model_name)


def configure(output: Output, options: StudyOptions, console: Quiet | None = None) -> None:
    """Refuse what could not be studied, and write ``code/config.yaml``, which runs it again.

    Parameters
    ----------
    output : Output
        Dataset and output folder; held for writing.
    options : StudyOptions
        What is to be done.
    console : Quiet, optional
        Told of messages and progress.

    Raises
    ------
    UsageError
        For options that cannot be used, such as a target that no table has.
    InputsUnusableError
        When too few images are usable.
    """
    console = output.heard(console)
    data, run = options.data, options.run
    folder = output.path / "models" / f"desc-{run.model_name}"
    training = known_shape(options.training, folder)
    if options.model is None:
        check_training(training)
        if options.prediction.readout is not None:
            raise UsageError(
                "--readout needs the model that it reads: give --model FOLDER of that study "
                "(models/desc-… in its OUTPUT_DIR), so that nothing is trained here."
            )
    else:
        description = read_description(options.model)
        digest = str(description["sha256"]["weights.safetensors"])
        refuse_another_model(folder, options.model, digest)
        find_readouts(
            output.public,
            options.prediction.readout,
            options.target,
            model=run.model_name,
            model_sha256=digest,
        )
    module = data_module(
        output.bids_dir, data, run, training=training, work=output.work, console=console
    )
    check_inputs(output, module)
    check_targets(module, options.target, options.prediction)
    data = hold_out(module, data, run, options.model or folder, options.prediction.group)
    refuse_unusable(module.images, module.persons, options.target, options.prediction)
    if options.model is None and (folder / "model.json").is_file():
        config = training_config(data, training, run, module.preparation, module.group)
        is_trained(folder, config)
    here = replace(options, bids_dir=output.bids_dir, output_dir=output.path, data=data)
    write_text(output.path / "code" / "config.yaml", study_yaml(here))


def study(
    output: Output,
    options: StudyOptions,
    console: Quiet | None = None,
    team: Team | None = None,
) -> list[dict[str, Any]]:
    """Pretrain, embed, predict and report; with a model folder, without pretraining.

    Parameters
    ----------
    output : Output
        Dataset and output folder; held for writing.
    options : StudyOptions
        What is to be done.
    console : Quiet, optional
        Told of messages and progress.
    team : Team, optional
        The processes that train; this is the first of them.

    Returns
    -------
    list of dict
        As `predict`.
    """
    console = output.heard(console)
    data, run, trust = options.data, options.run, options.trust
    group = options.prediction.group
    configure(output, options, console)
    live = LivePage(output.path, run.model_name, console)
    if live.is_needed:
        live.write()
    with live.following():
        if options.model is None:
            pretrain(
                output, data, options.training, run, console, group=group, team=team, live=live
            )
            if output.worked:
                live.write()
        embed(
            output, data, run, model_folder=options.model, trust=trust, console=console, group=group
        )
        if output.worked:
            live.write()
        rows = predict(
            output, options.target, data, run, options.prediction, trust=trust, console=console
        )
    old = any(map(_report_is_old, {output.path, output.public}))
    if output.worked or live.is_needed or old:
        report(output, run)
    return rows


def demo(
    output_dir: Path,
    run: RunOptions,
    *,
    n_participants: int,
    max_epochs: int,
    occlusion: bool = False,
    console: Quiet | None = None,
    command: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], Path]:
    """Write a synthetic BIDS dataset and run a study of age and sex on it.

    Parameters
    ----------
    output_dir : Path
        Gets the dataset in ``bids/`` and the study in ``study/``.
    run : RunOptions
        Options.
    n_participants, max_epochs : int
        Size and length.
    occlusion : bool, default=False
        Also map where the read-outs look.
    console : Quiet, optional
        Told of messages and progress.
    command : sequence of str
        For the record.

    Returns
    -------
    rows : list of dict
        As `study`.
    page : Path
        The report.
    """
    from nidl_dcl.demo import write_demo_dataset  # nilearn takes seconds to import

    console = console or Quiet()
    bids_dir = output_dir / "bids"
    if not (bids_dir / ".complete").is_file():
        console.say(f"Writing a synthetic BIDS dataset of {n_participants} participants.")
        write_demo_dataset(
            bids_dir,
            n_participants=n_participants,
            seed=run.random_seed,
            progress=_named(console, "drawing brains"),
        )
    options = StudyOptions(
        bids_dir=bids_dir,
        output_dir=output_dir / "study",
        target=["age", "sex"],
        training=TrainingOptions(max_epochs=max_epochs, devices="1"),
        prediction=PredictionOptions(occlusion=occlusion),
        run=run,
    )
    config = {**asdict(options.training), **asdict(run), "n_participants": n_participants}
    work = run.work_dir
    if run.share and work is None:
        work = output_dir.with_name(f"{output_dir.resolve().name}-private")
    output = Output(
        bids_dir,
        options.output_dir,
        work_dir=work,
        command=command,
        config=config,
        share=run.share,
        share_key=run.share_key,
    )
    with output.writing():
        rows = study(output, options, console)
    return rows, output.public / "report.html"


def _report_is_old(folder: Path) -> bool:
    """Return whether a result was written after the report, before a run was killed."""
    page = folder / "report.html"
    if not page.is_file():
        return True
    results = ("desc-*", "models/*/*", "figures/*", "logs/*.tsv", "logs/*.csv")
    files = [file for pattern in results for file in folder.glob(pattern)]
    return any(file.stat().st_mtime_ns > page.stat().st_mtime_ns for file in files)


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
    file = _beside(stem, "_metrics.json")
    if not file.is_file() or not _beside(stem, "_predictions.tsv").is_file():
        return None
    try:
        known = json.loads(file.read_text("utf-8"))
        provenance, summary = known["provenance"], known["summary"]
    except (ValueError, KeyError, TypeError):
        return None
    refuse_changes(provenance.get("config", {}), config, file)
    return dict(summary) if provenance.get("data") == data else None


def _named(console: Quiet, what: str) -> Callable[[int, int], None]:
    """Return a function of steps done and in all that tells the console of `what`."""
    return lambda done, total: console.progress(what, done, total)


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)

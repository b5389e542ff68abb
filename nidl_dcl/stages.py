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
from nidl_dcl.datamodule import BIDSDataModule
from nidl_dcl.descriptions import write_descriptions
from nidl_dcl.embedding import (
    COLUMNS,
    Embeddings,
    embed_volumes,
    is_written,
    read_embeddings,
    write_embeddings,
    write_parquet,
)
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.exposure import records_images
from nidl_dcl.figure_data import shows_plane, write_outliers, write_plane, write_retrieval
from nidl_dcl.forecast import dry_run
from nidl_dcl.intake import (
    INPUTS,
    MATCHES,
    check_inputs,
    draw_volumes,
    index,
    logged,
    prepare,
    set_up,
)
from nidl_dcl.live_page import LivePage
from nidl_dcl.model_folder import load_model, read_description
from nidl_dcl.occlusion_files import Occlusion, forget_old, occlude
from nidl_dcl.options import (
    DataOptions,
    PredictionOptions,
    RunOptions,
    StudyOptions,
    TrainingOptions,
    study_yaml,
)
from nidl_dcl.output import PATIENCE, Output
from nidl_dcl.parts import (
    Part,
    Selection,
    merge_embeddings,
    merge_inputs,
    merge_matches,
    waiting_parts,
)
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
    pretraining_splits,
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
from nidl_dcl.writing import keep_tsv, to_tsv, write_bytes, write_json, write_text, write_tsv

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


def embed(
    output: Output,
    data: DataOptions,
    run: RunOptions,
    *,
    model_folder: Path | None = None,
    trust: Sequence[str] = (),
    console: Quiet | None = None,
    group: str | None = None,
) -> Embeddings:
    """Write one embedding per image; images embedded before are not computed again.

    Parameters
    ----------
    output : Output
        Dataset and output folder; held for writing.
    data, run
        Options.
    model_folder : Path, optional
        The model; default: the one that `pretrain` wrote. Another one is copied into the output.
    trust : sequence of str
        Packages whose encoders may be imported.
    console : Quiet, optional
        Told of messages and progress.
    group : str, optional
        Column whose equal values (a family) are held out together.

    Returns
    -------
    Embeddings
    """
    console = output.heard(console)
    source = _model_to_embed_with(output, run, model_folder)
    selection = Selection.of(data.participant_label, data.session_label)
    figures = output.path / "figures"
    with output.stage("embed", share=run.share) as entry:
        model, digest = _fitted_model(output, run, source, trust)
        module = data_module(
            output.bids_dir,
            data,
            run,
            preparation=model.preparation,
            work=output.work,
            console=console,
        )
        _merge_parts(output, run, source, digest)
        check_inputs(output, module)
        hold_out(module, data, run, source, group)
        set_up(output, module, console)
        _keep_model(output, run, source)
        before = read_embeddings(output.path, run.model_name)
        found, computed = _embedded(output, run, module, model, source, console)
        embeddings = _merged(before, found, selection)
        changed = not is_written(output.path, run.model_name, embeddings)
        table_there = (output.path / f"desc-{run.model_name}_embeddings.parquet").is_file()
        if run.parquet and (changed or not table_there):
            write_parquet(output.path, run.model_name, embeddings)
        write_descriptions(output.path, run.model_name)
        entry["skipped"] = not changed and computed == 0
        if before is None or not selection:  # pictures are of all
            draw_volumes(output, module, console)
            if changed or not shows_plane(figures, module):
                write_plane(figures, module, found.matrix)
            everything, matrix = range(len(module.images)), found.matrix
            if changed or not _are_there(figures, "outliers.tsv", "outlier_1.png"):
                write_outliers(figures, module, everything, matrix)
            if changed or not _are_there(figures, "retrieval.tsv", "retrieval.json"):
                features = {"embeddings": [matrix]}
                write_retrieval(figures, module, everything, features, run.random_seed)
        if changed:
            # Last, since from here on a run that goes on finds nothing left to write.
            write_embeddings(output.path, run.model_name, embeddings)
        _say_embedded(console, embeddings, computed)
    return embeddings


def embed_part(
    output: Output,
    data: DataOptions,
    run: RunOptions,
    *,
    model_folder: Path | None = None,
    trust: Sequence[str] = (),
    console: Quiet | None = None,
    group: str | None = None,
    patience: float = PATIENCE,
) -> Embeddings:
    """Embed some participants or sessions, beside others that do so at the same time.

    Images are prepared and encoded without holding the output. What was found is kept there as a
    part; whoever holds the output next merges all parts that wait.

    Parameters
    ----------
    output : Output
        Dataset and output folder; not held.
    data : DataOptions
        With participants or sessions.
    run : RunOptions
        Options.
    model_folder, trust, console, group
        As `embed`.
    patience : float
        Seconds to wait, at most, for the folder.

    Returns
    -------
    Embeddings
        Those of the part.

    Raises
    ------
    OutputInUseError
        When the folder stays in use; the part is kept for the next run.
    """
    console = output.heard(console)
    selection = Selection.of(data.participant_label, data.session_label)
    source = _model_to_embed_with(output, run, model_folder)
    model, digest = _fitted_model(output, run, source, trust)
    module = data_module(
        output.bids_dir,
        data,
        run,
        preparation=model.preparation,
        work=output.work,
        console=console,
    )
    found, computed, failure = None, 0, None
    try:
        with output.stage("embed", share=run.share) as entry:
            module.check()
            hold_out(module, data, run, source, group)
            prepare(module, console)
            found, computed = _embedded(output, run, module, model, source, console)
            entry["skipped"] = computed == 0
    except Exception as error:
        if not module.is_indexed:
            raise
        failure = error
    output.end_record(failure)
    record = {**output.record, "selection": asdict(selection)}
    part = Part(selection, module.inputs, module.matches, found, record)
    file = part.write(output.path, run.model_name, digest)
    try:
        with output.joining(console.say, lambda: not file.exists(), patience) as holding:
            if holding:
                _merge_parts(output, run, source, digest)
    except UsageError:
        file.unlink(missing_ok=True)  # of another model than the output's
        raise
    if failure is not None:
        raise failure
    assert found is not None
    _say_embedded(console, found, computed)
    return found


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
            _merge_parts(output, run, own, weights)
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


def _are_there(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


def _model_to_embed_with(output: Output, run: RunOptions, given: Path | None) -> Path:
    """Return the folder of the model: the one given, or the output's own."""
    own = output.path / "models" / f"desc-{run.model_name}"
    if given is None and not own.exists():
        raise UsageError(
            f"{output.path} has no model {run.model_name!r}. Run `nidl-dcl pretrain`, or give "
            "--model FOLDER."
        )
    return own if given is None else given


def _fitted_model(
    output: Output, run: RunOptions, source: Path, trust: Sequence[str]
) -> tuple[Any, str]:
    """Return the model that embeds, on one device, and the checksum of its weights."""
    digest = str(read_description(source)["sha256"]["weights.safetensors"])
    refuse_another_model(output.path / "models" / f"desc-{run.model_name}", source, digest)
    model = load_model(source, trust=trust)
    if not model.fitted or model.preparation is None:
        raise UsageError(
            f"{source} is not a fitted model with an input contract, so images cannot be "
            "prepared for it. Train it with `nidl-dcl pretrain`."
        )
    return model.set_params(devices=1), digest


def _embedded(
    output: Output,
    run: RunOptions,
    module: BIDSDataModule,
    model: Any,
    source: Path,
    console: Quiet,
) -> tuple[Embeddings, int]:
    """Return the embeddings of a module's images, and how many had to be computed."""
    assert module.volumes is not None
    description = read_description(source)
    digest = str(description["sha256"]["weights.safetensors"])
    matrix, computed = embed_volumes(
        model,
        module.volumes,
        digest=digest,
        memory=output.work / "features",
        num_workers=run.nprocs or 0,
        progress=console.progress,
    )
    table = module.images.copy()
    table["split"] = pretraining_splits(module, description)
    table["row"] = range(len(table))
    config = {"model_sha256": digest, "preparation": model.preparation.to_dict()}
    return Embeddings(table[list(COLUMNS)], matrix, config), computed


def _keep_model(output: Output, run: RunOptions, source: Path) -> None:
    """Copy the model into the output, where it is not there."""
    own = output.path / "models" / f"desc-{run.model_name}"
    if own != source and not (own / "model.json").is_file():
        own.mkdir(parents=True, exist_ok=True)
        for name in ("weights.safetensors", "model.json"):
            write_bytes(own / name, (source / name).read_bytes())


def _merge_parts(output: Output, run: RunOptions, source: Path, digest: str) -> None:
    """Merge the parts that wait in the output, which is held; the files of the parts go last."""
    files = waiting_parts(output.path, run.model_name, digest)
    parts = [part for file in files if (part := Part.read(file)) is not None]
    if not parts:
        return
    own = output.path / "models" / f"desc-{run.model_name}"
    refuse_another_model(own, source, digest)
    before = embeddings = read_embeddings(output.path, run.model_name)
    inputs, matches = (logged(output, name, None) for name in ("inputs.tsv", "phenotypes.tsv"))
    for part in parts:
        inputs = merge_inputs(inputs, part.inputs, part.selection)
        matches = merge_matches(matches, part.matches, part.selection)
        if part.embeddings is not None:
            embeddings = _merged(embeddings, part.embeddings, part.selection)
    assert inputs is not None
    assert matches is not None
    keep_tsv(output.path / INPUTS, inputs)
    keep_tsv(output.path / MATCHES, matches)
    if embeddings is not None and embeddings is not before:
        _keep_model(output, run, source)
        write_embeddings(output.path, run.model_name, embeddings)
        kept = output.path / f"desc-{run.model_name}_embeddings.parquet"
        if run.parquet or kept.is_file():
            write_parquet(output.path, run.model_name, embeddings)
        write_descriptions(output.path, run.model_name)
    output.add_part_records([part.record for part in parts])
    for file in files:
        file.unlink(missing_ok=True)


def _merged(before: Embeddings | None, now: Embeddings, selection: Selection) -> Embeddings:
    """Keep rows of images that a run was told to leave alone."""
    if before is not None and before.config.get("model_sha256") != now.config["model_sha256"]:
        raise UsageError(
            "The embeddings in OUTPUT_DIR come from another model. Choose another --model-name or "
            "another OUTPUT_DIR."
        )
    return merge_embeddings(before, now, selection)


def _say_embedded(console: Quiet, embeddings: Embeddings, computed: int) -> None:
    console.say(
        f"Embeddings: {len(embeddings.table)} images of "
        f"{embeddings.table['participant_id'].nunique()} participants, {computed} computed now."
    )


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

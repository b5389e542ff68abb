"""The stage `embed`: one embedding for each image, computed where it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.console import NullReporter
from nidl_dcl.io.formats import keep_tsv
from nidl_dcl.models.inference import embed_volumes
from nidl_dcl.models.serialization import load_model, read_description, weights_sha256
from nidl_dcl.output.embeddings import (
    COLUMNS,
    Embeddings,
    is_written,
    read_embeddings,
    write_embeddings,
    write_parquet,
)
from nidl_dcl.output.folder import PATIENCE, Output, write_descriptions
from nidl_dcl.output.parts import (
    Part,
    Selection,
    merge_embeddings,
    merge_inputs,
    merge_matches,
    waiting_parts,
)
from nidl_dcl.workflow.factory import data_module
from nidl_dcl.workflow.figure_data import shows_plane, write_outliers, write_plane, write_retrieval
from nidl_dcl.workflow.inputs import (
    INPUTS,
    MATCHES,
    check_inputs,
    draw_volumes,
    logged,
    prepare,
    set_up,
)
from nidl_dcl.workflow.options import DataOptions, RunOptions
from nidl_dcl.workflow.participants import hold_out, pretraining_splits
from nidl_dcl.workflow.preflight import refuse_another_model

__all__ = ["embed", "embed_part", "merge_parts"]


def embed(
    output: Output,
    data: DataOptions,
    run: RunOptions,
    *,
    model_folder: Path | None = None,
    trust: Sequence[str] = (),
    console: NullReporter | None = None,
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
        module = _images_for(model, output, data, run, console)
        merge_parts(output, run, source, digest)
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
    console: NullReporter | None = None,
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
    module = _images_for(model, output, data, run, console)
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
                merge_parts(output, run, source, digest)
    except UsageError:
        file.unlink(missing_ok=True)  # of another model than the output's
        raise
    if failure is not None:
        raise failure
    assert found is not None
    _say_embedded(console, found, computed)
    return found


def _model_to_embed_with(output: Output, run: RunOptions, given: Path | None) -> Path:
    """Return the folder of the model: the one given, or the output's own."""
    own = output.model_folder(run.model_name)
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
    digest = weights_sha256(source)
    refuse_another_model(output.model_folder(run.model_name), source, digest)
    model = load_model(source, trust=trust)
    if not model.fitted or model.preparation is None:
        raise UsageError(
            f"{source} is not a fitted model with an input contract, so images cannot be "
            "prepared for it. Train it with `nidl-dcl pretrain`."
        )
    return model.set_params(devices=1), digest


def _images_for(
    model: Any, output: Output, data: DataOptions, run: RunOptions, console: NullReporter
) -> BIDSDataModule:
    return data_module(
        output.bids_dir,
        data,
        run,
        preparation=model.preparation,
        work=output.work,
        console=console,
    )


def _embedded(
    output: Output,
    run: RunOptions,
    module: BIDSDataModule,
    model: Any,
    source: Path,
    console: NullReporter,
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
    own = output.model_folder(run.model_name)
    if own != source and not (own / "model.json").is_file():
        own.mkdir(parents=True, exist_ok=True)
        for name in ("weights.safetensors", "README.md", "model.json"):
            if name != "README.md" or (source / name).is_file():
                write_bytes(own / name, (source / name).read_bytes())


def merge_parts(output: Output, run: RunOptions, source: Path, digest: str) -> None:
    """Merge the parts that wait in the output, which is held; the files of the parts go last."""
    files = waiting_parts(output.path, run.model_name, digest)
    parts = [part for file in files if (part := Part.read(file)) is not None]
    if not parts:
        return
    own = output.model_folder(run.model_name)
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


def _say_embedded(console: NullReporter, embeddings: Embeddings, computed: int) -> None:
    console.say(
        f"Embeddings: {len(embeddings.table)} images of "
        f"{embeddings.table['participant_id'].nunique()} participants, {computed} computed now."
    )


def _are_there(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)

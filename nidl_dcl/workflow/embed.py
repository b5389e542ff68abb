"""The stage `embed`: one embedding for each image, computed where it is missing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.console import log_progress
from nidl_dcl.models.inference import embed_volumes
from nidl_dcl.models.model_source import BUILTIN, ModelSource, folder_of
from nidl_dcl.models.serialization import load_model, read_description, weights_sha256
from nidl_dcl.output.description import write_descriptions
from nidl_dcl.output.embeddings import (
    COLUMNS,
    Embeddings,
    is_written,
    read_embeddings,
    write_embeddings,
    write_parquet,
)
from nidl_dcl.output.selection import merge_embeddings
from nidl_dcl.workflow.figure_data import (
    draw_volumes,
    shows_plane,
    write_outliers,
    write_plane,
    write_retrieval,
)
from nidl_dcl.workflow.inputs import Study
from nidl_dcl.workflow.participants import excluded_but_seen, pretraining_splits
from nidl_dcl.workflow.preflight import refuse_another_model

_LOGGER = logging.getLogger(__name__)


def embed(study: Study, model_folder: ModelSource | None = None) -> Embeddings:
    """Write one embedding per image; images embedded before are not computed again.

    Parameters
    ----------
    study : Study
        Dataset, output folder and common options. Where it is restricted to participants or
        sessions, rows of the others stay as they are.
    model_folder : Path or "builtin", optional
        The model's folder; default: the one that `pretrain` wrote. Another one is copied into the
        output.

    Returns
    -------
    Embeddings
    """
    output, run, figures = study.output, study.run, study.figures
    source = _model_to_use(study, model_folder)
    with output.stage("embed") as entry:
        model, module = _open(study, source)
        _copy_model(source, study.model_folder)
        found, computed = _compute(study, model, module, source)
        before = read_embeddings(output.path, run.model_name)
        embeddings = _merged(study, before, found)
        changed = not is_written(output.path, run.model_name, embeddings)
        table_there = (output.path / f"desc-{run.model_name}_embeddings.parquet").is_file()
        if run.parquet and (changed or not table_there):
            write_parquet(output.path, run.model_name, embeddings)
        write_descriptions(output.path, run.model_name, BUILTIN if source == BUILTIN else "")
        entry["skipped"] = not changed and computed == 0
        if before is None or not study.selection:  # figures are of all
            draw_volumes(figures, module)
            if changed or not shows_plane(figures, module):
                write_plane(figures, module, found.matrix)
            everything, matrix = range(len(module.images)), found.matrix
            if changed or not _are_there(figures, "outliers.tsv", "outlier_1.png"):
                write_outliers(figures, module, everything, matrix)
            if changed or not _are_there(figures, "retrieval.tsv", "retrieval.json"):
                features = {"embeddings": [matrix]}
                write_retrieval(figures, module, everything, features, run.random_seed)
        if changed:
            # Last, since from here on a resumed run finds nothing left to write.
            write_embeddings(output.path, run.model_name, embeddings)
        _LOGGER.info(
            f"Embeddings: {len(embeddings.table)} images of "
            f"{embeddings.table['participant_id'].nunique()} participants, {computed} computed now."
        )
    return embeddings


def cache_features(study: Study, model_folder: ModelSource | None = None) -> None:
    """Compute the features of images into the work folder, without holding the output folder.

    Many jobs can do so at once, each for some participants; one `embed` of all then finds them.

    Parameters
    ----------
    study : Study
        Dataset, output folder and common options.
    model_folder : Path or "builtin", optional
        As `embed`.
    """
    source = _model_to_use(study, model_folder)
    with study.output.stage("embed") as entry:
        model, module = _open(study, source)
        _, computed = _compute(study, model, module, source)
        entry["skipped"] = computed == 0


def _model_to_use(study: Study, given: ModelSource | None) -> ModelSource:
    """Return the folder of the model: the one given, or the output's own."""
    if given is None and not study.model_folder.exists():
        raise UsageError(
            f"{study.output.path} has no model {study.run.model_name!r}. Run `nidl-dcl pretrain`, "
            "or give --model FOLDER."
        )
    study.model = study.model_folder if given is None else given
    return study.model


def _open(study: Study, source: ModelSource) -> tuple[Any, BIDSDataModule]:
    """Return the model, on one device, and the images prepared for it."""
    refuse_another_model(study.model_folder, source)
    model = load_model(source, trust=study.trust)
    if not model.fitted or model.preparation is None:
        raise UsageError(
            f"{source} is not a fitted model with an input contract, so images cannot be "
            "prepared for it. Train it with `nidl-dcl pretrain`."
        )
    module = study.data_module(source, preparation=model.preparation)
    study.prepare(module)
    description, dataset = read_description(source), study.output.bids_dir.name
    if said := excluded_but_seen(study.table.inputs, description, dataset):
        _LOGGER.info(said)
    return model.set_params(devices=1), module


def _compute(
    study: Study, model: Any, module: BIDSDataModule, source: ModelSource
) -> tuple[Embeddings, int]:
    """Return the embeddings of a module's images, and how many had to be computed."""
    assert module.volumes is not None
    digest = weights_sha256(source)
    matrix, computed = embed_volumes(
        model,
        module.volumes,
        digest=digest,
        memory=study.output.work / "features",
        num_workers=study.run.nprocs or 0,
        progress=log_progress,
    )
    table = module.images.copy()
    table["split"] = pretraining_splits(table, read_description(source))
    table["row"] = range(len(table))
    config = {"model_sha256": digest, "preparation": model.preparation.to_dict()}
    return Embeddings(table[list(COLUMNS)], matrix, config), computed


def _copy_model(source: ModelSource, own: Path) -> None:
    """Copy the model into the output, where it is not there."""
    folder = folder_of(source)
    if own != folder and not (own / "model.json").is_file():
        own.mkdir(parents=True, exist_ok=True)
        for name in ("weights.safetensors", "README.md", "model.json"):
            if name != "README.md" or (folder / name).is_file():
                write_bytes(own / name, (folder / name).read_bytes())


def _merged(study: Study, before: Embeddings | None, now: Embeddings) -> Embeddings:
    """Keep rows of images that the run was restricted not to compute."""
    if before is not None and before.config.get("model_sha256") != now.config["model_sha256"]:
        raise UsageError(
            "The embeddings in OUTPUT_DIR come from another model. Choose another --model-name or "
            "another OUTPUT_DIR."
        )
    return merge_embeddings(before, now, study.selection)


def _are_there(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)

"""The stage `preprocess`: scans of a dataset to brains, masked and aligned, as a BIDS derivative."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, cpu_count, delayed, parallel_config

from nidl_dcl.bids.entities import natural_key
from nidl_dcl.bids.index import DatasetIndex, find_images
from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.data.image_table import ImageTable
from nidl_dcl.data.preprocessed import TABLE, Mode, PreprocessedImages
from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import keep_bytes
from nidl_dcl.io.console import log_progress
from nidl_dcl.io.formats import keep_tsv, read_json, to_json
from nidl_dcl.models.model_source import ModelSource, folder_of
from nidl_dcl.models.serialization import read_description
from nidl_dcl.output.brains import Scan, read_record, target_of, write_brain
from nidl_dcl.output.description import add_links, describe_brains
from nidl_dcl.output.folder import Output, check_paths
from nidl_dcl.output.selection import Selection, as_text
from nidl_dcl.preprocessing.measures import MEASURES
from nidl_dcl.preprocessing.pipeline import AlignedBrain, Outcome, keep_size, preprocess_t1w
from nidl_dcl.workflow.estimate import duration
from nidl_dcl.workflow.factory import image_table, refuse_changes
from nidl_dcl.workflow.options import DataOptions

_LOGGER = logging.getLogger(__name__)

_COLUMNS = {
    "participant_id": "Participant",
    "session_id": "Session",
    "run": "Run",
    "source": "The scan",
    "status": "ok: use it; warn: use it and look at it; skip: not used",
    "code": "Why, in a word",
    "message": "Why",
    "figure": "Picture of the scan and of the brain",
    "brain": "The brain, if it may be used",
    "mask": "The brain mask that was given; n/a: it was found here",
}

_GB_EACH = 2.0
"""Memory for one image: 1.3 GB were measured at 2 mm and at 1 mm."""


def missing_packages() -> str:
    """Return what must be installed before images can be preprocessed; empty if nothing."""
    missing = [name for name in ("SimpleITK", "deepbet") if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"it needs {' and '.join(missing)}: pip install 'nidl_dcl[preprocess]'"


def choose_mode(data: DataOptions, model: ModelSource) -> Mode:
    """Return what is done to scans before anything else.

    Parameters
    ----------
    data : DataOptions
        ``preprocess`` and which images there are.
    model : Path or "builtin"
        Folder of the model that is used, if it is there: "auto" is as its images were.

    Raises
    ------
    UsageError
        For images that are no scans, and for missing packages.
    """
    preset = PRESETS.get(data.preset)
    if preset is None:
        return "none"  # it is refused with the images
    mode: Mode = "align"
    if data.preprocess != "auto":
        mode = data.preprocess
    elif not preset.is_native:
        return "none"
    elif (folder_of(model) / "model.json").is_file():
        contract = read_description(model)["input_contract"] or {}
        mode = (contract.get("origin") or {}).get("preprocessing", "none")
    elif preset.suffix != "T1w" or data.bids_filter_file is not None:
        return "none"  # brain extraction is made for T1w, and a filter may choose others
    elif missing := missing_packages():
        _LOGGER.info(f"Scans are not preprocessed; {missing}.")
        return "none"
    if mode == "none":
        return mode
    if not preset.is_native:
        scans = ", ".join(name for name, known in PRESETS.items() if known.is_native)
        raise UsageError(
            f"--preprocess {mode}: images of the preset {data.preset!r} are no scans in their own "
            f"space. It is for {scans}."
        )
    if missing := missing_packages():
        if data.preprocess == "auto":
            raise UsageError(
                f"The model {model} takes scans after --preprocess {mode}, and {missing}."
            )
        raise UsageError(f"--preprocess {mode}: {missing}.")
    return mode


def preprocess_scans(
    output: Output, table: ImageTable, mode: Mode, folder: Path, nprocs: int | None = None
) -> PreprocessedImages:
    """Preprocess the scans of a dataset; those done before, and unchanged since, are not done again.

    Parameters
    ----------
    output : Output
        Dataset and output folder, for the record.
    table : ImageTable
        The scans that are selected; not read here.
    mode : {"strip", "rigid", "align"}
        What is done.
    folder : Path
        The derivative that the images are written to.
    nprocs : int, optional
        Images at a time; default: as many as cores and memory allow. It changes no result.

    Raises
    ------
    UsageError
        When the folder holds brains of another mode.
    """
    _refuse_other_mode(folder, mode)
    index = _index(output.bids_dir, table, folder)
    scans = _scans(index, mode)
    if others := sorted({scan.suffix for scan in scans} - {"T1w"}):
        _LOGGER.info(
            f"Brain extraction and registration are made for T1w, and these are {' '.join(others)}: "
            "look at the report, at images with the code 'contrast' first."
        )
    with output.stage("preprocess") as entry:
        records, computed = _records(scans, folder, nprocs)
        entry["skipped"] = computed == 0
        _LOGGER.info(_summary(mode, scans, records, computed))
    return PreprocessedImages(
        mode=mode,
        folder=folder,
        scans=_with_records(index, records),
        measures=_measures(index, scans, records),
        kept=index.kept,
        links=index.links,
    )


def preprocessing_lines(
    bids_dir: Path, table: ImageTable, mode: Mode, folder: Path, nprocs: int | None = None
) -> tuple[list[str], float]:
    """Return what preprocessing would do, and its seconds from one image; nothing is written.

    Parameters
    ----------
    bids_dir : Path
        The dataset.
    table, mode, folder, nprocs
        As in `preprocess_scans`.
    """
    seconds = 0.0
    scans = _scans(_index(bids_dir, table, folder), mode)
    missing = [scan for scan in scans if read_record(folder, scan) is None]
    masked = sum(scan.mask is not None for scan in scans)
    lines = [
        (
            f"{len(scans)} scans to preprocess ({mode}), {masked} by masks of the dataset, "
            f"{len(scans) - len(missing)} done before"
        )
    ]
    if missing:
        start = time.perf_counter()
        _preprocess(missing[0])
        processes = _processes(nprocs, len(missing))
        seconds = (time.perf_counter() - start) * len(missing) / processes
        lines.append(
            f"about {duration(seconds)} for that, {processes} at a time (one image measured)"
        )
    return lines, seconds


def dry_run(
    bids_dir: Path, output_dir: Path, data: DataOptions, nprocs: int | None = None
) -> list[str]:
    """Return what ``nidl-dcl preprocess`` would do; nothing is written.

    Parameters
    ----------
    bids_dir, output_dir : Path
        The dataset and the output folder.
    data : DataOptions
        Which images, and what is done.
    nprocs : int, optional
        As in `preprocess_scans`.
    """
    check_paths(bids_dir, output_dir)
    mode = choose_mode(data, output_dir / "models")
    table = image_table(bids_dir, data)
    lines, _ = preprocessing_lines(bids_dir, table, mode, output_dir, nprocs)
    return lines


def _index(bids_dir: Path, table: ImageTable, folder: Path) -> DatasetIndex:
    return find_images(
        bids_dir,
        **table.selection,
        mask=table.mask,
        all_masked=False,
        leave_out=folder,  # whose masks are of an earlier run
        progress=log_progress,
    )


def _refuse_other_mode(folder: Path, mode: str) -> None:
    before = mode
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = read_json(folder / f"{TABLE}.json")["Mode"]
    refuse_changes({"--preprocess": before}, {"--preprocess": mode}, folder)


def _scans(index: DatasetIndex, mode: str) -> list[Scan]:
    """Return what there is to preprocess, one for each image of the index."""
    scans = []
    for source, mask in index.images[["source", "mask_path"]].itertuples(index=False):
        home, _, inside = str(source).removeprefix("bids:").partition(":")
        target, suffix = target_of(inside)
        masked = isinstance(mask, str)
        scans.append(
            Scan(
                path=index.links[home] / inside,
                mask=index.root / mask if masked else None,
                source=str(source),
                mask_source=_uri(index, mask) if masked else None,
                target=target,
                suffix=suffix,
                mode=mode,
            )
        )
    double = [name for name, count in Counter(scan.target for scan in scans).items() if count > 1]
    if double:
        raise UsageError(
            f"Several images would become {double[0]}…: preprocess one contrast at a time "
            "(--bids-filter-file, --preset)."
        )
    return scans


def _uri(index: DatasetIndex, mask: str) -> str:
    """Return the BIDS URI of a mask, given by its path relative to the dataset."""
    file = Path(os.path.normpath(index.root / mask))
    for name, root in index.links.items():
        if name != "raw" and root in file.parents:
            return f"bids:{name}:{file.relative_to(root).as_posix()}"
    return f"bids:raw:{mask}"


def _records(
    scans: Sequence[Scan], folder: Path, nprocs: int | None
) -> tuple[list[dict[str, Any]], int]:
    """Return what became of each scan, and how many were preprocessed now."""
    found = {scan.target: read_record(folder, scan) for scan in scans}
    missing = [scan for scan in scans if found[scan.target] is None]
    log_progress("preprocessing", len(scans) - len(missing), len(scans))
    with parallel_config("loky", inner_max_num_threads=1):
        work = Parallel(n_jobs=_processes(nprocs, len(missing)), return_as="generator_unordered")
        results = work(delayed(preprocess_scan)(scan, folder) for scan in missing)
        for done, (target, record) in enumerate(results, start=len(scans) - len(missing) + 1):
            found[target] = record
            log_progress("preprocessing", done, len(scans))
    return [found[scan.target] or {} for scan in scans], len(missing)


def preprocess_scan(scan: Scan, folder: Path) -> tuple[str, dict[str, Any]]:
    """Preprocess one scan and write its files; return its name and what became of it."""
    return scan.target, write_brain(folder, scan, _preprocess(scan))


def _preprocess(scan: Scan) -> Outcome:
    with _one_thread():
        outcome = preprocess_t1w(scan.path, mask=scan.mask, align=scan.mode != "strip")
        if scan.mode == "rigid" and isinstance(outcome.brain, AlignedBrain):
            outcome = replace(outcome, brain=keep_size(outcome.brain))
    return outcome


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: the same bits for any number of processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processes(nprocs: int | None, jobs: int) -> int:
    """Return how many images are preprocessed at a time: as many as cores and memory allow."""
    if nprocs is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        nprocs = min(cpu_count(), int(free / _GB_EACH))
    return max(1, min(nprocs, jobs))


def _with_records(index: DatasetIndex, records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return the rows of ``inputs.tsv`` with what became of each scan, and its brain."""
    table = index.inputs.copy().astype(object)
    table["brain"], table["brain_ml"] = pd.NA, float("nan")
    row_of = dict(zip(table["path"], table.index, strict=True))
    for path, record in zip(index.images["path"], records, strict=True):
        row = row_of[path]
        if record["status"] != "ok":
            table.loc[row, ["status", "code", "message"]] = [
                record["status"],
                record["code"],
                record["message"],
            ]
        table.loc[row, "brain"] = record["brain"] or pd.NA
        if record["measures"]:
            table.loc[row, "brain_ml"] = record["measures"]["mask_ml"]
    return table


def _measures(
    index: DatasetIndex, scans: Sequence[Scan], records: Sequence[dict[str, Any]]
) -> pd.DataFrame:
    """Return what was measured of each scan."""
    rows = []
    images = index.images[["participant_id", "session_id", "run"]].itertuples(index=False)
    for image, scan, record in zip(images, scans, records, strict=True):
        measures = record["measures"] or {}
        told = [record[name] for name in ("status", "code", "message", "figure", "brain")]
        told.append(scan.mask_source)
        rows.append([*image, scan.source, *told, *(measures.get(name) for name in MEASURES)])
    return pd.DataFrame(rows, columns=[*_COLUMNS, *MEASURES])


def write_measures(brains: PreprocessedImages, bids_dir: Path, selection: Selection) -> None:
    """Write the table of measures, and what makes the folder a BIDS derivative.

    Parameters
    ----------
    brains : PreprocessedImages
        What was measured, and where it goes.
    bids_dir : Path
        The dataset.
    selection : Selection
        What the run was restricted to; rows of other participants stay.
    """
    describe_brains(brains.folder, bids_dir)
    masks = brains.measures["mask"].dropna().str.extract("^bids:([^:]+):", expand=False)
    add_links(brains.folder, {name: brains.links[name] for name in sorted(set(masks))})
    file, table = brains.folder / f"{TABLE}.tsv", as_text(brains.measures)
    excluded = _excluded(brains)
    if (selection or excluded) and file.is_file():
        before = pd.read_csv(
            file, sep="\t", quoting=3, dtype=str, keep_default_na=False, na_values=["n/a"]
        )
        for row, source in enumerate(before["source"]):
            if source in excluded:
                before.loc[row, ["status", "code", "message"]] = (
                    "skip",
                    "excluded",
                    excluded[source],
                )
        stays = ~selection.holds(before) if selection else np.zeros(len(before), dtype=bool)
        stays |= before["source"].isin(list(excluded)).to_numpy(dtype=bool)
        kept = before[stays & ~before["source"].isin(table["source"])]
        table = pd.concat([kept.astype(object), table.astype(object)])
        table = table.sort_values("source", key=lambda c: c.map(natural_key), ignore_index=True)
    keep_tsv(file, table)
    columns = {name: {"Description": text} for name, text in {**_COLUMNS, **MEASURES}.items()}
    sidecar = to_json({"Mode": brains.mode, **columns})
    keep_bytes(file.with_suffix(".json"), sidecar.encode())


def _excluded(brains: PreprocessedImages) -> dict[str, str]:
    """Return why scans were left out by hand, by their source."""
    scans = brains.scans[brains.scans["code"] == "excluded"]
    found = {}
    for path, reason in zip(scans["path"], scans["message"], strict=True):
        file = Path(os.path.normpath(brains.links["raw"] / str(path)))
        for name, root in brains.links.items():
            if root in file.parents:
                found[f"bids:{name}:{file.relative_to(root).as_posix()}"] = str(reason)
    return found


def _summary(
    mode: Mode, scans: Sequence[Scan], records: Sequence[dict[str, Any]], computed: int
) -> str:
    """Return in a sentence what was done to how many."""
    done = {"strip": "brain extracted", "rigid": "brain aligned rigidly", "align": "brain aligned"}
    masked = sum(scan.mask is not None for scan in scans)
    faults = Counter(f"{r['status']}: {r['code']}" for r in records if r["status"] != "ok")
    told = [f"{sum(r['brain'] is not None for r in records)} of {len(scans)}"]
    told += [f"{masked} by masks of the dataset"] if masked else []
    told += [f"{count} {fault}" for fault, count in faults.items()]
    return f"Preprocessing, {done[mode]}: {', '.join(told)}; {computed} computed now."

"""The stage `preprocess`: scans of a dataset to brains, masked and aligned, as a BIDS derivative."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from joblib import Parallel, cpu_count, delayed, parallel_config

from nidl_dcl.bids.entities import natural_key
from nidl_dcl.bids.index import DatasetIndex, find_images
from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.data.image_table import ImageTable
from nidl_dcl.data.preprocessed import TABLE, Mode, PreprocessedImages
from nidl_dcl.errors import UsageError
from nidl_dcl.io.console import log_progress
from nidl_dcl.io.formats import keep_tsv, read_json, write_json
from nidl_dcl.output.description import describe_brains
from nidl_dcl.output.selection import Selection, as_text
from nidl_dcl.workflow.factory import refuse_changes
from nidl_dcl.workflow.options import DataOptions

if TYPE_CHECKING:
    from nidl_dcl.output.brains import Scan
    from nidl_dcl.output.folder import Output

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
}

_GB_EACH = 4.0
"""Memory that one image takes while it is preprocessed; measured, and rounded up."""


def missing_packages() -> str:
    """Return what must be installed before images can be preprocessed; empty if nothing."""
    missing = [name for name in ("SimpleITK", "deepbet") if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"it needs {' and '.join(missing)}: pip install 'nidl_dcl[preprocess]'"


def require_possible(data: DataOptions, mode: str) -> None:
    """Refuse to preprocess images in a mode where it cannot be done.

    Raises
    ------
    UsageError
        For images that are preprocessed already, and for missing packages.
    """
    if data.preset in PRESETS and not PRESETS[data.preset].is_native:
        scans = ", ".join(name for name, preset in PRESETS.items() if preset.is_native)
        raise UsageError(
            f"--preprocess {mode}: images of the preset {data.preset!r} are preprocessed "
            f"already, or no scans. It is for {scans}."
        )
    if missing := missing_packages():
        raise UsageError(f"--preprocess {mode}: {missing}.")


def default_mode(data: DataOptions) -> Mode:
    """Return what ``--preprocess auto`` means for a dataset without a model: "align" or "none"."""
    if data.preset not in PRESETS or not PRESETS[data.preset].is_native:
        return "none"
    if data.preset == "mp2rage" or data.bids_filter_file is not None:
        return "none"  # extraction is made for T1-weighted images, and a filter may name others
    if missing := missing_packages():
        _LOGGER.info(f"Scans are not aligned to a template; {missing}.")
        return "none"
    return "align"


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
    index = find_images(
        output.bids_dir,
        **table.selection,
        mask=table.mask,
        all_masked=False,
        leave_out=folder,  # whose masks are of an earlier run
        progress=log_progress,
    )
    scans = _scans(index, mode)
    with output.stage("preprocess") as entry:
        records, computed = _records(scans, folder, nprocs)
        entry["skipped"] = computed == 0
        _LOGGER.info(_summary(mode, scans, records, computed))
    return PreprocessedImages(
        mode, folder, _with_records(index, scans, records), _measures(index, scans, records)
    )


def _refuse_other_mode(folder: Path, mode: str) -> None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = read_json(folder / f"{TABLE}.json")["Mode"]
        refuse_changes({"--preprocess": before}, {"--preprocess": mode}, folder)


def _scans(index: DatasetIndex, mode: str) -> list[Scan]:
    """Return what there is to preprocess, one for each image of the index."""
    from nidl_dcl.output.brains import Scan, target_of

    scans = []
    for source, path, mask in index.images[["source", "path", "mask_path"]].itertuples(index=False):
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
    from nidl_dcl.output.brains import read_record

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
    from nidl_dcl.output.brains import write_brain
    from nidl_dcl.preprocessing.pipeline import keep_size, preprocess_t1w

    with _one_thread():
        outcome = preprocess_t1w(scan.path, mask=scan.mask, align=scan.mode != "strip")
        if scan.mode == "rigid" and outcome.brain is not None:
            outcome = replace(outcome, brain=keep_size(outcome.brain))
        return scan.target, write_brain(folder, scan, outcome)


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


def _with_records(
    index: DatasetIndex, scans: Sequence[Scan], records: Sequence[dict[str, Any]]
) -> pd.DataFrame:
    """Return the rows of ``inputs.tsv`` with what became of each scan, and its brain."""
    table = index.inputs.copy().astype(object)
    table["brain"], table["brain_ml"] = pd.NA, float("nan")
    row_of = dict(zip(table["path"], table.index, strict=True))
    for path, scan, record in zip(index.images["path"], scans, records, strict=True):
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
    from nidl_dcl.preprocessing.measures import MEASURES  # nilearn takes seconds to import

    rows = []
    images = index.images[["participant_id", "session_id", "run"]].itertuples(index=False)
    for image, scan, record in zip(images, scans, records, strict=True):
        measures = record["measures"] or {}
        told = [record[name] for name in ("status", "code", "message", "figure", "brain")]
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
    from nidl_dcl.preprocessing.measures import MEASURES

    describe_brains(brains.folder, bids_dir)
    file, table = brains.folder / f"{TABLE}.tsv", as_text(brains.measures)
    if selection and file.is_file():
        before = pd.read_csv(
            file, sep="\t", quoting=3, dtype=str, keep_default_na=False, na_values=["n/a"]
        )
        kept = before[~selection.holds(before) & ~before["source"].isin(table["source"])]
        table = pd.concat([kept.astype(object), table.astype(object)])
        table = table.sort_values("source", key=lambda c: c.map(natural_key), ignore_index=True)
    keep_tsv(file, table)
    columns = {
        name: {"Description": text} for name, text in {**_COLUMNS, **MEASURES}.items()
    }
    write_json(file.with_suffix(".json"), {"Mode": brains.mode, **columns})


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



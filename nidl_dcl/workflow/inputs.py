"""How images come into a stage: listed, opened, told of and prepared.

Thin: the data module does the work, what became of each image is written here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd

from nidl_dcl.data.datamodule import RIGHT_FOLDER, BIDSDataModule
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.io.console import NullReporter
from nidl_dcl.io.formats import keep_tsv, to_tsv
from nidl_dcl.output.folder import Output
from nidl_dcl.output.parts import Selection, as_text, merge_inputs, merge_matches
from nidl_dcl.workflow.factory import data_module
from nidl_dcl.workflow.figure_data import write_average, write_mosaic
from nidl_dcl.workflow.options import DataOptions, RunOptions

__all__ = [
    "INPUTS",
    "MATCHES",
    "check_inputs",
    "draw_volumes",
    "index",
    "input_lines",
    "logged",
    "prepare",
    "set_up",
    "tell_inputs",
]

INPUTS = Path("logs") / "inputs.tsv"


MATCHES = Path("logs") / "phenotypes.tsv"


def index(
    bids_dir: Path,
    data: DataOptions,
    run: RunOptions,
    *,
    check: bool = False,
    console: NullReporter | None = None,
) -> str:
    """Return every candidate image as TSV text, the columns those of ``logs/inputs.tsv``.

    Parameters
    ----------
    bids_dir : Path
        The dataset.
    data, run : DataOptions, RunOptions
        Which images; how many workers.
    check : bool, default=False
        Whether images are opened; otherwise they are judged by name.
    console : Quiet, optional
        Told of progress, and how many images each step leaves.
    """
    from nidl_dcl.bids.index import find_images

    console = console or NullReporter()
    if run.share:
        raise UsageError(
            "index lists ids and paths, and writes to no OUTPUT_DIR: leave --share out."
        )
    module = data_module(bids_dir, data, run, work=run.work_dir, max_skipped=1.0, console=console)
    if check:
        try:
            with suppress(InputsUnusableError):  # which the table says better
                module.check()
        except UsageError as error:
            if data.mask != "auto" or "mask" not in str(error):
                raise
            console.say(f"{error} Masks are not checked.")
            return index(bids_dir, replace(data, mask="none"), run, check=True, console=console)
        inputs, kept = module.inputs, module.kept
    else:
        found = find_images(bids_dir, **module.selection, mask="none", progress=console.progress)
        inputs, kept = found.inputs, found.kept
    for line in _kept_lines(kept):
        console.say(line)
    if inputs.empty:
        console.say(f"{bids_dir}: no candidate. {RIGHT_FOLDER} If so, look at --preset.")
    return to_tsv(inputs)


def check_inputs(output: Output, module: BIDSDataModule) -> None:
    """Open every image, and write what became of each even if the dataset is refused."""
    try:
        module.check()
    finally:
        if module.is_indexed:
            _keep_inputs(output, module)
    matches = as_text(module.matches)
    before = logged(output, "phenotypes.tsv", matches)
    keep_tsv(output.path / MATCHES, merge_matches(before, matches, _selected(module)))


def _keep_inputs(output: Output, module: BIDSDataModule) -> None:
    """Write what became of each image; of those that were not asked for, what was known before."""
    inputs = as_text(module.inputs)
    before = logged(output, "inputs.tsv", inputs)
    keep_tsv(output.path / INPUTS, merge_inputs(before, inputs, _selected(module)))


def set_up(output: Output, module: BIDSDataModule, console: NullReporter) -> None:
    """Prepare the volumes; images that only preparing finds unusable have their rows, too."""
    try:
        prepare(module, console)
    finally:
        _keep_inputs(output, module)


def prepare(module: BIDSDataModule, console: NullReporter) -> None:
    """Prepare the volumes, after saying how much will be written where."""
    volumes = module.plan()
    if missing := len(volumes.missing()):
        console.say(
            f"Preparing {missing} volume{'s' * (missing > 1)}: {missing * volumes.entry_bytes / 1e6:.1f} MB, a file "
            f"each, in {volumes.folder}."
        )
    before = len(module.images)
    module.setup()
    if lost := before - len(module.images):
        console.say(f"{lost} image{'s' * (lost > 1)} cannot be prepared (logs/inputs.tsv).")


def draw_volumes(output: Output, module: BIDSDataModule, console: NullReporter) -> None:
    """Write what prepared volumes look like: some of them, their average, those far from it."""
    write_mosaic(output.path / "figures", module)
    write_average(output.path / "figures", module, console.progress)


def _kept_lines(kept: Sequence[tuple[str, int]]) -> list[str]:
    """Say how many images each step of a selection left."""
    return [f"{count} image{'' if count == 1 else 's'}: {step}" for step, count in kept]


def input_lines(module: BIDSDataModule, where: str) -> list[str]:
    """Say how many images each step left, what is odd, and how tables were read.

    Parameters
    ----------
    module : BIDSDataModule
        Checked.
    where : str
        What has a row for each image.
    """
    odd = module.inputs[module.inputs["code"] != "ok"]
    faults = (odd["status"] + ": " + odd["code"]).value_counts()
    return [
        *_kept_lines(module.kept),
        *(f"{count} {fault} ({where})" for fault, count in faults.items()),
        *module.notes,
    ]


def tell_inputs(module: BIDSDataModule, console: NullReporter) -> None:
    """Say what `input_lines` has."""
    for line in input_lines(module, "logs/inputs.tsv"):
        console.say(line)


def logged(output: Output, name: str, like: pd.DataFrame | None) -> pd.DataFrame | None:
    """Return a table of ``logs/`` as text; None where there is none with the same columns."""
    try:
        text = (output.path / "logs" / name).read_text("utf-8")
        table = pd.read_csv(
            io.StringIO(text),
            sep="\t",
            dtype=str,
            keep_default_na=False,
            na_values=["n/a"],
            quoting=3,
        )
    except (OSError, ValueError):
        return None
    return table if like is None or list(table.columns) == list(like.columns) else None


def _selected(module: BIDSDataModule) -> Selection:
    asked = module.selection
    return Selection.of(asked["participant_label"] or (), asked["session_label"] or ())

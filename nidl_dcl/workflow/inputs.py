"""The inputs of a study: a dataset that is indexed, checked and joined with phenotypes once."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.data.image_table import WHICH_FOLDER, ImageTable
from nidl_dcl.data.preprocessed import DERIVATIVE
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.io.console import log_progress
from nidl_dcl.io.formats import keep_tsv, to_tsv
from nidl_dcl.models.model_source import ModelSource
from nidl_dcl.output.description import add_links
from nidl_dcl.output.folder import Output
from nidl_dcl.output.selection import Selection, as_text, merge_inputs, merge_matches
from nidl_dcl.volumes.preparation import Preparation
from nidl_dcl.workflow.factory import data_module, image_table
from nidl_dcl.workflow.options import DataOptions, RunOptions, TrainingOptions
from nidl_dcl.workflow.participants import hold_out, missing_groups
from nidl_dcl.workflow.preprocess import choose_mode, preprocess_scans, write_measures

_LOGGER = logging.getLogger(__name__)

WHOLE_HEADS = (
    "No brain masks: the images are used as they are, face, neck and scalp included unless they are "
    "skull-stripped. Give masks as a derivative (…_desc-brain_mask.nii.gz), or have them made: pip "
    "install 'nidl_dcl[preprocess]', then --preprocess align."
)
"""What to do where whole heads are used."""


@dataclass(eq=False)
class Study:
    """A dataset and an output folder, with the options that all stages share.

    Every stage takes one; the dataset is read when the first stage needs it, and once.

    Parameters
    ----------
    output : Output
        Dataset and output folder; held for writing.
    data : DataOptions
        Which images are used.
    run : RunOptions
        How it runs; the model's label.
    group : str, optional
        Column whose equal values (a family) stay on one side of every split.
    trust : sequence of str
        Packages whose encoders may be imported.
    model : Path or "builtin", optional
        Folder of the model that is used; default: `model_folder`.
    brains : Path, optional
        Folder of the derivative of preprocessed images; default: ``derivatives/preproc`` in the
        output folder.
    """

    output: Output
    data: DataOptions = field(default_factory=DataOptions)
    run: RunOptions = field(default_factory=RunOptions)
    group: str | None = None
    trust: Sequence[str] = ()
    model: ModelSource | None = None
    brains: Path | None = None
    _is_announced: bool = field(default=False, init=False, repr=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False)

    @property
    def model_folder(self) -> Path:
        """Where the study's own model is, or will be."""
        return self.output.model_folder(self.run.model_name)

    @property
    def figures(self) -> Path:
        """The folder of figures."""
        return self.output.path / "figures"

    @property
    def selection(self) -> Selection:
        """The participants and sessions that the run is restricted to."""
        return Selection.of(self.data.participant_label, self.data.session_label)

    @cached_property
    def table(self) -> ImageTable:
        """The images of the dataset, checked; what became of each is written.

        Raises
        ------
        UsageError, InputsUnusableError
            As `ImageTable.check`; ``logs/inputs.tsv`` is written all the same.
        """
        bids_dir, work = self.output.bids_dir, self.output.work
        table = image_table(bids_dir, self.data, work=work)
        mode = choose_mode(self.data, self.model or self.model_folder)
        if mode != "none":
            folder = self.brains or self.output.path / "derivatives" / DERIVATIVE
            brains = preprocess_scans(self.output, table, mode, folder, self.run.nprocs)
            table = image_table(bids_dir, self.data, preprocessed=brains, work=work)
        try:
            table.check()
        finally:
            self.write_inputs(table)
        return table

    def data_module(
        self,
        model: ModelSource,
        *,
        training: TrainingOptions | None = None,
        preparation: Preparation | None = None,
    ) -> BIDSDataModule:
        """Return the data module of a stage, with the participants held out that a model holds out.

        Parameters
        ----------
        model : Path or "builtin"
            Folder of the model that is trained or used.
        training : TrainingOptions, optional
            How it is trained.
        preparation : Preparation, optional
            The model's input contract; otherwise made from `training` and the images.

        Raises
        ------
        UsageError
            As `hold_out`.
        """
        module = data_module(
            self.table,
            self.run,
            training=training,
            preparation=preparation,
            group=self.group,
            work=self.output.work,
        )
        self.write_inputs(self.table)
        hold_out(module, self.data.holdout, model, self.group)
        return module

    def announce(self, lines: Sequence[str]) -> None:
        """Log lines, each of them once, whichever stages say it."""
        for line in lines:
            if line not in self._said:
                self._said.add(line)
                _LOGGER.info(line)

    def prepare(self, module: BIDSDataModule) -> None:
        """Prepare the volumes, after logging what was found and how much will be written where.

        Images that only preparing finds unusable get their rows in ``logs/inputs.tsv``, too.
        """
        if not self._is_announced:
            self._is_announced = True
            for line in input_lines(self.table, "logs/inputs.tsv"):
                _LOGGER.info(line)
            if found := missing_groups(module.images, self.group):
                _LOGGER.info(found["sentence"])
        volumes = module.plan()
        if missing := len(volumes.missing()):
            _LOGGER.info(
                f"Preparing {missing} volume{'s' * (missing > 1)}: "
                f"{missing * volumes.entry_bytes / 1e6:.1f} MB, a file each, in {volumes.folder}."
            )
        before = len(module.images)
        try:
            module.setup()
        finally:
            self.write_inputs(module.table)
        if lost := before - len(module.images):
            _LOGGER.info(f"{lost} image{'s' * (lost > 1)} cannot be prepared (logs/inputs.tsv).")

    def write_inputs(self, table: ImageTable) -> None:
        """Write what became of each image and each row of the phenotypes, if the folder is held.

        Of images that were not asked for, what was known before stays.
        """
        if self.output.is_held and table.preprocessed is not None:
            write_measures(table.preprocessed, self.output.bids_dir, self.selection)
        if not (self.output.is_held and table.is_indexed):
            return
        add_links(self.output.path, table.links)
        for name, found, merge in (
            ("inputs.tsv", table.inputs, merge_inputs),
            ("phenotypes.tsv", table.matches, merge_matches),
        ):
            now = as_text(found)
            before = self._read_log(name, now)
            keep_tsv(self.output.path / "logs" / name, merge(before, now, self.selection))

    def _read_log(self, name: str, like: pd.DataFrame) -> pd.DataFrame | None:
        """Return a table of ``logs/`` as text; None where there is none with the same columns."""
        try:
            text = (self.output.path / "logs" / name).read_text("utf-8")
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
        return table if list(table.columns) == list(like.columns) else None


def index(
    bids_dir: Path, data: DataOptions, run: RunOptions, *, check: bool = False
) -> tuple[str, int]:
    """Return every candidate image as TSV text, the columns those of ``logs/inputs.tsv``.

    Also return how many images can be used.

    Parameters
    ----------
    bids_dir : Path
        The dataset.
    data, run : DataOptions, RunOptions
        Which images; the work folder.
    check : bool, default=False
        Whether images are opened; otherwise they are judged by name.
    """
    from nidl_dcl.bids.index import find_images

    table = image_table(bids_dir, data, work=run.work_dir, max_skipped=1.0)
    if check:
        try:
            with suppress(InputsUnusableError):  # which the table says better
                table.check()
        except UsageError as error:
            if data.mask != "auto" or "mask" not in str(error):
                raise
            _LOGGER.info(f"{error} Masks are not checked.")
            return index(bids_dir, replace(data, mask="none"), run, check=True)
        inputs, kept, notes = table.inputs, table.kept, table.near
    else:
        found = find_images(bids_dir, **table.selection, mask="none", progress=log_progress)
        inputs, kept, notes = found.inputs, found.kept, found.notes
    for line in (*_kept_lines(kept), *notes):
        _LOGGER.info(line)
    if inputs.empty:
        _LOGGER.info(f"{bids_dir}: no candidate. {WHICH_FOLDER} If so, look at --preset.")
    return to_tsv(inputs), int((inputs["status"] != "skip").sum())


def _kept_lines(kept: Sequence[tuple[str, int]]) -> list[str]:
    """Return how many images each step of a selection left, a line each."""
    return [f"{count} image{'' if count == 1 else 's'}: {step}" for step, count in kept]


def input_lines(table: ImageTable, where: str) -> list[str]:
    """Return how many images each step left, what is odd, and how phenotype tables were read.

    Parameters
    ----------
    table : ImageTable
        Checked.
    where : str
        What has a row for each image.
    """
    odd = table.inputs[table.inputs["code"] != "ok"]
    faults = (odd["status"] + ": " + odd["code"]).value_counts()
    lines = [f"{count} {fault} ({where})" for fault, count in faults.items()]
    for code in ("affine", "mask", "blank", "range", "spacing"):  # what no file's name tells
        rows = odd[(odd["status"] == "warn") & (odd["code"] == code)]
        if len(rows):
            lines.append(f"  {code}, for one {rows['path'].iloc[0]}: {rows['message'].iloc[0]}")
    if table.has_whole_heads:
        lines.append(WHOLE_HEADS)
    return [*_kept_lines(table.kept), *table.near, *lines, *table.notes]

"""The images of a dataset: indexed, opened once and joined with phenotypes, one row each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import cpu_count

from nidl_dcl.bids.index import INPUT_COLUMNS, DatasetIndex, find_images
from nidl_dcl.bids.phenotypes import read_phenotypes
from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.data.grouping import connected_groups
from nidl_dcl.data.preprocessed import PreprocessedImages, read_measures
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.io.file_cache import FileMemory
from nidl_dcl.status import Check, UnreadableVolumeError
from nidl_dcl.volumes.checks import check_images, copies, how_to_fetch, record_checks
from nidl_dcl.volumes.reading import INTENSITIES

WHICH_FOLDER = "Is this the folder that holds the sub-* folders?"
"""What to ask where no file is a candidate."""

Progress = Callable[[str, int, int], None]


class ImageTable:
    """The images of a BIDS dataset, with what became of each candidate.

    Nothing is read before `check`, or the first use of a table.

    Parameters
    ----------
    bids_dir : path
        Dataset; never written to.
    preset : str, default="raw-t1w"
        Which images; a name of ``nidl_dcl.bids.presets.PRESETS``.
    derivatives : sequence of str, default=()
        Folders of derivatives, ``[NAME=]PATH``.
    participant_label, session_label : sequence of str or None
        Only these, with or without prefix.
    exclude_participant_label : sequence of str or None
        Not these, with or without prefix.
    exclude : path or None
        Table of images that are not to be used: ``participant_id``, and if wanted ``session_id``,
        ``run`` and ``reason``.
    filters : mapping or None
        BIDS filter: entity to value, list of values, ``None`` (absent) or ``"*"`` (any).
    select : {"all", "first", "last"}, default="all"
        Of several images in a session.
    intensity : {"auto", "robust", "probability", "signed"}, default="auto"
        What the values are, see `Preparation`; "auto": as the preset says.
    mask : str, default="auto"
        "auto", "none", or the derivative that holds the brain masks.
    phenotypes : sequence of path, optional
        Further tables, besides those of the dataset.
    id_column, id_map : optional
        As in `nidl_dcl.bids.phenotypes.read_phenotypes`.
    preprocessed : PreprocessedImages, optional
        Brains that are used instead of the dataset's own images. `preset` and `derivatives` are then
        those of the brains.
    max_skipped : float, default=0.1
        Largest share of the candidate images that may be unusable.
    work_dir : path, optional
        Where what was learned of files is kept, for as long as they do not change.
    progress : callable, optional
        Called with (what, done, total).

    Attributes
    ----------
    root : Path
        The dataset, absolute; paths are relative to it. Known after `check`.
    kept : list of (str, int)
        How many images each step of the selection left.
    notes : list of str
        How the phenotype tables were read.
    near : list of str
        What was not taken though its name is near.
    preprocessing : {"none", "strip", "rigid", "align"}
        What the program did to the images before. Known after `check`.
    links : dict of str to Path
        The datasets that `source` refers to, by name. Known after `check`.
    matches : DataFrame
        Whom the rows of the phenotype tables belong to.
    """

    def __init__(
        self,
        bids_dir: str | Path,
        *,
        preset: str = "raw-t1w",
        derivatives: Sequence[str] = (),
        participant_label: Sequence[str] | None = None,
        session_label: Sequence[str] | None = None,
        exclude_participant_label: Sequence[str] | None = None,
        exclude: str | Path | None = None,
        filters: Mapping[str, Any] | None = None,
        select: str = "all",
        intensity: str = "auto",
        mask: str = "auto",
        phenotypes: Sequence[str | Path] = (),
        id_column: str | None = None,
        id_map: str | Path | None = None,
        preprocessed: PreprocessedImages | None = None,
        max_skipped: float = 0.1,
        work_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        if intensity not in ("auto", *INTENSITIES):
            raise UsageError(f"intensity is auto, {', '.join(INTENSITIES)}; got {intensity!r}.")
        self.bids_dir = Path(bids_dir)
        self.preset = preset
        self.selection: dict[str, Any] = {
            "preset": preset,
            "derivatives": tuple(derivatives),
            "participant_label": participant_label,
            "session_label": session_label,
            "exclude_participant_label": exclude_participant_label,
            "exclude": exclude,
            "filters": filters,
            "select": select,
        }
        self.mask = mask
        self.phenotype_files = [Path(file) for file in phenotypes]
        self.preprocessed = preprocessed
        self.preprocessing = "none"
        self.max_skipped = max_skipped
        self.work_dir = None if work_dir is None else Path(work_dir)
        self.progress = progress or (lambda what, done, total: None)
        self.file_cache = FileMemory(
            None if self.work_dir is None else self.work_dir / "files.json"
        )
        self.kept: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.near: list[str] = []
        self.matches = pd.DataFrame(columns=["participant_id", "id", "rule", "source"])
        self._phenotype_columns: list[str] = []
        self._intensity = intensity
        self.ids: dict[str, Any] = {"id_column": id_column, "id_map": id_map}
        self._reasons: Mapping[str, list[str]] = {}
        self._sidecars: Mapping[str, Any] = {}
        self.links: dict[str, Path] = {}
        self._images: pd.DataFrame | None = None
        self._inputs: pd.DataFrame | None = None

    @property
    def images(self) -> pd.DataFrame:
        """The usable images, one row each.

        ``participant_id session_id run path source mask_path``; ``person_id``: the participant that
        stands for all who share an image; ``content``: checksum of the voxels, which copies share;
        ``voxel_mm``: longest side of a voxel in the file; ``brain_ml``, if the program aligned the
        images affinely: volume of the brain before; then the phenotypes.
        """
        self.check()
        assert self._images is not None
        return self._images

    @property
    def inputs(self) -> pd.DataFrame:
        """``participant_id session_id path status code message``, one row per candidate image.

        After a `check` that refused the dataset it still holds what was found.
        """
        if self._inputs is None:
            self.check()
        assert self._inputs is not None
        return self._inputs

    @property
    def is_indexed(self) -> bool:
        """Whether `inputs` is known, be the dataset usable or not."""
        return self._inputs is not None

    @property
    def intensity(self) -> str:
        """The rule for the values of the images: "robust", "probability" or "signed"."""
        if self.preset not in PRESETS:
            raise UsageError(f"Unknown preset {self.preset!r}; known: {', '.join(PRESETS)}.")
        return PRESETS[self.preset].rule if self._intensity == "auto" else self._intensity

    @property
    def phenotype_columns(self) -> list[str]:
        """The columns of `images` that come from phenotype tables."""
        self.check()
        return self._phenotype_columns

    @property
    def has_whole_heads(self) -> bool:
        """Whether images with a skull are used without masks."""
        preset = PRESETS[self.preset]
        with_skull = preset.kind == "intensity" and not preset.stripped
        return (
            with_skull
            and self.preprocessing == "none"
            and len(self.images) > 0
            and not self.images["mask_path"].notna().all()
        )

    def why_missing(self, column: str | None = None) -> str:
        """Return why values of a column, or all of a table, may be missing; empty if nothing is odd."""
        self.check()
        own = [] if column is None else self._reasons.get(column, [])
        return "".join(f" {reason}." for reason in (*own, *self._reasons.get("", [])))

    def units(self, column: str) -> str | None:
        """Return the unit that the tables declare for a column, None if they declare none."""
        self.check()
        return str(self._sidecars.get(column, {}).get("Units") or "").strip() or None

    def check(self) -> None:
        """Index the dataset, open every candidate image once and join the phenotypes.

        Raises
        ------
        UsageError
            For a missing folder, an unknown participant, an incomplete set of masks.
        InputsUnusableError
            When no image is usable, or more than `max_skipped` of the candidates are not.
        """
        if self._images is not None:
            return
        if self.work_dir is not None and not self.work_dir.exists():
            # Prepared heads have faces. A folder that is there keeps the rights it was given.
            self.work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.preprocessed is not None and self.preprocessed.scans["brain"].isna().all():
            self._inputs = self.preprocessed.scans[INPUT_COLUMNS].astype("string")
            self._refuse_unusable(self._inputs, 0, "")
        with warnings.catch_warnings():
            # Joining the tables, below, refuses one that cannot be read.
            warnings.filterwarnings("ignore", "participants.tsv is not used")
            index = find_images(
                self.bids_dir, **self.selection, mask=self.mask, progress=self.progress
            )
        if self.preprocessed is not None:
            index = self.preprocessed.in_place_of_scans(index)
            self.preprocessing = self.preprocessed.mode
        elif self.preset.startswith("preprocessed") and len(index.images):
            self.preprocessing, volumes = read_measures(index)
            if volumes:
                index.images["brain_ml"] = volumes
        if self.preprocessing != "align":  # otherwise images keep their size
            images = index.images.drop(columns="brain_ml", errors="ignore")
            index = replace(index, images=images)
        self.root = index.root
        homes = index.images["source"].str.extract("^bids:([^:]+):", expand=False)
        self.links = {name: index.links[name] for name in sorted(set(homes))}
        images = index.images.reset_index(drop=True)
        found = check_images(
            self.root, images, self.intensity, self.file_cache, min(8, cpu_count()), self.progress
        )
        self._assemble(index, images, found)

    def leave_out(self, faults: Mapping[Path, UnreadableVolumeError]) -> None:
        """Leave out images that turned out unusable when prepared, as `check` would have."""
        index, images, found = self._checked
        checks = []
        for path, mask, check in zip(images["path"], images["mask_path"], found, strict=True):
            if (fault := faults.get(self.root / str(path))) is not None:
                about = str(fault).removeprefix(f"{self.root / str(path)}: ")
                about = about.replace(f"{self.root / str(mask)}: ", f"mask {mask}: ")
                check = replace(check, status="skip", code=fault.code, message=about)
            checks.append(check)
        self._assemble(index, images, checks)

    def _assemble(self, index: DatasetIndex, images: pd.DataFrame, found: list[Check]) -> None:
        """Make the tables from what opening the images showed."""
        self._checked = index, images, found
        shared, found = copies(images, found)
        inputs = self._inputs = record_checks(index.inputs, images, found)
        usable = [check.status != "skip" for check in found]
        kept = images[usable].reset_index(drop=True)
        self.kept = [*index.kept, ("usable after opening", len(kept))]
        self.near = index.notes
        fetch = how_to_fetch(self.root, inputs)
        self._refuse_unusable(inputs, len(kept), fetch)
        phenotypes = read_phenotypes(self.root, kept, self.phenotype_files, **self.ids)
        self._reasons = phenotypes.reasons
        self.notes = [*phenotypes.notes, *([fetch] if fetch else [])]
        self.matches = phenotypes.matches
        self._sidecars = phenotypes.columns
        own = [c for c in phenotypes.table.columns if c not in kept.columns]
        self._phenotype_columns = [str(c) for c in own]
        checks, alike = list(compress(found, usable)), list(compress(shared, usable))
        kept["person_id"] = connected_groups(kept["participant_id"], alike)
        kept["content"] = [check.content for check in checks]
        kept["voxel_mm"] = [check.coarsest for check in checks]
        self._images = pd.concat([kept, phenotypes.table[own].set_index(kept.index)], axis=1)

    def _refuse_unusable(self, inputs: pd.DataFrame, n_usable: int, fetch: str) -> None:
        # What a person left out is not a fault of the data.
        candidates = inputs[(inputs["path"] != "n/a") & (inputs["code"] != "excluded")]
        skipped = int((candidates["status"] == "skip").sum())
        if n_usable == 0:
            first = (
                "`nidl-dcl index` lists the candidates; look at --preset and --bids-filter-file."
            )
            if inputs.empty:
                first = f"{WHICH_FOLDER} If so, look at --preset and --bids-filter-file."
                first = " ".join([*(f"{note[0].upper()}{note[1:]}." for note in self.near), first])
            elif len(told := inputs[inputs["message"].fillna("").str.len() > 0]):
                row = told.iloc[0]
                first = f"For one, {row['participant_id']}: {row['message'].rstrip('.')}. {first}"
            raise InputsUnusableError(
                f"{self.bids_dir}: no usable image for preset {self.preset!r} "
                f"({_reasons(inputs) or 'no candidate by name'}). {first} {fetch}"
            )
        if skipped > self.max_skipped * len(candidates):
            raise InputsUnusableError(
                f"{self.bids_dir}: {skipped} of {len(candidates)} candidate images cannot be used "
                f"({_reasons(candidates)}), more than the share of {self.max_skipped:g} that is "
                "allowed. logs/inputs.tsv and `nidl-dcl index --check` name them; repair them, or "
                f"raise --max-skipped. {fetch}"
            )


def _reasons(inputs: pd.DataFrame) -> str:
    skipped = inputs.loc[inputs["status"] == "skip", "code"].value_counts()
    return ", ".join(f"{count} {code}" for code, count in skipped.items())

"""From a BIDS dataset to loaders: index, check, prepare, split by participant, draw two views."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from joblib import cpu_count
from torch.utils.data import DataLoader

from nidl_dcl.bids.index import PRESETS, DatasetIndex, find_images, layout
from nidl_dcl.bids.phenotypes import read_phenotypes
from nidl_dcl.data.datasets import LazyViews, TwoViewSamples
from nidl_dcl.data.exposure import exposure_of
from nidl_dcl.data.grouping import joined
from nidl_dcl.data.input_contract import origin_of, require_contract
from nidl_dcl.data.samplers import sync_with_trainer, two_view_loader
from nidl_dcl.data.views import volume_views
from nidl_dcl.distributed import world
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.io.file_cache import FileMemory
from nidl_dcl.randomness import key_seed
from nidl_dcl.volumes.cache import PreparedVolumes
from nidl_dcl.volumes.checks import check_images, copies, how_to_fetch, record_checks
from nidl_dcl.volumes.preparation import Preparation, common_shape
from nidl_dcl.volumes.reading import INTENSITIES, Check, UnreadableVolumeError

__all__ = ["RIGHT_FOLDER", "BIDSDataModule", "split_of"]

RIGHT_FOLDER = "Is this the folder that holds the sub-* folders?"
"""What to ask where no file is a candidate."""


Progress = Callable[[str, int, int], None]


class BIDSDataModule(L.LightningDataModule):
    """Loaders of two views per participant, from a BIDS dataset of 3D brain MRI.

    A training epoch holds one image of each participant, a random one of theirs, so that two scans
    of one person are never negatives of each other.

    Parameters
    ----------
    bids_dir : path
        Dataset; never written to.
    preset : str, default="raw-t1w"
        Which images; a name of ``nidl_dcl.bids.index.PRESETS``.
    derivatives : sequence of str, default=()
        Folders of derivatives, ``[NAME=]PATH``.
    participant_label, session_label : sequence of str or None
        Only these, with or without prefix.
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
    preparation : Preparation, optional
        A model's input contract; otherwise made from `spacing`, `shape` and the images.
    spacing : float or sequence of three, default=4.0
        Voxel size in mm.
    shape : sequence of three int, optional
        Voxels; default: field of view / spacing.
    views : callable or {"light", "default", "strong"}, default="default"
        From a volume to a view of it.
    views_on_device : bool, default=False
        Draw the views where the encoder is, on a GPU, rather than in the loading workers.
    batch_size : int, default=32
        Participants of a batch, all processes together.
    num_workers : int, default=0
        Loading workers; they change no result.
    validation, holdout : float, default=0.0
        Shares of participants, by hash: a new participant moves nobody else.
    group : str, optional
        Column of phenotypes whose equal values (a family) are of one split.
    random_state : int, default=0
        Seed of splits, order and views.
    work_dir : path, optional
        Where prepared volumes are kept; otherwise they are prepared anew at each access.
    max_skipped : float, default=0.1
        Largest share of the candidate images that may be unusable.
    progress : callable, optional
        Called with (what, done, total).

    Attributes
    ----------
    images : DataFrame
        One row per usable image: ``participant_id session_id run path source mask_path split`` and
        the phenotypes.
    inputs : DataFrame
        One row per candidate image: ``participant_id session_id path status code message``.
    preparation : Preparation
        The input contract, once set up.

    Examples
    --------
    >>> data = BIDSDataModule("ds000001", spacing=4.0)  # doctest: +SKIP
    >>> DCL(StridedCNN, proj_input_dim=512).fit(data)  # doctest: +SKIP
    """

    def __init__(
        self,
        bids_dir: str | Path,
        *,
        preset: str = "raw-t1w",
        derivatives: Sequence[str] = (),
        participant_label: Sequence[str] | None = None,
        session_label: Sequence[str] | None = None,
        filters: Mapping[str, Any] | None = None,
        select: str = "all",
        intensity: str = "auto",
        mask: str = "auto",
        phenotypes: Sequence[str | Path] = (),
        preparation: Preparation | None = None,
        spacing: float | Sequence[float] = 4.0,
        shape: Sequence[int] | None = None,
        views: Callable[..., Any] | str = "default",
        views_on_device: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        validation: float = 0.0,
        holdout: float = 0.0,
        group: str | None = None,
        random_state: int = 0,
        work_dir: str | Path | None = None,
        max_skipped: float = 0.1,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        for name, share in (("validation", validation), ("holdout", holdout)):
            if not 0 <= share < 1:
                raise UsageError(f"{name} is a share from 0 to below 1, got {share}.")
        if validation + holdout >= 1:
            raise UsageError("validation and holdout together leave nobody to train on.")
        if intensity not in ("auto", *INTENSITIES):
            raise UsageError(f"intensity is auto, {', '.join(INTENSITIES)}; got {intensity!r}.")
        self.bids_dir = Path(bids_dir)
        self.preset = preset
        self.intensity = intensity
        self.selection: dict[str, Any] = {
            "preset": preset,
            "derivatives": tuple(derivatives),
            "participant_label": participant_label,
            "session_label": session_label,
            "filters": filters,
            "select": select,
        }
        self.mask = mask
        self.phenotype_files = [Path(file) for file in phenotypes]
        self.given_preparation = preparation
        self.spacing = _three(spacing)
        self.shape = None if shape is None else tuple(int(n) for n in shape)
        self.views = views
        self.views_on_device = views_on_device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.validation = validation
        self.holdout = holdout
        self.group = group
        self.random_state = random_state
        self.work_dir = None if work_dir is None else Path(work_dir)
        self.max_skipped = max_skipped
        self.progress = progress or (lambda what, done, total: None)
        self.kept: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.memory = FileMemory(None if self.work_dir is None else self.work_dir / "files.json")
        self.volumes: PreparedVolumes | None = None
        self._preparation: Preparation | None = None
        self._voxels: list[float] = []
        self._shared: list[str | None] = []
        self._contents: list[str] = []
        self._about: Mapping[str, Any] = {}
        self._groups: list[str] = []
        self._images: pd.DataFrame | None = None
        self._inputs: pd.DataFrame | None = None
        self._phenotype_columns: list[str] = []
        self.matches = pd.DataFrame(columns=["participant_id", "id", "rule", "source"])

    # -- tables ------------------------------------------------------------------------------

    @property
    def images(self) -> pd.DataFrame:
        """The usable images, one row each."""
        self.check()
        assert self._images is not None
        return self._images

    @property
    def inputs(self) -> pd.DataFrame:
        """The candidate images and what became of them, one row each.

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
    def phenotype_columns(self) -> list[str]:
        """The columns of `images` that come from phenotype tables."""
        self.check()
        return self._phenotype_columns

    @property
    def shared(self) -> list[str | None]:
        """For each image what several participants share, None where it is their own alone."""
        self.check()
        return self._shared

    @property
    def voxels(self) -> list[float]:
        """For each image the longest side of a voxel in its file, in mm."""
        self.check()
        return self._voxels

    @property
    def contents(self) -> list[str]:
        """For each image a checksum of its voxels, which copies share."""
        self.check()
        return self._contents

    @property
    def persons(self) -> list[str]:
        """For each image the participant that stands for all who share an image with theirs."""
        self.check()
        return self._groups

    def units(self, column: str) -> str | None:
        """Return the unit that the tables declare for a column, None if they declare none."""
        self.check()
        return str(self._about.get(column, {}).get("Units") or "").strip() or None

    @property
    def layout(self) -> Any:
        """A ``bids.BIDSLayout`` of the dataset, built at each access."""
        return layout(self.bids_dir)

    def check(self) -> None:
        """Index the dataset and open every candidate image once.

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
        with warnings.catch_warnings():
            # Joining the tables, below, refuses one that cannot be read.
            warnings.filterwarnings("ignore", "participants.tsv is not used")
            inventory = find_images(
                self.bids_dir,
                **self.selection,
                mask=self.mask,
                progress=self.progress,
            )
        self.root = inventory.root
        images = inventory.images.reset_index(drop=True)
        found = check_images(
            self.root, images, self._intensity, self.memory, self._threads, self.progress
        )
        self._settle(inventory, images, found)

    def _settle(self, inventory: DatasetIndex, images: pd.DataFrame, found: list[Check]) -> None:
        """Make the tables from what opening the images told."""
        self._checked = inventory, images, found
        shared, found = copies(images, found)
        inputs = self._inputs = record_checks(inventory.inputs, images, found)
        usable = [check.status != "skip" for check in found]
        kept = images[usable].reset_index(drop=True)
        self.kept = [*inventory.kept, ("usable after opening", len(kept))]
        fetch = how_to_fetch(self.root, inputs)
        candidates = inputs[inputs["path"] != "n/a"]
        skipped = int((candidates["status"] == "skip").sum())
        if len(kept) == 0:
            first = "`nidl-dcl index` lists the candidates;"
            if inputs.empty:
                first = f"{RIGHT_FOLDER} If so,"
            raise InputsUnusableError(
                f"{self.bids_dir}: no usable image for preset {self.preset!r} "
                f"({_reasons(inputs) or 'no candidate by name'}). "
                f"{first} look at --preset and --bids-filter-file. {fetch}"
            )
        if skipped > self.max_skipped * len(candidates):
            raise InputsUnusableError(
                f"{self.bids_dir}: {skipped} of {len(candidates)} candidate images cannot be used "
                f"({_reasons(candidates)}), more than the share of {self.max_skipped:g} that is "
                "allowed. logs/inputs.tsv and `nidl-dcl index --check` name them; repair them, or "
                "raise --max-skipped. "
                f"{fetch}"
            )
        phenotypes = read_phenotypes(self.root, kept, self.phenotype_files)
        self.notes = [*phenotypes.notes, *([fetch] if fetch else [])]
        self.matches = phenotypes.matches
        own = [c for c in phenotypes.table.columns if c not in kept.columns]
        kept = pd.concat([kept, phenotypes.table[own].set_index(kept.index)], axis=1)
        at = list(kept.columns).index("mask_path") + 1
        self._voxels = [check.coarsest for check in found if check.status != "skip"]
        self._about = phenotypes.columns
        self._shared = [s for s, check in zip(shared, found, strict=True) if check.status != "skip"]
        self._contents = [check.content for check in found if check.status != "skip"]
        self._groups = joined(kept["participant_id"], self._shared)
        self._phenotype_columns = [str(c) for c in own]
        kept.insert(at, "split", self._splits(kept))
        self._images = kept

    def _splits(self, images: pd.DataFrame) -> list[str]:
        """Return the split of each image, one for all who share an image or a family."""
        if self.group is not None and self.group not in self._phenotype_columns:
            raise UsageError(
                f"No phenotype table of {self.bids_dir} has a column {self.group!r}; there are: "
                f"{', '.join(self._phenotype_columns) or 'none'}."
            )
        families = [] if self.group is None else [images[self.group]]
        return [
            split_of(together, self.random_state, self.validation, self.holdout)
            for together in joined(images["participant_id"], self._shared, *families)
        ]

    def hold_out(self, share: float, group: str | None = None) -> None:
        """Divide anew, with another share held out; no image is opened for it.

        Parameters
        ----------
        share : float
            As `holdout`.
        group : str, optional
            As `group`.
        """
        self.check()
        assert self._images is not None
        self.holdout, self.group = share, group
        self._images = self._images.assign(split=self._splits(self._images))

    def exposure(self) -> dict[str, Any]:
        """Return whom a model trained on this data has seen (see `nidl_dcl.data.exposure`)."""
        used = (self.images["split"] != "holdout").to_numpy()
        people = self.images["participant_id"].astype(str)
        contents = [c for c, is_used in zip(self.contents, used, strict=True) if is_used]
        return exposure_of(
            sorted(people[used].unique()),
            contents,
            # Of images, not of ids, which could be tried until the salt fits.
            f"{key_seed(self.random_state, 'salt', *sorted(set(contents))):08x}",
            people[self.images["split"] == "val"].unique(),
        )

    @property
    def kind(self) -> str:
        """What the values of the images are: "intensity", "probability" or "signed"."""
        if self.preset not in PRESETS:
            raise UsageError(f"Unknown preset {self.preset!r}; known: {', '.join(PRESETS)}.")
        return "intensity" if self._intensity == "robust" else self._intensity

    @property
    def _intensity(self) -> str:
        return PRESETS[self.preset].rule if self.intensity == "auto" else self.intensity

    @property
    def _threads(self) -> int:
        """Threads that check and prepare; they change no result."""
        return max(self.num_workers, min(8, cpu_count()))

    @property
    def preparation(self) -> Preparation:
        """The input contract of models trained on this data.

        Raises
        ------
        UsageError
            When the images break the contract that was given, saying how to meet it.
        """
        if self._preparation is not None:
            return self._preparation
        images = self.images
        masked = bool(images["mask_path"].notna().all())
        at = int(np.argmax(self._voxels))
        origin = origin_of(images["path"], PRESETS[self.preset], self._voxels[at])
        if self.given_preparation is not None:
            require_contract(
                self.given_preparation,
                intensity=self._intensity,
                masked=masked,
                origin=origin,
                coarse=str(images["path"].iloc[at]),
            )
            self._preparation = self.given_preparation
        else:
            shape = self.shape or common_shape(
                [self.root / path for path in images["path"]], self.spacing, masked
            )
            self._preparation = Preparation(
                spacing=self.spacing,
                shape=shape,  # type: ignore[arg-type]
                masked=masked,
                intensity=self._intensity,
                origin=origin,
            )
        return self._preparation

    # -- Lightning ---------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Index, check and prepare; all of it once.

        Parameters
        ----------
        stage : str, optional
            Ignored.
        """
        if self.volumes is not None:
            return
        volumes = self.plan()
        faults: dict[int, UnreadableVolumeError] = {}
        with closing(volumes.fill(self._threads, faults)) as filling:
            for done, total in filling:
                self.progress("preparing volumes", done, total)
        if faults:
            self._leave_out({volumes.images[i]: fault for i, fault in faults.items()})
            volumes = self.plan()
        self.volumes = volumes

    def _leave_out(self, faults: Mapping[Path, UnreadableVolumeError]) -> None:
        """Leave out images that turned out unusable only with their masks, as `check` would have."""
        inventory, images, found = self._checked
        told = []
        for path, mask, check in zip(images["path"], images["mask_path"], found, strict=True):
            if (fault := faults.get(self.root / str(path))) is not None:
                about = str(fault).removeprefix(f"{self.root / str(path)}: ")
                about = about.replace(f"{self.root / str(mask)}: ", f"mask {mask}: ")
                check = replace(check, status="skip", code=fault.code, message=about)
            told.append(check)
        self._settle(inventory, images, told)

    def plan(self) -> PreparedVolumes:
        """Return the volumes as they will be prepared; none is, until it is asked for."""
        images, preparation = self.images, self.preparation
        return PreparedVolumes(
            [self.root / path for path in images["path"]],
            [
                self.root / path if preparation.masked and isinstance(path, str) else None
                for path in images["mask_path"]
            ],
            preparation,
            None if self.work_dir is None else self.work_dir / "volumes",
            self.memory,
        )

    def participants(self, split: str) -> list[tuple[str, list[int]]]:
        """Return the participants of a split with the rows of their images, by name.

        Participants who share an image are one, under the first one's name.
        """
        rows: dict[str, list[int]] = {}
        splits = self.images["split"]
        for row, (who, where) in enumerate(zip(self._groups, splits, strict=True)):
            if where == split:
                rows.setdefault(who, []).append(row)
        return sorted(rows.items())

    def two_views(self, split: str) -> TwoViewSamples:
        """Return the two-view samples of a split."""
        self.setup()
        views = self.views
        if isinstance(views, str):
            views = volume_views(views, self.kind)
        return TwoViewSamples(
            self.volumes,
            views,
            seed=self.random_state,
            groups=self.participants(split),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of two-view batches of the training participants."""
        loader = self._loader("train", shuffle=True)
        if self.trainer is not None:
            sync_with_trainer(self.trainer, loader)
        return loader

    def val_dataloader(self) -> Any:
        """Return the loader of the validation participants, none when there are none."""
        return self._loader("val", shuffle=False) if self.participants("val") else []

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader[Any]:
        samples = self.two_views(split)
        samples.lazy = self.views_on_device
        if len(samples) == 0:
            raise InputsUnusableError(f"No participant is left in the split {split!r}.")
        rank, processes = world()
        return two_view_loader(
            samples,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            rank=rank,
            processes=processes,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw the views of a batch that was loaded without, on the device where it is now."""
        return batch.draw() if isinstance(batch, LazyViews) else batch

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return a loader of all images, one at a time, in the order of `images`."""
        self.setup()
        assert self.volumes is not None
        return DataLoader(self.volumes, batch_size=1, num_workers=self.num_workers)

    def sample_name(self, epoch: int, batch: int, position: int) -> str:
        """Return the participant at a position of a training batch."""
        samples = self.two_views("train")
        batches: Any = self._loader("train", shuffle=True).batch_sampler
        return samples.key(batches.batch(epoch, batch)[position])

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a resumed run to equal an uninterrupted one."""
        names = [name for name, _ in self.participants("train")]
        return {
            "participants": f"{len(names)} ({key_seed(*names):08x})",
            "batch_size": self.batch_size,
            "data_seed": self.random_state,
            "preparation": self.preparation.rules(),
        }


def split_of(participant: str, seed: int, validation: float, holdout: float) -> str:
    """Return the split of a participant: ``"train"``, ``"val"`` or ``"holdout"``, by hash."""
    place = key_seed("split", seed, participant) / 2**32
    if place < holdout:
        return "holdout"
    return "val" if place < holdout + validation else "train"


def _three(spacing: float | Sequence[float]) -> tuple[float, float, float]:
    values = [float(spacing)] if isinstance(spacing, int | float) else [float(s) for s in spacing]
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise UsageError(f"spacing takes one or three sizes in mm, got {values}.")
    return values[0], values[1], values[2]


def _reasons(inputs: pd.DataFrame) -> str:
    skipped = inputs.loc[inputs["status"] == "skip", "code"].value_counts()
    return ", ".join(f"{count} {code}" for code, count in skipped.items())

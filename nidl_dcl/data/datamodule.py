"""Loaders of two views per participant, as a Lightning data module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from joblib import cpu_count
from torch.utils.data import DataLoader

from nidl_dcl.bids.layout import layout
from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.data.datasets import TwoViewSamples, draw_lazy_views
from nidl_dcl.data.exposure import exposure_of
from nidl_dcl.data.grouping import connected_groups
from nidl_dcl.data.image_table import ImageTable, Progress
from nidl_dcl.data.input_contract import origin_of, require_contract
from nidl_dcl.data.samplers import two_view_loader
from nidl_dcl.data.views import volume_views
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.randomness import key_seed
from nidl_dcl.status import UnreadableVolumeError
from nidl_dcl.volumes.cache import PreparedVolumes
from nidl_dcl.volumes.preparation import Preparation, common_shape


class BIDSDataModule(L.LightningDataModule):
    """Loaders of two views per participant, from a BIDS dataset of 3D brain MRI.

    A training epoch holds one image of each participant, a random one of theirs, so that two scans
    of one person are never negatives of each other. Which images there are is left to `ImageTable`.

    Parameters
    ----------
    bids_dir : path or ImageTable
        Dataset (never written to), or its images where they are indexed already.
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
    progress : callable, optional
        Called with (what, done, total).
    **selection
        Which images of `bids_dir`, as options of `ImageTable`: ``preset``, ``derivatives``,
        ``participant_label``, ``session_label``, ``exclude_participant_label``, ``exclude``,
        ``filters``, ``select``, ``intensity``, ``mask``, ``phenotypes``, ``id_column``, ``id_map``,
        ``max_skipped``.

    Attributes
    ----------
    table : ImageTable
        What was found in the dataset.
    volumes : PreparedVolumes or None
        One per row of `images`, once set up.

    Examples
    --------
    ``MY_DATASET`` is a BIDS dataset.

    >>> from nidl_dcl import BIDSDataModule
    >>> data = BIDSDataModule("MY_DATASET", spacing=8.0, batch_size=5)
    >>> first, second = next(iter(data.train_dataloader()))
    >>> first.shape
    torch.Size([5, 1, 24, 24, 24])
    >>> embeddings = DCL(StridedCNN, proj_input_dim=512).fit(data).transform(data)  # doctest: +SKIP
    """

    def __init__(
        self,
        bids_dir: str | Path | ImageTable,
        *,
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
        progress: Progress | None = None,
        **selection: Any,
    ) -> None:
        super().__init__()
        for name, share in (("validation", validation), ("holdout", holdout)):
            if not 0 <= share < 1:
                raise UsageError(f"{name} is a share from 0 to below 1, got {share}.")
        if validation + holdout >= 1:
            raise UsageError("validation and holdout together leave nobody to train on.")
        if isinstance(bids_dir, ImageTable):
            if selection:
                raise TypeError(f"An ImageTable has its selection: leave out {list(selection)}.")
            self.table = bids_dir
        else:
            self.table = ImageTable(bids_dir, work_dir=work_dir, progress=progress, **selection)
        self.bids_dir = self.table.bids_dir
        self.given_preparation = preparation
        self.spacing = _three(spacing)
        self.shape: Any = None if shape is None else tuple(int(n) for n in shape)
        self.views = views
        self.views_on_device = views_on_device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.validation = validation
        self.holdout = holdout
        self.group = self.holdout_group = group
        self.random_state = random_state
        self.work_dir = None if work_dir is None else Path(work_dir)
        self.progress = progress or (lambda what, done, total: None)
        self.volumes: PreparedVolumes | None = None
        self._preparation: Preparation | None = None
        self._images: pd.DataFrame | None = None

    # -- tables ------------------------------------------------------------------------------

    @property
    def images(self) -> pd.DataFrame:
        """The usable images, one row each: those of `ImageTable` with ``split`` and ``group_id``.

        ``group_id`` is the participant that stands for all of a person or family, who are of one
        split.
        """
        if self._images is None:
            images = self.table.images.copy()
            groups = together = self._group_ids(self.group)
            if self.holdout_group != self.group:
                together = self._group_ids(self.holdout_group)
            splits = [
                split_of(group, self.random_state, self.validation, self.holdout)
                for group in together
            ]
            at = list(images.columns).index("person_id")
            images.insert(at + 1, "group_id", groups)
            images.insert(at, "split", splits)
            self._images = images
        return self._images

    def _group_ids(self, column: str | None) -> list[str]:
        """Return who stands for the person, or the family by a column, of each image."""
        images, known = self.table.images, self.table.phenotype_columns
        if column is None:
            return images["person_id"].tolist()
        if column not in known:
            raise UsageError(
                f"No phenotype table of {self.bids_dir} has a column {column!r}; there are: "
                f"{', '.join(known) or 'none'}."
            )
        return connected_groups(images["participant_id"], images["person_id"], images[column])

    @property
    def inputs(self) -> pd.DataFrame:
        """The candidate images and what became of them, one row each (see `ImageTable`)."""
        return self.table.inputs

    @property
    def layout(self) -> Any:
        """A ``bids.BIDSLayout`` of the dataset, built at each access."""
        return layout(self.bids_dir)

    def check(self) -> None:
        """Index the dataset and open every candidate image once (see `ImageTable.check`)."""
        self.table.check()

    def hold_out(self, share: float, group: str | None = None) -> None:
        """Hold out another share, equal values of a column (perhaps not `group`) together.

        No image is opened for it.
        """
        self.holdout, self.holdout_group, self._images = share, group, None

    def participants(self, split: str) -> list[tuple[str, list[int]]]:
        """Return the participants of a split with the rows of their images, by name.

        Participants who share an image are one, under the first one's name.
        """
        images = self.images
        chosen = np.flatnonzero(images["split"] == split)
        rows: dict[str, list[int]] = {}
        for row, person in zip(chosen, images["person_id"].iloc[chosen], strict=True):
            rows.setdefault(person, []).append(int(row))
        return sorted(rows.items())

    def exposure(self) -> dict[str, Any]:
        """Return whom a model trained on this data has seen (see `nidl_dcl.data.exposure`)."""
        used = self.images[self.images["split"] != "holdout"]
        people = used["participant_id"].astype(str)
        return exposure_of(
            sorted(people.unique()),
            used["content"],
            # Of images, not of ids, which could be tried until the salt fits.
            f"{key_seed(self.random_state, 'salt', *sorted(set(used['content']))):08x}",
            people[used["split"] == "val"].unique(),
        )

    # -- volumes -----------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """What the values of the images are: "intensity", "probability" or "signed"."""
        rule = self.table.intensity
        return "intensity" if rule == "robust" else rule

    @property
    def preparation(self) -> Preparation:
        """The input contract of models trained on this data.

        Raises
        ------
        UsageError
            When the images break the contract that was given, saying how to meet it.
        """
        if self._preparation is None:
            images, intensity = self.images, self.table.intensity
            masked = bool(images["mask_path"].notna().all())
            paths = [self.table.root / path for path in images["path"]]
            at = int(np.argmax(images["voxel_mm"]))
            coarsest = float(images["voxel_mm"].iloc[at])
            origin = origin_of(
                images["path"], PRESETS[self.table.preset], coarsest, self.table.preprocessing
            )
            if self.given_preparation is not None:
                require_contract(
                    self.given_preparation,
                    intensity=intensity,
                    masked=masked,
                    origin=origin,
                    coarse=str(images["path"].iloc[at]),
                )
            self._preparation = self.given_preparation or Preparation(
                spacing=self.spacing,
                shape=self.shape or common_shape(paths, self.spacing, masked),
                masked=masked,
                intensity=intensity,
                origin=origin,
            )
        return self._preparation

    def plan(self) -> PreparedVolumes:
        """Return the volumes as they will be prepared; none is, until it is asked for."""
        images, preparation, root = self.images, self.preparation, self.table.root
        return PreparedVolumes(
            [root / path for path in images["path"]],
            [
                root / path if preparation.masked and isinstance(path, str) else None
                for path in images["mask_path"]
            ],
            preparation,
            None if self.work_dir is None else self.work_dir / "volumes",
            self.table.file_cache,
        )

    def setup(self, stage: str | None = None) -> None:
        """Index, check and prepare; all of it once."""
        if self.volumes is not None:
            return
        volumes = self.plan()
        faults: dict[int, UnreadableVolumeError] = {}
        threads = max(self.num_workers, min(8, cpu_count()))  # they change no result
        with closing(volumes.fill(threads, faults)) as filling:
            for done, total in filling:
                self.progress("preparing volumes", done, total)
        if faults:
            self.table.leave_out({volumes.images[i]: fault for i, fault in faults.items()})
            self._images = None
            volumes = self.plan()
        self.volumes = volumes

    # -- loaders -----------------------------------------------------------------------------

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
            lazy=self.views_on_device,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of two-view batches of the training participants."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        """Return the loader of the validation participants, none when there are none."""
        return self._loader("val", shuffle=False) if self.participants("val") else []

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader[Any]:
        samples = self.two_views(split)
        if len(samples) == 0:
            raise InputsUnusableError(f"No participant is left in the split {split!r}.")
        return two_view_loader(
            samples,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            trainer=self.trainer,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw the views of a batch that was loaded without, on the device where it is now."""
        return draw_lazy_views(batch, self.trainer)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return a loader of all images, one at a time, in the order of `images`."""
        self.setup()
        assert self.volumes is not None
        return DataLoader(self.volumes, batch_size=1, num_workers=self.num_workers)

    def sample_name(self, epoch: int, batch: int, position: int) -> str:
        """Return the participant at a position of a training batch.

        Parameters
        ----------
        epoch, batch, position : int
            From 0.
        """
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
    """Return the split of a participant, by hash.

    Parameters
    ----------
    participant : str
        Who stands for the person or family.
    seed : int
        Part of the hash.
    validation, holdout : float
        Shares.

    Returns
    -------
    {"train", "val", "holdout"}
    """
    place = key_seed("split", seed, participant) / 2**32
    if place < holdout:
        return "holdout"
    return "val" if place < holdout + validation else "train"


def _three(spacing: float | Sequence[float]) -> tuple[float, float, float]:
    values = [float(size) for size in np.ravel(spacing)]
    if len(values) not in (1, 3):
        raise UsageError(f"spacing takes one or three sizes in mm, got {values}.")
    x, y, z = values * (3 // len(values))
    return x, y, z

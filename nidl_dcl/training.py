"""Callbacks of a training run on disk: the curve, checkpoints that survive a kill, progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nidl_dcl.writing import replacing

__all__ = ["AtomicCheckpoints", "Checkpoints", "Progress", "TrainingCurve", "sound_checkpoint"]


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoint files that appear whole, with a sha256 beside them."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` beside `path`, sync, rename."""
        path = Path(path)
        with replacing(path) as beside:
            torch.save(checkpoint, beside)
            digest = hashlib.sha256(beside.read_bytes()).hexdigest()
            with replacing(path.with_suffix(".sha256")) as note:
                note.write_text(digest, encoding="ascii")


class Checkpoints(Checkpoint):
    """Saves at the end of each epoch, and at SIGTERM after the step under way; keeps two.

    A `Checkpoint` for Lightning, which calls those after the estimator has logged its epoch.

    Parameters
    ----------
    folder : Path
        Where ``step-*.ckpt`` files go.
    """

    training = False
    """Whether a run is training, hence ends by itself after a SIGTERM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that training began."""
        Checkpoints.training = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that training ended."""
        Checkpoints.training = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save."""
        self._save(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save when the run is told to end."""
        Checkpoints.training = False
        if isinstance(exception, SIGTERMException):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        file = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(file, weights_only=False)  # the optimizer too
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[:-2]:
                old.unlink(missing_ok=True)
                old.with_suffix(".sha256").unlink(missing_ok=True)


def sound_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose checksum holds, saying which ones do not; None without."""
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        note = path.with_suffix(".sha256")
        if note.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == note.read_text(
            encoding="ascii"
        ):
            return path
        say(f"Checkpoint {path} is damaged; the one before it is used.")
    return None


class TrainingCurve(Checkpoint):
    """Writes one row per epoch to a table that is whole at any time.

    A `Checkpoint` for Lightning, as `Checkpoints` is, so that a row holds what its epoch logged.

    Parameters
    ----------
    path : Path
        The CSV file; on a resume, rows up to the resumed epoch are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of this epoch."""
        if not trainer.is_global_zero:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "loss/train": metrics.get("loss/train"),
            "loss/val": metrics.get("loss/val"),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "alignment": metrics.get("alignment"),
            "uniformity": metrics.get("uniformity"),
            "effective_rank": metrics.get("effective_rank"),
            "collapse_loss": metrics.get("collapse_loss"),
        }
        text = {name: "n/a" if v is None else f"{v:.8g}" for name, v in row.items()}
        table = pd.DataFrame([text])
        if self.path.is_file():
            # As text, so that what was written once stays the same to the digit.
            before = pd.read_csv(self.path, dtype=str, keep_default_na=False)
            table = pd.concat([before[before["epoch"].astype(int) < row["epoch"]], table])
        with replacing(self.path) as beside:
            table.to_csv(beside, index=False)


class Progress(L.Callback):
    """Tells a progress function of every training step.

    Parameters
    ----------
    progress : callable
        Called with ("training", steps done, steps in all).
    """

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self.progress = progress

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Report the step."""
        whole = trainer.estimated_stepping_batches
        if trainer.is_global_zero:
            self.progress("training", trainer.global_step, int(whole))

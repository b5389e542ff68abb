"""Callbacks of a training that writes to disk: its curve, checkpoints that survive a kill, progress.

Where the files go, and when a run resumes from them, is left to `nidl_dcl.workflow.pretrain`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nidl_dcl.distributed import any_process
from nidl_dcl.io.atomic import replacing
from nidl_dcl.io.formats import write_text


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that appear whole, with their sha256 in a file beside them."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a temporary file beside its path, sync it and rename it.

        Parameters
        ----------
        checkpoint : dict
            What Lightning saves.
        path : path
            The file.
        storage_options : object, optional
            Ignored.
        """
        path = Path(path)
        # Not straight to the file: PyTorch's error does not name the cause of a failed write.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with replacing(path) as beside:
            beside.write_bytes(content.getbuffer())
            digest = hashlib.sha256(content.getbuffer()).hexdigest()
            write_text(path.with_suffix(".sha256"), digest)


class StepCheckpoint(Checkpoint):
    """Checkpoint after each epoch, and at SIGTERM after the step under way; two files are kept.

    A `Checkpoint` for Lightning, which calls those after the estimator has logged its epoch. The
    files are ``step-*.ckpt`` in `folder`.
    """

    training = False
    """Whether a run is training, so that it ends by itself after a SIGTERM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that training began."""
        StepCheckpoint.training = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that training ended; a SIGTERM that came too late for a last step counts."""
        StepCheckpoint.training = False
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a checkpoint."""
        self._save(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save a checkpoint when the exception is Lightning's for a SIGTERM.

        Parameters
        ----------
        trainer : Trainer
            Saves the checkpoint.
        pl_module : LightningModule
            Ignored.
        exception : BaseException
            What ended the training.
        """
        StepCheckpoint.training = False
        if isinstance(exception, SIGTERMException):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        file = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(file, weights_only=False)  # the optimizer too
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[:-2]:
                old.unlink(missing_ok=True)
                old.with_suffix(".sha256").unlink(missing_ok=True)


class CollectiveSigterm(L.Callback):
    """Callback that ends several processes after the same step when one of them got a SIGTERM.

    Lightning's own handler would communicate between processes in the middle of a collective call.
    """

    received = False
    """Whether this process got a SIGTERM."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handler; Lightning restores the former one."""
        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Tell Lightning to stop if any process got the signal."""
        if trainer.world_size > 1 and any_process(self.received, trainer.strategy.root_device):
            trainer._signal_connector.received_sigterm = True

    def _note(self, *args: Any) -> None:
        self.received = True


def latest_valid_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that matches its checksum, None without; report damaged ones."""
    found = [path for path in folder.glob("step-*.ckpt") if path.stem[5:].isdecimal()]
    for path in sorted(found, key=step_of, reverse=True):
        note = path.with_suffix(".sha256")
        if note.is_file():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if note.read_bytes().strip() == digest.encode():
                return path
        report(f"Checkpoint {path} is damaged; the one before it is used, if there is one.")
    return None


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    return int(checkpoint.stem[5:])


_COLUMNS = (
    *("epoch", "step", "loss/train", "loss/val", "learning_rate"),
    *("alignment", "uniformity", "effective_rank", "collapse_loss"),
)

_NUMBER = re.compile(r"n/a|nan|-?inf|-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")


class TrainingCurve(Checkpoint):
    """Table of the training curve (CSV), one row per epoch, rewritten whole after each.

    A `Checkpoint` for Lightning, as `StepCheckpoint` is, so that a row holds what its epoch logged.
    On a resume, rows up to the resumed epoch are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of this epoch."""
        # Reading these sums them over the processes, so each process must do it.
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if not trainer.is_global_zero:
            return
        metrics["epoch"] = trainer.current_epoch + 1
        metrics["step"] = trainer.global_step
        metrics["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        text = {name: f"{metrics[name]:.8g}" if name in metrics else "n/a" for name in _COLUMNS}
        rows = [*_rows_before(self.path, trainer.current_epoch + 1, list(text)), text]
        content = io.StringIO(newline="")
        table = csv.DictWriter(content, list(text), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(self.path, content.getvalue())


def _rows_before(path: Path, epoch: int, names: list[str]) -> list[dict[str, str]]:
    """Return the rows of earlier epochs as they were written, each once, without damaged ones."""
    if not path.is_file():
        return []
    # As text, so that what was written once stays the same to the digit.
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    header = lines[0].split(",")
    rows: dict[int, dict[str, str]] = {}
    lost = header != names or lines[-1] != ""
    for line in lines[1:-1]:
        cells = line.split(",")
        valid = (
            len(cells) == len(names) and cells[0].isdecimal() and all(map(_NUMBER.fullmatch, cells))
        )
        if header != names or not valid:
            lost = True
        elif int(cells[0]) < epoch:
            rows[int(cells[0])] = dict(zip(names, cells, strict=True))
    if lost:
        warnings.warn(f"{path} is damaged; what could be read of it is kept.", stacklevel=2)
    return [rows[number] for number in sorted(rows)]


class Progress(L.Callback):
    """Callback that calls `progress` ("training", steps done, number of steps) after every step."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self.progress = progress

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Report the step."""
        total = trainer.estimated_stepping_batches
        if trainer.is_global_zero:
            self.progress("training", trainer.global_step, int(total))

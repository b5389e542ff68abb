"""The report while a study runs: written early, after each stage and now and then in training.

It never ends a run and takes at most a fiftieth of its time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from nidl_dcl.report.build import is_under_way, write_report

_LOGGER = logging.getLogger(__name__)

_EVERY = 30.0
"""Seconds between two pages in training, at least."""

_SHARE = 50
"""A page that took a second is not written again for as many seconds."""


class LivePage(Checkpoint):
    """Writes ``report.html`` with what is done so far, and a line that says so.

    A callback of training, too: a `Checkpoint` for Lightning, as `training.TrainingCurve` is, so that
    the curves hold the epoch that ended. A finished page of earlier runs is left until this one has
    something new.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.written = False
        self._not_before = 0.0

    @property
    def is_needed(self) -> bool:
        """Whether the final page is still to be written: there is none, or one in progress."""
        page = self.folder / "report.html"
        return self.written or not page.is_file() or is_under_way(page)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Tell on the page of an error that ends the block, if a page was written in it.

        A run that is killed, interrupted or terminated leaves the page as it is: in progress.
        """
        try:
            yield
        except Exception as error:
            if self.written:
                self.write(error=str(error))
            raise

    def write(self, *, error: str = "") -> None:
        """Write the page now, with the error that ended the run; a failure is told, and that is all."""
        start = time.monotonic()
        try:
            write_report(self.folder, model=self.model, under_way=True, error=error)
        except Exception as fault:  # whatever it is, the study is worth more than its page
            _LOGGER.info(
                f"The page in progress could not be written ({type(fault).__name__}: {fault}); "
                "the run continues."
            )
        else:
            self.written = True
        took = time.monotonic() - start
        self._not_before = time.monotonic() + max(_EVERY, _SHARE * took)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the page when the last one is old."""
        if trainer.is_global_zero and time.monotonic() >= self._not_before:
            self.write()

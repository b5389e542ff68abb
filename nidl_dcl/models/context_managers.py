"""Context managers around Lightning: seeds, warnings, and Ctrl-C."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nidl_dcl.randomness import keyed


@contextmanager
def isolate_rng(*key: object) -> Iterator[None]:
    """Seed every generator by `key`, devices' included; restore them afterwards."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), keyed(*key) as seed:
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def ignore_warnings() -> Iterator[None]:
    """Hide warnings that say nothing to the caller of this package."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*have no `val_dataloader`.*",
            ".*Total length of .* is zero.*",
            ".*available but not used.*",
            ".*treespec, LeafSpec.*",
            ".*smaller than the logging interval.*",
            ".*sampler has shuffling enabled.*",
            ".*callbacks used to create the checkpoint.*",
            ".*local rank has zero length.*",
            ".*sync_dist=True.*",
            ".*srun. command is available.*",
        ):
            warnings.filterwarnings("ignore", message)
        yield


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Hide what Lightning logs about every new trainer, and the warnings of `ignore_warnings`."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with ignore_warnings():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def keyboard_interrupt() -> Iterator[None]:
    """Turn Lightning's exit at Ctrl-C back into KeyboardInterrupt, and keep the caller's handler."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        raise
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)


def was_interrupted(error: BaseException) -> bool:
    """Return whether an error comes of Ctrl-C, at which Lightning exits."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)

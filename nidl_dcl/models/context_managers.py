"""Context managers around Lightning: seeds, warnings, and Ctrl-C."""

from __future__ import annotations

import logging
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import seed

from nidl_dcl.randomness import keyed


@contextmanager
def isolate_rng(*key: object) -> Iterator[None]:
    """Seed every generator by `key`, devices' included; restore them afterwards."""
    with fork_rng(), keyed(*key) as number:
        torch.cuda.manual_seed_all(number)  # without CUDA running, once it runs
        yield


@contextmanager
def fork_rng() -> Iterator[None]:
    """Restore torch's generators after the block, those of CUDA too, without initializing CUDA.

    A process that has initialized it can no longer fork others that use it, as notebooks do; hence
    not `torch.random.fork_rng` with devices.
    """
    state, number = torch.get_rng_state(), torch.initial_seed()
    running = torch.cuda.is_initialized()
    states = torch.cuda.get_rng_state_all() if running else []
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if running:
            torch.cuda.set_rng_state_all(states)
        else:
            torch.cuda.manual_seed_all(number)  # what they begin with, as the caller seeded torch


@contextmanager
def without_cuda(device: torch.device) -> Iterator[None]:
    """Keep Lightning from initializing CUDA for a trainer of another device.

    Around its sanity check it saves all generators, and is given no choice of which.
    """
    if device.type == "cuda" or torch.cuda.is_initialized():
        yield
        return
    module: Any = seed
    collect = module._collect_rng_states
    module._collect_rng_states = lambda include_cuda=True: collect(include_cuda=False)
    try:
        yield
    finally:
        module._collect_rng_states = collect


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


_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric")
"""Where Lightning says what hardware there is, and what else one may install."""

_ABOUT_TRAINERS = re.compile("GPU|TPU|HPU|💡|LOCAL_RANK|You are using a CUDA device")
"""How messages begin that come with every new trainer."""

_told = False
"""Whether this process has said them."""


@contextmanager
def lightning_messages(shown: bool) -> Iterator[None]:
    """Let Lightning speak if asked to, of hardware and further packages once in a process.

    What is asked for is a progress bar, or that the package's logger lets details (DEBUG) through, as
    ``-v`` does on the command line.
    """
    global _told
    if not (shown or logging.getLogger("nidl_dcl").isEnabledFor(logging.DEBUG)):
        with silence_lightning():
            yield
        return
    again, _told = _told, True
    if not again:
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_says_more)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_says_more)


def _says_more(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not _ABOUT_TRAINERS.match(record.getMessage())


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Hide what Lightning logs about every new trainer, and the warnings of `ignore_warnings`."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
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

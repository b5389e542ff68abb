"""Seeds derived from keys such as (seed, epoch, participant, view), and generators seeded by them.

What is random in nidl_dcl depends on its key alone: never on a worker, a process or an index.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key_seed(*key: object) -> int:
    """Return a seed in [0, 2**32) that depends on the text of the key's parts alone.

    The key of a view: seed, epoch, participant, view number.
    """
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def fresh_seed(random_state: int | np.random.RandomState | None) -> int:
    """Return a seed for a `random_state` as scikit-learn takes it.

    None draws it from NumPy's global generator, so that ``seed_everything`` or ``np.random.seed``
    beforehand make it repeatable.
    """
    if random_state is None:
        return int(np.random.randint(0, 2**32, dtype=np.uint32))  # noqa: NPY002
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(0, 2**32, dtype=np.uint32))
    return int(random_state)


def permutation(n: int, *key: object) -> np.ndarray:
    """Return a permutation of ``range(n)`` that depends on `key` alone."""
    return np.random.Generator(np.random.PCG64(key_seed(*key))).permutation(n)


@contextmanager
def keyed(*key: object) -> Iterator[int]:
    """Seed torch (on the CPU), numpy and random by `key` inside the block; restore them after it.

    Yields the seed, for objects with generators of their own.
    """
    seed = key_seed(*key)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield seed
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)

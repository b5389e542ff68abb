"""Result codes of images: what became of each one, in one word, and the error that carries it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from nidl_dcl.errors import NidlDclError

Code = Literal[
    "ok",
    "empty",
    "truncated",
    "crc",
    "not_nifti",
    "not_a_file",
    "not_fetched",
    "unreadable",
    "permission",
    "extension",
    "dimensions",
    "too_large",
    "too_small",
    "dtype",
    "scaling",
    "non_finite",
    "constant",
    "blank",
    "range",
    "affine",
    "spacing",
    "mask",
    "sidecar",
    "duplicate",
    "ambiguous",
    "bad_name",
    "part",
    "no_image",
    "bad_id",
    "excluded",
]
"""The words for what became of an image; each is explained in the documentation."""


class UnreadableVolumeError(NidlDclError, ValueError):
    """An image that cannot be used; `code` is the word for why in ``logs/inputs.tsv``.

    Parameters
    ----------
    message : str
        Which file, what is wrong with it, what to do.
    code : str
        For instance ``"truncated"``, ``"crc"`` or ``"affine"``.
    """

    exit_status = 3

    def __init__(self, message: str, code: Code = "unreadable") -> None:
        super().__init__(message)
        self.code: Code = code


@dataclasses.dataclass(frozen=True)
class Check:
    """What opening an image told: the columns `status`, `code`, `message` of ``inputs.tsv``.

    `status` is ``"ok"``, ``"warn"`` (repaired when read, or odd) or ``"skip"`` (not usable). Of an
    image that is usable also: a checksum of its voxels, which copies share whatever file holds them,
    and the longest side of a voxel in mm.
    """

    status: str
    code: Code
    message: str
    content: str = dataclasses.field(default="", compare=False)
    coarsest: float = dataclasses.field(default=0.0, compare=False)

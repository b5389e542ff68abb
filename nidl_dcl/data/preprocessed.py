"""Preprocessed brains in place of the scans of a dataset: which scan became which brain, or why not.

Preprocessing itself is left to `nidl_dcl.preprocessing`, running it to `nidl_dcl.workflow`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd

from nidl_dcl.bids.index import INPUT_COLUMNS, DatasetIndex
from nidl_dcl.io.formats import read_json

Mode = Literal["none", "strip", "rigid", "align"]
"""How scans are preprocessed: not at all; brains in their own space; brains in the template's space
by rotation and translation, or by an affine transform."""

DERIVATIVE = "preproc"
"""Name of the derivative that holds the brains, in BIDS URIs and under ``derivatives/``."""

TABLE = "desc-preproc_measures"
"""Name of the table of measures, and of its sidecar."""


def preset_of(mode: Mode) -> str:
    """Return the preset of the brains of a mode other than "none"."""
    return "preprocessed-native" if mode == "strip" else "preprocessed"


@dataclass(frozen=True, eq=False)
class PreprocessedImages:
    """The brains that stand for the scans of a dataset.

    Attributes
    ----------
    mode : {"strip", "rigid", "align"}
        What was done.
    folder : Path
        The derivative that holds the brains.
    scans : DataFrame
        The columns of ``inputs.tsv``, for each candidate of the dataset and each participant
        without one; ``brain``: path of its brain relative to `folder`, missing where there is none;
        ``brain_ml``: volume of the brain in ml.
    measures : DataFrame
        What was measured of each scan, for a table.
    kept : list of (str, int)
        How many scans each step of their selection left.
    links : dict of str to Path
        The datasets of the scans and of their masks, by name.
    """

    mode: Mode
    folder: Path
    scans: pd.DataFrame
    measures: pd.DataFrame
    kept: list[tuple[str, int]]
    links: dict[str, Path]

    @property
    def suffixes(self) -> list[str]:
        """The contrasts of the brains, such as T1w."""
        names = self.scans["brain"].dropna().str.extract(r"_([a-zA-Z0-9]+)\.[^/]*$", expand=False)
        return sorted(set(names)) or ["T1w"]

    def in_place_of_scans(self, index: DatasetIndex) -> DatasetIndex:
        """Return the index of the derivative with what became of the scans.

        Images are those of `scans`, and no others that the folder may hold, with their ``brain_ml``.
        """
        scans = self.scans.dropna(subset="brain").set_index("brain")
        names = index.images["source"].str.removeprefix(f"bids:{DERIVATIVE}:")
        images = index.images[names.isin(scans.index)].reset_index(drop=True)
        names = images["source"].str.removeprefix(f"bids:{DERIVATIVE}:")
        images["brain_ml"] = names.map(scans["brain_ml"]).astype(float)
        inputs = self.scans[INPUT_COLUMNS].copy()
        found = dict(zip(names, images["path"], strict=True))
        paths = self.scans["brain"].map(found)
        inputs["path"] = paths.where(paths.notna(), inputs["path"]).astype("string")
        kept = [*self.kept, (f"preprocessed ({self.mode})", len(images))]
        return replace(index, images=images, inputs=inputs, kept=kept)


def read_measures(index: DatasetIndex) -> tuple[str, list[float]]:
    """Return how the images of an index were preprocessed, and the volumes of the brains in ml.

    They are those of the table that `nidl-dcl preprocess` wrote in their derivative; without one,
    or one that lacks an image: "none", and no volume.
    """
    home, _, _ = str(index.images["source"].iloc[0]).removeprefix("bids:").partition(":")
    file = index.links[home] / f"{TABLE}.tsv"
    try:
        mode = str(read_json(file.with_suffix(".json"))["Mode"])
        table = pd.read_csv(file, sep="\t", quoting=3, dtype=str, keep_default_na=False)
        volumes = dict(zip(table["brain"], pd.to_numeric(table["mask_ml"], "coerce"), strict=True))
        names = index.images["source"].str.removeprefix(f"bids:{home}:")
        return mode, [volumes[name] for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return "none", []

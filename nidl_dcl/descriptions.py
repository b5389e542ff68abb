"""The BIDS table of an output folder that says what each ``desc-`` label means."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nidl_dcl.writing import write_json, write_tsv

__all__ = ["write_descriptions"]


def write_descriptions(folder: Path, label: str) -> None:
    """Write the BIDS table that says what ``desc-<label>`` means."""
    path, sidecar = folder / "descriptions.tsv", folder / "descriptions.json"
    rows = {label: "Decoupled contrastive learning embeddings and their predictions"}
    if path.is_file():
        known = pd.read_csv(path, sep="\t", dtype=str)
        before = dict(zip(known["desc_id"].str[5:], known["description"], strict=True))
        if label in before and sidecar.is_file():
            return
        rows = {**before, **rows}
    table = pd.DataFrame(
        {"desc_id": [f"desc-{name}" for name in rows], "description": list(rows.values())}
    )
    write_tsv(path, table)
    write_json(
        sidecar,
        {
            "desc_id": {"Description": "Label in file names"},
            "description": {"Description": "What files with the label hold"},
        },
    )

"""What makes an output folder a BIDS derivative: its description, README and label table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from nidl_dcl._version import __version__
from nidl_dcl.io.formats import read_json, utc_now, write_json, write_text, write_tsv
from nidl_dcl.models.model_card import METHOD


def describe_folder(folder: Path, bids_dir: Path) -> None:
    """Write the files of a BIDS derivative that are missing in a folder.

    Parameters
    ----------
    folder : Path
        The output folder.
    bids_dir : Path
        The dataset that it is derived from.
    """
    name = _dataset_name(bids_dir)
    title, readme = f"nidl_dcl embeddings of {name}", _template("README.md", source=name)
    _write_missing(folder, title, readme, os.path.relpath(bids_dir, folder))


def describe_copy(folder: Path, link: str, about: str) -> None:
    """Write these files where the dataset is not named.

    Parameters
    ----------
    folder : Path
        The copy of an output folder.
    link : str
        URI that stands for the dataset.
    about : str
        The end of the README.
    """
    _write_missing(
        folder, "nidl_dcl embeddings", _template("README.md", source="(not named)") + about, link
    )


def _write_missing(folder: Path, title: str, readme: str, link: str) -> None:
    files: dict[str, Any] = {
        "dataset_description.json": {
            "Name": title,
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "License": "n/a",
            "GeneratedBy": [
                {
                    "Name": "nidl_dcl",
                    "Version": __version__,
                    "Description": "Decoupled contrastive learning of brain MRI",
                }
            ],
            "SourceDatasets": [{"URL": link}],
            "DatasetLinks": {"raw": link},
        },
        "README.md": readme,
        "CHANGES": f"{__version__} {utc_now()[:10]}\n - Written by nidl_dcl {__version__}.\n",
        ".bidsignore": _template("bidsignore"),
        "logs/CITATION.md": _template("CITATION.md", version=__version__, method=METHOD),
    }
    for file, content in files.items():
        target = folder / file
        if not target.exists():
            if isinstance(content, str):
                write_text(target, content)
            else:
                write_json(target, content)


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


def _dataset_name(bids_dir: Path) -> str:
    try:
        name = read_json(bids_dir / "dataset_description.json")["Name"]
    except (OSError, ValueError, KeyError, TypeError):
        return bids_dir.name
    return str(name)


def _template(name: str, **values: str) -> str:
    text = (Path(__file__).parent / "templates" / name).read_text("utf-8")
    return text.format(**values) if values else text

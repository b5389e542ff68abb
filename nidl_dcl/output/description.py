"""What makes an output folder a BIDS derivative: its description, README and label table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from nidl_dcl._version import __version__
from nidl_dcl.io.formats import read_json, to_json, utc_now, write_json, write_text, write_tsv
from nidl_dcl.models.model_card import METHOD


def describe_folder(folder: Path, bids_dir: Path) -> None:
    """Write the files of a BIDS derivative, made from a dataset, that are missing in a folder."""
    name = _name_of(bids_dir)
    title, readme = f"nidl_dcl embeddings of {name}", _template("README.md", source=name)
    _write_missing(folder, title, readme, os.path.relpath(bids_dir, folder))


def describe_brains(folder: Path, bids_dir: Path) -> None:
    """Write these files into a derivative of preprocessed images, which is inside of another one."""
    name = _name_of(bids_dir)
    title, readme = f"Preprocessed images of {name}", _template("BRAINS.md", source=name)
    _write_missing(folder, title, readme, os.path.relpath(bids_dir, folder))


def _name_of(bids_dir: Path) -> str:
    """Return the name of a dataset, or that of its folder."""
    try:
        return str(read_json(bids_dir / "dataset_description.json")["Name"])
    except (OSError, ValueError, KeyError, TypeError):
        return bids_dir.name


def add_links(folder: Path, links: Mapping[str, Path]) -> None:
    """Name datasets that BIDS URIs in a derivative refer to, beside those that are named already."""
    file = folder / "dataset_description.json"
    description = read_json(file)
    known = description.setdefault("DatasetLinks", {})
    new = {
        name: os.path.relpath(path, folder)
        for name, path in links.items()
        if name not in known and path != folder
    }
    if new:
        known.update(new)
        write_json(file, description)


def describe_copy(folder: Path, link: str) -> None:
    """Write these files into a shared copy, where a URI stands for the dataset."""
    readme = _template("README.md", source="(not named)") + _template("SHARED.md")
    _write_missing(folder, "nidl_dcl embeddings", readme, link)


def _write_missing(folder: Path, title: str, readme: str, link: str) -> None:
    description = {
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
    }
    files = {
        "dataset_description.json": to_json(description),
        "README.md": readme,
        "CHANGES": f"{__version__} {utc_now()[:10]}\n - Written by nidl_dcl {__version__}.\n",
        ".bidsignore": _template("bidsignore"),
        "logs/CITATION.md": _template("CITATION.md", version=__version__, method=METHOD),
    }
    for file, text in files.items():
        if not (folder / file).exists():
            write_text(folder / file, text)
    _ignore_new_kinds(folder / ".bidsignore")


def _ignore_new_kinds(file: Path) -> None:
    """Add the kinds of files that were not written yet when an output was begun."""
    known = file.read_text("utf-8", "surrogateescape").splitlines()
    lacking = [line for line in _template("bidsignore").splitlines() if line not in known]
    if lacking:
        write_text(file, "\n".join([*known, *lacking, ""]))


def write_descriptions(folder: Path, label: str, model: str = "") -> None:
    """Write the BIDS table that says what ``desc-<label>`` means.

    Parameters
    ----------
    folder : Path
        The output folder.
    label : str
        Of the model in file names.
    model : str, optional
        The word for a model that nidl_dcl ships.
    """
    path, sidecar = folder / "descriptions.tsv", folder / "descriptions.json"
    shipped = f" (the model {model} of nidl_dcl)" if model else ""
    rows = {label: f"Decoupled contrastive learning embeddings{shipped} and their predictions"}
    if path.is_file():
        known = pd.read_csv(path, sep="\t", dtype=str)
        before = dict(zip(known["desc_id"].str[5:], known["description"], strict=True))
        if label in before and sidecar.is_file():
            return
        rows = {**before, **rows}
    table = [(f"desc-{name}", text) for name, text in rows.items()]
    write_tsv(path, pd.DataFrame(table, columns=["desc_id", "description"]))
    columns = {"desc_id": "Label in file names", "description": "What files with the label hold"}
    write_json(sidecar, {name: {"Description": text} for name, text in columns.items()})


def _template(name: str, **values: str) -> str:
    text = (Path(__file__).parent / "templates" / name).read_text("utf-8")
    return text.format(**values) if values else text

"""What makes an output folder a BIDS derivative: its description, README and label table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from nidl_dcl._version import __version__
from nidl_dcl.io.formats import read_json, utc_now, write_json, write_text, write_tsv
from nidl_dcl.models.model_card import METHOD

CITATION = """\
# How to cite

- The method: {method}.
- The augmentations and networks: MONAI (Cardoso et al., 2022, arXiv:2211.02701).
- The dataset index: PyBIDS (Yarkoni et al., 2019, doi:10.21105/joss.01294) and BIDS (Gorgolewski
  et al., 2016, doi:10.1038/sdata.2016.44).
- The predictions: scikit-learn (Pedregosa et al., 2011, JMLR 12); intervals after Nadeau and Bengio
  (2003, doi:10.1023/A:1024068626366).
- This software: nidl_dcl {version}.

## Methods text

Brain images were turned into embeddings by an encoder trained without labels by decoupled
contrastive learning (Yeh et al., 2022), as implemented in nidl_dcl {version}. Settings stand in
`code/config.yaml`, training curves in `logs/metrics.csv`. Phenotypes were predicted from the
embeddings by linear models, cross-validated by participant; each metrics file states its folds,
its chance level and its baselines.
"""

_README = """\
# Embeddings and predictions by nidl_dcl

Derived from the BIDS dataset {source} by decoupled contrastive learning.

| file | what it is |
|---|---|
| `report.html` | the page to look at first |
| `desc-<model>_embeddings.tsv`, `.npy` | which image each row is, and the rows |
| `desc-<model><Target>_predictions.tsv` | cross-validated predictions, one row per image |
| `desc-<model><Target>_metrics.json` | scores, intervals, chance level, baselines |
| `desc-<model><Target>_externalmetrics.json` | scores of a readout that another cohort gave |
| `models/desc-<model>/` | the model: weights (safetensors) and description (JSON) |
| `logs/inputs.tsv` | every candidate image and what became of it |
| `logs/phenotypes.tsv` | whom each row of the phenotype tables belongs to (not where ids are pseudonyms) |
| `logs/metrics.csv` | training curves |
| `logs/run.json` | what was run, when, with which versions |
| `logs/<UTC time>_<command>.log` | what each run said and did |
| `logs/CITATION.md` | what to cite |
| `code/config.yaml` | the configuration that runs the study again |
| `figures/` | the figures of the report with their data |
"""

_IGNORED = (
    "README.md",
    "report.html",
    "descriptions.*",
    "desc-*_embeddings.*",
    "desc-*_predictions.*",
    "desc-*_metrics.*",
    "desc-*_externalpredictions.*",
    "desc-*_externalmetrics.*",
    "models",
    "logs",
    "figures",
    ".work",
    ".lock",
    "**/.*",
)


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
    title, readme = f"nidl_dcl embeddings of {name}", _README.format(source=name)
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
        folder, "nidl_dcl embeddings", _README.format(source="(not named)") + about, link
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
        ".bidsignore": "\n".join(_IGNORED) + "\n",
        "logs/CITATION.md": CITATION.format(version=__version__, method=METHOD),
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

"""The embeddings of an output folder beside the phenotypes of its dataset, for an analyst.

Reads files alone: no image is opened and nothing is computed. How tables are joined is the business
of `phenotypes`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from nidl_dcl.bids.derivatives import dataset_root
from nidl_dcl.bids.phenotypes import read_phenotypes
from nidl_dcl.errors import UsageError
from nidl_dcl.output.embeddings import COLUMNS, read_embeddings
from nidl_dcl.output.sharing_rules import is_shared


def load_embeddings(
    output_dir: str | Path,
    *,
    bids_dir: str | Path | None = None,
    model_name: str = "dcl",
    phenotypes: bool = True,
) -> tuple[pd.DataFrame, NDArray[np.float32]]:
    """Return the images of an output folder with their phenotypes, and their embeddings.

    Phenotypes are joined by the rules of the study: per scan, per session, else per participant. The
    tables are those of the dataset that the output names in ``dataset_description.json``, and those
    that were given to it by ``--phenotypes``.

    Parameters
    ----------
    output_dir : path
        OUTPUT_DIR of a study, or of ``nidl-dcl embed``.
    bids_dir : path, optional
        The dataset, where it has moved since.
    model_name : str, default="dcl"
        Label of the model in file names.
    phenotypes : bool, default=True
        Whether to join phenotypes; without, only `output_dir` is looked at.

    Returns
    -------
    table : DataFrame
        One row per image: ``participant_id session_id run source split row``, then the phenotypes.
    matrix : ndarray of float32, shape (n_images, n_features)
        Row i belongs to row i of the table.

    Raises
    ------
    UsageError
        For an output without embeddings of that model, or with damaged ones, a `bids_dir` that is
        no folder or has none of the participants, and tables that contradict themselves.

    Warns
    -----
    UserWarning
        When the dataset, or a table, is no longer where it was, or the output is a shared copy; the
        table then goes without it.

    Examples
    --------
    ``MY_OUTPUT`` is the output folder of a study.

    >>> from nidl_dcl import load_embeddings
    >>> table, matrix = load_embeddings("MY_OUTPUT")
    >>> len(table) == len(matrix), matrix.dtype
    (True, dtype('float32'))
    >>> ages = table["age"]
    """
    folder = Path(output_dir).expanduser()
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}. Give the OUTPUT_DIR of a study.")
    found = read_embeddings(folder, model_name)
    if found is None:
        labels = sorted(p.name[5:-15] for p in folder.glob("desc-*_embeddings.npy"))
        raise UsageError(
            f"{folder} has no embeddings of model {model_name!r}; there are: "
            f"{', '.join(labels) or 'none'}. Run `nidl-dcl embed`, or give another model_name."
        )
    try:
        table = found.table[list(COLUMNS)].astype("string").astype({"run": "Int64", "row": "int64"})
    except ValueError as error:
        raise UsageError(
            f"{folder / f'desc-{model_name}_embeddings.tsv'} is damaged: {error}. Run `nidl-dcl "
            "embed` again."
        ) from error
    matrix = np.asarray(found.matrix, dtype=np.float32)
    if not phenotypes:
        return table, matrix
    if is_shared(folder):
        warnings.warn(
            f"{folder} was written by `nidl-dcl share`: its ids are pseudonyms, so the table has no "
            "phenotypes. The output that it was made from has them. Give phenotypes=False.",
            stacklevel=2,
        )
        return table, matrix
    root = _linked(folder) if bids_dir is None else dataset_root(bids_dir)
    if root is None:
        warnings.warn(
            f"The dataset of {folder} is not where its dataset_description.json says, so the table "
            "has no phenotypes. Give bids_dir=..., or phenotypes=False.",
            stacklevel=2,
        )
        return table, matrix
    files = []
    for file in _recorded(folder):
        if file.is_file():
            files.append(file)
        else:
            warnings.warn(
                f"The table {file}, which was given by --phenotypes, is gone; its columns are "
                "missing. Put it back, or join it yourself.",
                stacklevel=2,
            )
    joined = read_phenotypes(root, table.assign(path=_paths(table["source"])), files)
    known = joined.matches.loc[joined.matches["rule"] != "none", "participant_id"]
    people = table["participant_id"]
    if not (known.isin(people).any() or any((root / p).is_dir() for p in people.unique())):
        raise UsageError(
            f"{root} has none of the participants of {folder} (the first is {people.iloc[0]}). Give "
            "the dataset that was embedded as bids_dir."
        )
    own = [c for c in joined.table.columns if c not in table.columns]
    return pd.concat([table, joined.table[own]], axis=1), matrix


def _linked(folder: Path) -> Path | None:
    """Return the dataset that an output names, None where it is not there."""
    try:
        links = json.loads((folder / "dataset_description.json").read_text("utf-8"))
        root = (folder.resolve() / links["DatasetLinks"]["raw"]).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return root if root.is_dir() else None


def _recorded(folder: Path) -> list[Path]:
    """Return the tables that a study, then the last command, was given besides the dataset's own."""
    given: list[Any] = []
    for name, section in (("code/config.yaml", None), ("logs/run.json", "config")):
        try:
            options = yaml.safe_load((folder / name).read_text("utf-8"))
            given += (options if section is None else options[section]).get("phenotypes") or []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue
    return list(dict.fromkeys(Path(str(file)).expanduser() for file in given))


def _paths(sources: pd.Series) -> list[str]:
    """Return the paths that BIDS URIs name, relative to the dataset."""
    paths = []
    for source in sources.astype(str):
        home, _, path = source.removeprefix("bids:").partition(":")
        paths.append(path if home == "raw" else f"derivatives/{home}/{path}")
    return paths

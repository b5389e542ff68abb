"""Predict a phenotype from a table of embeddings, cross-validated by participant.

    python pipelines/predict.py EMBEDDINGS.tsv BIDS_DIR age

Takes the table of ``pipelines/embed.py``, or any table with participant_id and columns of numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from nidl_dcl import predict_phenotype


def main(table: str, bids_dir: str, target: str) -> None:
    embeddings = pd.read_csv(table, sep="\t", na_values=["n/a"])
    people = pd.read_csv(
        Path(bids_dir) / "participants.tsv",
        sep="\t",
        na_values=["n/a"],
        dtype={"participant_id": str},
    )
    images = embeddings.merge(people[["participant_id", target]], on="participant_id", how="left")
    features = images.filter(regex=r"^dcl(\d|_region)")
    result = predict_phenotype(
        *(features, images[target], images["participant_id"]),
        target=target,
        scaling="shared",
        random_state=0,
    )
    for name, value in result.summary().items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main(*sys.argv[1:4])

"""Embed images with a trained model, as one table.

    python pipelines/embed.py BIDS_DIR MODEL_FOLDER EMBEDDINGS.tsv

The model folder says how images are prepared, so nothing about that stands here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from nidl_dcl import BIDSDataModule, load_model


def main(bids_dir: str, model_folder: str, table: str) -> None:
    model = load_model(model_folder)
    data = BIDSDataModule(bids_dir, preparation=model.preparation)
    features = model.transform(data)  # one row per row of data.images
    columns = model.get_feature_names_out()
    ids = data.images[["participant_id", "session_id", "run"]]
    whole = pd.concat([ids, pd.DataFrame(features, columns=columns, index=ids.index)], axis=1)
    whole.to_csv(Path(table), sep="\t", index=False, na_rep="n/a")
    print(f"{len(whole)} rows in {table}")


if __name__ == "__main__":
    main(*sys.argv[1:4])

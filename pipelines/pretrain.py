"""Train an encoder on a BIDS dataset, written with the classes that the stages are made of.

    python pipelines/pretrain.py BIDS_DIR MODEL_FOLDER

Edit the encoder, the views or the training options; the folder it writes is what ``nidl-dcl embed
--model`` and ``pipelines/embed.py`` take.
"""

from __future__ import annotations

import sys

from nidl_dcl import DCL, BIDSDataModule
from nidl_dcl.models.encoders import RegionalEncoder


def main(bids_dir: str, model_folder: str, max_epochs: int = 60) -> None:
    # Images are found by their BIDS names, checked, brain-masked where all have a mask, and
    # brought to 3 mm. An epoch holds one image of each participant, as two views.
    data = BIDSDataModule(bids_dir, spacing=3.0, views="light", batch_size=16, random_state=0)
    print(f"{len(data.images)} images of {data.images['participant_id'].nunique()} participants")

    # The class, not an instance: its first weights are drawn under random_state, too.
    model = DCL(
        RegionalEncoder,
        proj_input_dim=RegionalEncoder().n_features,
        proj_hidden_dim=256,
        learning_rate=2e-3,
        lr_scheduler_kwargs={"warmup_epochs": max_epochs / 10},
        max_epochs=max_epochs,
        random_state=0,
    )
    model.fit(data)
    print(model.save(model_folder))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

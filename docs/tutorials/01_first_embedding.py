"""
A first embedding in three minutes
==================================

From a BIDS dataset of brain MRI to one row of numbers per image, in Python.

You need no data of your own: the first lines write a synthetic dataset of the same form.
"""

# %%
# A BIDS dataset
# --------------
# One T1-weighted image for each of 24 participants, made from one template, with a `participants.tsv`.

import tempfile
from pathlib import Path

from nidl_dcl import DCL, BIDSDataModule
from nidl_dcl.demo import write_demo_dataset
from nidl_dcl.encoder import StridedCNN

folder = Path(tempfile.mkdtemp()) / "bids"
write_demo_dataset(folder, n_participants=24, seed=0)

data = BIDSDataModule(folder, spacing=6.0, batch_size=12, random_state=0)
data.setup()
data.images[["participant_id", "age", "sex", "path"]].head()

# %%
# Train
# -----
# Two random views of each brain are pulled together, the views of other people pushed away. No
# label is used.

model = DCL(
    StridedCNN(),
    proj_input_dim=512,
    max_epochs=8,
    learning_rate=1e-3,
    random_state=0,
    enable_progress_bar=False,
)
model.fit(data)

# %%
# One row per image
# -----------------

embeddings = model.transform(data)
embeddings.shape

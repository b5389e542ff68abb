"""
A first embedding in three minutes
==================================

From a BIDS dataset of brain MRI to one row of numbers per image, in Python. Such a row is called an
embedding: images that the network finds alike get rows that are alike.

You need no data of your own: the first lines write a synthetic dataset of the same form.
"""

# %%
# A BIDS dataset
# --------------
# T1-weighted images of 24 participants, drawn from one template, with brain masks and a
# ``participants.tsv``. Some participants came twice.

import tempfile
from pathlib import Path

from nidl_dcl import BIDSDataModule
from nidl_dcl.bids.synthetic import write_demo_dataset

folder = Path(tempfile.mkdtemp())
write_demo_dataset(folder / "bids", n_participants=24, seed=0)

data = BIDSDataModule(
    folder / "bids",
    spacing=4.0,  # mm
    batch_size=12,
    random_state=0,
    work_dir=folder / "work",
)
data.setup()
data.images[["participant_id", "session_id", "age", "sex", "site"]].head()

# %%
# ``setup`` found the images by their names, opened each one, and joined the tables. What became of
# every file stands in ``data.inputs``, one row for each. Here all are fine.

print(data.inputs["status"].value_counts().to_dict())

# %%
# Look at the views
# -----------------
# Each image is turned into a volume of 4 mm voxels: brain alone, centered, brightness brought to one
# scale. In training the network never sees it like that. It sees two random views: turned, shifted,
# mirrored, darker, softer, with boxes missing. What the views change is what the network learns to
# ignore, so look at them before a long training. :doc:`/views` shows each change by itself.

import matplotlib.pyplot as plt

from nidl_dcl import TwoViews

volumes = [batch[0] for batch in data.predict_dataloader()]  # each (1, 40, 48, 40)
two_views = TwoViews()

rows = {"sub-001": 0, "sub-003": 2}
figure, panels = plt.subplots(2, 3, figsize=(7.2, 5.8), layout="constrained")
figure.set_facecolor("black")
figure.suptitle("Axial slices: the prepared volume and two views of it", color="white")
for line, (who, row) in zip(panels, rows.items(), strict=True):
    volume = volumes[row]
    first, second = two_views(volume, key=(0, 0, who))  # seed, epoch, participant
    shown = {"volume": volume, "one view": first, "another view": second}
    for panel, (name, image) in zip(line, shown.items(), strict=True):
        panel.imshow(image[0, :, :, 20].T, cmap="gray", origin="lower", vmin=0, vmax=1)
        panel.set_title(f"{who}: {name}", color="white", fontsize=10)
        panel.axis("off")

# %%
# Train
# -----
# ``StridedCNN`` is a small three-dimensional convolutional network, whose output is the embedding:
# 512 numbers. Training pulls the two views of a brain together and pushes those of other people
# away. No age, no sex, no label is used. Given as a class, the network gets its first weights from
# ``random_state`` too, so the result is the same each time.

from nidl_dcl import DCL
from nidl_dcl.models.encoders import StridedCNN

model = DCL(
    StridedCNN,
    proj_input_dim=512,
    max_epochs=10,
    learning_rate=1e-3,
    lr_scheduler_kwargs={"warmup_epochs": 1},
    random_state=0,
    enable_progress_bar=False,
    enable_model_summary=False,
).fit(data)

# %%
# One row for each image
# ----------------------
# ``transform`` gives the rows in the order of ``data.images``, so ids and numbers stand side by
# side. Here are the first six numbers of the first images.

import pandas as pd

embeddings = model.transform(data)
print(embeddings.shape)

ids = pd.MultiIndex.from_frame(data.images[["participant_id", "session_id"]])
pd.DataFrame(embeddings, index=ids).iloc[:5, :6].round(2)

# %%
# A picture in two dimensions
# ---------------------------
# Principal components draw 512 numbers as two. Each point is an image, its color the age that the
# network was never told. If colors lie in order, the images differ by something that goes with
# age. A picture is no test: for that, see the next tutorials.

from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

plane = PCA(2, random_state=0).fit_transform(StandardScaler().fit_transform(embeddings))
age = data.images["age"].astype(float)

figure, panel = plt.subplots(figsize=(6, 4.4), layout="constrained")
points = panel.scatter(*plane[age.notna()].T, c=age[age.notna()], s=60)
panel.scatter(*plane[age.isna()].T, s=60, c="lightgray", label="age unknown")
figure.colorbar(points, label="age (years)")
panel.set(title="Embeddings in two dimensions, colored by age")
panel.set(xlabel="first component", ylabel="second component")
panel.legend()

# %%
# Keep the model
# --------------
# A saved model is a folder: numbers, a description in JSON, and a card that says the same in words.
# No file makes code run. The description holds how images have to be prepared, so the loaded model
# takes the paths of images and masks, here of the same ones.

from nidl_dcl import load_model

model.save(folder / "model")
print(sorted(file.name for file in (folder / "model").iterdir()))

again = load_model(folder / "model", enable_progress_bar=False)
files = data.images[["path", "mask_path"]].map(lambda path: folder / "bids" / path)
print((again.transform(files) == embeddings).all())

# %%
# Where to go from here
# ---------------------
# * Ten epochs of 24 people are a toy. With your own dataset, start from :doc:`/your_dataset`.
# * :doc:`02_study_stage_by_stage` lets the program do all of this, writes files that can be checked,
#   and predicts age and sex.
# * :doc:`03_dcl_in_a_pipeline` uses ``DCL`` as a step of scikit-learn.

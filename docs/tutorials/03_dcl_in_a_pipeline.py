"""
DCL in a scikit-learn pipeline
==============================

``DCL`` is a scikit-learn transformer: images in, embeddings out, a network learned in between. So it
can be a step of a ``Pipeline``, be searched by ``GridSearchCV``, and be cross-validated with
everything that comes after it. This page does that on arrays, and says when you want it and when
you want an encoder that stays as it is.
"""

# %%
# Images as an array
# ------------------
# To be quick we draw small volumes: an ellipsoid with a hole in its middle, which grows with age.
# 32 people of different shapes come for two scans each. Any array ``(n, d, h, w)`` of yours will do.

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter

rng = np.random.default_rng(0)
n_people = 32
places = np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij"))
age = rng.uniform(20, 80, n_people)
widths = rng.normal(0.85, 0.07, (n_people, 3))  # what tells people apart


def draw(age, widths):
    head = np.linalg.norm(places / widths[:, None, None, None], axis=0) < 1
    hole = np.linalg.norm(places, axis=0) < 0.15 + 0.4 * (age - 20) / 60
    clean = gaussian_filter(head * np.where(hole, 0.2, 0.8), 0.7)
    return clean + rng.normal(0, 0.03, clean.shape)


people = np.repeat(np.arange(n_people), 2)  # two scans of each
images = np.stack([draw(age[who], widths[who]) for who in people]).astype("float32")
ages = age[people]
images.shape

# %%

figure, panels = plt.subplots(1, 4, figsize=(7.2, 2.2), layout="constrained")
figure.suptitle("Middle slices of four people")
for panel, row in zip(panels, np.argsort(ages)[[0, 20, 42, 63]], strict=True):
    panel.imshow(images[row, :, :, 8], cmap="gray", vmin=0, vmax=1)
    panel.set_title(f"{ages[row]:.0f} years", fontsize=10)
    panel.axis("off")

# %%
# One pipeline, cross-validated by person
# ---------------------------------------
# The network learns from images alone, ``Ridge`` learns the age from the embeddings.
# ``cross_val_predict`` makes a fresh copy of both for each fold and fits them on the training rows,
# so neither has met the people it is tested on.
#
# ``groups`` says who is who. Without it, one scan of a person may be trained on and the other one
# tested.

from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nidl_dcl import DCL
from nidl_dcl.models.encoders import StridedCNN

dcl = DCL(
    StridedCNN,
    {"width": 8},
    proj_input_dim=128,  # 16 * width: the length of the embedding
    max_epochs=5,
    batch_size=16,
    learning_rate=1e-3,
    lr_scheduler_kwargs={"warmup_epochs": 1},
    random_state=0,
    enable_progress_bar=False,
    enable_model_summary=False,
)
pipeline = make_pipeline(dcl, StandardScaler(), Ridge(alpha=100))
by_person = GroupKFold(4)
predicted = cross_val_predict(pipeline, images, ages, groups=people, cv=by_person)

error = mean_absolute_error(ages, predicted)
guess = np.abs(ages - ages.mean()).mean()
figure, panel = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
panel.plot([20, 80], [20, 80], color="gray", linewidth=1)
panel.scatter(ages, predicted, s=30)
panel.set(title=f"Mean error {error:.1f} years; by the mean age, {guess:.1f}")
panel.set(xlabel="age (years)", ylabel="predicted by a model of other people (years)")
panel.set_aspect("equal")

# %%
# What the groups are for
# -----------------------
# To see it, predict what no image can show: numbers drawn by lot for each person, a hundred times
# over. Cut by person, truth and prediction have nothing in common, as it must be. Cut by scan, they
# have: the model finds the other scan of the same person and repeats its number.

from sklearn.model_selection import KFold
from sklearn.neighbors import KNeighborsRegressor

lots = rng.normal(size=(n_people, 100))[people]
nearest = make_pipeline(dcl, StandardScaler(), KNeighborsRegressor(1))
cuts = {
    "by person": list(by_person.split(images, groups=people)),
    "by scan (wrong)": KFold(4, shuffle=True, random_state=0),
}
for name, cv in cuts.items():
    guessed = cross_val_predict(nearest, images, lots, cv=cv)
    pairs = zip(lots.T, guessed.T, strict=True)
    mean = np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs])
    print(f"cut {name}: mean correlation {mean:.2f}")

# %%
# Search settings
# ---------------
# Options of ``DCL`` and of the readout are searched together, by the names that scikit-learn gives
# them. ``set_output`` and ``clone`` work too.

import pandas as pd
from sklearn.model_selection import GridSearchCV

grid = {"dcl__temperature": [0.1, 0.5], "ridge__alpha": [10, 100]}
scoring = "neg_mean_absolute_error"
search = GridSearchCV(pipeline, grid, cv=GroupKFold(3), scoring=scoring, refit=False)
search.fit(images, ages, groups=people)
pd.DataFrame(search.cv_results_["params"]).assign(
    mean_absolute_error=-search.cv_results_["mean_test_score"].round(2)
)

# %%
# Refit in each fold, or trained once?
# ------------------------------------
# In the pipeline above the network is trained again in each fold. Its scores hold for people whom
# neither the network nor the readout has met, and nothing leaks from test to training rows. It
# costs a training per fold.
#
# A network that exists already, such as one of another cohort, is kept as it is by scikit-learn's
# ``FrozenEstimator``: only the readout is fitted in the folds. If it was trained on the same
# people, as here, it knows their images but not their ages. Such scores tell how well age is read
# out in this cohort, not in new people; :doc:`/honest_evaluation` says how much that matters and
# how a study reports it.

from sklearn.frozen import FrozenEstimator

trained = dcl.fit(images)
frozen = make_pipeline(FrozenEstimator(trained), StandardScaler(), Ridge(alpha=100))
predicted = cross_val_predict(frozen, images, ages, groups=people, cv=by_person)
print(f"mean error {mean_absolute_error(ages, predicted):.1f} years")

# %%
# Embeddings of an existing study
# -------------------------------
# A study has trained a network and written the embeddings already. ``load_embeddings`` reads them
# with the phenotypes of their dataset, and what comes after is plain scikit-learn. The first lines
# make a very small study to read; the shell command does the same.
#
# .. code-block:: console
#
#    $ nidl-dcl pretrain bids study --spacing 8 --max-epochs 5 --batch-size 8
#    $ nidl-dcl embed bids study

import tempfile
from pathlib import Path

from nidl_dcl import load_embeddings
from nidl_dcl.bids.synthetic import write_demo_dataset
from nidl_dcl.output.folder import Output
from nidl_dcl.workflow.embed import embed
from nidl_dcl.workflow.inputs import Study
from nidl_dcl.workflow.options import TrainingOptions
from nidl_dcl.workflow.pretrain import pretrain

folder = Path(tempfile.mkdtemp())
write_demo_dataset(folder / "bids", n_participants=16, seed=0)
study = Study(Output(folder / "bids", folder / "study"))
with study.output.writing():
    training = TrainingOptions(spacing=[8], max_epochs=5, batch_size=8)
    pretrain(study, training)
    embed(study)

table, matrix = load_embeddings(folder / "study")
table[["participant_id", "session_id", "age", "sex", "row"]].head()

# %%
# Row i of the matrix belongs to row i of the table. Rows without an age are left out, participants
# are the groups.

from sklearn.linear_model import RidgeCV

known = table["age"].notna()
readout = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))
table.loc[known, "predicted"] = cross_val_predict(
    readout,
    matrix[known].astype(float),
    table.loc[known, "age"].astype(float),
    groups=table.loc[known, "participant_id"],
    cv=GroupKFold(4),
)
table[["participant_id", "session_id", "age", "predicted"]].head().round(1)

# %%
# Where to go from here
# ---------------------
# * ``predict_phenotype`` does this with repeated folds, intervals, chance and baselines in one
#   call: :doc:`/api`. :doc:`04_reading_the_report` shows what comes of it.
# * :doc:`/estimator` has more of what ``DCL`` takes: loaders, data modules, lists of paths.
# * :doc:`/analysis` continues with the tables of a study.

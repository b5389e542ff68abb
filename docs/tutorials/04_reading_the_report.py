"""
Reading the report
==================

Every study ends in ``report.html``. This page makes a small study, shows its report, and goes
through it in the order in which a careful reader would: did training work, who was used, how good
are the scores and against what, and what else could explain them. What each score means exactly is
in :doc:`/honest_evaluation`.
"""

# %%
# A small study
# -------------
# 30 synthetic participants, large voxels, ten epochs. ``occlusion`` also maps where the readout
# looks.
#
# .. code-block:: console
#
#    $ nidl-dcl study bids study --target age sex --spacing 6 --max-epochs 10 --batch-size 15 \
#        --occlusion

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from nidl_dcl.bids.synthetic import write_demo_dataset
from nidl_dcl.output.folder import Output
from nidl_dcl.workflow.inputs import Study
from nidl_dcl.workflow.options import PredictionOptions, StudyOptions, TrainingOptions
from nidl_dcl.workflow.study import run_study

folder = Path(tempfile.mkdtemp())
write_demo_dataset(folder / "bids", n_participants=30, seed=0)

options = StudyOptions(
    bids_dir=folder / "bids",
    output_dir=folder / "study",
    target=["age", "sex"],
    training=TrainingOptions(spacing=[6], max_epochs=10, batch_size=15),
    prediction=PredictionOptions(occlusion=True),
)
opened = Study(Output(options.bids_dir, options.output_dir))
with opened.output.writing():
    run_study(opened, options)

report_page = folder / "study" / "report.html"
# sphinx_gallery_thumbnail_number = 2

# %%
# This is the report. It is one file that loads nothing from elsewhere, so it can be sent by mail.
# Every number in it stands in a table or JSON file beside it; below we read those.

study = folder / "study"


def read(name):
    return pd.read_csv(study / name, sep="\t", na_values="n/a")


age = json.loads((study / "desc-dclAge_metrics.json").read_text())
sex = json.loads((study / "desc-dclSex_metrics.json").read_text())

# %%
# Did training work?
# ------------------
# `In the report <../../reports/04_reading_the_report.html#training>`__: the training curves. Look
# for signs of collapse first, since nothing after it means anything if the encoder gives all images
# the same embedding.
#
# * The loss should fall well below the dashed line, which is the loss of a collapsed encoder.
# * The effective rank is how many directions the embeddings use. It may fall, but not toward 1.

curve = pd.read_csv(study / "logs" / "metrics.csv")

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
left.plot(curve["epoch"], curve["loss/train"], marker="o")
left.plot(curve["epoch"], curve["collapse_loss"], color="gray", linestyle="--")
left.set(title="Loss; dashed: of a collapsed encoder", xlabel="epoch")
right.plot(curve["epoch"], curve["effective_rank"], marker="o")
right.set(title="Effective rank of the embeddings", xlabel="epoch", ylim=(0, 60))

# %%
# Who was used?
# -------------
# `In the report <../../reports/04_reading_the_report.html#participants>`__: every image and what
# became of it. Then, for each target, how many participants were left out and why. A study that
# lost a third of its people tells of those who stayed.

print("images:", read("logs/inputs.tsv")["status"].value_counts().to_dict())
for metrics in (age, sex):
    used, dropped = metrics["n_participants"], metrics["n_dropped"]
    print(f"{metrics['target']}: {used} participants, left out {dropped}")

# %%
# Scans that stand out
# --------------------
# `In the report <../../reports/04_reading_the_report.html#outliers>`__: the oddest images, with
# pictures. ``worst_z`` is the largest distance from the median of all images, in robust standard
# deviations, over embedding, brain, noise, sharpness and contrast. An image is flagged above 3.5.
# Look at these before you look at scores; nothing is removed for you.

columns = ["rank", "participant_id", "session_id", "worst_z", "flagged"]
read("figures/outliers.tsv")[columns].head(4).round(2)

# %%
# The score, and what it has to beat
# ----------------------------------
# `In the report <../../reports/04_reading_the_report.html#headline>`__: the first sentence compares
# the embeddings with the best baseline. Read it before any number.

for metrics in (age, sex):
    print(metrics["headline"]["sentence"])

# %%
# Each score is a mean over test folds with its 95 % interval. It has four rivals:
#
# chance
#     the score when the target is shuffled between people. It tells whether there is any
#     information at all.
# dummy
#     a model that knows no image: the mean age, or the shares of the sexes.
# untrained
#     the same network before training. What it reaches is owed to its form, not to learning.
# voxels
#     principal components of coarse voxels. What it reaches needed no network.

scores = read("figures/desc-dclAge_baselines.tsv").iloc[::-1]

figure, panel = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
panel.hlines(scores["features"], scores["low"], scores["high"], color="gray")
panel.scatter(scores["mean"], scores["features"], zorder=3)
panel.axvline(age["permutation"]["chance"], color="red", linestyle=":", label="chance")
panel.set(title="Error in predicting age, with 95 % intervals")
panel.set(xlabel="mean absolute error (years)")
panel.margins(y=0.2)
panel.legend(loc="center left")

# %%
# Do not judge by whether two intervals overlap: all scores are on the same folds, so they rise and
# fall together. What counts is the gain, the difference in each fold. The embeddings are called
# better only where the interval of the gain lies above zero.

pd.DataFrame(
    {
        f"{metrics['target']}: gain over {name}": [gain["mean"], *gain["ci95"]]
        for metrics in (age, sex)
        for name, gain in metrics["headline"]["gains"].items()
    },
    index=["mean", "low", "high"],
).T.round(2)

# %%
# The p value of the permutations answers another question: whether the score could be luck. A small
# one does not say that the score is useful.

print(f"age: p = {age['permutation']['p']:.3f}; sex: p = {sex['permutation']['p']:.3f}")

# %%
# More labels, or fewer
# ---------------------
# `In the report <../../reports/04_reading_the_report.html#predictions>`__, under each target: the
# learning curve, the same test participants predicted by models that learned from fewer people. If a
# curve still falls at its right end, more labeled people would help. If the embeddings lie below
# the voxels at its left end, they save labels.

curves = read("figures/desc-dclAge_learningcurve.tsv")

figure, panel = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
for name, line in curves.groupby("features", sort=False):
    panel.plot(line["n_participants"], line["mean"], marker="o", label=name)
panel.set(title="Error in predicting age, by labeled participants")
panel.set(xlabel="participants learned from", ylabel="mean absolute error (years)")
figure.legend(loc="outside right upper")
print(age["learning_curve"]["sentence"])

# %%
# Could it be the scanner?
# ------------------------
# `In the report <../../reports/04_reading_the_report.html#site>`__: the site audit. If the site can
# be decoded from the embeddings, and sites differ in the target, part of a score may be the
# scanner. The score at sites that training never had is the answer to that, and the one to quote for
# new scanners.

print(age["site"]["sentence"])
print(age["site"]["leave_one_site_out"]["sentence"])

# %%
# Had the encoder seen these people?
# ----------------------------------
# `In the report <../../reports/04_reading_the_report.html#exposure>`__: how many of the tested
# people were in pretraining. It never sees a label, and no readout is tested on a participant it
# was fitted on. Still, a score in new people may be lower. ``--holdout`` keeps some people out of
# everything but one last score; ``--model`` takes the encoder of another cohort.

print(age["exposure"]["sentence"])

# %%
# Where does the readout look?
# -----------------------------
# `In the report <../../reports/04_reading_the_report.html#occlusion>`__: blocks of the mean brain
# are hidden, one after the other. Warm colors: what is there makes the predicted age higher. The
# map shows what the readout is sensitive to. It shows no cause, and no place was tested for
# significance.

figure, panel = plt.subplots(figsize=(7.2, 3), layout="constrained")
panel.imshow(plt.imread(study / "figures" / "desc-dclAge_occlusion.png"))
panel.set_title("What each place adds to the predicted age, in years")
panel.set_axis_off()

# %%
# The sentences beside it say whether the map can be trusted: whether single people have the same
# map, and whether an untrained encoder has it too.

occlusion = json.loads((study / "figures" / "desc-dclAge_occlusion.json").read_text())
print(*occlusion["Outputs"][0]["Sentences"], sep="\n")

# %%
# In short
# --------
# 1. Is the loss well below collapse?
# 2. How many people were left out, and why? Have you looked at the odd scans?
# 3. Is the score better than chance, and does its gain over the best baseline lie above zero?
# 4. Could the site explain it? What is left at sites that training never had?
# 5. Had pretraining seen the people it is tested on?
#
# The end of the report has a text for your methods section, and what to cite.
# :doc:`/analysis` continues with the tables in pandas.

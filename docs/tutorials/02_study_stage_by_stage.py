"""
A study, stage by stage
=======================

A study goes from a BIDS dataset to predictions in five stages. Each reads files and writes files,
so each can be run alone, looked at, and run again. This page runs them one after the other, from
Python and with the shell command beside it: both do the same to the same folder.
"""

# %%
# The dataset, the output folder and the options
# ----------------------------------------------
# The synthetic dataset has T1-weighted images of 24 participants, brain masks as a derivative, and
# tables of age, sex and scanner. The options say what differs from the defaults: large voxels and a
# short training, for the sake of this page.

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nidl_dcl.bids.synthetic import write_demo_dataset
from nidl_dcl.output.folder import Output
from nidl_dcl.workflow.embed import embed
from nidl_dcl.workflow.inputs import Study, index
from nidl_dcl.workflow.options import TrainingOptions
from nidl_dcl.workflow.predict import predict
from nidl_dcl.workflow.pretrain import pretrain
from nidl_dcl.workflow.study import report

folder = Path(tempfile.mkdtemp())
write_demo_dataset(folder / "bids", n_participants=24, seed=0)

study = Study(Output(folder / "bids", folder / "study"))
training = TrainingOptions(spacing=[8], max_epochs=10, batch_size=12)


def read(name):
    return pd.read_csv(folder / "study" / name, sep="\t", na_values="n/a")


# %%
# Index: which images, and what is wrong with the others
# ------------------------------------------------------
# ``index`` writes nothing. It finds every candidate image by its name, and with ``check`` opens it
# too. So run it first: it tells what a study would use before anything is computed. Every image and
# every participant has a row, whose ``status`` is ``ok``, ``warn`` or ``skip``;
# :doc:`/when_things_go_wrong` has all codes.
#
# .. code-block:: console
#
#    $ nidl-dcl index bids --check

import io

listed, usable = index(folder / "bids", study.data, study.run, check=True)
inputs = pd.read_csv(io.StringIO(listed), sep="\t", keep_default_na=False)
inputs[["participant_id", "session_id", "status", "code", "message"]].head(4)

# %%

print(inputs["status"].value_counts().to_dict())

# %%
# Pretrain: an encoder, without labels
# ------------------------------------
# ``study.output.writing()`` holds the folder, so that no other run writes to it at the same time.
#
# .. code-block:: console
#
#    $ nidl-dcl pretrain bids study --spacing 8 --max-epochs 10 --batch-size 12

with study.output.writing():
    model = pretrain(study, training)

print(model.relative_to(folder))
print(sorted(file.name for file in model.iterdir()))

# %%
# The training curve is in ``logs/metrics.csv``, a row for each epoch. A collapsed encoder gives all
# images the same embedding; training works when its loss falls well below that of collapse.

curve = pd.read_csv(folder / "study" / "logs" / "metrics.csv")

figure, panel = plt.subplots(figsize=(6, 3.2), layout="constrained")
panel.plot(curve["epoch"], curve["loss/train"], marker="o", label="training")
panel.plot(curve["epoch"], curve["collapse_loss"], "--", color="gray", label="collapse")
panel.set(title="Loss in each epoch, and the loss of a collapsed encoder")
panel.set(xlabel="epoch", ylabel="loss")
panel.legend()

# %%
# Embed: one row for each image
# -----------------------------
# .. code-block:: console
#
#    $ nidl-dcl embed bids study

with study.output.writing():
    embeddings = embed(study)

# %%
# Two files: a table of ids, and a matrix whose row i belongs to row i of the table. ``source`` is
# the image, ``split`` what pretraining did with the participant.

print(np.load(folder / "study" / "desc-dcl_embeddings.npy").shape)
read("desc-dcl_embeddings.tsv").head(4)

# %%
# Predict: phenotypes, cross-validated by participant
# ---------------------------------------------------
# Targets are columns of the dataset's tables. A number is predicted by regression, classes by
# classification.
#
# .. code-block:: console
#
#    $ nidl-dcl predict bids study --target age sex

with study.output.writing():
    rows = predict(study, ["age", "sex"])

# %%
# The command prints this at its end: each score with the ends of its 95 % interval, beside chance
# and the baselines. :doc:`04_reading_the_report` tells what they are. ``mae`` is the mean absolute
# error, in years: lower is better. Balanced accuracy is the mean of the shares of each sex that are
# recognized: higher is better.

scores = ["score", "low", "high", "chance", "dummy", "untrained", "voxels"]
pd.DataFrame(rows)[["target", "metric", *scores]].round(2)

# %%
# For each target there is a table of predictions, a row for each image. ``prediction`` is always by
# models that never had an image of this participant in training.

columns = ["participant_id", "session_id", "target", "prediction", "n_folds", "status"]
read("desc-dclAge_predictions.tsv")[columns].head(4).round(1)

# %%
# The scores, with all that a reviewer may ask for, are in a JSON file. Its sentences say the numbers
# in words.

metrics = json.loads((folder / "study" / "desc-dclAge_metrics.json").read_text())
print(metrics["headline"]["sentence"])
print(metrics["exposure"]["sentence"])
print("Keys:", ", ".join(metrics))

# %%
# Report: one page about all of it
# --------------------------------
# ``report`` computes nothing: it gathers what the files say.
#
# .. code-block:: console
#
#    $ nidl-dcl report bids study

with study.output.writing():
    page = report(study)

print(page.relative_to(folder))

# %%
# What is there now
# -----------------
# The folder is a BIDS derivative. :doc:`/files` explains each file, column and key. ``figures/``
# holds the pictures of the report and their numbers, ``.work`` what can be computed again.

files = [file for file in (folder / "study").rglob("*") if file.is_file()]
paths = [file.relative_to(folder / "study") for file in sorted(files)]
print(*[p for p in paths if p.parts[0] not in (".work", "figures")], sep="\n")

# %%
# A second call computes nothing
# ------------------------------
# The same stages again look at what is there, and find that nothing is missing. ``logs/run.json``
# lists the stages of this run: those above did their work, the last three were skipped. In the same
# way an interrupted run resumes, and new participants or targets are added.

with study.output.writing():
    pretrain(study, training)
    embed(study)
    predict(study, ["age", "sex"])

record = json.loads((folder / "study" / "logs" / "run.json").read_text())
pd.DataFrame(record["stages"])[["name", "seconds", "skipped"]]

# %%
# Other settings for a stage that is done would mix two studies in one folder, so they are refused.

from dataclasses import replace

from nidl_dcl.errors import UsageError

try:
    with study.output.writing():
        pretrain(study, replace(training, temperature=0.5))
except UsageError as error:
    print(str(error).replace(f"{folder}/", ""))

# %%
# Where to go from here
# ---------------------
# * All stages in one command: ``nidl-dcl study bids study --target age sex``.
#   :doc:`/your_dataset` goes through it for a dataset of your own.
# * The scripts in ``pipelines/`` hold these calls, to copy and edit.
# * :doc:`04_reading_the_report` reads the page that was written.

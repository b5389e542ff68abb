"""Train the model that the package ships: `--model builtin`, `--init builtin`.

    python benchmarks/builtin.py BIDS_DIR [--output FOLDER] [--study FOLDER]

BIDS_DIR holds T1w heads of the IXI dataset. They are aligned by `--preprocess align` and trained on with
the defaults of `nidl-dcl study --encoder regional`. FOLDER, by default the one in the package, gets the
weights, `model.json` with the salted hashes of those who were seen, the card, and LICENSE. With --study,
the folder of that training is kept, and a run that was killed resumes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from nidl_dcl.io.console import ConsoleHandler, handled_by
from nidl_dcl.io.formats import write_text
from nidl_dcl.models.model_source import BUILTIN, folder_of
from nidl_dcl.models.serialization import load_model, read_description, save_model
from nidl_dcl.workflow.options import DataOptions, RunOptions, TrainingOptions
from nidl_dcl.workflow.pretrain import pretrain
from nidl_dcl.workflow.study import open_study

LICENSE = "CC-BY-SA-3.0"
LICENSE_URL = "https://creativecommons.org/licenses/by-sa/3.0/"
IXI = "https://brain-development.org/ixi-dataset/"

CREDITS = [
    (
        f"The model {BUILTIN} of nidl_dcl was trained, without labels, on T1-weighted images of the IXI "
        f"dataset ({IXI}; IXI - Information eXtraction from Images, EPSRC GR/S21533/02), which is made "
        f"available under the license CC BY-SA 3.0 ({LICENSE_URL}). The images were masked, aligned and "
        "brought to larger voxels; none is part of the model."
    )
]

# What the card says of its use. Claims about scores are those that benchmarks/quality.py measured.
GOOD_FOR = [
    "T1-weighted images of adult heads, aligned by nidl_dcl or in MNI space already.",
    (
        "A dataset with few labels, or too few participants to train an encoder on: a model trained alike "
        "on 40 participants of IXI predicted the age of 40 others, whom it never saw, with an error of 7.1 "
        "years from 32 labels; voxels 8.1, the same network untrained 7.7."
    ),
    "A first look, without a training.",
    "Features that were fixed before anybody saw your participants, if yours are not in IXI.",
]
NOT_FOR = [
    "Other contrasts, tissue maps, and heads that are not aligned: they are refused.",
    "Predicting sex better than from voxels: balanced accuracy 0.82 there, voxels 0.84.",
    "Children, and brains with large lesions: training saw healthy adults alone.",
    (
        "Proof of what holds on any scanner: training saw one, the 3 T scanner of Hammersmith "
        "Hospital, London."
    ),
]

LICENSE_TEXT = f"""\
This license is of the model in this folder (weights.safetensors, model.json, README.md) and not of the
code of nidl_dcl.

Creative Commons Attribution-ShareAlike 3.0 Unported (SPDX: {LICENSE})
{LICENSE_URL}
The legal code: {LICENSE_URL}legalcode

{CREDITS[0]}

Whoever passes on the model, or a model trained further from it, names IXI and nidl_dcl, says what was
changed, and does so under the same or a compatible license.
"""


def main(
    bids_dir: Path,
    output: Path | None = None,
    study_dir: Path | None = None,
    training: TrainingOptions | None = None,
    data: DataOptions | None = None,
) -> Path:
    """Train, unless `study_dir` holds the trained model, and write the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        study = open_study(
            bids_dir,
            study_dir or Path(scratch) / "study",
            data or DataOptions(preprocess="align"),
            RunOptions(),
            training := training or TrainingOptions(encoder="regional"),
            command=["benchmarks/builtin.py"],
        )
        with study.output.writing():
            trained = pretrain(study, training)
        return publish(trained, output or folder_of(BUILTIN))


def publish(trained: Path, folder: Path) -> Path:
    """Write a trained model with its license, whose data it is made from, and what it is for."""
    # An instance, so that its arguments are written down, whatever the defaults will be.
    model = load_model(trained, encoder=load_model(trained).encoder)
    about = read_description(trained)
    told = {
        "name": BUILTIN,
        "license": LICENSE,
        "credits": CREDITS,
        "good_for": GOOD_FOR,
        "not_for": NOT_FOR,
    }
    save_model(
        model,
        folder,
        preparation=model.preparation,
        exposure=model.exposure,
        provenance={"config": about["provenance"]["config"], "source": "IXI", **told},
    )
    write_text(folder / "LICENSE", LICENSE_TEXT)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("--output", type=Path, help="folder of the model")
    parser.add_argument(
        "--study", type=Path, help="keep the folder of the training; resume from it"
    )
    given = parser.parse_args(sys.argv[1:])
    with handled_by(ConsoleHandler()):
        print(main(given.bids_dir, given.output, given.study))

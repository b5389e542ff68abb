"""What is said of the inputs before anything is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_images import AFFINE, brain, image, save

from nidl_dcl.data.image_table import ImageTable
from nidl_dcl.workflow.inputs import WHOLE_HEADS, input_lines


def dataset(root: Path, count: int = 3) -> Path:
    for k in range(count):
        anat = root / f"sub-{k}" / "anat"
        anat.mkdir(parents=True)
        save(anat / f"sub-{k}_T1w.nii.gz", brain()[0] + k * (brain()[0] > 100))
    return root


def lines(root: Path, **options) -> list[str]:
    table = ImageTable(root, **options)
    table.check()
    return input_lines(table, "logs/inputs.tsv")


@pytest.mark.parametrize("mask", ["auto", "none"])
def test_whole_heads_without_masks_are_said_with_what_to_do(mask, tmp_path):
    assert WHOLE_HEADS in lines(dataset(tmp_path), mask=mask)
    assert all(word in WHOLE_HEADS for word in ("desc-brain_mask", "--preprocess align"))


def test_masked_and_tissue_images_are_no_whole_heads(tmp_path):
    root = dataset(tmp_path)
    for k in range(3):
        anat = root / "derivatives" / "masks" / f"sub-{k}" / "anat"
        anat.mkdir(parents=True)
        mask = image(brain()[1], dtype=np.uint8)
        mask.to_filename(anat / f"sub-{k}_desc-brain_mask.nii.gz")
    assert WHOLE_HEADS not in lines(root)
    assert WHOLE_HEADS in lines(root, mask="none")


def test_a_warning_that_many_images_share_is_said_once_with_their_number(tmp_path):
    root = dataset(tmp_path)
    moved = AFFINE.copy()
    moved[:3, 3] += [0, 40, -30]
    for path in root.glob("sub-*/anat/*"):
        made = image(brain()[0])
        made.set_sform(moved, 2)
        made.to_filename(path)
    said = [line for line in lines(root) if "affine" in line]
    assert said[0] == "3 warn: affine (logs/inputs.tsv)"
    assert "50.0 mm" in said[1]
    assert len(said) == 2

from __future__ import annotations

import importlib.metadata
import sys

import numpy as np
import pytest

from nidl_dcl.preprocessing.brain_extraction import extract_brain, largest_component
from nidl_dcl.preprocessing.head import read_head
from nidl_dcl.preprocessing.measures import overlap


@pytest.fixture
def deepbet():
    try:
        importlib.metadata.distribution("deepbet")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("deepbet is not installed")


def test_the_largest_part_is_kept_with_its_corners():
    inside = np.zeros((6, 6, 6), bool)
    inside[0, 0, 0] = inside[1, 1, 1] = inside[2, 2, 2] = inside[5, 5, 0] = True
    kept = largest_component(inside)
    assert kept.sum() == 3
    assert not kept[5, 5, 0]
    assert not largest_component(np.zeros((3, 3, 3), bool)).any()


@pytest.mark.slow
def test_the_brain_of_a_synthetic_head_is_found_and_nothing_said(deepbet, demo_head, capfd):
    image, true = demo_head
    head = read_head(image)
    mask = extract_brain(head.data)
    assert overlap(mask, read_head(true).data > 0) > 0.9
    np.testing.assert_array_equal(mask, extract_brain(head.data))
    assert capfd.readouterr() == ("", "")
    assert not {"customtkinter", "deepbet", "cc3d"} & set(sys.modules)


@pytest.mark.slow
def test_an_image_of_one_value_holds_no_brain(deepbet):
    assert not extract_brain(np.ones((40, 40, 40), np.float32)).any()


@pytest.mark.slow
def test_real_brains_are_found(deepbet, ixi_dir):
    for path in sorted(ixi_dir.glob("sub-*/anat/*_T1w.nii.gz"))[:3]:
        name = path.name.replace("T1w", "desc-brain_mask")
        true = ixi_dir / "derivatives" / "dlmuse" / path.relative_to(ixi_dir).parent / name
        assert overlap(extract_brain(read_head(path).data), read_head(true).data > 0) > 0.97

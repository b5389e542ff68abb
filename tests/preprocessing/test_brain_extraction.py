from __future__ import annotations

import importlib.metadata

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
def test_the_brain_of_a_synthetic_head_is_found(deepbet, demo_head):
    image, true = demo_head
    head = read_head(image)
    mask = extract_brain(head.data)
    assert overlap(mask, read_head(true).data > 0) > 0.9
    np.testing.assert_array_equal(mask, extract_brain(head.data))


@pytest.mark.slow
def test_an_image_of_one_value_holds_no_brain(deepbet):
    assert not extract_brain(np.ones((40, 40, 40), np.float32)).any()

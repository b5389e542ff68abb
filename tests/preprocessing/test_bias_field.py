from __future__ import annotations

import numpy as np
import pytest

from nidl_dcl.preprocessing.bias_field import correct_bias_field
from nidl_dcl.preprocessing.template import load_template

pytest.importorskip("SimpleITK")


def biased():
    """Return the template with and without a smooth field; the spread of its logarithm is 0.2."""
    template = load_template(2)
    x, y, z = (np.linspace(-1, 1, n) for n in template.data.shape)
    field = 0.35 * y[:, None] + 0.25 * (z - 0.5 * z**2) + 0.2 * (x**2)[:, None, None]
    return template, np.exp(field).astype(np.float32)


def test_a_smooth_field_is_taken_out():
    template, field = biased()
    mask, affine = template.mask, template.affine
    plain = correct_bias_field(template.data, mask, affine)

    corrected = correct_bias_field(template.data * field, mask, affine)

    left = np.log(corrected[mask] / plain[mask])
    assert np.log(field[mask]).std() > 0.15
    assert left.std() < 0.3 * np.log(field[mask]).std()
    applied = np.log(corrected[mask] / (template.data * field)[mask])
    assert abs(applied.mean()) < 0.02


def test_an_image_with_too_little_brain_stays_as_it_is():
    template, field = biased()
    mask = np.zeros_like(template.mask)
    mask[50:53, 50:53, 50:53] = True
    data = template.data * field
    np.testing.assert_array_equal(correct_bias_field(data, mask, template.affine), data)

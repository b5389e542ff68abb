from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nilearn import datasets

from nidl_dcl.preprocessing.template import SPACE, load_template


def test_the_space_is_named_as_bids_names_the_file_in_nilearn():
    assert SPACE == "MNI152NLin2009aSym"
    assert Path(datasets.struct.MNI152_FILE_PATH).name.endswith("nlin_sym_09a_converted.nii.gz")


@pytest.mark.parametrize("mm", [2, 4, 8])
def test_the_template_is_one_brain_on_every_grid(mm):
    template = load_template(mm)
    np.testing.assert_allclose(np.diag(template.affine), [mm, mm, mm, 1])
    assert template.volume_ml == pytest.approx(1883, rel=0.04)
    assert template.data.shape == template.mask.shape
    assert (template.data[~template.mask] == 0).mean() > 0.9
    with pytest.raises(ValueError, match="read-only"):
        template.data[0] = 1

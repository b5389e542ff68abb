from __future__ import annotations

import json

import pandas as pd
import pytest

from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.data.input_contract import origin_of, require_contract
from nidl_dcl.errors import UsageError
from nidl_dcl.volumes.preparation import Origin, Preparation

RAW = Origin("T1w", "native", coarsest=1.2)


def require(
    learned=RAW, seen=RAW, *, masked=(False, False), intensity=("robust", "robust"), spacing=4.0
):
    contract = Preparation((spacing,) * 3, (8, 8, 8), masked[0], intensity[0], origin=learned)
    require_contract(
        contract, intensity=intensity[1], masked=masked[1], origin=seen, coarse="a.nii"
    )


@pytest.mark.parametrize(
    ("learned", "seen", "more"),
    [
        (RAW, RAW, {}),
        (RAW, RAW, {"masked": (False, True)}),  # masks are simply not used
        (RAW, RAW, {"masked": (True, True)}),
        (RAW, Origin("T1w", "native", coarsest=5.0), {}),  # 4 mm voxels hide it
        (RAW, Origin("T1w", "native", coarsest=0.5), {"spacing": 1.0}),  # finer is averaged
        (Origin("T1w", "MNI152NLin6Asym"), Origin("T1w", "MNI152NLin2009cAsym"), {}),
        (None, Origin("T2w", "fsaverage", True, 9.0), {}),  # a folder that does not say
        (Origin("T1w", "native", True), RAW, {"masked": (True, True)}),
    ],
)
def test_images_like_those_of_training_are_taken(learned, seen, more):
    require(learned, seen, **more)


@pytest.mark.parametrize(
    ("seen", "more", "words"),
    [
        (RAW, {"masked": (True, False)}, ["brain-masked", "--mask NAME"]),
        (RAW, {"intensity": ("robust", "probability")}, ["'probability'", "--preset raw-t1w"]),
        (Origin("T2w", "native"), {}, ["T1w images and these are T2w", "--bids-filter-file"]),
        (
            Origin("T1w", "MNI152NLin2009cAsym"),
            {},
            ["space native", "in MNI152NLin2009cAsym", "--preset raw-t1w"],
        ),
        (Origin("T1w", "MNI152+native"), {}, ["MNI152+native"]),
        (Origin("T1w", "native", stripped=True), {}, ["with skull", "without skull"]),
        (
            Origin("T1w", "native", coarsest=6.0),
            {},
            ["a.nii has voxels of 6 mm", "1.2 mm at most", "takes up to 5 mm", "--spacing"],
        ),
        (Origin("T1w", "native", coarsest=2.0), {"spacing": 1.0}, ["takes up to 1.5 mm"]),
    ],
)
def test_other_images_are_refused_with_what_to_do(seen, more, words):
    with pytest.raises(UsageError) as caught:
        require(RAW, seen, **more)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "path", "expected"),
    [
        ("raw-t1w", "sub-1/anat/sub-1_T1w.nii.gz", ("T1w", "native", False)),
        ("raw-t1w", "sub-1/anat/sub-1_FLAIR.nii", ("FLAIR", "native", False)),
        (
            "fmriprep-mni",
            "derivatives/x_space-odd/sub-1/anat/sub-1_space-MNI152NLin2009cAsym_T1w.nii.gz",
            ("T1w", "MNI152NLin2009cAsym", False),
        ),
        ("fmriprep-gm", "sub-1_space-MNI152NLin2009cAsym_label-GM_probseg.nii.gz",
         ("probseg", "MNI152NLin2009cAsym", False)),
        ("cat12-vbm", "sub-1/mri/mwp1sub-1_T1w.nii", ("T1w", "MNI152", False)),
        ("freesurfer", "sub-1/mri/brain.mgz", ("brain", "native", True)),
    ],
)  # fmt: skip
def test_what_images_are_is_read_from_their_names(preset, path, expected):
    origin = origin_of(pd.Series([path], dtype="string"), PRESETS[preset], 1.5)
    assert (origin.contrast, origin.space, origin.stripped) == expected
    assert origin.coarsest == 1.5


def test_the_origin_survives_json_and_is_no_rule():
    preparation = Preparation(origin=RAW)
    assert Preparation.from_dict(json.loads(json.dumps(preparation.to_dict()))).origin == RAW
    assert preparation == Preparation()
    assert preparation.rules() == Preparation().rules()
    assert "origin" not in preparation.rules()

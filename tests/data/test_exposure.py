from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ONE_EPOCH
from torch import nn

from nidl_dcl import DCL, BIDSDataModule, load_model
from nidl_dcl.data.exposure import after, exposure_of, recognize, records_images, validated
from nidl_dcl.models.encoders import StridedCNN
from nidl_dcl.volumes.reading import check_volume

NAME = "sub-{0}/ses-01/anat/sub-{0}_ses-01_T1w.nii.gz"
SEEN = exposure_of(["sub-01", "sub-02"], ["aa", "bb"], "salt", validation=["sub-02"])


@pytest.mark.parametrize(
    ("who", "content", "expected"),
    [
        ("sub-01", "aa", "image"),
        ("sub-77", "aa", "image"),  # renamed
        ("sub-01", "cc", "id"),  # another image, or another person of the same name
        ("sub-77", "cc", ""),
        ("sub-77", "", ""),
    ],
)
def test_who_was_seen_is_recognized_by_image_or_else_by_id(who, content, expected):
    assert recognize([who], [content], SEEN) == [expected]


def test_names_and_checksums_are_in_no_exposure():
    text = json.dumps(exposure_of(["sub-secret"], ["0123456789abcdef"], "salt"))
    assert "secret" not in text
    assert "0123456789abcdef" not in text


def test_only_validated_on_counts_as_seen_and_is_told_apart():
    assert recognize(["sub-02"], ["bb"], SEEN) == ["image"]
    assert validated(["sub-01", "sub-02"], SEEN) == [False, True]


def test_a_model_folder_without_images_recognizes_ids():
    old = {name: SEEN[name] for name in ("salt", "n_participants", "participants")}
    assert recognize(["sub-01", "sub-77"], ["aa", "aa"], old) == ["id", ""]
    assert not records_images(old)
    assert records_images(SEEN)


def test_without_a_record_nobody_is_called_unseen():
    assert recognize(["sub-01"], ["aa"], {}) == [None]
    assert recognize(["sub-01", "sub-77"], ["aa", "cc"], after({}, SEEN)) == ["image", None]
    assert recognize(["sub-01"], ["aa"], after(SEEN, {})) == ["image"]
    assert recognize(["sub-77"], ["cc"], after(SEEN, {})) == [None]


def test_what_the_first_weights_saw_stays_seen():
    further = after(SEEN, exposure_of(["sub-03"], ["cc"], "other"))
    assert recognize(["a", "b", "sub-02", "x"], ["aa", "cc", "", ""], further) == [
        *("image", "image", "id", "")
    ]
    assert after(further, exposure_of(["sub-03"], ["cc"], "other")) == further


def changed_copy(image: Path, how: str, place: Path) -> Path:
    """Write an image again, as users do, and return the file."""
    loaded = nib.load(image)
    data = np.asanyarray(loaded.dataobj)
    target = place / "copy.nii.gz"
    if how == "compressed again":
        target.write_bytes(gzip.compress(gzip.decompress(image.read_bytes()), 1, mtime=7))
    elif how == "not compressed":
        target = place / "copy.nii"
        target.write_bytes(gzip.decompress(image.read_bytes()))
    elif how == "as float64":
        nib.save(nib.Nifti1Image(data.astype(np.float64), loaded.affine), target)
    elif how == "big-endian":
        header = nib.Nifti1Header(endianness=">")
        nib.save(nib.Nifti1Image(data.astype(">i2"), loaded.affine, header), target)
    elif how == "as .mgz":
        target = place / "copy.mgz"
        nib.save(nib.MGHImage(data.astype(np.int16), loaded.affine), target)
    elif how == "another header":
        other = nib.Nifti1Image(data, np.diag([7.0, 7.0, 7.0, 1.0]))
        other.header["descrip"] = b"anonymized"
        nib.save(other, target)
    elif how == "flipped":
        nib.save(loaded.as_reoriented([[0, -1], [1, 1], [2, 1]]), target)
    elif how == "one voxel changed":
        data = data.copy()
        data[0, 0, 0] += 1
        nib.save(nib.Nifti1Image(data, loaded.affine), target)
    elif how == "cropped":
        nib.save(loaded.slicer[1:], target)
    return target


@pytest.mark.parametrize(
    ("how", "same"),
    [
        *((how, True) for how in ("compressed again", "not compressed", "as float64")),
        *((how, True) for how in ("big-endian", "as .mgz", "another header")),
        *((how, False) for how in ("flipped", "one voxel changed", "cropped")),
    ],
)
def test_the_checksum_of_the_voxels_survives_what_the_docs_say(
    how: str, same: bool, heads_made: Path, tmp_path: Path
) -> None:
    image = heads_made / NAME.format("01")
    copy = check_volume(changed_copy(image, how, tmp_path))
    assert copy.content
    assert (copy.content == check_volume(image).content) is same


def fit(data: Any, **more: Any) -> DCL:
    encoder = StridedCNN(width=2)
    size = encoder.n_features
    return DCL(encoder, proj_input_dim=size, proj_hidden_dim=8, **{**ONE_EPOCH, **more}).fit(data)


def module_of(bids: Path, **more: Any) -> BIDSDataModule:
    return BIDSDataModule(bids, spacing=16.0, mask="none", batch_size=8, **more)


def test_a_model_fitted_on_a_data_module_keeps_whom_it_saw(
    heads_made: Path, make_heads: Callable[..., Path], tmp_path: Path
) -> None:
    data = module_of(heads_made, validation=0.3, holdout=0.3, random_state=1)
    split = dict(zip(data.images["participant_id"], data.images["split"], strict=True))
    assert set(split.values()) == {"train", "val", "holdout"}
    folder = fit(data).save(tmp_path / "model")
    exposure = json.loads((folder / "model.json").read_text())["exposure"]
    how = recognize(data.images["participant_id"], data.images["content"], exposure)
    assert how == ["" if s == "holdout" else "image" for s in data.images["split"]]
    assert validated(split, exposure) == [s == "val" for s in split.values()]
    again = load_model(folder, encoder=StridedCNN(width=2)).save(tmp_path / "again")
    assert json.loads((again / "model.json").read_text())["exposure"] == exposure
    # Renamed and compressed again, on another machine.
    other = make_heads("other", n=2, first=40, masks=False)
    shutil.copy(
        changed_copy(heads_made / NAME.format("01"), "compressed again", tmp_path),
        other / NAME.format("41"),
    )
    renamed = module_of(other)
    seen = recognize(renamed.images["participant_id"], renamed.images["content"], exposure)
    expected = "" if split["sub-01"] == "holdout" else "image"
    assert dict(zip(renamed.images["participant_id"], seen, strict=True)) == {
        "sub-40": "",
        "sub-41": expected,
    }
    assert expected == "image"


def test_a_second_fit_has_seen_what_its_first_weights_had(heads_made: Path) -> None:
    data = module_of(heads_made, participant_label=["01", "02", "03"])
    model = fit(data)
    once = model.exposure
    assert model.fit(data).exposure == once
    other = module_of(heads_made, participant_label=["04", "05", "06"])
    assert "before" not in model.fit(other).exposure  # afresh
    assert model.set_params(warm_start=True).fit(data).exposure["before"] == [other.exposure()]


def test_a_model_fitted_on_tensors_says_that_it_does_not_know(tmp_path: Path) -> None:
    rows = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    linear = {"encoder": nn.Linear, "encoder_kwargs": {"in_features": 6, "out_features": 4}}
    model = DCL(**linear, proj_input_dim=4, proj_hidden_dim=8, **ONE_EPOCH).fit(rows)
    folder = model.save(tmp_path / "model")
    assert json.loads((folder / "model.json").read_text())["exposure"] == {}
    assert load_model(folder).exposure == {}

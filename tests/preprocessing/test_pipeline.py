from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from nidl_dcl.preprocessing import pipeline
from nidl_dcl.preprocessing.head import read_head
from nidl_dcl.preprocessing.measures import overlap
from nidl_dcl.preprocessing.pipeline import AlignedBrain, keep_size, preprocess_t1w
from nidl_dcl.preprocessing.registration import TURNS

pytest.importorskip("SimpleITK")


@pytest.fixture(scope="session")
def head_and_mask(demo_head):
    image, mask = demo_head
    head, inside = read_head(image), read_head(mask).data > 0
    # Without bias field, so that those who are not about it do not wait for it.
    return pipeline.correct_bias_field(head.data, inside, head.affine), inside, head.affine


@pytest.fixture
def preprocess(monkeypatch, tmp_path):
    """Return a function that preprocesses an image; the network is replaced by the true mask."""

    def run(data, mask, affine, *, bias_field=False, given=None, **options):
        path = tmp_path / "sub-01_T1w.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(data, np.float32), affine), path)
        bright = pipeline._above_air(np.asarray(data, np.float32))

        def extract(seen):
            for turn in TURNS:  # the head comes as the pipeline has turned it
                axes = np.stack([np.abs(turn).argmax(axis=0), turn.sum(axis=0)], axis=1)
                if np.array_equal(nib.apply_orientation(bright, axes), seen):
                    return nib.apply_orientation(mask, axes)
            raise AssertionError("the network sees an image that is not the head")

        if not bias_field:
            monkeypatch.setattr(pipeline, "correct_bias_field", lambda data, mask, affine: data)
        monkeypatch.setattr(pipeline, "extract_brain", extract)
        monkeypatch.setattr(pipeline, "locate_brain", extract)
        return preprocess_t1w(path, mask=given, **options)

    return run


def test_a_head_is_stripped_and_aligned(preprocess, head_and_mask):
    outcome = preprocess(*head_and_mask, bias_field=True)
    data, mask, _ = head_and_mask
    brain = outcome.brain
    assert (outcome.verdict.status, outcome.verdict.code) == ("ok", "ok")
    assert outcome.measures.overlap > 0.93
    assert outcome.measures.mask_ml == pytest.approx(mask.sum() * 0.027)
    assert np.linalg.det(brain.matrix[:3, :3]) == pytest.approx(outcome.measures.determinant)
    assert brain.aligned.shape == brain.template.data.shape == brain.aligned_mask.shape
    assert not brain.aligned[~brain.aligned_mask].any()
    assert brain.aligned.min() >= 0
    assert (brain.corrected.shape, brain.corrected.dtype) == (data.shape, np.float32)
    again = preprocess(*head_and_mask, bias_field=True).brain
    np.testing.assert_array_equal(again.aligned, brain.aligned)


def test_a_brain_that_keeps_its_size_is_turned_and_moved_alone(preprocess, head_and_mask):
    brain = preprocess(*head_and_mask).brain
    kept = keep_size(brain)
    np.testing.assert_allclose(kept.matrix[:3, :3] @ kept.matrix[:3, :3].T, np.eye(3), atol=1e-9)
    assert kept.aligned_mask.sum() * 8 == pytest.approx(brain.mask.sum() * 27, rel=0.03)
    assert overlap(kept.aligned_mask, brain.template.mask) > 0.85


QUARTERS = {"x": (1, 2), "y": (0, 2), "z": (0, 1)}


@pytest.mark.parametrize(
    "axis", ["x", *(pytest.param(axis, marks=pytest.mark.slow) for axis in "yz")]
)
def test_a_head_turned_by_a_quarter_is_turned_back_and_flagged(preprocess, head_and_mask, axis):
    data, mask, affine = head_and_mask
    turned = (np.rot90(array, 1, QUARTERS[axis]) for array in (data, mask))
    outcome = preprocess(*turned, affine)
    assert (outcome.verdict.status, outcome.verdict.code) == ("warn", "turned")
    assert outcome.measures.overlap > 0.93
    assert outcome.measures.lead > 0.2
    assert np.linalg.det(outcome.brain.matrix[:3, :3]) > 0


@pytest.mark.slow
def test_a_head_upside_down_is_turned_back(preprocess, head_and_mask):
    data, mask, affine = head_and_mask
    outcome = preprocess(data[::-1, :, ::-1], mask[::-1, :, ::-1], affine)
    assert (outcome.verdict.status, outcome.verdict.code) == ("warn", "turned")
    assert outcome.measures.overlap > 0.93


def tilted(array, order):
    return ndimage.rotate(array.astype(np.float32), 30, (1, 2), reshape=False, order=order)


FAULTS = {
    "constant offset": (lambda d, m: (d - 1024, m), "ok", "ok"),
    "values below 1": (lambda d, m: (d * 1e-4, m), "ok", "ok"),
    "head tilted by 30 degrees": (lambda d, m: (tilted(d, 1), tilted(m, 0) > 0.5), "ok", "ok"),
    "stripped already": (lambda d, m: (d * m, m), "warn", "stripped"),
    "no brain": (lambda d, m: (d, np.zeros_like(m)), "skip", "no_brain"),
    "a tiny brain": (lambda d, m: (d, np.indices(m.shape).sum(0) == 9), "skip", "no_brain"),
    "contrast of T2w": (
        lambda d, m: (np.where(m, d[m].max() * 1.1 - d, d / 2), m),
        "skip",
        "contrast",
    ),
    "top not scanned": (lambda d, m: (d[:, :, :50], m[:, :, :50]), "skip", "field_of_view"),
    "one value in all": (lambda d, m: (np.zeros_like(d), m), "skip", "constant"),
    "no values at all": (lambda d, m: (np.full_like(d, np.nan), m), "skip", "non_finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_a_verdict(preprocess, head_and_mask, fault):
    change, status, code = FAULTS[fault]
    data, mask, affine = head_and_mask
    outcome = preprocess(*change(data, mask), affine)
    assert (outcome.verdict.status, outcome.verdict.code) == (status, code)
    assert (outcome.verdict.message == "") == (status == "ok")


def test_thick_slices_are_told(preprocess, head_and_mask):
    data, mask, affine = head_and_mask
    thick = affine @ np.diag([1, 1, 2, 1])
    half = data[:, :, :74].reshape(*data.shape[:2], 37, 2).mean(axis=3)
    outcome = preprocess(half, mask[:, :, :74:2], thick)
    assert (outcome.verdict.status, outcome.verdict.code) == ("warn", "thick_slices")


def save_mask(path, mask, affine):
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), path)
    return path


def test_a_brain_can_stay_where_it_is(preprocess, head_and_mask):
    outcome = preprocess(*head_and_mask, align=False)
    assert (outcome.verdict.status, outcome.verdict.code) == ("ok", "ok")
    assert not isinstance(outcome.brain, AlignedBrain)
    np.testing.assert_array_equal(outcome.brain.mask, head_and_mask[1])
    assert outcome.measures.upright > 0.7
    assert outcome.measures.overlap is None


def test_a_brain_that_stays_where_it_is_is_judged(preprocess, head_and_mask):
    data, mask, affine = head_and_mask
    turned = preprocess(np.rot90(data, 1, (1, 2)), np.rot90(mask, 1, (1, 2)), affine, align=False)
    assert (turned.verdict.status, turned.verdict.code) == ("warn", "turned")
    cut = preprocess(data[:, :, :50], mask[:, :, :50], affine, align=False)
    assert (cut.verdict.status, cut.verdict.code) == ("skip", "field_of_view")


def test_a_given_mask_is_used_on_any_grid(preprocess, head_and_mask, tmp_path):
    data, mask, affine = head_and_mask
    eroded = ndimage.binary_erosion(mask)
    flipped = affine @ np.diag([-1.0, 1, 1, 1])
    flipped[:3, 3] = (affine @ [mask.shape[0] - 1, 0, 0, 1])[:3]
    file = save_mask(tmp_path / "mask.nii", eroded[::-1], flipped)

    outcome = preprocess(data, mask, affine, given=file)

    assert (outcome.verdict.status, outcome.verdict.code) == ("ok", "ok")
    np.testing.assert_array_equal(outcome.brain.mask, eroded)
    stripped = preprocess(data * mask, mask, affine, given=file)
    assert (stripped.verdict.status, stripped.verdict.code) == ("ok", "ok")
    np.testing.assert_array_equal(stripped.brain.mask, eroded)


def test_a_turned_head_with_its_mask_is_turned_back(preprocess, head_and_mask, tmp_path):
    data, mask, affine = head_and_mask
    file = save_mask(tmp_path / "mask.nii", np.rot90(mask, 1, (1, 2)), affine)
    outcome = preprocess(np.rot90(data, 1, (1, 2)), None, affine, given=file)
    assert (outcome.verdict.status, outcome.verdict.code) == ("warn", "turned")
    assert outcome.measures.overlap > 0.93


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda mask, affine: (mask * 0, affine), "constant"),
        (lambda mask, affine: (mask, affine + np.eye(4, k=3) * 1000), "affine"),
        (lambda mask, affine: (np.indices(mask.shape).sum(0) == 9, affine), "no_brain"),
    ],
)
def test_a_given_mask_that_is_no_brain_is_refused(
    preprocess, head_and_mask, tmp_path, change, code
):
    data, mask, affine = head_and_mask
    file = save_mask(tmp_path / "mask.nii", *change(mask, affine))
    outcome = preprocess(data, mask, affine, given=file)
    assert (outcome.verdict.status, outcome.verdict.code) == ("skip", code)


def test_what_is_no_image_has_the_code_of_the_reader(tmp_path):
    path = tmp_path / "sub-01_T1w.nii.gz"
    path.write_text("<html>404</html>")
    outcome = preprocess_t1w(path)
    assert (outcome.verdict.status, outcome.verdict.code) == ("skip", "not_nifti")
    assert outcome.measures is None


@pytest.mark.slow
def test_a_real_head_from_file_to_template(ixi_dir):
    pytest.importorskip("deepbet")
    path = min(ixi_dir.glob("sub-*/anat/*_T1w.nii.gz"))
    outcome = preprocess_t1w(path)
    assert outcome.verdict.status == "ok"
    assert outcome.measures.overlap > 0.93
    assert outcome.measures.lead > 0.2

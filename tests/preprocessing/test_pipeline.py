from __future__ import annotations

import importlib.metadata
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from nidl_dcl.preprocessing import pipeline
from nidl_dcl.preprocessing.head import read_head, read_mask
from nidl_dcl.preprocessing.measures import overlap
from nidl_dcl.preprocessing.pipeline import AlignedBrain, keep_size, preprocess_t1w
from nidl_dcl.preprocessing.registration import TURNS

pytestmark = pytest.mark.slow

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
            if seen.size != bright.size:  # a coarser one, of voxels that are too small for a head
                return np.zeros(seen.shape, bool)
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


def tilted(array, order, degrees=30, axes=(1, 2)):
    return ndimage.rotate(array.astype(np.float32), degrees, axes, reshape=False, order=order)


def turned_by(degrees, axes):
    return lambda d, m: (tilted(d, 1, degrees, axes), tilted(m, 0, degrees, axes) > 0.5)


def recolored(*brightness):
    """Return a change of contrast: brightness of air, fluid, gray and white matter, and beyond."""

    def change(d, m):
        shares = d / np.percentile(d[m], 99)
        return np.interp(shares, [0, 0.3, 0.75, 1, 1.2], brightness) * 500, m

    return change


def with_lesion(brightness):
    """Return a change that fills a ball of 28 mm radius, 90 ml, with a share of the brain's mean."""

    def change(d, m):
        center = np.add(ndimage.center_of_mass(m), (6, 4, 4))
        ball = sum((g - c) ** 2 for g, c in zip(np.indices(m.shape), center, strict=True)) < 87
        return np.where(ball & m, brightness * d[m].mean(), d), m

    return change


def defaced(d, m):
    kept = d.copy()
    _, y, z = (int(c) for c in ndimage.center_of_mass(m))
    kept[:, y + 22 :, : z - 5] = 0
    return kept, m


def noisy(d, m):
    noise = np.random.default_rng(0).normal(0, 0.15 * d[m].mean(), d.shape)
    return d + noise, m


def cut(axis, start=None, stop=None):
    def change(d, m):
        part = [slice(None)] * 3
        part[axis] = slice(start, stop)
        return d[tuple(part)], m[tuple(part)]

    return change


def padded(d, m):
    """Return a head whose top was not scanned, in a field of view that is filled up with 0."""
    kept = np.arange(d.shape[2]) < 50
    return d * kept, m & kept


def half(d, m):
    return d, m & (np.arange(len(m)) < ndimage.center_of_mass(m)[0])[:, None, None]


def without_cerebellum(d, m):
    return d, m & (np.arange(m.shape[2]) > ndimage.center_of_mass(m)[2] - 7)


SLOW_FAULTS = {
    "face removed": (defaced, "ok", "ok"),
    "values below 1": (lambda d, m: (d * 1e-4, m), "ok", "ok"),
    "head nods by -25 degrees": (turned_by(-25, (1, 2)), "ok", "ok"),
    "head leans by 30 degrees": (turned_by(30, (0, 2)), "ok", "ok"),
    "head looks aside by 35 degrees": (turned_by(35, (0, 1)), "ok", "ok"),
    "mirrored front to back": (lambda d, m: (d[:, ::-1], m[:, ::-1]), "warn", "turned"),
    "mirrored top to bottom": (lambda d, m: (d[:, :, ::-1], m[:, :, ::-1]), "warn", "turned"),
    "dark lesion": (with_lesion(0.25), "warn", "contrast"),
    "bright lesion": (with_lesion(1.6), "ok", "ok"),
    "noise": (noisy, "ok", "ok"),
    "contrast of FLAIR": (recolored(0, 0.1, 1, 0.75, 0.6), "warn", "contrast"),
    "front not scanned": (cut(1, stop=60), "skip", "field_of_view"),
    "bottom not scanned": (cut(2, start=32), "skip", "field_of_view"),
    "one side not scanned": (cut(0, start=30), "skip", "field_of_view"),
    "top not scanned, filled up": (padded, "skip", "field_of_view"),
    "a slab": (cut(2, 30, 46), "skip", "field_of_view"),
    "half of the brain found": (half, "skip", "misaligned"),
    "no cerebellum found": (without_cerebellum, "skip", "misaligned"),
    "scalp taken for brain": (
        lambda d, m: (d, ndimage.binary_dilation(m, iterations=4)),
        "skip",
        "brain_size",
    ),
}

FAULTS = {
    "constant offset": (lambda d, m: (d - 1024, m), "ok", "ok"),
    "head nods by 30 degrees": (turned_by(30, (1, 2)), "ok", "ok"),
    "stripped already": (lambda d, m: (d * m, m), "warn", "stripped"),
    "no brain": (lambda d, m: (d, np.zeros_like(m)), "skip", "no_brain"),
    "a tiny brain": (lambda d, m: (d, np.indices(m.shape).sum(0) == 9), "skip", "no_brain"),
    "contrast of T2w": (recolored(0.1, 1.1, 0.6, 0.4, 0.3), "skip", "contrast"),
    "top not scanned": (cut(2, stop=50), "skip", "field_of_view"),
    "one value in all": (lambda d, m: (np.zeros_like(d), m), "skip", "constant"),
    "no values at all": (lambda d, m: (np.full_like(d, np.nan), m), "skip", "non_finite"),
}


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW_FAULTS)]
)
def test_a_fault_ends_in_a_verdict(preprocess, head_and_mask, fault):
    change, status, code = (FAULTS | SLOW_FAULTS)[fault]
    data, mask, affine = head_and_mask
    outcome = preprocess(*change(data, mask), affine)
    assert (outcome.verdict.status, outcome.verdict.code) == (status, code)
    assert (outcome.verdict.message == "") == (status == "ok")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "status", "code"),
    [
        (0.8, "ok", "ok"),  # a child, or an adult of small stature
        (0.7, "warn", "brain_size"),  # an infant
        (1.1, "warn", "brain_size"),
        (1.26, "skip", "brain_size"),  # two brains' size
        (0.1, "skip", "no_brain"),  # cm for mm
    ],
)
def test_size_is_judged(preprocess, head_and_mask, scale, status, code):
    data, mask, affine = head_and_mask
    outcome = preprocess(data, mask, affine @ np.diag([scale, scale, scale, 1]))
    assert (outcome.verdict.status, outcome.verdict.code) == (status, code)


@pytest.mark.slow
def test_a_strong_bias_field_is_taken_out(preprocess, head_and_mask):
    data, mask, affine = head_and_mask
    field = np.exp(np.linspace(-0.6, 0.6, data.shape[1]))[:, None]
    outcome = preprocess(data * field, mask, affine, bias_field=True)
    assert (outcome.verdict.status, outcome.verdict.code) == ("ok", "ok")


def test_thick_slices_are_told(preprocess, head_and_mask):
    data, mask, affine = head_and_mask
    thick = affine @ np.diag([1, 1, 2, 1])
    halves = data[:, :, :74].reshape(*data.shape[:2], 37, 2).mean(axis=3)
    outcome = preprocess(halves, mask[:, :, :74:2], thick)
    assert (outcome.verdict.status, outcome.verdict.code) == ("warn", "thick_slices")


@pytest.mark.slow
def test_left_and_right_in_doubt_are_told(preprocess, head_and_mask, monkeypatch):
    monkeypatch.setattr("nidl_dcl.preprocessing.head._forms_disagree", lambda path: True)
    outcome = preprocess(*head_and_mask)
    assert (outcome.verdict.status, outcome.verdict.code) == ("warn", "handedness")


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
    stripped = preprocess(data * mask, mask, affine, given=file, align=False)
    assert (stripped.verdict.status, stripped.verdict.code) == ("ok", "ok")
    np.testing.assert_array_equal(stripped.brain.mask, eroded)


@pytest.mark.slow
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
        (lambda mask, affine: (np.indices(mask.shape).sum(0) < 20, affine), "no_brain"),
    ],
)
def test_a_given_mask_that_is_no_brain_is_refused(
    preprocess, head_and_mask, tmp_path, change, code
):
    data, mask, affine = head_and_mask
    file = save_mask(tmp_path / "mask.nii", *change(mask, affine))
    outcome = preprocess(data, mask, affine, given=file)
    assert (outcome.verdict.status, outcome.verdict.code) == ("skip", code)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda content: b"", "empty"),
        (lambda content: b"<html>404</html>", "not_nifti"),
        (lambda content: content[: len(content) // 2], "truncated"),
        (lambda content: content[:-8] + bytes(4) + content[-4:], "crc"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1", "not_fetched"),
    ],
)
def test_what_is_no_image_has_the_code_of_the_reader(tmp_path, demo_head, change, code):
    path = tmp_path / "sub-01_T1w.nii.gz"
    path.write_bytes(change(demo_head[0].read_bytes()))
    outcome = preprocess_t1w(path)
    assert (outcome.verdict.status, outcome.verdict.code) == ("skip", code)
    assert outcome.measures is None
    assert str(path) in outcome.verdict.message


@pytest.fixture
def real_head(ixi_dir):
    """Return a real head, axes RAS, its reference mask and its affine, if the network is here."""
    try:
        importlib.metadata.distribution("deepbet")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("deepbet is not installed")
    path = min(ixi_dir.glob("sub-*/anat/*_T1w.nii.gz"))
    name = path.name.replace("T1w", "desc-brain_mask")
    true = next(ixi_dir.glob(f"derivatives/*/sub-*/anat/{name}"))
    head = read_head(path)
    return head.data, read_mask(true, head), head.affine


def save_head(path, data, affine):
    nib.save(nib.Nifti1Image(np.asarray(data, np.float32), affine), path)
    return path


@pytest.mark.slow
def test_a_real_head_from_file_to_template(real_head, tmp_path, capfd):
    data, mask, affine = real_head
    outcome = preprocess_t1w(save_head(tmp_path / "sub-01_T1w.nii", data, affine))
    assert outcome.verdict.status == "ok"
    assert overlap(outcome.brain.mask, mask) > 0.97
    assert outcome.measures.overlap > 0.93
    assert outcome.measures.lead > 0.2
    assert capfd.readouterr() == ("", "")
    assert not {"customtkinter", "deepbet", "cc3d"} & set(sys.modules)


@pytest.mark.slow
def test_a_real_head_turned_about_the_vertical_is_turned_back(real_head, tmp_path):
    """The network finds a brain that looks aside, and registration alone would make it fit."""
    data, _, affine = real_head
    path = save_head(tmp_path / "sub-01_T1w.nii", np.rot90(data, 1, (0, 1)), affine)
    outcome = preprocess_t1w(path)
    assert (outcome.verdict.status, outcome.verdict.code) == ("warn", "turned")
    assert outcome.measures.lead > 0.2


@pytest.mark.slow
def test_a_phantom_of_the_size_of_a_brain_is_no_brain(real_head, tmp_path, monkeypatch):
    # The search from all sides finds nothing better, in 15 s.
    monkeypatch.setattr(pipeline, "_likeliest_turn", lambda task: TURNS[0])
    _, mask, affine = real_head
    center = ndimage.center_of_mass(mask)
    steps = zip(np.indices(mask.shape), center, (35, 42, 32), strict=True)
    egg = sum(((g - c) / size) ** 2 for g, c, size in steps) < 1
    data = 500 * egg + np.random.default_rng(0).random(egg.shape) * 30
    path = save_head(tmp_path / "sub-01_T1w.nii", data, affine)
    outcome = preprocess_t1w(path, align=False)
    assert (outcome.verdict.status, outcome.verdict.code) == ("skip", "misaligned")

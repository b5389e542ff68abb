from __future__ import annotations

import pickle
import random
import re

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    OneOf,
    RandAdjustContrast,
    RandBiasField,
    RandGaussianNoise,
    RandHistogramShift,
    RandRotate,
    RandZoom,
)
from torch.utils.data import DataLoader, Dataset

from nidl_dcl.errors import UsageError
from nidl_dcl.views import (
    STRENGTHS,
    MultiViewsTransform,
    RandBias,
    RandBlur,
    RandContrast,
    RandCutout,
    RandForegroundNoise,
    RandPlacement,
    TwoViews,
    draw_view,
    volume_views,
)

KINDS = ("intensity", "probability", "signed")


def head(*shape: int) -> torch.Tensor:
    """Return a masked egg, brighter to the right, the front and the top."""
    sides = shape[-3:] or (18, 22, 16)
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in sides), indexing="ij")
    egg = ((x / 0.8) ** 2 + (y / 0.9) ** 2 + (z / 0.8) ** 2 < 1) * (
        0.6 + 0.1 * x + 0.3 * y + 0.2 * z
    )
    return egg.expand(shape or (1, *sides)).contiguous()


# Several views --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transforms", "n_views", "expected"),
    [
        (lambda x: x + 1, None, [2]),
        (lambda x: x + 1, 1, [2]),
        (lambda x: x + 1, 3, [2, 2, 2]),
        (lambda x: x + 1, 0, []),
        (lambda x: x + 1, np.int64(2), [2, 2]),
        ([lambda x: x + 1, lambda x: -x], None, [2, -1]),
        ((lambda x: x + 1, lambda x: -x), 1, [2, -1]),
        ([lambda x: x + 1], 1, [2]),
    ],
)
def test_several_views_come_as_a_list(transforms, n_views, expected):
    views = MultiViewsTransform(transforms, n_views)(1)
    assert isinstance(views, list)
    assert views == expected


@pytest.mark.parametrize(
    ("transforms", "n_views", "error"),
    [
        (3, None, TypeError),
        ("abc", None, TypeError),
        (None, 2, TypeError),
        ([abs, 3], None, TypeError),
        (abs, 2.0, TypeError),
        (abs, "2", TypeError),
        (abs, True, TypeError),
        ([abs, abs], True, TypeError),
        (abs, -1, ValueError),
        ([abs, abs], -1, ValueError),
        ([abs, abs], 2, ValueError),
        ([abs], 0, ValueError),
    ],
)
def test_what_makes_no_views_is_refused(transforms, n_views, error):
    with pytest.raises(error):
        MultiViewsTransform(transforms, n_views)


# Keys -----------------------------------------------------------------------------------------

TRANSFORMS = {
    "placement": RandPlacement(),
    "blur": RandBlur(prob=1),
    "contrast": RandContrast(prob=1),
    "bias": RandBias(prob=1),
    "noise": RandForegroundNoise(prob=1),
    "cutout": RandCutout(prob=1),
    "volume_views": volume_views(),
    "two of MONAI's": Compose([RandGaussianNoise(prob=1), RandBiasField(prob=1)]),
    "one of MONAI's": OneOf([RandAdjustContrast(prob=1), RandHistogramShift(prob=1)]),
    "MONAI's in a list": MultiViewsTransform([RandRotate(0.3, prob=1), RandZoom(prob=1)]),
    "a function of torch": lambda x: x + torch.randn(x.shape),
    "a function of numpy": lambda x: x + float(np.random.standard_normal()),  # noqa: NPY002
    "a function of random": lambda x: x + random.random(),
}


def same(first, second) -> bool:
    if isinstance(first, list):
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    return torch.equal(torch.as_tensor(first), torch.as_tensor(second))


def disturb(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_view_depends_on_its_key_alone(name):
    views, x = TRANSFORMS[name], head()
    disturb(1)
    first = draw_view(views, x, 0, 3, "sub-01", 0)
    disturb(2)
    other = draw_view(views, x, 0, 3, "sub-01", 1)
    again = draw_view(views, x, 0, 3, "sub-01", 0)
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_drawing_a_view_leaves_the_global_generators_alone(name):
    disturb(5)
    expected = torch.rand(3), np.random.random(3), random.random()  # noqa: NPY002
    disturb(5)
    draw_view(TRANSFORMS[name], head(), 1)
    found = torch.rand(3), np.random.random(3), random.random()  # noqa: NPY002
    assert torch.equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[2] == expected[2]


def test_two_views_are_the_views_1_and_2_of_the_key():
    x, views = head(), volume_views()
    first, second = TwoViews(views)(x, key=(7, 0, "sub-01"))
    assert torch.equal(first, draw_view(views, x, 7, 0, "sub-01", 1))
    assert torch.equal(second, draw_view(views, x, 7, 0, "sub-01", 2))
    assert same(TwoViews()(x, key=3), TwoViews()(x, key=(3,)))


def test_without_a_key_views_obey_the_seed_of_torch():
    two = TwoViews(RandGaussianNoise(prob=1))
    torch.manual_seed(1)
    first, then = two(head()), two(head())
    torch.manual_seed(1)
    assert same(two(head()), first)
    assert not same(first, then)


def test_two_views_take_any_callable_and_nothing_else():
    assert TwoViews(lambda x: x + 1)(1, key=0) == [2, 2]
    with pytest.raises(TypeError, match="callable"):
        TwoViews(3)


class Keyed(Dataset):
    def __init__(self):
        self.two = TwoViews()

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.two(head(), key=(0, "participant", i))


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_worker_draws_the_same_views(how):
    here = [Keyed()[i] for i in range(4)]
    loader = DataLoader(Keyed(), batch_size=None, num_workers=1, multiprocessing_context=how)
    for expected, found in zip(here, loader, strict=True):
        assert same(expected, found)


def test_two_views_survive_pickling():
    two = TwoViews()
    assert same(pickle.loads(pickle.dumps(two))(head(), key=4), two(head(), key=4))


def test_the_number_of_threads_changes_no_bit():
    x, views = head(1, 37, 45, 51), volume_views("strong")
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append([draw_view(views, x, key) for key in range(6)])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert same(*found)


# What a view may change -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("shape", [(1, 18, 22, 16), (2, 9, 8, 13), (12, 12, 12), (1, 4, 4, 4)])
def test_shape_and_type_are_kept_and_the_input_is_untouched(shape, strength, kind):
    x = head(*shape)
    before = x.clone()
    for key in range(4):
        view = draw_view(volume_views(strength, kind), x, key)
        assert view.shape == shape
        assert type(view) is torch.Tensor
        assert view.dtype == torch.float32
        assert torch.isfinite(view).all()
    assert torch.equal(x, before)


def test_metadata_and_arrays_are_taken_as_plain_tensors():
    expected = draw_view(volume_views(), head(), 1)
    for given in (MetaTensor(head()), head().numpy(), head().double()):
        found = draw_view(volume_views(), given, 1)
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)


def test_what_is_no_volume_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8, 8\)"):
        RandBlur()(torch.zeros(1, 1, 8, 8, 8))


def test_a_draw_can_be_repeated():
    views = RandPlacement().set_random_state(seed=1)
    assert torch.equal(views(head()), views(head(), randomize=False))


def test_the_flip_is_left_right():
    x = head()
    assert torch.equal(RandPlacement(prob=0, flip=1)(x), x.flip(1))
    assert torch.equal(RandPlacement(prob=0, flip=0)(x), x)


def likeness(first, second) -> float:
    return torch.corrcoef(torch.stack([first.ravel(), second.ravel()]))[0, 1].item()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_front_stays_front_and_up_stays_up(strength):
    place, x, seen = RandPlacement(**STRENGTHS[strength]["placement"]), head(), set()
    for key in range(30):
        view = draw_view(place, x, key)
        seen.add(
            max((0, 1, 2, 3), key=[likeness(view, x.flip(axis)) for axis in range(4)].__getitem__)
        )
    # Flipping axis 0, that of the channel, leaves a volume as it is.
    assert seen == {0, 1}


def test_flip_and_placement_are_one_resampling():
    placed = RandPlacement(prob=1, flip=1).set_random_state(seed=3)
    plain = RandPlacement(prob=1, flip=0).set_random_state(seed=3)
    x = head()
    torch.testing.assert_close(placed(x), plain(x).flip(1), atol=1e-5, rtol=0)


def test_placement_without_rotation_equals_the_general_one():
    x = head(2, 18, 22, 16)
    general = RandPlacement(prob=1, degrees=1e-9, scale=0.1, crop=0.2, shift=0.1)
    separable = RandPlacement(prob=1, degrees=0, scale=0.1, crop=0.2, shift=0.1)
    for seed in range(5):
        torch.testing.assert_close(
            separable.set_random_state(seed=seed)(x),
            general.set_random_state(seed=seed)(x),
            atol=1e-4,
            rtol=0,
        )


def test_a_crop_enlarges_and_stays_inside_the_field():
    crop = RandPlacement(prob=1, degrees=0, scale=0, crop=0.3, shift=0, flip=0)
    x = torch.ones(1, 20, 20, 20)
    for seed in range(10):
        # Beyond the field are zeros; at most the outermost half voxel may feel them.
        assert crop.set_random_state(seed=seed)(x)[:, 1:-1, 1:-1, 1:-1].min() > 0.999


@pytest.mark.parametrize("strength", STRENGTHS)
def test_background_stays_exactly_zero(strength):
    limits = STRENGTHS[strength]
    steps = [
        RandBlur(**limits["blur"] | {"prob": 1}),
        RandContrast(**limits["contrast"] | {"prob": 1}),
        RandBias(**limits["bias"] | {"prob": 1}),
        RandForegroundNoise(**limits["noise"] | {"prob": 1}),
        RandCutout(**limits["cutout"] | {"prob": 1}),
    ]
    x = head()
    for key in range(5):
        assert torch.all(draw_view(Compose(steps), x, key)[x == 0] == 0)


def test_blur_keeps_the_sum_where_zeros_are_values():
    x = torch.zeros(1, 15, 15, 15)
    x[0, 7, 7, 7] = 1
    blur = RandBlur(prob=1, sigma=0.8, keep_zero=False).set_random_state(seed=1)
    assert blur(x).sum() == pytest.approx(1, abs=1e-5)
    assert blur(x)[0, 7, 7, 8] > 0


def test_noise_is_relative_to_the_foreground():
    noise, x = RandForegroundNoise(prob=1, std=0.2), head()
    for scale in (1, 1000):
        noise.set_random_state(seed=1)
        change = (noise(x * scale) - x * scale)[x != 0]
        expected = noise._std * (x[x != 0] * scale).std()
        assert change.std() == pytest.approx(expected.item(), rel=0.1)


def test_the_bias_field_is_smooth_and_bounded():
    bias, x = RandBias(prob=1, amplitude=0.3), torch.ones(1, 24, 24, 24)
    for seed in range(10):
        field = bias.set_random_state(seed=seed)(x).log()
        assert field.abs().max() == pytest.approx(bias._peak, rel=1e-4)
        assert field.diff(dim=1).abs().max() < 0.1


def test_contrast_keeps_order_and_signs():
    x = torch.linspace(-2, 2, 27).reshape(1, 3, 3, 3)
    contrast = RandContrast(prob=1, gain=0.2, gamma=0.3)
    for seed in range(10):
        changed = contrast.set_random_state(seed=seed)(x).ravel()
        assert torch.all(changed.diff() > 0)
        assert torch.equal(changed.sign(), x.ravel().sign())
        assert changed.abs().max() == pytest.approx(2 * contrast._gain, rel=1e-5)


def test_cutout_takes_boxes_and_nothing_else():
    cutout, x = RandCutout(prob=1, boxes=2, side=0.3), torch.ones(2, 20, 20, 20)
    for seed in range(10):
        cut = cutout.set_random_state(seed=seed)(x)
        share = (cut == 0).float().mean().item()
        assert 0 < share <= 2 * 0.3**3 * 1.3
        assert torch.equal(cut[0], cut[1])
        assert set(cut.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", ["probability", "signed"])
def test_maps_get_no_gamma_no_bias_field_and_no_clipping(kind):
    views = volume_views("strong", kind)
    assert not any(isinstance(step, RandBias) for step in views.transforms)
    x = head() - 0.6
    fine = Compose([step for step in views.transforms if isinstance(step, RandContrast)])
    for key in range(5):
        ratio = (draw_view(fine, x, key) / x)[x != 0]
        assert ratio.std() < 1e-5
    assert min(draw_view(views, x, key).min() for key in range(5)) < -0.3


@pytest.mark.parametrize(("strength", "kind"), [("weak", "intensity"), ("light", "T1w")])
def test_unknown_names_are_refused(strength, kind):
    with pytest.raises(UsageError, match="one of"):
        volume_views(strength, kind)


def test_the_documented_table_holds_the_limits_in_use():
    rows = {
        "rotation": ("placement", "degrees"),
        "scaling": ("placement", "scale"),
        "resized crop": ("placement", "crop"),
        "shift": ("placement", "shift"),
        "sigma": ("blur", "sigma"),
        "gain": ("contrast", "gain"),
        "gamma": ("contrast", "gamma"),
        "largest": ("bias", "amplitude"),
        "of the foreground": ("noise", "std"),
        "boxes": ("cutout", "boxes"),
        "side of a box": ("cutout", "side"),
    }
    change = ""
    found = {}
    for line in volume_views.__doc__.splitlines():
        match = re.match(r" +(\S.*?)  +(\S.*?)  +([\d.]+)( %)? +([\d.]+)(?: %)? +([\d.]+)", line)
        if not match:
            continue
        name, limit, light, percent, default, strong = match.groups()
        change = change if name == "." else name.split()[0]
        for start, place in rows.items():
            if limit.startswith(start):
                found[place] = [
                    float(v) / (100 if percent else 1) for v in (light, default, strong)
                ]
        if limit == "probability":
            found[change, "prob"] = [float(v) for v in (light, default, strong)]
    used = {
        (change, name): [STRENGTHS[s][change][name] for s in STRENGTHS]
        for change, limits in STRENGTHS["light"].items()
        for name in limits
    }
    assert found == used

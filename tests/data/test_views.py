from __future__ import annotations

import pickle
import random
import re
import warnings

import numpy as np
import pytest
import torch
from made_images import head
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    OneOf,
    Rand3DElastic,
    RandAdjustContrast,
    RandAffine,
    RandCoarseDropout,
    RandCropByPosNegLabel,
    RandGaussianNoise,
    RandGibbsNoise,
    RandHistogramShift,
    RandIntensityRemap,
    RandLambda,
    RandomizableTransform,
    RandomOrder,
    RandRicianNoise,
    RandRotate,
    RandRotated,
    RandShiftIntensity,
    RandSpatialCropSamples,
    RandZoom,
    SomeOf,
)
from monai.transforms import RandBiasField as MonaiBiasField
from torch.utils.data import DataLoader, Dataset

from nidl_dcl.data.transforms import (
    RandBiasField,
    RandBlur,
    RandContrast,
    RandCutout,
    RandForegroundNoise,
    RandSpatial,
)
from nidl_dcl.data.views import (
    STRENGTHS,
    MultiViewsTransform,
    PairedViews,
    TwoViews,
    draw_view,
    volume_views,
)
from nidl_dcl.errors import UsageError

KINDS = ("intensity", "probability", "signed")


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
    "placement": RandSpatial(),
    "blur": RandBlur(prob=1),
    "contrast": RandContrast(prob=1),
    "bias": RandBiasField(prob=1),
    "noise": RandForegroundNoise(prob=1),
    "cutout": RandCutout(prob=1),
    "volume_views": volume_views(),
    "two of MONAI's": Compose([RandGaussianNoise(prob=1), MonaiBiasField(prob=1)]),
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


def over_numpy(x):
    return x + float(np.random.standard_normal())  # noqa: NPY002


def over_torch_and_random(x):
    return x + torch.randn(x.shape) * random.random()


class InOut:
    """From a tensor to a dictionary and back, around a transform of dictionaries."""

    def __init__(self, inner):
        self.transforms = [inner]

    def __call__(self, x):
        return self.transforms[0]({"image": x})["image"]


NOISES = [RandGaussianNoise(prob=0.9), RandRicianNoise(prob=0.9), RandShiftIntensity(0.3, prob=0.9)]

MONAI = {
    "one interpolation": lambda: RandAffine(0.8, rotate_range=0.3, scale_range=0.2),
    "a cached grid": lambda: RandAffine(
        0.9, rotate_range=0.3, spatial_size=(18, 22, 16), cache_grid=True
    ),
    "a smooth deformation": lambda: Rand3DElastic((2, 3), (20, 40), prob=0.8),
    "one that writes into its input": lambda: RandCoarseDropout(2, (3, 3, 3), prob=0.8),
    "one in the frequency domain": lambda: RandGibbsNoise(prob=0.8),
    "several crops": lambda: RandSpatialCropSamples(6, num_samples=2, random_size=False),
    "crops around labels": lambda: RandCropByPosNegLabel((6, 6, 6), label=head(), num_samples=2),
    "a function": lambda: RandLambda(over_torch_and_random),
    "one of dictionaries": lambda: InOut(RandRotated("image", 0.3, prob=0.8)),
    "Compose of composes": lambda: Compose([Compose(NOISES[:1]), Compose([Compose(NOISES[1:])])]),
    "OneOf": lambda: OneOf(NOISES),
    "SomeOf": lambda: SomeOf(NOISES, num_transforms=(1, 3)),
    "RandomOrder": lambda: RandomOrder([RandHistogramShift(prob=0.9), *NOISES]),
    "composes in a plain list": lambda: MultiViewsTransform([Compose(NOISES), OneOf(NOISES)]),
    "functions between": lambda: Compose([over_numpy, RandRotate(0.2, prob=0.9), over_numpy]),
}


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
def test_a_view_does_not_depend_on_how_the_volume_lies_in_memory(name):
    x = head() + torch.rand(1, 18, 22, 16, generator=torch.Generator().manual_seed(0))
    turned = x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert not turned.is_contiguous()
    for key in range(5):
        first, second = (
            draw_view(TRANSFORMS[name], x, key),
            draw_view(TRANSFORMS[name], turned, key),
        )
        assert same(first, second)


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


@pytest.mark.parametrize("name", MONAI)
def test_monai_transforms_obey_the_key_alone_and_leave_all_else_as_it_was(name):
    x, keys = head(), range(8)
    disturb(1)
    views = MONAI[name]()
    first = [draw_view(views, x, key, "sub-01", 1) for key in keys]
    disturb(2)
    again = [draw_view(views, x, key, "sub-01", 1) for key in reversed(keys)][::-1]
    disturb(3)
    expected = torch.rand(3)
    disturb(3)
    fresh = [draw_view(MONAI[name](), x, key, "sub-01", 1) for key in keys]
    assert torch.equal(torch.rand(3), expected)
    assert same(first, again), "the calls before changed it"
    assert same(first, fresh), "the instance or the global generators changed it"
    assert not all(same(first[0], other) for other in first), "no key changes it"
    assert torch.equal(x, head())


def test_views_carry_no_metadata():
    assert type(draw_view(RandRotate(0.3, prob=1), MetaTensor(head()), 1)) is torch.Tensor


def test_a_transform_that_writes_into_its_input_spoils_no_other_view():
    views, x = Compose([RandCoarseDropout(3, (4, 4, 4), fill_value=9.0, prob=1)]), head()
    first, second = TwoViews(views)(x, key=0)
    assert torch.equal(second, draw_view(views, x, 0, 2))
    assert (x != 9).all()
    assert not same(first, second)


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


class OwnGenerator(RandomizableTransform):
    """Draws from a generator that no key reaches."""

    def __init__(self):
        super().__init__(prob=1)
        self.generator = np.random.default_rng(0)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + self.generator.normal()


def hidden(x, inner=RandGaussianNoise(prob=1)):  # noqa: B008
    return inner(x)


@pytest.mark.parametrize(
    ("views", "named"),
    [
        (OwnGenerator(), "The views OwnGenerator gave two different results"),
        (hidden, "The views hidden gave"),
        (RandIntensityRemap(prob=1), "The views RandIntensityRemap gave"),
        (
            Compose([RandRotate(), OneOf([OwnGenerator()])]),
            re.escape("The views Compose(RandRotate, OneOf(OwnGenerator)) gave"),
        ),
    ],
)
def test_views_that_differ_under_one_key_are_warned_of_once(views, named):
    two = TwoViews(views)
    with pytest.warns(UserWarning, match=named) as caught:
        assert len([two(head(), key=key) for key in range(3)]) == 3
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_first_sample_alone_is_drawn_twice():
    views = OwnGenerator()
    two = TwoViews(views)
    with pytest.warns(UserWarning, match="OwnGenerator"):
        two(head(), key=0)
    assert views.calls == 4
    two(head(), key=1)
    assert views.calls == 6


@pytest.mark.parametrize("name", [*TRANSFORMS, *MONAI])
def test_views_that_obey_the_key_give_no_warning_and_no_other_result(name):
    views = TRANSFORMS[name] if name in TRANSFORMS else MONAI[name]()
    disturb(4)
    expected = torch.rand(3), np.random.random(3), random.random()  # noqa: NPY002
    disturb(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = TwoViews(views)(head(), key=5)
    assert same(pair, [draw_view(views, head(), 5, view) for view in (1, 2)])
    found = torch.rand(3), np.random.random(3), random.random()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_not_a_number_in_a_view_is_no_difference():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TwoViews(lambda x: x * torch.nan)(head(), key=0)[0].isnan().all()
        assert TwoViews(lambda x: str(x.shape))(head(), key=0)


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


@pytest.mark.parametrize("strength", STRENGTHS)
def test_background_stays_exactly_zero(strength):
    limits = STRENGTHS[strength]
    steps = [
        RandBlur(**limits["blur"] | {"prob": 1}),
        RandContrast(**limits["contrast"] | {"prob": 1}),
        RandBiasField(**limits["bias"] | {"prob": 1}),
        RandForegroundNoise(**limits["noise"] | {"prob": 1}),
        RandCutout(**limits["cutout"] | {"prob": 1}),
    ]
    x = head()
    for key in range(5):
        assert torch.all(draw_view(Compose(steps), x, key)[x == 0] == 0)


@pytest.mark.parametrize("kind", ["probability", "signed"])
def test_maps_get_no_gamma_no_bias_field_and_no_clipping(kind):
    views = volume_views("strong", kind)
    assert not any(isinstance(step, RandBiasField) for step in views.transforms)
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


def flips(flip):
    """Return whether views 1 and 2 of 40 participants are flipped."""
    volume = torch.zeros(1, 16, 16, 16)
    volume[:, :8, 4:12, 4:12] = 1
    views = TwoViews(volume_views("light", flip=flip))
    pairs = [views(volume, key=(0, i)) for i in range(40)]
    return [[bool(v[:, 8:].sum() > v[:, :8].sum()) for v in pair] for pair in pairs]


def test_left_and_right_are_flipped_in_each_view_in_both_or_never():
    assert {tuple(pair) for pair in flips("view")} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert {tuple(pair) for pair in flips("pair")} == {(False, False), (True, True)}
    assert {tuple(pair) for pair in flips("none")} == {(False, False)}
    with pytest.raises(UsageError, match="flip is one of"):
        volume_views(flip="both")


def test_a_change_shared_by_a_pair_obeys_its_key_and_the_others_differ():
    volume = torch.rand(1, 12, 12, 12)
    views = TwoViews(pickle.loads(pickle.dumps(volume_views("strong", flip="pair"))))
    first, second = views(volume, key=(0, "sub-01"))
    again = views(volume, key=(0, "sub-01"))
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)


def test_paired_views_by_themselves_draw_both_changes():
    views = PairedViews(lambda x: x + torch.rand(1), lambda x: x + 10 * torch.randint(9, (1,)))
    first, second = MultiViewsTransform(views, n_views=2)(torch.zeros(1))
    assert first % 1 != second % 1
    first, second = TwoViews(views)(torch.zeros(1), key=0)
    torch.testing.assert_close(first % 10, second % 10)


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
        for start, limit_name in rows.items():
            if limit.startswith(start):
                found[limit_name] = [
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

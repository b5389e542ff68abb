"""MONAI's random transforms under a key."""

from __future__ import annotations

import inspect
import random
import warnings

import monai.transforms
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    MapTransform,
    OneOf,
    RandAffine,
    RandCoarseDropout,
    RandGaussianNoise,
    RandHistogramShift,
    RandLambda,
    RandomizableTransform,
    RandomOrder,
    RandRicianNoise,
    RandRotate,
    RandShiftIntensity,
    SignalRandDrop,
    SomeOf,
)
from monai.transforms.traits import RandomizableTrait
from torch import nn

from nidl_dcl import DCL
from nidl_dcl.data.datasets import ArraySamples, TwoViewSamples
from nidl_dcl.data.monai_seeding import TESTED, UNTESTED
from nidl_dcl.data.samplers import two_view_loader
from nidl_dcl.data.views import MultiViewsTransform, TwoViews, draw_view

SIDES = (16, 18, 16)
X = torch.rand(1, *SIDES, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 1, 16)
LABEL = (X > 0.5).float()


def plain(result):
    """Return a result without MONAI's metadata."""
    if isinstance(result, list | tuple):
        return [plain(part) for part in result]
    return torch.Tensor(result.as_tensor() if hasattr(result, "as_tensor") else result)


def over_numpy(x):
    return x + float(np.random.standard_normal())  # noqa: NPY002


def over_torch_and_random(x):
    return x + torch.randn(x.shape) * random.random()


HALF = {"prob": 0.8}
NOISES = [RandGaussianNoise(prob=0.9), RandRicianNoise(prob=0.9), RandShiftIntensity(0.3, prob=0.9)]

# Arguments of each transform; the same for its dictionary form unless OTHERWISE has them.
ARGUMENTS = {
    "IntensityRemap": {},
    "Rand2DElastic": {"spacing": 4, "magnitude_range": (1, 2), "rotate_range": 0.3, **HALF},
    "Rand3DElastic": {"sigma_range": (2, 3), "magnitude_range": (20, 40), "shear_range": 0.1}
    | HALF,
    "RandAdjustContrast": HALF,
    "RandAffine": {"rotate_range": 0.3, "scale_range": 0.2, "shear_range": 0.1, **HALF},
    "RandAxisFlip": HALF,
    "RandBiasField": {"coeff_range": (0.1, 0.3), **HALF},
    "RandCoarseDropout": {"holes": 2, "spatial_size": (3, 3, 3), "max_holes": 4, **HALF},
    "RandCoarseShuffle": {
        "holes": 2,
        "spatial_size": (3, 3, 3),
        "max_spatial_size": (5, 5, 5),
        **HALF,
    },
    "RandCropByLabelClasses": {"spatial_size": (6, 6, 6), "num_classes": 2, "num_samples": 2},
    "RandCropByPosNegLabel": {"spatial_size": (6, 6, 6), "num_samples": 2},
    "RandFlip": {"spatial_axis": 0, "prob": 0.5},
    "RandGaussianNoise": HALF,
    "RandGaussianSharpen": HALF,
    "RandGaussianSmooth": HALF,
    "RandGibbsNoise": HALF,
    "RandGridDistortion": {"num_cells": 3, "distort_limit": 0.2, **HALF},
    "RandGridPatch": {"patch_size": (5, 5, 5), "max_offset": 4, "num_patches": 3},
    "RandHistogramShift": {"num_control_points": (4, 8), **HALF},
    "RandImageFilter": {"filter": "mean", "filter_size": 3, "prob": 0.5},
    "RandKSpaceSpikeNoise": HALF,
    "RandLambda": {"func": over_numpy, "prob": 0.8},
    "RandRicianNoise": HALF,
    "RandRotate": {"range_x": 0.3, "range_z": 0.3, **HALF},
    "RandRotate90": {"spatial_axes": (0, 2), **HALF},
    "RandScaleCrop": {"roi_scale": 0.6, "random_size": True, "max_roi_scale": 0.9},
    "RandScaleIntensity": {"factors": 0.3, **HALF},
    "RandScaleIntensityFixedMean": {"factors": 0.3, **HALF},
    "RandShiftIntensity": {"offsets": 0.3, **HALF},
    "RandSimulateLowResolution": HALF,
    "RandSmoothDeform": {"spatial_size": SIDES, "rand_size": (3, 3, 3), "def_range": 0.2, **HALF},
    "RandSmoothFieldAdjustContrast": {"spatial_size": SIDES, "rand_size": (3, 3, 3), **HALF},
    "RandSmoothFieldAdjustIntensity": {"spatial_size": SIDES, "rand_size": (3, 3, 3), **HALF},
    "RandSpatialCrop": {"roi_size": 6, "random_size": False},
    "RandSpatialCropSamples": {"roi_size": 6, "num_samples": 2, "random_size": False},
    "RandStdShiftIntensity": {"factors": 0.5, **HALF},
    "RandWeightedCrop": {"spatial_size": (6, 6, 6), "num_samples": 2},
    "RandZoom": HALF,
}
ARRAY_ONLY = {
    "RandCropByLabelClasses": {"label": LABEL},
    "RandCropByPosNegLabel": {"label": LABEL},
    "RandWeightedCrop": {"weight_map": LABEL},
}
DICTIONARY_ONLY = {
    "RandCropByLabelClasses": {"label_key": "label"},
    "RandCropByPosNegLabel": {"label_key": "label"},
    "RandWeightedCrop": {"w_key": "label"},
    "RandImageFilter": {"kernel": "mean", "kernel_size": 3},
}
COMPOSED = {
    "Compose of composes": lambda: Compose([Compose(NOISES[:1]), Compose([Compose(NOISES[1:])])]),
    "OneOf": lambda: OneOf(NOISES),
    "SomeOf": lambda: SomeOf(NOISES, num_transforms=(1, 3)),
    "RandomOrder": lambda: RandomOrder([RandHistogramShift(prob=0.9), *NOISES]),
    "composes in a plain list": lambda: MultiViewsTransform([Compose(NOISES), OneOf(NOISES)]),
    "RandLambda over torch and random": lambda: RandLambda(over_torch_and_random),
    "a cached grid": lambda: RandAffine(0.9, rotate_range=0.3, spatial_size=SIDES, cache_grid=True),
    "plain functions between": lambda: Compose([over_numpy, RandRotate(0.2, prob=0.9), over_numpy]),
}


class InOut:
    """From a tensor to a dictionary and back, around a transform of dictionaries."""

    def __init__(self, inner):
        self.transforms = [inner]

    def __call__(self, x):
        found = self.transforms[0]({"image": x, "label": LABEL.clone()})
        return [f["image"] for f in found] if isinstance(found, list) else found["image"]


def dictionary_form(name):
    """Return the dictionary form of a transform, None where MONAI has none."""
    kind = getattr(monai.transforms, f"{name}d", None)
    if kind is None:
        return None
    arguments = ARGUMENTS[name] | DICTIONARY_ONLY.get(name, {})
    if name == "Rand2DElastic" or name == "Rand3DElastic":
        arguments = arguments | {"padding_mode": "zeros"}
    if name == "RandImageFilter":
        arguments = {k: v for k, v in arguments.items() if not k.startswith("filter")}
    return InOut(kind("image", **arguments))


def cases():
    """Return what is tested, by name: what makes it anew."""
    made = {}
    for name, given in ARGUMENTS.items():
        kind = getattr(monai.transforms, name)
        made[name] = lambda kind=kind, name=name, given=given: kind(
            **given, **ARRAY_ONLY.get(name, {})
        )
        if hasattr(monai.transforms, f"{name}d"):
            made[f"{name}d"] = lambda name=name: dictionary_form(name)
    return made | COMPOSED


CASES = cases()


def sample(name):
    return X[..., 5] if name.startswith("Rand2D") else X


def same(first, second):
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first.shape == second.shape and torch.equal(first, second)


def disturb(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def state():
    return torch.rand(3).tolist(), np.random.random(3).tolist(), random.random()  # noqa: NPY002


@pytest.mark.parametrize("name", CASES)
def test_a_transform_obeys_its_key_alone(name):
    x, keys = sample(name), range(8)
    disturb(1)
    views = CASES[name]()
    first = [plain(draw_view(views, x, key, "sub-01", 1)) for key in keys]
    disturb(2)
    again = [plain(draw_view(views, x, key, "sub-01", 1)) for key in reversed(keys)][::-1]
    disturb(3)
    fresh = [plain(draw_view(CASES[name](), x, key, "sub-01", 1)) for key in keys]
    assert same(first, again), "the calls before changed it"
    assert same(first, fresh), "the instance or the global generators changed it"
    assert not all(same(first[0], other) for other in first), "no key changes it"


@pytest.mark.parametrize("name", CASES)
def test_a_transform_leaves_the_global_generators_and_its_input_alone(name):
    views, x = CASES[name](), sample(name)
    before = x.clone()
    disturb(5)
    expected = state()
    disturb(5)
    for key in range(4):
        draw_view(views, x, key)
    assert state() == expected
    assert torch.equal(x, before)


def test_no_transform_notices_the_number_of_workers():
    # Crops that differ in number or size make no batch.
    kept = [n for n in CASES if n != "composes in a plain list" and not n.startswith("Rand2D")]
    views = MultiViewsTransform([CASES[n]() for n in kept if "Crop" not in n])
    samples = TwoViewSamples(ArraySamples(X.expand(6, *X.shape)), Plain(views), seed=3)
    found = [list(two_view_loader(samples, 2, num_workers=workers)) for workers in (0, 2)]
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    assert len(found[0]) == 3


class Plain:
    """Views without MONAI's metadata."""

    def __init__(self, views):
        self.transforms = [views]

    def __call__(self, x):
        return plain(self.transforms[0](x))


def test_an_estimator_trains_on_views_of_monai_with_any_number_of_workers():
    x = torch.rand(6, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()
    views = Compose([RandRotate(0.3, prob=0.9), RandCoarseDropout(1, (3, 3, 3), prob=0.9), *NOISES])
    found = []
    for workers in (0, 2):
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(512, 4, bias=False))
        nn.init.eye_(encoder[1].weight)
        model = DCL(
            encoder,
            proj_input_dim=4,
            max_epochs=2,
            lr_scheduler=None,
            random_state=0,
            views=views,
            num_workers=workers,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        found.append(model.fit(x).transform(x))
    assert np.array_equal(*found)


def test_views_carry_no_metadata():
    view = draw_view(RandRotate(0.3, prob=1), MetaTensor(X), 1)
    assert type(view) is torch.Tensor


def test_a_transform_that_writes_into_its_input_spoils_no_other_view():
    views = Compose([RandCoarseDropout(3, (4, 4, 4), fill_value=9.0, prob=1)])
    first, second = TwoViews(views)(X, key=0)
    assert torch.equal(second, draw_view(views, X, 0, 2))
    assert (X != 9).all()
    assert not same(first, second)


# The list --------------------------------------------------------------------------------------


def random_classes():
    """Return the random array transforms of MONAI by name."""
    everything = {n: getattr(monai.transforms, n) for n in dir(monai.transforms)}
    return {
        n: kind
        for n, kind in everything.items()
        if inspect.isclass(kind)
        and issubclass(kind, RandomizableTrait)
        and not issubclass(kind, MapTransform)
        and kind.__name__ == n
    }


def test_everything_random_in_monai_is_tested_or_named_with_a_reason():
    assert set(random_classes()) == TESTED | set(UNTESTED)
    assert not TESTED & set(UNTESTED)
    assert all(UNTESTED.values())


def test_everything_on_the_list_is_tested_here():
    assert TESTED - set(ARGUMENTS) == {"Compose", "OneOf", "RandomOrder", "SomeOf"}
    assert set(ARGUMENTS) <= TESTED


# The warning -----------------------------------------------------------------------------------


class Unknown(RandomizableTransform):
    """Stands for a transform of a MONAI to come."""

    __module__ = "monai.transforms.to_come"

    def __call__(self, x):
        return x


class OfAUser(RandomizableTransform):
    def __call__(self, x):
        return x


def take_as_two_views(views):
    TwoViews(views)


def take_as_samples(views):
    TwoViewSamples(ArraySamples(X), views, seed=0)


TAKERS = [take_as_two_views, take_as_samples]


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize(
    ("views", "named"),
    [
        (Unknown(), "not tested to obey a key: Unknown\\."),
        (Compose([RandRotate(), OneOf([Compose([Unknown()])]), OfAUser()]), ": Unknown\\."),
        (
            MultiViewsTransform([SignalRandDrop(), Unknown()]),
            r": SignalRandDrop \(takes a signal of one dimension\), Unknown\.",
        ),
        (InOut(Unknown()), ": Unknown\\."),
    ],
)
def test_one_warning_names_what_is_not_tested(take, views, named):
    with pytest.warns(UserWarning, match=named) as said:
        take(views)
    assert len(said) == 1
    assert said[0].filename == __file__


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_tested_gives_no_warning(take, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(CASES[name]())


@pytest.mark.parametrize("take", TAKERS)
def test_transforms_of_a_user_and_functions_give_no_warning(take):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(OfAUser())
        take(Compose([OfAUser(), over_numpy]))
        take(over_numpy)

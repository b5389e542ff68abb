"""MONAI's random transforms that are tested to obey a key, and what of some views is not.

Keys are handed out in `views`; the tests of the list are in ``tests/data/test_monai_seeding.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from monai.transforms.traits import RandomizableTrait

__all__ = ["TESTED", "UNTESTED", "warn_of_untested"]

# [the list]
TESTED = frozenset(
    {
        # what holds others
        *("Compose", "OneOf", "RandomOrder", "SomeOf"),
        # where things are
        *("Rand2DElastic", "Rand3DElastic", "RandAffine", "RandAxisFlip", "RandFlip"),
        *("RandGridDistortion", "RandRotate", "RandRotate90", "RandSmoothDeform", "RandZoom"),
        # what of the image is kept
        *("RandCropByLabelClasses", "RandCropByPosNegLabel", "RandGridPatch", "RandScaleCrop"),
        *("RandSpatialCrop", "RandSpatialCropSamples", "RandWeightedCrop"),
        # what values it has
        *("IntensityRemap", "RandAdjustContrast", "RandBiasField", "RandCoarseDropout"),
        *("RandCoarseShuffle", "RandGaussianNoise", "RandGaussianSharpen", "RandGaussianSmooth"),
        *("RandGibbsNoise", "RandHistogramShift", "RandImageFilter"),
        *("RandKSpaceSpikeNoise", "RandRicianNoise", "RandScaleIntensity"),
        *("RandScaleIntensityFixedMean", "RandShiftIntensity", "RandSimulateLowResolution"),
        *("RandSmoothFieldAdjustContrast", "RandSmoothFieldAdjustIntensity"),
        *("RandStdShiftIntensity",),
        # a function of your own, over generators of numpy, torch or random
        *("RandLambda",),
    }
)
"""Classes of ``monai.transforms`` (1.6.1) that obey the key, their dictionary forms (``…d``) too."""


# [end of the list]

UNTESTED = {
    "AddExtremePointsChannel": "takes a label map",
    "CutMix": "mixes the samples of a batch",
    "CutOut": "takes a batch; use RandCoarseDropout",
    "MixUp": "mixes the samples of a batch",
    "RandAffineGrid": "makes a grid, takes no image",
    "RandCoarseTransform": "a base class",
    "RandCuCIM": "needs the package cucim",
    "RandDeformGrid": "makes a grid, takes no image",
    "RandIdentity": "changes nothing",
    "RandIntensityRemap": "draws from a generator that no key reaches; use RandHistogramShift",
    "RandMark": "marks a place for a profiler",
    "RandRangePop": "marks a place for a profiler",
    "RandRangePush": "marks a place for a profiler",
    "RandTorchIO": "needs the package torchio",
    "RandTorchVision": "needs the package torchvision",
    "Randomizable": "a base class",
    "RandomizableTrait": "a base class",
    "RandomizableTransform": "a base class",
    "SignalRandAddGaussianNoise": "takes a signal of one dimension",
    "SignalRandAddSine": "takes a signal of one dimension",
    "SignalRandAddSinePartial": "takes a signal of one dimension",
    "SignalRandAddSquarePulse": "takes a signal of one dimension",
    "SignalRandAddSquarePulsePartial": "takes a signal of one dimension",
    "SignalRandDrop": "takes a signal of one dimension",
    "SignalRandScale": "takes a signal of one dimension",
    "SignalRandShift": "takes a signal of one dimension",
    "SmoothField": "makes a field, takes no image",
}
"""The other random classes of ``monai.transforms`` (1.6.1), and why they are not on the list."""


def warn_of_untested(views: Any) -> None:
    """Warn of MONAI's random transforms in `views` that are not known to obey a key.

    Parameters
    ----------
    views : callable
        One input in, one view out. Looked into are MONAI's composes and whatever else has a list
        `transforms`. Classes of other packages are their authors' business.
    """
    names = sorted(set(_untested(views)))
    if names:
        known = [
            (name, UNTESTED.get(name) or UNTESTED.get(name.removesuffix("d"))) for name in names
        ]
        told = ", ".join(name if why is None else f"{name} ({why})" for name, why in known)
        warnings.warn(
            f"Random transforms of MONAI that are not tested to obey a key: {told}. The two views "
            "may depend on the number of workers and differ from run to run. "
            "nidl_dcl.data.monai_seeding.TESTED names those that are tested.",
            stacklevel=3,
        )


def _untested(views: Any) -> Iterator[str]:
    kind = type(views)
    ours = kind.__module__.partition(".")[0] != "monai"
    if isinstance(views, RandomizableTrait) and not ours:
        name = kind.__name__
        if name not in TESTED and name.removesuffix("d") not in TESTED:
            yield name
    parts = getattr(views, "transforms", ())
    for part in parts if isinstance(parts, list | tuple) else ():
        yield from _untested(part)

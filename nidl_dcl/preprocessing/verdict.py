"""Whether an aligned image may be used, in one word with a reason.

The limits were set by the measures of 80 healthy adults (see the documentation) and of the faults in
``tests/preprocessing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nidl_dcl.preprocessing.measures import Measures

__all__ = ["PREPROCESSING_CODES", "Verdict", "gravest", "judge"]

PREPROCESSING_CODES = {
    "no_brain": "No brain was found",
    "brain_size": "The brain found is smaller or larger than those of people",
    "misaligned": "The brain found is not where, or not how, the template's is",
    "contrast": "Gray and white matter have not the brightness they have in a T1-weighted image",
    "field_of_view": "Part of the brain lies outside of what was scanned, or of the template's field",
    "turned": "The header's orientation is wrong by quarter turns; the head was turned",
    "handedness": "The two forms of the header disagree about left and right",
    "thick_slices": "Voxels are so long that fine structures are lost",
    "stripped": "The image held no skull; its own brain was kept",
}
"""The words for what became of an image in preprocessing, besides those for files, and what they say."""


@dataclass(frozen=True)
class Verdict:
    """What is told of one image in ``logs/inputs.tsv``.

    Attributes
    ----------
    status : {"ok", "warn", "skip"}
        Use it; use it and look at it; do not use it.
    code : str
        ``"ok"``, one of `PREPROCESSING_CODES`, or the code of a file that cannot be read.
    message : str
        The same in words, with numbers.
    """

    status: Literal["ok", "warn", "skip"]
    code: str
    message: str = ""


@dataclass(frozen=True)
class _Limit:
    """From which value on an image is odd, and from which it is not used.

    A `warn` greater than `skip` means that low values are bad.
    """

    measure: str
    warn: float
    skip: float
    code: str
    text: str


_OF_ANY = (
    _Limit("at_edge", 0.02, 0.10, "field_of_view", "{:.0%} of its surface is at an edge."),
    _Limit("mask_ml", 800, 300, "brain_size", "The brain mask has {:.0f} ml."),
    _Limit("mask_ml", 2100, 2600, "brain_size", "The brain mask has {:.0f} ml."),
)

_OF_ALIGNED = (
    _Limit("correlation", 0.3, -0.1, "contrast", "Inside, it correlates with a T1w by {:.2f}."),
    _Limit("overlap", 0.90, 0.85, "misaligned", "Its overlap with the template's is {:.2f}."),
    _Limit("upright", 0.85, 0.72, "misaligned", "Its correlation with the template is {:.2f}."),
    _Limit("lead", 0.17, 0.12, "misaligned", "Another orientation is nearly as good (by {:.2f})."),
    _Limit("determinant", 0.7, 0.5, "misaligned", "It is made {:.2f} times as large."),
    _Limit("determinant", 3.0, 4.5, "misaligned", "It is made {:.2f} times as large."),
    _Limit("stretch", 1.4, 1.6, "misaligned", "It is stretched {:.2f} times more one way."),
    _Limit("shear_degrees", 12, 20, "misaligned", "It is sheared by {:.0f} degrees."),
    _Limit("clipped", 0.03, 0.15, "field_of_view", "{:.0%} of it is beyond the template's field."),
)

_OF_OTHERS = (
    _Limit("upright", 0.65, 0.50, "misaligned", "Its correlation with the template is {:.2f}."),
    _Limit("lead", 0.14, 0.10, "misaligned", "Another orientation is nearly as good (by {:.2f})."),
)
"""For images that stay where they are; as if aligned by center, volume and rotation alone."""


def judge(measures: Measures) -> Verdict:
    """Return the verdict on one brain, by the measures that it has."""
    found = []
    for limit in (*_OF_ANY, *(_OF_OTHERS if measures.overlap is None else _OF_ALIGNED)):
        value = getattr(measures, limit.measure)
        sign = 1 if limit.skip > limit.warn else -1
        text = limit.text.format(value)
        if sign * value > sign * limit.skip:
            found.append(Verdict("skip", limit.code, text))
        elif sign * value > sign * limit.warn:
            found.append(Verdict("warn", limit.code, text))
    return gravest(found)


def gravest(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the worst of several verdicts, of equal ones the first, with the words of all."""
    told = [verdict for verdict in verdicts if verdict.status != "ok"]
    if not told:
        return Verdict("ok", "ok")
    worst = next((verdict for verdict in told if verdict.status == "skip"), told[0])
    others = [verdict.message for verdict in told if verdict is not worst]
    return Verdict(worst.status, worst.code, " ".join([worst.message, *others]))

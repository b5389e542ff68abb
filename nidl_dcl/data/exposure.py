"""Whom the training of a model saw, as salted hashes of ids and of images, and who is recognized.

An image is known by its voxels, so a participant who was renamed since is recognized; what the
voxels' checksum survives is for `image_file`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nidl_dcl.io.hashing import salted, salted_hash

Exposure = Mapping[str, Any]


def exposure_of(
    participants: Iterable[str], contents: Iterable[str], salt: str, validation: Iterable[str] = ()
) -> dict[str, Any]:
    """Return what a model folder keeps of who was seen in pretraining: salted hashes, no names.

    Parameters
    ----------
    participants : iterable of str
        Ids of all whom it used, those it only validated on included: a loss that is looked at
        decides about settings.
    contents : iterable of str
        Checksums of the voxels of their images.
    salt : str
        Mixed into every hash; kept beside them.
    validation : iterable of str
        Those of `participants` that it only validated on.
    """
    hashes = _hash_all(participants, salt)
    return {
        "salt": salt,
        "n_participants": len(hashes),
        "participants": hashes,
        "images": _hash_all(contents, salt),
        "validation": _hash_all(validation, salt),
    }


def after(before: Exposure | None, now: Exposure) -> dict[str, Any]:
    """Return the exposure of weights that were trained further, from those before and by training.

    An exposure is empty where it is not known; that of new weights is None.
    """
    if before is None:
        return dict(now)
    if {name: value for name, value in before.items() if name != "before"} == now:
        return dict(before)
    return {**now, "before": [dict(before)]}


def is_exposure(value: Any) -> bool:
    """Return whether a value from elsewhere has the form of an exposure; it may be empty."""
    if not isinstance(value, dict) or not isinstance(value.get("n_participants", 0), int):
        return False
    hashes = [value.get(name) or [] for name in ("participants", "images", "validation")]
    before = value.get("before") or []
    return (
        all(isinstance(texts, list) and all(isinstance(t, str) for t in texts) for texts in hashes)
        and isinstance(before, list)
        and all(map(is_exposure, before))
    )


def recognize(
    participants: Iterable[str], contents: Iterable[str], exposure: Exposure
) -> list[str | None]:
    """Return for each image how its participant is known to have been seen.

    Parameters
    ----------
    participants : iterable of str, length n
        ``sub-…`` ids.
    contents : iterable of str, length n
        Checksums of the voxels; empty where not known.
    exposure : mapping
        Of a model folder.

    Returns
    -------
    list of (str or None)
        ``"image"``: the same voxels; ``"id"``: the id alone, which may be another person of that
        name; ``""``: not seen; None: not known, because a training kept no record.
    """
    parts = list(trainings(exposure))
    known = all("participants" in part for part in parts)
    sets = [
        (
            str(part.get("salt", "")),
            set(part.get("images") or ()),
            set(part.get("participants") or ()),
        )
        for part in parts
    ]
    found: list[str | None] = []
    for who, content in zip(participants, contents, strict=True):
        if content and any(salted_hash(content, salt) in images for salt, images, _ in sets):
            found.append("image")
        elif any(salted_hash(who, salt) in names for salt, _, names in sets):
            found.append("id")
        else:
            found.append("" if known else None)
    return found


def validated(participants: Iterable[str], exposure: Exposure) -> list[bool]:
    """Return for each participant whether the last training only validated on it."""
    salt, names = str(exposure.get("salt", "")), set(exposure.get("validation") or ())
    return [salted_hash(who, salt) in names for who in participants]


def records_images(exposure: Exposure) -> bool:
    """Return whether images can be recognized, which model folders of old cannot."""
    return all("images" in part for part in trainings(exposure))


def trainings(exposure: Exposure) -> Iterator[Exposure]:
    """Yield the exposure by the last training, then those by the ones before."""
    yield exposure
    for earlier in exposure.get("before") or ():
        yield from trainings(earlier)


def _hash_all(texts: Iterable[str], salt: str) -> list[str]:
    return salted(filter(None, texts), salt)

"""Write a synthetic BIDS dataset of heads, drawn from the MNI152 maps in nilearn's wheel.

Running a study on it is left to `nidl_dcl.workflow`.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nilearn import datasets
from numpy.typing import NDArray
from scipy import ndimage, special
from scipy.spatial.transform import Rotation
from torch.nn import functional

from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import keep_bytes, write_bytes
from nidl_dcl.io.formats import to_json, to_tsv, write_text
from nidl_dcl.randomness import key_seed

Floats = NDArray[np.float32]

_DRAWING = "1"
"""Version of the images: a change that gives other images for the same seed needs a new one."""

_BIDS_VERSION = "1.10.0"
_SHAPE = (69, 87, 75)
_VOXEL = 3.0  # mm
_CENTER = (0.0, -8.0, -12.0)  # mm in MNI space: middle of the field of view
_STEP = 2  # mm: voxels of the template
_MARGIN = ((6, 6), (6, 14), (28, 10))  # voxels: what the template needs beyond the brain for a head
_CSF, _GREY, _WHITE = 0.28, 0.65, 0.87  # brightness; fat is 0.85, air 0


@dataclass(frozen=True)
class _Site:
    """A scanner and how its images differ from others."""

    bias: float  # standard deviation of the logarithm of the receive field
    gamma: float  # contrast
    noise: float  # standard deviation, as a share of the brightness of white matter
    gain: float  # stored value of brightness 1
    axes: str  # order and direction of the stored axes


_SITES = {
    "A": _Site(bias=0.10, gamma=1.00, noise=0.020, gain=300, axes="RAS"),
    "B": _Site(bias=0.25, gamma=0.80, noise=0.035, gain=180, axes="LAS"),
    "C": _Site(bias=0.18, gamma=1.25, noise=0.028, gain=600, axes="PSR"),
}

_README = """# Synthetic heads

T1-weighted heads that belong to nobody, drawn by `nidl-dcl demo` from the MNI152 maps in nilearn.
"""

_COLUMNS = {
    "age": {"Description": "Age at the session", "Units": "year"},
    "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
    "site": {"Description": "Scanner", "Levels": {k: f"scanner {k}" for k in _SITES}},
    "handedness": {"Description": "Preferred hand", "Levels": {"R": "right", "L": "left"}},
}


def write_demo_dataset(
    folder: str | Path,
    *,
    n_participants: int = 120,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a raw BIDS dataset of synthetic T1-weighted heads, with brain masks as a derivative.

    Participants differ in age (18 to 85 years), sex, scanner, size and shape of the head, folds of
    the cortex and how old their brain looks for its age. With age ventricles and sulci widen, the
    cortex thins, white matter darkens. A quarter have a second session, one to two and a half years
    later. Some ages, sexes and handednesses are ``n/a``.

    Parameters
    ----------
    folder : path
        A new or empty folder, or one that an earlier call with the same seed wrote or began.
    n_participants : int, default=120
        Number of participants, or more where the folder holds more. Participant i is the same for
        any number.
    seed : int, default=0
        Seed of everything random.
    progress : callable, optional
        Called with (participants done, participants in total).

    Returns
    -------
    Path
        `folder`. Images that are there already are left as they are.

    Raises
    ------
    UsageError
        When `folder` holds anything else, or `n_participants` is less than 1.
    """
    folder = Path(folder)
    if n_participants < 1:
        raise UsageError(f"A demo dataset has at least 1 participant, got {n_participants}.")
    _claim(folder, seed)
    n_participants = max(n_participants, sum(1 for _ in folder.glob("sub-*")))
    people = [_person(seed, i) for i in range(n_participants)]
    template: _Template | None = None
    for done, person in enumerate(people, 1):
        for session, files in enumerate(_paths(folder, person)):
            if not all(file.is_file() for file in files):
                template = template or _template()
                for file, image in zip(files, _draw(template, person, session), strict=True):
                    write_bytes(file, gzip.compress(image.to_bytes(), compresslevel=3, mtime=0))
        if progress is not None:
            progress(done, n_participants)
    _write_tables(folder, people)
    return folder


# -- files -----------------------------------------------------------------------------------


def _claim(folder: Path, seed: int) -> None:
    """Make `folder` the demo dataset of `seed`, unless it is something else."""
    marker = folder / "dataset_description.json"
    text = to_json(
        {
            "Name": "Synthetic heads",
            "BIDSVersion": _BIDS_VERSION,
            "DatasetType": "raw",
            "License": "as the MNI152 maps (ICBM 2009a nonlinear symmetric) they are drawn from",
            "Authors": ["nidl_dcl"],
            "GeneratedBy": [
                {"Name": "nidl_dcl demo", "Version": _DRAWING, "Description": f"seed {seed}"}
            ],
        }
    )
    known = marker.read_text(encoding="utf-8") if marker.is_file() else None
    empty = not folder.exists() or (
        folder.is_dir() and all(p.name.startswith(".") for p in folder.iterdir())
    )
    if known != text and not empty:
        raise UsageError(
            f"{folder} holds something else than the demo dataset of seed {seed}. Choose another "
            "folder, or remove this one."
        )
    if known is None:
        write_text(marker, text)


def _paths(folder: Path, person: _Person) -> Iterator[tuple[Path, Path]]:
    """Yield the paths of the image and the mask of each session."""
    for session in range(len(person.ages)):
        stem = f"{person.label}_{_session(session)}"
        anat = Path(person.label) / _session(session) / "anat"
        yield (
            folder / anat / f"{stem}_T1w.nii.gz",
            folder / "derivatives" / "brainmask" / anat / f"{stem}_desc-brain_mask.nii.gz",
        )


def _session(number: int) -> str:
    return f"ses-{number + 1:02d}"


def _write_tables(folder: Path, people: list[_Person]) -> None:
    """Write the files that are not images where they differ, participants.tsv last."""
    texts = {
        "README.md": _README,
        "T1w.json": to_json({"Modality": "MR", "ConversionSoftware": "nidl_dcl demo"}),
        "participants.json": to_json(_COLUMNS),
        "sessions.json": to_json({"age": _COLUMNS["age"]}),
        "derivatives/brainmask/dataset_description.json": to_json(
            {
                "Name": "Brain masks of the synthetic heads",
                "BIDSVersion": _BIDS_VERSION,
                "DatasetType": "derivative",
                "GeneratedBy": [{"Name": "nidl_dcl demo", "Version": _DRAWING}],
            }
        ),
        "derivatives/brainmask/desc-brain_mask.json": to_json({"Type": "Brain"}),
    }
    for person in people:
        sessions = [
            {"session_id": _session(k), "age": age if person.age_known else None}
            for k, age in enumerate(person.ages)
        ]
        texts[f"{person.label}/{person.label}_sessions.tsv"] = to_tsv(pd.DataFrame(sessions))
    texts["participants.tsv"] = to_tsv(pd.DataFrame([p.row() for p in people]))
    for name, text in texts.items():
        keep_bytes(folder / name, text.encode())


# -- participants ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Person:
    key: tuple[object, ...]  # seeds everything random about them
    label: str
    sex: str
    site: str
    handedness: str
    ages: tuple[float, ...]  # one per session
    age_known: bool
    sex_known: bool

    def row(self) -> dict[str, Any]:
        """Return their row of participants.tsv."""
        return {
            "participant_id": self.label,
            "age": self.ages[0] if self.age_known else None,
            "sex": self.sex if self.sex_known else None,
            "site": self.site,
            "handedness": self.handedness,
        }


def _person(seed: int, i: int) -> _Person:
    """Draw participant `i`; successive participants are balanced in age, sex and site."""

    def turn(what: str, n: int) -> int:
        block, place = divmod(i, n)
        return int(_generator(seed, what, block).permutation(n)[place])

    rng = _generator(seed, i, "table")
    age = round(18 + 67 * (turn("age", 8) + rng.uniform()) / 8, 1)
    later = round(age + rng.uniform(1, 2.5), 1)
    return _Person(
        key=(seed, i),
        label=f"sub-{i + 1:03d}",
        sex="FM"[turn("sex", 2)],
        site="ABC"[turn("site", 3)],
        handedness=str(rng.choice(["R", "L", "n/a"], p=[0.86, 0.1, 0.04])),
        ages=(age, later) if turn("sessions", 4) == 0 else (age,),
        age_known=turn("age known", 20) != 0,
        sex_known=turn("sex known", 40) != 0,
    )


def _generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(key_seed("demo", *key))


# -- the average head ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Template:
    """Maps of an average head on one grid.

    They are ``csf``, ``gray``, ``white``: logarithms of tissue shares; ``detail``: brightness
    beyond them; ``surface``, ``ventricles``: millimeters outside the brain and the ventricles,
    inside negative; ``x``, ``y``, ``z``: direction away from the ventricles, fading with distance;
    ``head``: brightness of everything but the brain.
    """

    origin: Floats  # (3, 1), millimeters of the first voxel
    maps: dict[str, Floats]

    def at(self, points: Floats, *names: str) -> Floats:
        """Return maps at `points`, shape (3, n) in mm: (n_maps, n), or (n,) for a single one."""
        where = (points - self.origin) / np.float32(_STEP)
        linear = partial(ndimage.map_coordinates, output=np.float32, order=1, mode="nearest")
        found = [linear(self.maps[name], where) for name in names]
        return np.stack(found) if len(names) > 1 else found[0]


def _template() -> _Template:
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
        datasets.load_mni152_brain_mask,
    )
    images = [load(resolution=_STEP) for load in loaders]
    t1, gray, white, brain = (
        np.pad(image.get_fdata(dtype=np.float32), _MARGIN) for image in images
    )
    origin = images[0].affine[:3, 3] - _STEP * np.array(_MARGIN)[:, 0]
    axes = [o + _STEP * np.arange(n) for o, n in zip(origin, t1.shape, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)

    csf = np.clip(brain - gray - white, 0, 1)
    surface = _signed_distance(brain > 0.5)
    fluid, _ = ndimage.label((csf > 0.4) & (surface < -16) & (y > -58) & (z > -5) & (z < 30))
    ventricles = _signed_distance(fluid == 1 + np.bincount(fluid.ravel())[1:].argmax())
    away = np.stack(list(np.gradient(ventricles, _STEP))) * np.exp(-((ventricles / 14) ** 2))
    away *= np.clip(1 + ventricles / 2, 0, 1)  # what is ventricle stays ventricle
    # No share is quite 0, so that any voxel can become another tissue.
    shares = np.stack([csf, gray, white]) + 0.02
    shares /= shares.sum(0)
    detail = np.where(brain > 0.5, t1 - np.tensordot((_CSF, _GREY, _WHITE), shares, 1), 0)
    names = ("csf", "gray", "white", "x", "y", "z", "surface", "ventricles", "detail", "head")
    maps = (*np.log(shares), *away, surface, ventricles, detail, _head(brain > 0.5, x, y, z))
    return _Template(
        origin.astype(np.float32)[:, None],
        {name: m.astype(np.float32) for name, m in zip(names, maps, strict=True)},
    )


def _signed_distance(inside: NDArray[np.bool_]) -> Floats:
    """Return millimeters from the border, negative inside, a little smoothed."""
    edt = ndimage.distance_transform_edt
    return ndimage.gaussian_filter(_STEP * (edt(~inside) - edt(inside)), 0.7)


# Painted one over the other: center and radii in mm, brightness.
_ORGANS: tuple[tuple[tuple[float, ...], tuple[float, ...], float], ...] = (
    *(((side * 32, 58, -38), (19, 19, 19), 0.80) for side in (-1, 1)),  # fat behind the eyes
    *(((side * 32, 66, -38), (12.5, 12.5, 12.5), 0.20) for side in (-1, 1)),  # eyes
    ((0, 62, -52), (14, 30, 20), 0.08),  # air of the nose
    ((0, 55, -92), (26, 36, 14), 0.50),  # tongue
    ((0, 6, -95), (9, 7, 40), 0.03),  # air of the throat
    *(((0, -20, z), (15, 12, 8), 0.65) for z in (-80, -98, -116, -134)),  # vertebrae
)


def _head(brain: NDArray[np.bool_], x: Floats, y: Floats, z: Floats) -> Floats:
    """Paint everything but the brain: skin and fat, muscle, organs, skull, fluid, spinal cord."""

    def ball(center: tuple[float, ...], radii: tuple[float, ...]) -> NDArray[np.bool_]:
        parts = zip((x, y, z), center, radii, strict=True)
        return np.asarray(sum(((g - c) / r) ** 2 for g, c, r in parts)) < 1

    smooth = _signed_distance(brain) < 14
    gap = _signed_distance(_signed_distance(smooth) < -14)
    neck = ball((0, -30, -40), (58, 62, 1e9)) & (z < -40)
    face = ball((0, 38, -62), (64, 66, 72)) | ball((0, 96, -44), (14, 20, 18))
    depth = -_signed_distance((gap < 14) | face | neck)

    rng = _generator("muscle")
    muscle = ndimage.gaussian_filter(rng.standard_normal(gap.shape, dtype=np.float32), 1.5)
    painted = 0.40 + 0.12 * muscle / muscle.std()
    painted[depth < 5] = 0.85
    for center, radii, brightness in _ORGANS:
        painted[ball(center, radii)] = brightness
    painted[gap < 9] = 0.06
    painted[np.abs(gap - 6) < 1.5] = 0.28  # marrow
    painted[gap < 3] = _CSF
    painted[ball((0, -38, -120), (11, 11, 62))] = _CSF
    painted[ball((0, -38, -120), (6, 6, 62))] = 0.80
    painted[depth < 0] = 0
    return ndimage.gaussian_filter(painted, 0.6)


# -- one person on one day -------------------------------------------------------------------


def _draw(
    template: _Template, person: _Person, session: int
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Return the image and the brain mask of one session."""
    visit = _generator(*person.key, "visit", session)
    points = _positions(template, person, visit)
    surface = template.at(points, "surface")
    brightness = template.at(points, "head")
    near = surface < 2
    brain = _brain(template, points[:, near], person, person.ages[session])
    share = np.clip(0.5 - surface[near] / _VOXEL, 0, 1)
    brightness[near] = share * brain + (1 - share) * brightness[near]
    stored = _scan(brightness.reshape(_SHAPE), _SITES[person.site], visit)
    mask = (surface < 0).reshape(_SHAPE).astype(np.uint8)
    return _image(stored, _SITES[person.site]), _image(mask, _SITES[person.site])


def _positions(template: _Template, person: _Person, visit: np.random.Generator) -> Floats:
    """Return where in the template each voxel lies, shape (3, n_voxels), in mm."""
    rng = _generator(*person.key, "shape")
    male = 1.0 if person.sex == "M" else -1.0
    size = np.exp(0.016 * male + rng.normal(-0.015, 0.022) + rng.normal(0, 0.018, 3))
    turn = Rotation.from_euler("xyz", np.clip(visit.normal(0, 3, 3), -8, 8), degrees=True)
    shift = visit.normal(0, (3, 5, 5))
    voxels = _every_other_voxel() - (np.array(_SHAPE)[:, None] - 1) / 2
    place = turn.inv().as_matrix() @ (_VOXEL * voxels - shift[:, None]) / size[:, None]
    place += np.array(_CENTER)[:, None]
    bends = [(rng, 55.0, 3.0), (rng, 26.0, 1.8), (_generator("sex"), 45.0, male * 1.2)]
    for source, spacing, extent in bends:
        place += extent * np.stack([_smooth(source, place, spacing) for _ in range(3)])
    return _all_voxels(place).reshape(3, -1)


def _brain(template: _Template, points: Floats, person: _Person, age: float) -> Floats:
    """Return the brightness of the brain at `points` of the template, shape (n,)."""
    rng = _generator(*person.key, "brain")
    pace, *own = rng.normal(size=5)
    late = (age + 6 * pace - 50) / 20
    wider = 1.1 + 1.5 * late + 0.35 * late**2 + 0.9 * own[0]  # mm, ventricles
    thinner = 0.7 * late + 0.3 * own[1]  # log odds of fluid
    darker = max(0, 0.02 + 0.02 * late + 0.015 * own[2])  # white matter
    patchy = max(0, 0.18 + 0.2 * late + 0.15 * own[3])  # white matter at the ventricles

    points = points - np.float32(wider) * template.at(points, "x", "y", "z")
    odds = 1.3 * template.at(points, "csf", "gray", "white")
    crease = np.exp(-((_smooth(rng, points, 13.0) / 0.35) ** 2))
    odds[0] += thinner + (2.0 + 0.5 * late) * (crease - 0.4)
    odds[1] += 0.9 * _smooth(rng, points, 9.0)
    csf, gray, white = special.softmax(odds, axis=0)
    distance, detail = template.at(points, "ventricles", "detail")
    patches = np.float32(patchy) * np.exp(-(np.clip(distance - 1, 0, None) ** 2) / 40)
    pale = np.float32(_WHITE - darker) - patches
    return _CSF * csf + _GREY * gray + pale * white + detail * (1 - csf)


def _scan(brightness: Floats, site: _Site, visit: np.random.Generator) -> NDArray[np.int16]:
    """Return the image that the scanner of a site makes of a head."""
    contrast = site.gamma * np.exp(visit.normal(0, 0.04))
    coarse = _VOXEL * _every_other_voxel() - _VOXEL * np.array(_SHAPE)[:, None] / 2
    bias = _all_voxels(site.bias * _smooth(visit, coarse, 110.0)[None])[0]
    signal = np.clip(brightness, 0, None) ** np.float32(contrast) * np.exp(bias)
    noise = site.noise * np.exp(visit.normal(0, 0.1))
    real, imaginary = np.float32(noise) * visit.standard_normal((2, *_SHAPE), dtype=np.float32)
    signal = np.hypot(signal + real, imaginary)
    gain = site.gain * np.exp(visit.normal(0, 0.1))
    return np.round(np.clip(signal * gain, 0, 32000)).astype(np.int16)


def _image(data: NDArray[Any], site: _Site) -> nib.Nifti1Image:
    """Return an image in scanner space, with the site's order of axes."""
    affine = np.diag([_VOXEL, _VOXEL, _VOXEL, 1.0])
    affine[:3, 3] = -_VOXEL * (np.array(_SHAPE) - 1) / 2
    image = nib.Nifti1Image(data, affine)
    axes = nib.orientations.axcodes2ornt(site.axes)
    image = image.as_reoriented(nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], axes))
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(image.affine, code="scanner")
    image.set_qform(image.affine, code="scanner")
    return image


# -- smooth fields ---------------------------------------------------------------------------


def _smooth(rng: np.random.Generator, points: NDArray[Any], spacing: float) -> Floats:
    """Return a random field of unit variance at `points`, shape (3, n) in mm, within 170 mm.

    It is a cubic B-spline with normal coefficients `spacing` mm apart.
    """
    reach = 2 + math.ceil(170 / spacing)
    coefficients = rng.standard_normal((2 * reach + 1,) * 3, dtype=np.float32) / 0.33
    where = (points / spacing + reach).astype(np.float32)
    return ndimage.map_coordinates(
        coefficients, where, output=np.float32, order=3, prefilter=False, mode="nearest"
    )


def _every_other_voxel() -> Floats:
    """Return the indices of every second voxel along each axis, shape (3, n)."""
    indices = np.mgrid[tuple(slice(0, n, 2) for n in _SHAPE)]
    return indices.reshape(3, -1).astype(np.float32)


def _all_voxels(values: NDArray[Any]) -> Floats:
    """Interpolate values at every second voxel, shape (n_fields, n), to all: (n_fields, *_SHAPE)."""
    coarse = torch.from_numpy(values.astype(np.float32)).reshape(
        1, len(values), *((n + 1) // 2 for n in _SHAPE)
    )
    fine = functional.interpolate(coarse, size=_SHAPE, mode="trilinear", align_corners=True)
    return fine[0].numpy()

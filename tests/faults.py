"""A BIDS dataset with one participant for each fault, and what has to become of each."""

from __future__ import annotations

import bz2
import gzip
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from made_images import save

SHAPE = (20, 24, 20)
AFFINE = np.diag([8.0, 8.0, 8.0, 1.0])
AFFINE[:3, 3] = (-80, -96, -80)
GOOD = 8
"""Sound participants beside those with faults."""

Rows = list[tuple[str, str]]
"""Status and code of each row of a participant, in the order of the paths."""

OK: Rows = [("ok", "ok")]


@dataclass(frozen=True)
class Fault:
    """A participant with a fault.

    Attributes
    ----------
    name : str
        What is wrong, in words.
    participant : str
        As in ``inputs.tsv``.
    expected : Rows
        What has to become of it.
    make : callable
        Puts it into the folder of the dataset; returns nothing.
    """

    name: str
    participant: str
    expected: Rows
    make: Callable[[Path], object]


def skip(code: str) -> Rows:
    """Return one row that is left out."""
    return [("skip", code)]


def warn(code: str) -> Rows:
    """Return one row that is used with a warning."""
    return [("warn", code)]


def head(seed: int) -> np.ndarray:
    """Return a head of one size, different for each seed."""
    grid = np.stack(np.meshgrid(*[np.arange(n) - n / 2 for n in SHAPE], indexing="ij"))
    rng = np.random.default_rng(seed)
    size = 7.0 * rng.uniform(0.93, 1.07, 3)[:, None, None, None]
    radius = np.sqrt(((grid / size) ** 2).sum(0))
    signal = 600.0 * (radius < 1) + 200 * (np.abs(radius - 1.15) < 0.08)
    return np.clip(signal + rng.normal(0, 15, SHAPE), 0, None).astype(np.float32)


def bomb(lead: bytes, size: int) -> bytes:
    """Return `lead` and `size` zeros, compressed: a hundred-thousandth of that, in many members."""
    block = 2**26
    return gzip.compress(lead) + gzip.compress(bytes(block), 9) * (size // block)


def nested(depth: int) -> str:
    """Return JSON that no parser gets to the bottom of."""
    return "[" * depth + "]" * depth


class _Faults:
    """Gathers faults; each gets the label of its number."""

    def __init__(self) -> None:
        self.found: list[Fault] = []

    def add(
        self,
        name: str,
        expected: Rows,
        make: Callable[[Path, str, int], object],
        participant: str | None = None,
    ) -> None:
        """Add a fault made by `make(folder of images, stem of their names, seed)`."""
        seed = 100 + len(self.found)
        who = participant or f"sub-f{len(self.found) + 1:03d}"

        def into(root: Path) -> None:
            anat = root / who / "anat"
            anat.mkdir(parents=True)
            make(anat, who, seed)

        self.found.append(Fault(name, who, expected, into))

    def image(
        self,
        name: str,
        expected: Rows,
        data: Callable[[np.ndarray], np.ndarray] = lambda x: x,
        ending: str = ".nii.gz",
        **more: object,
    ) -> None:
        """Add an image with other values, type, affine or header fields."""

        def make(anat: Path, stem: str, seed: int) -> None:
            options: dict[str, object] = {"affine": AFFINE, **more}
            save(anat / f"{stem}_T1w{ending}", data(head(seed)), **options)

        self.add(name, expected, make)

    def content(
        self, name: str, expected: Rows, change: Callable[[bytes], bytes], ending: str = ".nii.gz"
    ) -> None:
        """Add an image whose bytes, as they would lie on disk, are changed."""

        def make(anat: Path, stem: str, seed: int) -> None:
            path = save(anat / f"{stem}_T1w{ending}", head(seed), AFFINE, np.int16)
            path.write_bytes(change(path.read_bytes()))

        self.add(name, expected, make)

    def place(
        self, name: str, expected: Rows, make: Callable[[Path], object], ending: str = ".nii.gz"
    ) -> None:
        """Add something that lies where the image should."""
        self.add(name, expected, lambda anat, stem, seed: make(anat / f"{stem}_T1w{ending}"))

    def named(self, name: str, expected: Rows, *names: str, participant: str | None = None) -> None:
        """Add sound images of other names, ``SUB`` standing for the participant."""

        def make(anat: Path, stem: str, seed: int) -> None:
            for number, text in enumerate(names):
                path = anat / text.replace("SUB", stem)
                path.parent.mkdir(parents=True, exist_ok=True)
                save(path, head(seed + 1000 * number), AFFINE)

        self.add(name, expected, make, participant)

    def sidecar(self, name: str, expected: Rows, make: Callable[[Path], object]) -> None:
        """Add a sound image with something under the name of its sidecar."""

        def both(anat: Path, stem: str, seed: int) -> None:
            save(anat / f"{stem}_T1w.nii.gz", head(seed), AFFINE)
            make(anat / f"{stem}_T1w.json")

        self.add(name, expected, both)


def _only(values: np.ndarray, side: int) -> np.ndarray:
    """Return zeros around a bright cube."""
    left = np.zeros_like(values)
    left[(slice(8, 8 + side),) * 3] = 900
    return left


def _with(data: np.ndarray, value: float, share: float) -> np.ndarray:
    flat = data.copy().reshape(-1)
    flat[: int(share * flat.size)] = value
    return flat.reshape(data.shape)


def _header(**fields: object) -> bytes:
    """Return the header of a NIfTI image of 8-bit numbers, with fields as they are given."""
    made = nib.Nifti1Header()
    made.set_data_dtype(np.uint8)
    made.set_sform(AFFINE, 1)
    for name, value in {"magic": b"n+1", "vox_offset": 352, **fields}.items():
        made[name] = value
    return bytes(made.binaryblock) + bytes(4)


def _sparse(path: Path, content: bytes, size: int) -> None:
    """Write a file with a hole at its end, which takes no room on disk."""
    path.write_bytes(content)
    os.truncate(path, size)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its address must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _big_endian(path: Path, seed: int) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.Nifti1Image(head(seed), AFFINE, header).to_filename(path)


def _content(faults: _Faults) -> None:
    add = faults.content
    add("no bytes", skip("empty"), lambda raw: b"")
    add("one byte", skip("not_nifti"), lambda raw: b"\x1f")
    add("a compressed stream of nothing", skip("not_nifti"), lambda raw: gzip.compress(b""))
    add("a web page", skip("not_nifti"), lambda raw: b"<html>404</html>")
    add("a DICOM file", skip("not_nifti"), lambda raw: bytes(128) + b"DICM" + bytes(500))
    add("a zip archive", skip("not_nifti"), lambda raw: b"PK\x03\x04" + bytes(500))
    add("compressed twice", skip("not_nifti"), gzip.compress)
    add("cut in the middle", skip("truncated"), lambda raw: raw[: len(raw) // 2])
    add("cut before its checksum", skip("truncated"), lambda raw: raw[:-4])
    add("cut in the header", skip("truncated"), lambda raw: raw[:200], ".nii")
    add("one byte short", skip("truncated"), lambda raw: raw[:-1], ".nii")
    short = lambda raw: gzip.compress(gzip.decompress(raw)[:-1000])  # noqa: E731
    add("cut before it was compressed", skip("truncated"), short)
    add("a wrong checksum", skip("crc"), lambda raw: raw[:-8] + b"\0\1\2\3" + raw[-4:])
    add("a wrong length", skip("crc"), lambda raw: raw[:-4] + b"\0\0\0\1")
    half = lambda raw: raw[: len(raw) // 2] + bytes(64) + raw[len(raw) // 2 + 64 :]  # noqa: E731
    add("zeros inside", skip("crc"), half)
    add("garbage behind", skip("crc"), lambda raw: raw + b"garbage" * 9)
    add("zeros behind", OK, lambda raw: raw + bytes(512))
    whole = bomb(_header(dim=[3, *SHAPE, 1, 1, 1, 1]) + bytes(range(240)) * 40, 10 * 2**30)
    add("a bomb: 10 GB of zeros behind", skip("too_large"), lambda raw: whole)
    huge = _header(dim=[3, 645, 645, 645, 1, 1, 1, 1])
    add("a bomb: 268 million zeros", skip("constant"), lambda raw: bomb(huge, 5 * 2**26))
    far = bomb(_header(dim=[3, *SHAPE, 1, 1, 1, 1], vox_offset=2**30), 2**30 + 2**26)
    add("a bomb: the numbers a gigabyte away", skip("constant"), lambda raw: far)
    name = lambda raw: raw[:3] + b"\x08" + raw[4:10] + b"x" * 10**6  # noqa: E731
    add("a stream whose file name never ends", skip("unreadable"), name)
    none = gzip.compress(b"") * 20_000
    add("many empty streams behind", OK, lambda raw: raw + none)


def _headers(faults: _Faults) -> None:
    add = faults.image
    add("four volumes", skip("dimensions"), lambda x: np.stack([x] * 4, axis=-1))
    add("a fourth axis of length one", OK, lambda x: x[..., None])
    add("a plane", skip("dimensions"), lambda x: x[:, :, 0])
    add("a single slice", skip("dimensions"), lambda x: x[:, :, :1])
    add("a localiser of five slices", skip("too_small"), lambda x: x[:, :, :5])
    add("a negative length", skip("dimensions"), dim=[3, 20, -24, 20, 1, 1, 1, 1])
    add("nine axes", skip("dimensions"), dim=[9, 20, 24, 20, 1, 1, 1, 1])
    add("no axes", skip("dimensions"), dim=[0, 20, 24, 20, 1, 1, 1, 1])
    add("more voxels than memory", skip("too_large"), dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    add("more voxels than bytes", skip("truncated"), dim=[3, 600, 600, 600, 1, 1, 1, 1])
    add("complex numbers", skip("dtype"), dtype=np.complex64)
    add("long complex numbers", skip("dtype"), datatype=1792)
    add("colors", skip("dtype"), datatype=128)
    add("colors with transparency", skip("dtype"), datatype=2304)
    add("quadruple precision", skip("dtype"), datatype=1536)
    add("single bits", skip("dtype"), datatype=1)
    add("an unknown type", skip("dtype"), datatype=-7)
    add("64-bit integers", OK, dtype=np.int64)
    add("unsigned 64-bit integers", OK, dtype=np.uint64)
    add("8-bit integers", OK, lambda x: x / 4, dtype=np.uint8)
    add("a few NaN", warn("non_finite"), lambda x: _with(x, np.nan, 0.01))
    add("a few infinities", warn("non_finite"), lambda x: _with(x, -np.inf, 0.01))
    add("NaN in most voxels", skip("non_finite"), lambda x: _with(x, np.nan, 0.9))
    add("zeros alone", skip("constant"), np.zeros_like)
    add("one value alone", skip("constant"), lambda x: np.full_like(x, 7))
    add("one value and NaN", warn("non_finite"), lambda x: _with(np.full_like(x, 7), np.nan, 0.1))
    add("one voxel alone", skip("constant"), lambda x: _only(x, 1))
    add("next to nothing", warn("blank"), lambda x: _only(x, 4))
    add("a background far below", warn("range"), lambda x: np.where(x > 100, x, -32768))
    add("values without measure", skip("range"), lambda x: x * 1e30)
    add("an infinite slope", skip("scaling"), dtype=np.int16, scl_slope=np.inf, scl_inter=0)
    add("an infinite intercept", skip("scaling"), dtype=np.int16, scl_slope=1, scl_inter=np.inf)
    add("a slope that overflows", skip("non_finite"), dtype=np.int16, scl_slope=3e38, scl_inter=0)
    add("a slope of zero", OK, dtype=np.int16, scl_slope=0, scl_inter=0)
    add("a slope that is no number", OK, dtype=np.int16, scl_slope=np.nan, scl_inter=np.nan)
    add("a flat orientation", skip("affine"), qform_code=0, srow_x=[0, 0, 0, 0])
    add("an orientation of NaN", skip("affine"), qform_code=0, srow_y=[np.nan] * 4)
    add("an infinite orientation", skip("affine"), qform_code=0, srow_z=[0, 0, np.inf, 0])
    add("a sheared orientation", skip("affine"), qform_code=0, srow_x=[8, 6, 0, 0])
    add("a quaternion beyond one", skip("affine"), sform_code=0, quatern_b=3, quatern_c=3)
    add("one of two orientations broken", warn("affine"), srow_x=[np.nan] * 4)
    add("two orientations apart", warn("affine"), qoffset_z=40)
    add("no orientation", warn("affine"), sform_code=0, qform_code=0)
    add("meters for millimeters", skip("spacing"), affine=np.diag([0.008, 0.008, 0.008, 1]))
    add("micrometers for millimeters", skip("spacing"), affine=np.diag([8000, 8000, 8000, 1.0]))
    two = {"pixdim": [1, 8, 8, 12, 1, 1, 1, 1], "qform_code": 0}
    add("two voxel sizes", warn("spacing"), **two)
    add("half of a pair of files", skip("not_nifti"), ending=".nii", magic=b"ni1")
    add("the numbers inside the header", skip("not_nifti"), ending=".nii", vox_offset=12)
    add("the numbers nowhere", skip("not_nifti"), ending=".nii", vox_offset=np.nan)
    add("the numbers before the file", skip("not_nifti"), ending=".nii", vox_offset=-1e9)
    add("the numbers behind the file", skip("truncated"), ending=".nii", vox_offset=1e8)
    add("other names in the header", OK, descrip=b"=cmd()<script>\x1b[2J", intent_name=b"../../x")
    faults.add(
        "big-endian", OK, lambda anat, stem, seed: _big_endian(anat / f"{stem}_T1w.nii.gz", seed)
    )
    faults.add(
        "NIfTI-2",
        OK,
        lambda anat, stem, seed: nib.Nifti2Image(head(seed), AFFINE).to_filename(
            anat / f"{stem}_T1w.nii.gz"
        ),
    )
    faults.content("compressed under a plain name", warn("extension"), gzip.compress, ".nii")
    faults.content("plain under a compressed name", warn("extension"), gzip.decompress)


def _places(faults: _Faults) -> None:
    add = faults.place
    nothing = "../../../.git/annex/objects/xx/SHA256E-s1--0.nii.gz"
    add("a folder", skip("not_a_file"), lambda path: path.mkdir())
    add("a pipe", skip("not_a_file"), os.mkfifo)
    add("a socket", skip("not_a_file"), _socket)
    add("a device without end", skip("not_a_file"), lambda path: path.symlink_to("/dev/zero"))
    add("a link to a folder", skip("not_a_file"), lambda path: path.symlink_to(".."))
    add("a link to itself", skip("unreadable"), lambda path: path.symlink_to(path.name))
    add("a link to nothing", skip("not_fetched"), lambda path: path.symlink_to("nothing"))
    add("a link of git-annex", skip("not_fetched"), lambda path: path.symlink_to(nothing))
    pointer = "/annex/objects/SHA256E-s1--0.nii.gz\n"
    add("a pointer of git-annex", skip("not_fetched"), lambda path: path.write_text(pointer))
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    add("a pointer of git-LFS", skip("not_fetched"), lambda path: path.write_text(lfs))
    big = 2**40
    dim = {"dim": [3, *SHAPE, 1, 1, 1, 1]}
    values = bytes(range(240)) * 40
    add(
        "a terabyte behind",
        skip("too_large"),
        lambda path: _sparse(path, _header(**dim) + values, big),
        ".nii",
    )
    add(
        "a terabyte behind a compressed stream",
        skip("too_large"),
        lambda path: _sparse(path, gzip.compress(_header(**dim) + values), big),
    )
    add("a file of the pair format", skip("extension"), lambda p: p.write_bytes(b"x"), ".img")
    add("another compression", skip("extension"), lambda p: p.write_bytes(bz2.compress(b"x")),
        ".nii.bz2")  # fmt: skip
    add("a FreeSurfer file", skip("extension"), lambda p: p.write_bytes(b"x"), ".mgz")
    add("a pickle", skip("extension"), lambda p: p.write_bytes(b"\x80\x04N."), ".npy")
    if os.geteuid() != 0:
        add("a file that one may not read", skip("permission"), lambda path: path.touch(0))


def _names(faults: _Faults) -> None:
    add = faults.named
    add("an ending in capitals", skip("extension"), "SUB_T1w.NII.GZ")
    add("the name of somebody else", skip("bad_name"), "sub-other_T1w.nii.gz")
    add("a session in the name alone", skip("bad_name"), "SUB_ses-1_T1w.nii.gz")
    add("an entity twice", skip("bad_name"), "SUB_run-1_run-2_T1w.nii.gz")
    add("an entity without a value", skip("bad_name"), "SUB_acq_T1w.nii.gz")
    add("a space in the name", skip("bad_name"), "SUB_acq-a b_T1w.nii.gz")
    add("a copy by a file manager", skip("bad_name"), "SUB copy_T1w.nii.gz")
    add("HTML in the name", skip("bad_name"), "SUB_acq-<img src=x onerror=alert(1)>_T1w.nii.gz")
    add("a line end in the name", skip("bad_name"), "SUB_acq-a\nsub-evil\tok_T1w.nii.gz")
    add("the direction of writing in the name", skip("bad_name"), "SUB_acq-\u202egnp_T1w.nii.gz")
    add("another script in the name", skip("bad_name"), "SUB_acq-größe_T1w.nii.gz")
    add("a folder of a session without a label", skip("bad_name"),
        "../ses-/anat/SUB_ses-_T1w.nii.gz")  # fmt: skip
    add("plain beside compressed", [("skip", "duplicate"), ("ok", "ok")],
        "SUB_T1w.nii", "SUB_T1w.nii.gz")  # fmt: skip
    add("runs 1 and 01", [("ok", "ok"), ("warn", "ambiguous")],
        "SUB_run-01_T1w.nii.gz", "SUB_run-1_T1w.nii.gz")  # fmt: skip
    add("a derivative among raw images", warn("ambiguous"), "SUB_desc-preproc_T1w.nii.gz")
    add("a phase image", skip("part"), "SUB_part-phase_T1w.nii.gz")
    add("real and imaginary parts beside the magnitude", [("skip", "part"), ("ok", "ok"),
        ("skip", "part")], "SUB_part-imag_T1w.nii.gz", "SUB_part-mag_T1w.nii.gz",
        "SUB_part-real_T1w.nii.gz")  # fmt: skip
    add("another contrast alone", skip("no_image"), "SUB_T2w.nii.gz")
    add("a folder without files", skip("no_image"))
    for name, label in {
        "a space in the label": "f copy",
        "HTML in the label": "<script>alert(1)<",
        "a formula in the label": "=HYPERLINK(evil)",
        "a line end in the label": "a\nsub-b",
        "colors of a terminal in the label": "\x1b[31mred",
        "another script in the label": "Ünï",
        "bytes that are no text in the label": "a\udcff",
        "a dot in the label": "a.b",
        "no label": "",
    }.items():
        add(name, skip("bad_id"), "SUB_T1w.nii.gz", participant=f"sub-{label}")

    def twin(anat: Path, stem: str, seed: int) -> None:
        save(anat / f"{stem}_T1w.nii.gz", head(7777), AFFINE)

    faults.add("the voxels of somebody else", warn("duplicate"), twin)
    faults.add("the voxels of somebody else, again", warn("duplicate"), twin)


def _sidecars(faults: _Faults) -> None:
    add = faults.sidecar
    add("a sidecar cut short", warn("sidecar"), lambda p: p.write_text('{"a": '))
    add("a sidecar of a list", warn("sidecar"), lambda p: p.write_text("[1]"))
    add("a sidecar that is no text", warn("sidecar"), lambda p: p.write_bytes(b"\xff\xfe\x00"))
    add("a sidecar without bytes", warn("sidecar"), lambda p: p.touch())
    add("a sidecar of brackets", warn("sidecar"), lambda p: p.write_text(nested(10**5)))
    add("a sidecar of a terabyte", warn("sidecar"), lambda p: _sparse(p, b"{}", 2**40))
    add("a sidecar that leads nowhere", warn("sidecar"), lambda p: p.symlink_to("nothing"))
    add("a sidecar with NaN", OK, lambda p: p.write_text('{"EchoTime": NaN}'))
    add("a sidecar with a number of 10,000 digits", warn("sidecar"),
        lambda p: p.write_text('{"EchoTime": ' + "9" * 10_000 + "}"))  # fmt: skip
    add("a sidecar that is a pipe", OK, os.mkfifo)
    add("a sidecar that is a folder", OK, lambda p: p.mkdir())


ONLY_IN_THE_TABLE = {
    "sub-nobody": "no_image",
    "../../etc/passwd": "bad_id",
    "=cmd|'/c calc'!A0": "bad_id",
    "@SUM(1)": "bad_id",
    "<img src=x onerror=alert(1)>": "bad_id",
    "\x1b]0;title\x07": "bad_id",
    "sub-a/../b": "bad_id",
    "'; DROP TABLE participants": "bad_id",
    "\u202eevil": "bad_id",
    "NULLified": "no_image",
}
"""Ids without a folder, as the table writes them, and the code of each."""


def faults() -> list[Fault]:
    """Return all faults, each with a participant of its own."""
    found = _Faults()
    for family in (_content, _headers, _places, _names, _sidecars):
        family(found)
    for text, code in ONLY_IN_THE_TABLE.items():
        who = f"sub-{text.removeprefix('sub-')}"
        found.found.append(
            Fault(f"an id without a folder: {text}", who, skip(code), lambda root: None)
        )
    return found.found


def write_faults(root: Path) -> list[Fault]:
    """Write the dataset, with `GOOD` sound participants ``sub-g<number>``; return its faults."""
    root.mkdir(parents=True)
    (root / "dataset_description.json").write_text('{"Name": "Faults", "BIDSVersion": "1.10.0"}')
    rows = ["participant_id\tage\tsex"]
    for i in range(1, GOOD + 1):
        anat = root / f"sub-g{i}" / "anat"
        anat.mkdir(parents=True)
        save(anat / f"sub-g{i}_T1w.nii.gz", head(i), AFFINE, np.int16)
        rows.append(f"sub-g{i}\t{20 + 5 * i}\t{'FM'[i % 2]}")
    rows += [f"{text}\t50\tF" for text in ONLY_IN_THE_TABLE]
    made = faults()
    for fault in made:
        fault.make(root)
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return made


# Masks ------------------------------------------------------------------------------------------


def mask_faults() -> dict[str, tuple[str, str, Callable[[Path, np.ndarray], object]]]:
    """Return, by name, status and code of the image, and what makes the mask from a sound one."""

    def of(**header: object) -> Callable[[Path, np.ndarray], object]:
        return lambda path, mask: save(path, mask, AFFINE, np.uint8, **header)

    def values(change: Callable[[np.ndarray], np.ndarray], dtype: type = np.float32):
        return lambda path, mask: save(path, change(mask), AFFINE, dtype)

    far = AFFINE.copy()
    far[:3, 3] += 5000
    near = AFFINE.copy()
    near[:3, 3] += 16
    return {
        "empty file": ("skip", "empty", lambda path, mask: path.touch()),
        "web page": ("skip", "not_nifti", lambda path, mask: path.write_text("<html>")),
        "cut": ("skip", "truncated", lambda p, m: p.write_bytes(of()(p, m).read_bytes()[:-9])),
        "nothing masked": ("skip", "constant", values(np.zeros_like)),
        "everything masked": ("skip", "constant", values(np.ones_like)),
        "NaN": ("skip", "non_finite", values(lambda m: np.where(m > 0, np.nan, np.nan))),
        "values of an image": ("skip", "range", values(lambda m: m * 900)),
        "four volumes": ("skip", "dimensions", values(lambda m: np.stack([m] * 3, -1))),
        "colors": ("skip", "dtype", of(datatype=128)),
        "no orientation": ("warn", "affine", of(sform_code=0, qform_code=0)),
        "moved by two voxels": ("warn", "mask", lambda p, m: save(p, m, near, np.uint8)),
        "shear": ("skip", "affine", of(qform_code=0, srow_x=[8, 6, 0, 0])),
        "elsewhere": ("skip", "affine", lambda path, mask: save(path, mask, far, np.uint8)),
        "soft edges": ("ok", "ok", values(lambda m: m * 0.9)),
    }


def write_mask_faults(root: Path) -> dict[str, tuple[str, str]]:
    """Write a dataset whose masks have faults; return status and code of each participant."""
    masks = root / "derivatives" / "masks"
    expected = {}
    made = {f"g{i}": None for i in range(GOOD)} | {
        "m" + "".join(c for c in name if c.isalpha()): fault
        for name, fault in mask_faults().items()
    }
    for number, (label, fault) in enumerate(made.items()):
        stem = f"sub-{label}/anat/sub-{label}"
        image, mask = root / f"{stem}_T1w.nii.gz", masks / f"{stem}_desc-brain_mask.nii.gz"
        image.parent.mkdir(parents=True)
        mask.parent.mkdir(parents=True)
        data = head(number)
        save(image, data, AFFINE)
        brain = (data > 400).astype(np.float32)
        if fault is None:
            save(mask, brain, AFFINE, np.uint8)
            expected[f"sub-{label}"] = "ok", "ok"
        else:
            fault[2](mask, brain)
            expected[f"sub-{label}"] = fault[:2]
    return expected


def state_of(root: Path) -> dict[str, tuple[int, ...]]:
    """Return what changes when anything in a folder is written, made, removed or given other rights."""
    found = {}
    for path in (root, *root.rglob("*")):
        seen = path.lstat()
        found[str(path.relative_to(root))] = (
            *(seen.st_mode, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns),
        )
    return found

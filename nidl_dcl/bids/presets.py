"""Presets: where the images of a dataset or pipeline lie, and how they are named.

Finding the images is left to `index`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_BIDS = ("sub-*/anat", "sub-*/ses-*/anat")


@dataclass(frozen=True)
class Preset:
    """Folders and names of one kind of images."""

    summary: str  # description of the images, for a table in the documentation
    suffix: str = "T1w"  # last part of the name, before the extension
    # pybids entities and the value each must have; None: the entity must be absent.
    entities: Mapping[str, str | None] = field(default_factory=dict)
    # Where images lie below the root; the only wildcards are sub-* and ses-*.
    folders: tuple[str, ...] = _BIDS
    # Accepted ones; of two files that differ by extension alone the earlier one is used.
    extensions: tuple[str, ...] = (".nii.gz", ".nii")
    # How the pipeline's folder under derivatives/ begins, in lower case; empty for raw data.
    derivatives: tuple[str, ...] = ()
    # Of the values: intensity, probability or signed; decides how they are normalized, augmented.
    kind: str = "intensity"
    # Accepted text before sub- in the name; names with other text are other images.
    prefixes: tuple[str, ...] = ("",)
    # The whole name, where it holds no entities. A folder sub-<label>_ses-<label> is then a
    # session; longitudinal runs (….long.…) and the template of a participant who has sessions are
    # not images of their own.
    file_name: str | None = None
    session_in_name: bool = True  # the name repeats the session of its folder
    bare_suffix: bool = False  # the suffix may be in the middle as well (older versions of Clinica)
    one_resolution: bool = False  # of files that differ only in res-, the finest one is used
    mask_suffix: str = "mask"  # suffix and desc- of the pipeline's own brain masks
    mask_desc: str | None = "brain"
    space: str = "native"  # or a template: of the images where names have no entity for it
    stripped: bool = False  # the images are skull-stripped, though no mask is paired with them
    # Masks that mask="auto" may pair: of any derivative, of the pipeline itself (own), or none
    # (tissue maps and images that are skull-stripped already).
    masks: str = "any"

    @property
    def is_native(self) -> bool:
        """Whether the images are scans in their own space, which the program can preprocess."""
        return (
            self.kind == "intensity"
            and self.space == "native"
            and self.entities.get("space") is None
            and not self.stripped
            and self.folders == _BIDS
        )

    @property
    def rule(self) -> str:
        """The intensity rule of `preparation.Preparation` for this kind."""
        return "robust" if self.kind == "intensity" else self.kind


PREPROCESSED_SPACE = "MNI152NLin2009aSym"
"""Space of the template that the program aligns to (nilearn's), by its BIDS name."""

_PREPROC = ("preproc", "nidl_dcl", "nidl-dcl")
_FMRIPREP = ("fmriprep", "smriprep")
_MNI = "MNI152NLin2009cAsym"
_OPENBHB = tuple(f"{split}derivatives/sub-*/ses-*" for split in ("", "train/", "val/"))

PRESETS: dict[str, Preset] = {
    "raw-t1w": Preset("T1-weighted images of a raw BIDS dataset"),
    "mp2rage": Preset("MP2RAGE uniform images (UNIT1) of a raw BIDS dataset", suffix="UNIT1"),
    "preprocessed": Preset(
        "`nidl-dcl preprocess`: T1w brains aligned to MNI space, skull-stripped",
        entities={"desc": "preproc", "space": PREPROCESSED_SPACE},
        derivatives=_PREPROC,
        masks="own",
        stripped=True,
    ),
    "preprocessed-native": Preset(
        "`nidl-dcl preprocess --preprocess strip`: T1w brains in their own space, skull-stripped",
        entities={"desc": "preproc", "space": None},
        derivatives=_PREPROC,
        masks="own",
        stripped=True,
    ),
    "fmriprep-mni": Preset(
        "fMRIPrep or sMRIPrep: preprocessed T1w in MNI space, not skull-stripped",
        entities={"desc": "preproc", "space": _MNI},
        derivatives=_FMRIPREP,
        one_resolution=True,
    ),
    "fmriprep-native": Preset(
        "fMRIPrep or sMRIPrep: preprocessed T1w in the participant's own space",
        entities={"desc": "preproc", "space": None},
        derivatives=_FMRIPREP,
        one_resolution=True,
    ),
    "fmriprep-gm": Preset(
        "fMRIPrep or sMRIPrep: gray matter probability in MNI space",
        suffix="probseg",
        entities={"label": "GM", "space": _MNI},
        derivatives=_FMRIPREP,
        one_resolution=True,
        kind="probability",
        masks="none",
    ),
    "clinica-t1-linear": Preset(
        "Clinica t1-linear: T1w registered affinely to MNI space, cropped",
        entities={"desc": "Crop", "space": "MNI152NLin2009cSym", "res": "1x1x1"},
        folders=("subjects/sub-*/ses-*/t1_linear",),
        derivatives=("clinica", "caps"),
        bare_suffix=True,
    ),
    "brainprep-quasiraw": Preset(
        "brainprep quasi-raw: bias-corrected T1w registered affinely to MNI space",
        entities={"desc": None},  # versions before 2 keep each step under a desc- of its own
        folders=("subjects/sub-*", "subjects/sub-*/ses-*"),
        derivatives=("quasiraw", "quasi-raw", "brainprep"),
        mask_suffix="brainmask",
        mask_desc=None,
        masks="own",
        space="MNI152",
    ),
    "openbhb-vbm": Preset(
        "OpenBHB: modulated gray matter of CAT12, NumPy arrays of 1.5 mm in MNI space",
        entities={"preproc": "cat12vbm", "desc": "gm"},
        folders=(*_OPENBHB, "sub-*/ses-*"),
        extensions=(".npy",),
        derivatives=("openbhb",),
        kind="probability",
        session_in_name=False,
        masks="none",
        space="MNI152",
    ),
    "openbhb-quasiraw": Preset(
        "OpenBHB: quasi-raw T1w, NumPy arrays of 1 mm in MNI space, skull-stripped",
        entities={"preproc": "quasiraw"},
        folders=(*_OPENBHB, "sub-*/ses-*"),
        extensions=(".npy",),
        derivatives=("openbhb",),
        session_in_name=False,
        masks="none",
        space="MNI152",
        stripped=True,
    ),
    "cat12-vbm": Preset(
        "CAT12: modulated, normalized gray matter (mwp1)",
        folders=tuple(
            f"{who}{where}mri"
            for who in ("sub-*/", "sub-*/ses-*/", "subjects/sub-*/ses-*/")
            for where in ("", "anat/")
        )
        + _BIDS,  # CAT12 makes no folder mri/ in a BIDS dataset
        extensions=(".nii", ".nii.gz"),
        derivatives=("cat12",),
        kind="probability",
        prefixes=("mwp1", "mwp1r", "mwmwp1r"),  # with r: the longitudinal pipelines
        masks="none",
        space="MNI152",
    ),
    "freesurfer": Preset(
        "FreeSurfer or FastSurfer: brain.mgz, skull-stripped, 1 mm",
        suffix="brain",
        folders=("sub-*/mri",),
        extensions=(".mgz",),
        derivatives=("freesurfer", "fastsurfer"),
        file_name="brain.mgz",
        masks="none",
        stripped=True,
    ),
}

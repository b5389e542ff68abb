"""Say what does lie where a participant's image was looked for, and why it is not taken.

Only names are looked at. Which images are taken is left to `search`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from nidl_dcl.bids.entities import Allowed, NameRule, entities_of, passes
from nidl_dcl.bids.presets import Preset
from nidl_dcl.bids.walk import subfolders

_IMAGES = (".nii", ".nii.gz", ".mgz", ".mgh", ".npy", ".img", ".nrrd", ".mnc")
_MOST_FILES = 2000
_MOST_NAMED = 3
_OLD_FMRIPREP = re.compile(
    r"_T1w(?:_space-[A-Za-z0-9]+)?_(?:preproc|class-[A-Z]+_probtissue)\.nii(?:\.gz)?$"
)


def what_lies_there(
    root: Path, participant: str, preset: Preset, rule: NameRule, filters: Mapping[str, Allowed]
) -> str:
    """Return what a participant's folder holds in place of an image of a preset, and why it is not it.

    Parameters
    ----------
    root : Path
        The dataset that was searched.
    participant : str
        Name of the folder.
    preset : Preset
        What was looked for.
    rule : NameRule
        Its names.
    filters : mapping
        The values that entities must have.
    """
    folder = root / participant
    if not folder.is_dir() and (root / "subjects").is_dir():
        folder = root / "subjects" / participant
    if not folder.is_dir():
        return _other_folder(root, participant)
    files = list(_images(folder))
    near = [file for file in files if rule.suffixes[0].lower() in file.lower()] or files
    if not near:
        return "its folder holds no image"
    base = folder.relative_to(root).as_posix()
    told = [
        f"{file} ({_reason(f'{base}/{file}', preset, rule, filters)})"
        for file in sorted(near, key=lambda name: (len(name), name))[:_MOST_NAMED]
    ]
    more = f" and {len(near) - len(told)} more" if len(near) > len(told) else ""
    return f"there is {', '.join(told)}{more}"


def goes_on(name: str, suffix: str) -> str:
    """Return what stands in the name of an image between the suffix and the extension, if anything."""
    if not name.lower().endswith(_IMAGES):
        return ""
    found = re.search(rf"_{re.escape(suffix)}(_[^.]*|[^_.][^.]*)\.", name, re.IGNORECASE)
    return found[1] if found else ""


def folders_of_others(root: Path, preset: Preset) -> list[str]:
    """Return folders that hold images of the preset, but whose names do not begin with ``sub-``."""
    rests = {f.removeprefix("sub-*").strip("/") for f in preset.folders if f.startswith("sub-*")}
    found = []
    for name in subfolders(os.scandir(root)):
        if name.startswith(("sub-", ".")) or name in ("derivatives", "fsaverage"):
            continue
        for rest in rests:
            if preset.file_name:
                here = (root / name / rest / preset.file_name).exists()
            else:
                below = root / name / rest
                here = "*" not in rest and below.is_dir() and any(_images(below))
            if here:
                found.append(name)
                break
    return found


def _other_folder(root: Path, participant: str) -> str:
    label = participant.removeprefix("sub-").lower()
    for name in subfolders(os.scandir(root)):
        if re.sub("^sub[-_]?", "", name.lower()) == label:
            return (
                f"there is a folder {name!r}: it must be called {participant!r}, in these letters"
            )
    return "there is no such folder"


def _images(folder: Path) -> Iterator[str]:
    """Yield the images in a folder and three levels below, as paths relative to it."""
    seen = 0
    waiting = [("", 0)]
    while waiting:
        inside, depth = waiting.pop(0)
        try:
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            seen += 1
            if seen > _MOST_FILES:
                return
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(_IMAGES):
                yield inside + entry.name
            elif depth < 3 and entry.is_dir(follow_symlinks=False):
                waiting.append((f"{inside}{entry.name}/", depth + 1))


def _reason(path: str, preset: Preset, rule: NameRule, filters: Mapping[str, Allowed]) -> str:
    """Return why a file is no image of the preset, as far as its path tells."""
    folder, _, name = path.rpartition("/")
    patterns = [re.escape(f).replace(r"\*", "[^/]+") for f in preset.folders]
    if not any(re.fullmatch(pattern, folder) for pattern in patterns):
        if any(re.fullmatch(pattern, folder, re.IGNORECASE) for pattern in patterns):
            return "its folder is right but for the capitals"
        return f"images of this preset lie in {' or '.join(preset.folders[:2])}"
    suffix, ending = rule.suffixes[0], rule.extensions[0]
    if _OLD_FMRIPREP.search(name):
        now = "_desc-preproc_T1w" if suffix == "T1w" else "_label-GM_probseg"
        return f"a name of fMRIPrep before 1.2; now it would end in {now}.nii.gz"
    if after := goes_on(name, suffix):
        return f"its name goes on after {suffix}, by {after!r}; it must end in _{suffix}{ending}"
    if rule.stem(name) is None:
        begins = " or ".join(f"{prefix}sub-" for prefix in preset.prefixes[:2])
        if not name.startswith(tuple(f"{prefix}sub-" for prefix in preset.prefixes)):
            return f"its name does not begin with {begins}"
        return f"its name does not end in _{suffix}{ending}"
    entities = entities_of(path)
    for key, allowed in filters.items():
        if not passes(entities.get(key), allowed):
            has = f"{key} {entities[key]}" if key in entities else f"no {key}"
            return f"it has {has}, asked for is {_words(key, allowed)}"
    return "it is not among the sessions or files asked for"


def _words(key: str, allowed: Allowed) -> str:
    if allowed == "*":
        return f"any {key}"
    return " or ".join(f"no {key}" if value is None else f"{key} {value}" for value in allowed)

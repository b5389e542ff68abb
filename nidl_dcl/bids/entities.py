"""Read entities from file names by pybids' own patterns, check names, and apply entity filters.

Only text is looked at. Finding folders and files is left to `walk` and `search`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from nidl_dcl.bids.presets import Preset
from nidl_dcl.errors import UsageError, did_you_mean

LABEL = "[a-zA-Z0-9+]+"
"""Letters, digits and +: the values of entities that pybids' patterns accept."""

# Extensions of images that other software reads: they get a row that says why they are skipped.
_FOREIGN = (
    *(".img", ".mgz", ".mgh", ".npy", ".nrrd", ".mnc", ".dcm"),
    *(".nii", ".nii.gz", ".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip"),
)

# Names of entities in BIDS and its filter files that differ from pybids' names.
_OTHER_NAMES = {
    "description": "desc",
    "density": "den",
    "hemisphere": "hemi",
    "inversion": "inv",
    "mtransfer": "mt",
    "processing": "proc",
    "resolution": "res",
    "stain": "staining",
}

_OWN_ENTITIES = ("preproc",)  # OpenBHB and brainprep; pybids does not know it
_LABEL = re.compile(LABEL).fullmatch

_Search = Callable[[str], re.Match[str] | None]
Allowed = list[str | int | None] | Literal["*"]
"""The values an entity may have (None: absent), or ``"*"``: present, whatever its value."""


@cache
def _grammar() -> tuple[tuple[str, str, _Search, bool], ...]:
    """Return (entity, text that any match contains, search, is a number) of each pybids pattern.

    The patterns are read from pybids' JSON files, because importing pybids takes seconds.
    """
    spec = importlib.util.find_spec("bids")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("pybids is not installed. Run: pip install pybids")
    folder = Path(spec.submodule_search_locations[0]) / "layout" / "config"
    rows: dict[str, tuple[str, str, _Search, bool]] = {}
    for name in ("bids.json", "derivatives.json"):
        for entity in json.loads((folder / name).read_text("utf-8"))["entities"]:
            key = re.search("([a-z]+-)\\(", entity["pattern"])
            needed, number = key[1] if key else "", entity.get("dtype") == "int"
            search = re.compile(entity["pattern"]).search
            rows[entity["name"]] = entity["name"], needed, search, number
    return tuple(rows.values())


@cache
def _entity_names() -> dict[str, str]:
    """Return pybids' name of an entity for each accepted spelling."""
    names = {name: name for name, *_ in _grammar()}
    names |= {key[:-1]: name for name, key, *_ in _grammar() if key}
    names |= {other: name for other, name in _OTHER_NAMES.items() if name in names}
    return names | {name: name for name in _OWN_ENTITIES}


def entities_of(path: str) -> dict[str, str | int]:
    """Return the entities that pybids reads from a path, by pybids' names; ``run`` is a number.

    The path is relative to the root of its dataset (folders above it could look like entities).
    ``preproc``, which pybids does not know, is read too.
    """
    text = f"/{path}"
    found: dict[str, str | int] = {}
    for name, needed, search, number in _grammar():
        if needed in text and (match := search(text)):
            found[name] = int(match[1]) if number else match[1]
    for name in _OWN_ENTITIES:
        if match := re.search(f"_{name}-({LABEL})", text):
            found[name] = match[1]
    return found


def is_label(text: str) -> bool:
    """Return whether `text` can stand after ``sub-`` or ``ses-``."""
    return _LABEL(text) is not None


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts ``run-2`` before ``run-10``."""
    parts = re.split("([0-9]+)", text)
    return tuple((1, int(p), p) if p.isascii() and p.isdigit() else (0, 0, p) for p in parts)


class NameRule:
    """Rule for the names of candidate images in a folder, and for those that are valid.

    A candidate ends in the suffix and an image's extension, in any case. It is valid when it reads
    ``sub-<label>[_ses-<label>][_<key>-<label>…]_<suffix><extension>``, labels of letters and
    digits, no key twice, and its participant and session are those of its folder.

    Parameters
    ----------
    preset : Preset
        Folders and names of the images.
    suffixes, extensions : iterable of str
        Accepted ones: those of the preset, or of a filter.
    """

    def __init__(self, preset: Preset, suffixes: Iterable[str], extensions: Iterable[str]) -> None:
        self.preset = preset
        self.suffixes = tuple(suffixes)
        self.extensions = tuple(extensions)
        self._hint = self.suffixes[0].lower() if len(self.suffixes) == 1 else ""
        suffix = "|".join(map(re.escape, self.suffixes))
        endings = "|".join(map(re.escape, sorted({*self.extensions, *_FOREIGN}, key=len)))
        pairs = f"(?:_[a-zA-Z0-9]+-{LABEL})*"
        if preset.bare_suffix:
            pairs += f"(?:_(?:{suffix}))?{pairs}"
        self._strict = re.compile(
            rf"(?:{'|'.join(map(re.escape, preset.prefixes))})sub-({LABEL})(?:_ses-({LABEL}))?"
            rf"({pairs})_(?:{suffix})"
        )
        self._loose = re.compile(rf"(?:.*_)?(?:{suffix})({endings})", re.IGNORECASE | re.DOTALL)

    def preselect(self, entries: Iterable[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
        """Return the files that can be candidates, without the cost of `stem` for each of many."""
        if self.preset.file_name:
            return [entry for entry in entries if entry.name == self.preset.file_name]
        hint = self._hint
        return [entry for entry in entries if hint in entry.name.lower()]

    def stem(self, name: str) -> str | None:
        """Return the name without its extension if it is a candidate, else None."""
        if self.preset.file_name:
            return name.split(".")[0] if name == self.preset.file_name else None
        if name.startswith(".") or not name.startswith(self.preset.prefixes):
            return None
        match = self._loose.fullmatch(name)
        return None if match is None else name[: match.start(1)]

    def judge(
        self, name: str, participant: str, session: str | None
    ) -> tuple[Literal["ok", "extension", "bad_name", "bad_id"], str]:
        """Return the code of a candidate and the reason for it.

        Parameters
        ----------
        name : str
            File name.
        participant, session : str and (str or None)
            Names of the folders it lies in.
        """
        if not is_label(participant.removeprefix("sub-")):
            return "bad_id", (
                f"the folder {participant!r} is no participant label: sub-, then letters and digits"
            )
        if session is not None and not is_label(session.removeprefix("ses-")):
            return "bad_name", (
                f"the folder {session!r} is no session label: ses-, then letters and digits"
            )
        if self.preset.file_name:
            return "ok", ""
        stem = self.stem(name) or name
        match = self._strict.fullmatch(stem)
        if match is None:
            capitals = re.fullmatch(self._strict.pattern, stem, re.IGNORECASE)
            return "bad_name", (
                f"the name is not {self.preset.prefixes[0]}sub-<label>[_ses-<label>][_<key>-<label>]_"
                f"{'|'.join(self.suffixes)} with labels of letters and digits"
                f"{': look at the capitals' if capitals else ''}"
            )
        if f"sub-{match[1]}" != participant:
            return "bad_name", f"the name says sub-{match[1]}, its folder {participant}"
        own = f"ses-{match[2]}" if match[2] else None
        if own != session and (own is not None or self.preset.session_in_name):
            return "bad_name", (
                f"the name says {own or 'no session'}, its folder {session or 'no session'}"
            )
        keys = ["sub", "ses", *re.findall("_([a-zA-Z0-9]+)-", match[3])]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            return "bad_name", f"{twice}- stands twice in the name"
        if name[len(stem) :] not in self.extensions:
            return "extension", (
                f"the extension {name[len(stem) :]} is not one of {' '.join(self.extensions)}"
            )
        return "ok", ""


def read_filters(filters: Mapping[str, Any] | None, preset: Preset) -> dict[str, Allowed]:
    """Return the allowed values of each entity in a BIDS filter for the images of a preset.

    It maps entities, by pybids' name or by their BIDS key, to a value, a list of values, None
    (absent) or ``"*"`` (present, any value). Or it is ``{"t1w": {entity: value}}``, as in
    fMRIPrep's filter files, of which the part named like the preset's suffix, or ``t1w``, is used.

    Raises
    ------
    UsageError
        For an unknown entity, a value of another type, or parts of which none is for `preset`.
    """
    if not filters:
        return {}
    if not isinstance(filters, Mapping):
        raise UsageError(f"A BIDS filter is a JSON object, got {type(filters).__name__}.")
    parts = {name: part for name, part in filters.items() if isinstance(part, Mapping)}
    if parts:
        if len(parts) < len(filters):
            raise UsageError(
                "The BIDS filter mixes entities with parts such as 't1w'. Use one of the two: "
                '{"acquisition": "mprage"} or {"t1w": {"acquisition": "mprage"}}.'
            )
        known = dict.fromkeys((preset.suffix.lower(), "t1w"))
        fitting = [n for w in known for n in parts if n.lower() == w]
        if not fitting:
            raise UsageError(
                f"The BIDS filter has parts for {', '.join(map(repr, parts))}, none for "
                f"{' or '.join(map(repr, known))}. Rename the part that is meant."
            )
        filters = parts[fitting[0]]
    names = _entity_names()
    allowed: dict[str, Allowed] = {}
    for given, value in filters.items():
        name = names.get(given) or names.get(str(given).lower())
        if name is None:
            hint = did_you_mean(str(given), names)
            raise UsageError(
                f"Unknown entity {given!r} in the BIDS filter.{hint} Known are, for instance: "
                "session, acquisition, run, reconstruction, space, res, desc, suffix, extension."
            )
        if isinstance(value, str) and value in ("*", "Query.ANY", "Query.REQUIRED"):
            if name in ("suffix", "extension"):
                raise UsageError(f"The BIDS filter takes values for {name!r}, not {value!r}.")
            allowed[name] = "*"
        elif value != "Query.OPTIONAL":
            values = value if isinstance(value, list | tuple) else [value]
            allowed[name] = [_plain_value(name, v) for v in values]
    return allowed


def _plain_value(name: str, value: Any) -> str | int | None:
    if value in (None, "Query.NONE"):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(
            f"The BIDS filter gives {name!r} the value {value!r}. Use text, a whole number, "
            'null (absent), "*" (any), or a list of those.'
        )
    if isinstance(value, str):
        # For values that repeat their key, pybids finds nothing and says nothing.
        value = value.removeprefix({"subject": "sub-", "session": "ses-"}.get(name, ""))
        if name == "extension" and not value.startswith("."):
            value = f".{value}"
    return value


def passes(value: str | int | None, allowed: Allowed) -> bool:
    """Return whether the value of an entity (None: absent) is one of the `allowed` values.

    Numbers compare by value: ``run`` always (``"01"`` allows run 1), other entities where the
    allowed value is a number (``1`` allows ``echo-01``).
    """
    if allowed == "*":
        return value is not None
    if value in allowed:
        return True
    if value is None or not str(value).isdecimal():
        return False
    return any(
        str(other).isdecimal() and int(other) == int(value)
        for other in allowed
        if other is not None and (isinstance(value, int) or isinstance(other, int))
    )

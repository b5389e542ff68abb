"""Find every candidate image of one dataset, and judge it by its name and kind of file alone.

Visiting folders is left to `walk`, reading names to `entities`, and making tables to `index`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from nidl_dcl.bids.entities import Allowed, NameRule, entities_of, is_label, natural_key, passes
from nidl_dcl.bids.near_misses import goes_on
from nidl_dcl.bids.presets import Preset
from nidl_dcl.bids.walk import DatasetWalker, Folder, Progress
from nidl_dcl.status import Code

_RESOLUTION = re.compile("_res-[a-zA-Z0-9+]+(?=_[^/]*$)")
_OF_ECHOES = ("echo", "reconstruction", "extension")
_NUMBERED = re.compile("(run|echo|inv|flip|chunk)-0+(?=[0-9])")


@dataclass(slots=True)
class Candidate:
    """One file that could be an image, or a folder that cannot be read."""

    participant: str  # names of the folders
    session: str | None
    path: str  # POSIX, relative to the root that was searched
    entry: os.DirEntry[str] | None = None  # None for a folder
    entities: dict[str, str | int] = field(default_factory=dict)  # as pybids reads them
    status: str = "ok"  # this and the rest: columns of inputs.tsv
    code: Code = "ok"
    message: str = ""

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.rpartition("/")[2]

    def leave_out(self, code: Code, message: str) -> None:
        """Mark the candidate as not usable."""
        self.status, self.code, self.message = "skip", code, message


@dataclass
class SearchResult:
    """The candidate images, participants and sessions of one dataset."""

    root: Path
    candidates: list[Candidate] = field(default_factory=list)  # by folder, then name
    participants: list[str] = field(default_factory=list)  # all sub-*, selected or not
    sessions: set[str] = field(default_factory=set)  # of the selected participants
    kept: list[tuple[str, int]] = field(default_factory=list)  # steps, and usable images after each
    rule: NameRule | None = None  # what was looked for; so are the filters
    filters: Mapping[str, Allowed] = field(default_factory=dict)
    # Of files with the suffix in their names, those that are no candidates.
    passed_over: list[str] = field(default_factory=list)

    @property
    def usable(self) -> list[Candidate]:
        """The candidates that are not skipped."""
        return [c for c in self.candidates if c.status != "skip"]

    def count(self, step: str) -> None:
        """Record how many usable images are left after a step."""
        self.kept.append((step, len(self.usable)))


def search(
    root: Path,
    preset: Preset,
    entity_filters: Mapping[str, Allowed],
    participants: Collection[str] | None = None,
    sessions: Collection[str] | None = None,
    *,
    progress: Progress | None = None,
) -> SearchResult:
    """Return every candidate image below `root`, with a code by its name and kind of file.

    Parameters
    ----------
    root : Path
        A dataset, raw or derivative.
    preset : Preset
        Folders and names of the images.
    entity_filters : mapping
        The values allowed for each entity, instead of those of the preset. Files with other values
        are no candidates.
    participants, sessions : collection of str, optional
        Only these, with ``sub-`` and ``ses-``.
    progress : callable, optional
        As in `walk.DatasetWalker`.
    """
    filters: dict[str, Allowed] = {name: [value] for name, value in preset.entities.items()}
    filters |= entity_filters
    rule = NameRule(
        preset,
        _texts(filters.pop("suffix", [preset.suffix])),
        _texts(filters.pop("extension", list(preset.extensions))),
    )
    found = SearchResult(root, rule=rule, filters=filters)
    reader = _Reader(rule)
    several: list[list[Candidate]] = []
    folders = DatasetWalker(root, preset, participants, progress)
    for folder in folders:
        if sessions is not None and folder.session not in sessions:
            continue
        if folder.error is not None:
            found.candidates.append(_unreadable(folder))
        here = reader.read(folder)
        found.candidates += here
        if len(here) > 1:
            several.append(here)
    found.passed_over = reader.passed_over
    found.participants, found.sessions = list(folders.participants), folders.sessions
    if preset.file_name:
        _drop_templates(found)
    found.count(f"{' or '.join(rule.suffixes)} by name")
    for name, allowed in filters.items():
        found.candidates = [
            c for c in found.candidates if not c.entities or passes(c.entities.get(name), allowed)
        ]
        found.count(_step(name, allowed))
    if preset.one_resolution and "res" not in filters:
        _drop_resolutions(found)
    if "echo" not in filters:
        _drop_echoes(found)
    marks = [n for n in ("desc", "space") if n not in filters and not preset.derivatives]
    for candidate in found.usable:
        _judge_kind(candidate)
        if "part" not in filters and candidate.entities.get("part") in ("phase", "real", "imag"):
            candidate.leave_out("part", f"part-{candidate.entities['part']}, not the magnitude")
        derived = [n for n in marks if n in candidate.entities]
        if derived and candidate.status == "ok":
            candidate.status, candidate.code = "warn", "ambiguous"
            candidate.message = f"{derived[0]}- marks a derivative; is another --preset meant?"
    remaining = {id(candidate) for candidate in found.candidates} if several else set()
    for here in several:
        _judge_doubles(here, rule, remaining)
    found.count("usable by name")
    return found


class _Reader:
    """Read candidates from folders; of names that differ only in their labels, one is parsed.

    A label holds none of the characters that separate entities, so another participant or session
    does not change the other entities of a valid name.
    """

    def __init__(self, rule: NameRule) -> None:
        self.rule = rule
        self.passed_over: list[str] = []
        self._parsed: dict[tuple[str, str, str], dict[str, str | int]] = {}

    def read(self, folder: Folder) -> list[Candidate]:
        """Return the candidates in a folder, in the order of their names."""
        entries = self.rule.preselect(folder.entries)
        if not entries:
            return []
        entries.sort(key=attrgetter("name"))
        who, when = folder.participant, folder.session
        subject = who.removeprefix("sub-")
        labels: dict[str, str | int] = {"subject": subject}
        start, prefixes = who, self.rule.preset.prefixes
        alike = not self.rule.preset.file_name and is_label(subject)
        if when is not None:
            labels["session"] = session = when.removeprefix("ses-")
            start += f"_{when}"
            alike = alike and is_label(session)
        found: list[Candidate] = []
        for entry in entries:
            name, path = entry.name, f"{folder.path}/{entry.name}"
            prefix, middle, rest = name.partition(start)
            key = folder.pattern, prefix, rest
            same = alike and middle != "" and prefix in prefixes
            if same and key in self._parsed:
                found.append(Candidate(who, when, path, entry, self._parsed[key] | labels))
            elif self.rule.stem(name) is not None:
                candidate = Candidate(who, when, path, entry, entities_of(path))
                code, message = self.rule.judge(name, who, when)
                if code != "ok":
                    candidate.leave_out(code, message)
                elif same:
                    self._parsed[key] = candidate.entities
                found.append(candidate)
            elif goes_on(name, self.rule.suffixes[0]):
                self.passed_over.append(path)
        return found


def select_images(found: SearchResult, select: str) -> None:
    """Keep one usable image of each session, the first or last by acquisition, run and path."""
    images = sorted(
        found.usable,
        key=lambda c: (
            natural_key(str(c.entities.get("acquisition", ""))),
            c.entities.get("run", -1),
            natural_key(c.path),
        ),
        reverse=select == "first",  # the last of a session stays
    )
    kept = set({(c.participant, c.session): id(c) for c in images}.values())
    found.candidates = [c for c in found.candidates if c.status == "skip" or id(c) in kept]
    found.count(f"{select} image of each session")


def _drop_templates(found: SearchResult) -> None:
    """Drop the templates that FreeSurfer makes of all sessions of a participant."""
    have = {c.participant for c in found.candidates if c.session is not None}
    found.candidates = [
        c for c in found.candidates if c.session is not None or c.participant not in have
    ]


def _drop_resolutions(found: SearchResult) -> None:
    """Keep one of the files that differ only in ``res-``: the one without it, else the first.

    They are one scan, resampled to several grids. Templates number their resolutions from the
    finest.
    """
    first: dict[str, int] = {}
    for c in sorted(found.candidates, key=lambda c: natural_key(str(c.entities.get("res", "")))):
        first.setdefault(_RESOLUTION.sub("", c.path), id(c))
    kept = set(first.values())
    if len(kept) < len(found.candidates):
        found.candidates = [c for c in found.candidates if id(c) in kept]
        found.count("finest resolution of each")


def _drop_echoes(found: SearchResult) -> None:
    """Of the echoes of one scan keep their combination, the image without ``echo-``; else the first.

    The combination may have a ``rec-`` (root mean square, for instance) that the echoes have not.
    """
    if not any("echo" in c.entities for c in found.candidates):
        return
    scans: defaultdict[object, list[Candidate]] = defaultdict(list)
    for c in found.usable:
        others = {k: v for k, v in c.entities.items() if k not in _OF_ECHOES}
        scans[c.participant, c.session, frozenset(others.items())].append(c)
    dropped: set[int] = set()
    for images in scans.values():
        echoes = [c for c in images if "echo" in c.entities]
        first = min((int(c.entities["echo"]) for c in echoes), default=0)
        combined = len(echoes) < len(images)
        dropped |= {id(c) for c in echoes if combined or int(c.entities["echo"]) > first}
    if dropped:
        found.candidates = [c for c in found.candidates if id(c) not in dropped]
        found.count("of several echoes, their combination (the image without echo-), or the first")


def _texts(allowed: Allowed) -> list[str]:
    return [str(value) for value in allowed if value is not None]


def _step(name: str, allowed: Allowed) -> str:
    if allowed == "*":
        return f"with {name}"
    return " or ".join(f"no {name}" if v is None else f"{name} {v}" for v in allowed)


def _unreadable(folder: Folder) -> Candidate:
    candidate = Candidate(folder.participant or "n/a", folder.session, folder.path or ".")
    error = folder.error
    code: Code = "permission" if isinstance(error, PermissionError) else "unreadable"
    reason = error.strerror if error is not None and error.strerror else "unknown error"
    candidate.leave_out(code, f"the folder cannot be read: {reason}")
    return candidate


def _judge_kind(candidate: Candidate) -> None:
    """Leave out a candidate that is not a regular file, or a link to nothing."""
    entry = candidate.entry
    if entry is None or entry.is_file(follow_symlinks=False):
        return
    if not entry.is_symlink():
        what = "a folder" if entry.is_dir() else "a pipe, socket or device"
        candidate.leave_out("not_a_file", f"{what}, not a file")
        return
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            candidate.leave_out("unreadable", "a link that leads back to itself")
        elif isinstance(error, PermissionError):
            candidate.leave_out("permission", f"the link cannot be followed: {error.strerror}")
        else:
            message = "a link to a file that does not exist"
            if "annex/objects/" in os.readlink(entry):  # noqa: PTH115
                message = f"its content has not been fetched; run: datalad get {candidate.path}"
            candidate.leave_out("not_fetched", message)
        return
    if not stat.S_ISREG(mode):
        candidate.leave_out("not_a_file", "a link to something that is not a file")


def _judge_doubles(here: Sequence[Candidate], rule: NameRule, remaining: set[int]) -> None:
    """Leave out a second file of one name; warn of names in a folder that mean the same."""
    stems: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in here:
        stems[rule.stem(candidate.name) or ""].append(candidate)
    meanings: dict[frozenset[str], Candidate] = {}
    for stem, same in stems.items():
        usable = [c for c in same if id(c) in remaining and c.status != "skip"]
        if not usable:
            continue
        first = usable[0]
        if len(same) > 1:
            first = min(usable, key=lambda c: rule.extensions.index(c.name.removeprefix(stem)))
            for other in same:
                if other is not first and (other.status != "skip" or other.code == "extension"):
                    other.leave_out("duplicate", f"the image is used as {first.name}")
        meaning = frozenset(_NUMBERED.sub(r"\1-", part) for part in stem.split("_"))
        twin = meanings.setdefault(meaning, first)
        if twin is not first:
            first.status, first.code = "warn", "ambiguous"
            first.message = f"the name means the same as {twin.name}; both are used"

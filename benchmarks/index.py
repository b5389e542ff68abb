"""How long an index takes, first, unchanged and changed, beside a bare walk and stock pybids."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import interleave, machine, print_table, row

from nidl_dcl.bids.index import find_images

NAMES = ("T1w", "acq-1_T2w", "acq-2_T2w", "acq-1_FLAIR", "acq-2_FLAIR", "PDw")
STRICT = re.compile(
    r"sub-([a-zA-Z0-9]+)(?:_ses-([a-zA-Z0-9]+))?(?:_[a-zA-Z0-9]+-[a-zA-Z0-9]+)*_T1w\.nii(?:\.gz)?"
)
MEGABYTES = 150


def make_tree(root: Path, participants: int) -> int:
    """Write empty images and sidecars, 12 files a session, two sessions for every fifth participant.

    Returns
    -------
    int
        The number of T1w images.
    """
    images = 0
    for i in range(participants):
        who = f"sub-{i:05d}"
        for session in ("ses-1", "ses-2") if i % 5 == 0 else ("",):
            folder = root / who / session / "anat"
            folder.mkdir(parents=True)
            stem = f"{who}_{session}" if session else who
            for name in NAMES:
                for ending in (".nii.gz", ".json"):
                    (folder / f"{stem}_{name}{ending}").write_text("{}" * (ending == ".json"))
            images += 1
    lines = "".join(f"sub-{i:05d}\t{20 + i % 60}\n" for i in range(participants))
    (root / "participants.tsv").write_text(f"participant_id\tage\n{lines}")
    description = {"Name": "Empty images", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    return images


def bare_walk(root: Path) -> int:
    """Count the images by listing the same folders and matching names: the limit."""
    found = 0
    with os.scandir(root) as people:
        for person in people:
            if not person.name.startswith("sub-"):
                continue
            folders = []
            with os.scandir(person.path) as below:
                for entry in below:
                    if entry.name == "anat":
                        folders.append(entry.path)
                    elif entry.name.startswith("ses-"):
                        folders.append(f"{entry.path}/anat")
            for folder in folders:
                with os.scandir(folder) as files:
                    found += sum(STRICT.fullmatch(file.name) is not None for file in files)
    return found


def stock_pybids(root: Path) -> int:
    """Count the images by a stock `BIDSLayout` that looks at anat alone and reads no sidecar."""
    from bids import BIDSLayout, BIDSLayoutIndexer

    # Every folder that is not on the way to an anat folder is left out, and so are other files.
    indexer = BIDSLayoutIndexer(
        validate=False,
        index_metadata=False,
        ignore=[re.compile(r"^/(?!sub-)"), re.compile(r"/(func|dwi|fmap|perf|meg|eeg|pet|beh)")],
    )
    stock = BIDSLayout(root, validate=False, indexer=indexer)
    return len(stock.get(suffix="T1w", extension=[".nii.gz", ".nii"], return_type="file"))


def change(root: Path, cache: Path) -> Callable[[], None]:
    """Return what makes the next index find three changed folders: one file more, fewer, renamed."""
    folders = sorted(root.glob("sub-*[1-4]/anat"))[:3]
    state = {"times": 0}

    def three() -> None:
        find_images(root, cache=cache)
        state["times"] += 1
        odd = state["times"] % 2
        for folder, ending in zip(folders, ("PDw.json", "FLAIR.json", "T2w.json"), strict=True):
            here, there = (folder / f"{folder.parent.name}_acq-{n}_{ending}" for n in "34")
            if ending == "PDw.json":
                here.touch() if odd else here.unlink()
            else:
                (there if there.exists() else here).unlink(missing_ok=True)
                (here if odd else there).touch()
        # Folders younger than two seconds are read, but not yet kept.
        time.sleep(2.1)

    return three


MEMORY = """
import resource, sys
from pathlib import Path
from nidl_dcl.bids.index import find_images

root, small, cache = map(Path, sys.argv[1:])
find_images(small)  # imports are done, and are not counted
try:  # what was at its peak during imports must not hide what comes now
    Path("/proc/self/clear_refs").write_text("5")
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    peak()
except (OSError, IndexError):
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
before = peak()
find_images(root, cache=None if cache.name == "none" else cache)
print(peak() - before)
"""


def added_memory(root: Path, cache: Path | None) -> float:
    """Return by how many megabytes an index raises the peak memory of a fresh process."""
    with tempfile.TemporaryDirectory() as small:
        make_tree(Path(small), 2)
        words = [sys.executable, "-c", MEMORY, str(root), small, str(cache or "none")]
        return float(subprocess.run(words, capture_output=True, check=True, text=True).stdout)


def main(participants: int = 10000, rounds: int = 5, stock: int = 1000) -> list[dict[str, Any]]:
    """Run all arms and return the rows of the table.

    Parameters
    ----------
    participants : int, default=10000
        Size of the dataset.
    rounds : int, default=5
        Rounds that count.
    stock : int, default=1000
        Participants of the smaller dataset on which both we and pybids are timed.
    """
    with tempfile.TemporaryDirectory() as place:
        root, cache = Path(place).resolve() / "ds", Path(place) / "index"
        images = make_tree(root, participants)
        small = Path(place).resolve() / "small"
        few = make_tree(small, min(stock, participants))
        time.sleep(2.1)  # nobody's dataset is younger than that
        return _measure(root, cache, images, small, few, rounds)


def _measure(
    root: Path, cache: Path, images: int, small: Path, few: int, rounds: int
) -> list[dict[str, Any]]:
    def index(kept: Path | None, where: Path = root) -> Callable[[], int]:
        return lambda: len(find_images(where, cache=kept).images)

    def forget(kept: Path) -> Callable[[], None]:
        return lambda: shutil.rmtree(kept, ignore_errors=True)

    other = cache.with_name("other")
    arms: dict[str, Callable[[], int]] = {
        "bare walk": lambda: bare_walk(root),
        "without a cache": index(None),
        "first": index(other),
        "unchanged": index(cache),
        "three changes": index(cache),
    }
    before = {
        "first": forget(other),
        "unchanged": index(cache),
        "three changes": change(root, cache),
    }
    times = interleave(arms, rounds, before=before, expected=dict.fromkeys(arms, images))
    walk = times["bare walk"]
    targets = {"without a cache": 4.0, "first": 4.0, "unchanged": 1.5, "three changes": 1.5}
    note = f"{images} T1w of {12 * images} files; peer: bare walk"
    rows = []
    for name, target in targets.items():
        rows.append(row(f"{name}, wall s", times[name].wall, walk.wall, target, note=note))
        rows.append(row(f"{name}, CPU s", times[name].cpu, walk.cpu, target, note=note))
    rows += _beside_pybids(small, few, cache.with_name("small-index"), rounds)
    forget(other)()
    for name, kept in (("first", other), ("unchanged", other), ("without a cache", None)):
        added = [added_memory(root, kept)]
        rows.append(row(f"{name}, peak MB", added, [MEGABYTES], 1.0, note="peer: the limit"))
    return rows


def _beside_pybids(small: Path, few: int, cache: Path, rounds: int) -> list[dict[str, Any]]:
    """Time both on a dataset of one size; pybids takes too long for the large one."""
    arms: dict[str, Callable[[], int]] = {
        "stock": lambda: stock_pybids(small),
        "first": lambda: len(find_images(small, cache=cache).images),
        "unchanged": lambda: len(find_images(small, cache=cache).images),
    }
    before = {"first": lambda: shutil.rmtree(cache, ignore_errors=True)}
    expected = dict.fromkeys(arms, few)
    times = interleave(arms, min(rounds, 3), before=before, expected=expected)
    note = f"both on {few} T1w of {12 * few} files; peer: BIDSLayout, no sidecars, anat only"
    return [
        row(
            f"{name} beside pybids, {kind} s",
            getattr(times[name], kind.lower()),
            getattr(times["stock"], kind.lower()),
            15.0,
            at_most=False,
            note=note,
        )
        for name in ("first", "unchanged")
        for kind in ("wall", "CPU")
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--participants", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stock", type=int, default=1000, help="participants for pybids")
    given = parser.parse_args()
    print(machine("pybids", "pandas"))
    print_table(main(given.participants, given.rounds, given.stock))

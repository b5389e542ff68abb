"""How long an index takes, beside a bare walk and stock pybids, and how much memory."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
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


MEMORY = """
import resource, sys
from pathlib import Path
from nidl_dcl.bids.index import find_images

root, small = map(Path, sys.argv[1:])
find_images(small)  # imports are done, and are not counted
try:  # what was at its peak during imports must not hide what comes now
    Path("/proc/self/clear_refs").write_text("5")
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    peak()
except (OSError, IndexError):
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
before = peak()
find_images(root)
print(peak() - before)
"""


def added_memory(root: Path) -> float:
    """Return by how many megabytes an index raises the peak memory of a fresh process."""
    with tempfile.TemporaryDirectory() as small:
        make_tree(Path(small), 2)
        words = [sys.executable, "-c", MEMORY, str(root), small]
        return float(subprocess.run(words, capture_output=True, check=True, text=True).stdout)


def count_images(root: Path) -> int:
    """Count the images with `find_images`."""
    return len(find_images(root).images)


def main(participants: int = 10000, rounds: int = 5, stock: int = 1000) -> list[dict[str, Any]]:
    """Run all arms and return the rows of the table.

    Parameters
    ----------
    participants : int, default=10000
        Size of the dataset.
    rounds : int, default=5
        Rounds that count.
    stock : int, default=1000
        Participants of the smaller dataset on which both we and pybids are timed, since pybids
        takes too long for the large one.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size, peer, times, target, note in (
            ("beside a bare walk", participants, bare_walk, rounds, 1.5, "peer: bare walk"),
            (
                "beside pybids",
                min(stock, participants),
                stock_pybids,
                min(rounds, 3),
                15.0,
                "peer: BIDSLayout, no sidecars, anat only",
            ),
        ):
            root = Path(folder).resolve() / name
            images = make_tree(root, size)
            arms = {"ours": partial(count_images, root), "peer": partial(peer, root)}
            timed = interleave(arms, times, expected=dict.fromkeys(arms, images))
            rows += [
                row(
                    f"{name}, {kind} s",
                    getattr(timed["ours"], kind.lower()),
                    getattr(timed["peer"], kind.lower()),
                    target,
                    at_most=peer is bare_walk,
                    note=f"{images} T1w of {12 * images} files; {note}",
                )
                for kind in ("wall", "CPU")
            ]
        added = [added_memory(Path(folder).resolve() / "beside a bare walk")]
        rows.append(row("peak MB", added, [MEGABYTES], 1.0, note="peer: the limit"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--participants", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stock", type=int, default=1000, help="participants for pybids")
    given = parser.parse_args()
    print(machine("pybids", "pandas"))
    print_table(main(given.participants, given.rounds, given.stock))

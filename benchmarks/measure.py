"""What benchmarks share: arms timed in turn, their medians, the machine, a table of ratios.

Says nothing when run. A benchmark has a `main` that returns rows for `print_table`.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass
class Times:
    """Seconds that an arm took in each round.

    Attributes
    ----------
    wall, cpu : list of float
        Elapsed, and of this process in user and system mode.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleave(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    before: Mapping[str, Callable[[], Any]] | None = None,
    expected: Mapping[str, Any] | None = None,
) -> dict[str, Times]:
    """Time each arm once a round, in turn, so that a busy machine slows all of them alike.

    Parameters
    ----------
    arms : mapping of str to callable
        What is timed.
    rounds : int
        Rounds that count; one more goes first, for warm file caches and finished imports.
    before : mapping of str to callable, optional
        What puts an arm into its state, not timed.
    expected : mapping, optional
        What an arm must return: a fast wrong answer is no result.

    Returns
    -------
    dict of str to Times
    """
    times = {name: Times() for name in arms}
    for round_ in range(rounds + 1):
        for name, arm in arms.items():
            if before and name in before:
                before[name]()
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            result = arm()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if expected and name in expected and result != expected[name]:
                raise AssertionError(f"{name} gave {result!r}, not {expected[name]!r}")
            if round_:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Return ours / peer, round by round: what slowed a whole round cancels."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


def span(values: Sequence[float], unit: str = "") -> str:
    """Return median and range as text, such as ``0.31 s (0.30-0.35)``."""
    return f"{median(values):.3g}{unit} ({min(values):.3g}-{max(values):.3g})"


def row(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    target: float | None,
    *,
    at_most: bool = True,
    note: str = "",
) -> dict[str, Any]:
    """Return a row of results.

    Parameters
    ----------
    name : str
        What is compared.
    ours, peer : sequence of float
        Measured in the same rounds.
    target : float or None
        Of ours / peer if `at_most`, else the least of peer / ours; None: for information.
    at_most : bool, default=True
        Which of the two.
    note : str
        Conditions that the reader must know.

    Returns
    -------
    dict
        ``name ours peer ratio target met note``; `ratio` is the median over rounds.
    """
    ratio = median(ratios(ours, peer) if at_most else ratios(peer, ours))
    return {
        "name": name,
        "ours": span(ours),
        "peer": span(peer),
        "ratio": ratio,
        "target": "" if target is None else f"{'<=' if at_most else '>='} {target:g}",
        "met": "" if target is None else ratio <= target if at_most else ratio >= target,
        "note": note,
    }


def skipped(name: str, peer: str) -> dict[str, Any]:
    """Return a row that says that a peer is not installed."""
    empty = dict.fromkeys(("ours", "peer", "ratio", "target", "met"), "")
    return {"name": name, **empty, "note": f"{peer} is not installed"}


@functools.cache  # not to be looked for at each image
def nidl_transforms(part: str) -> Any:
    """Return nidl's transforms of volumes: its module ``augmentation`` or ``preprocessing``."""
    try:
        return importlib.import_module(f"nidl.transforms.volume.{part}")
    except ImportError:  # nidl 0.0.2, where nidl.transforms is no package
        return importlib.import_module(f"nidl.volume.transforms.{part}")


def machine(*packages: str) -> str:
    """Return processor, cores, load, system and versions in one line.

    Parameters
    ----------
    *packages : str
        Whose versions are told.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    told = [f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"]
    told += [platform.system(), f"Python {platform.python_version()}"]
    for package in packages:
        try:
            told.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            told.append(f"{package} not installed")
    return ", ".join(told)


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Print rows under their columns as a Markdown table.

    Parameters
    ----------
    rows : sequence of mapping
        As from `row`.
    columns : sequence of str, optional
        Default: those of the first row.
    """
    if not rows:
        return
    heads = list(columns or rows[0])
    cells = [heads] + [[_text(line.get(head, "")) for head in heads] for line in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    for number, line in enumerate(cells):
        filled = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(filled)} |")
        if number == 0:
            print(f"|{'|'.join('-' * (width + 2) for width in widths)}|")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

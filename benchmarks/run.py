"""Run the benchmarks one after another and write their rows to RESULTS.md.

    python benchmarks/run.py [NAME ...]

With names, only those are run, and their tables alone are replaced.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import re
import sys
import time
from pathlib import Path

import measure

NAMES = (
    "views",
    "loss",
    "reading",
    "training",
    "embedding",
    "index",
    "scale",
    "growth",
    "starting",
    "quality",
)
PACKAGES = ("torch", "monai", "lightning", "nibabel", "pybids", "isal", "numpy", "nidl", "lightly")
RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = """\
# Results

Written by `make bench`. Arms are timed in turn in one run; a ratio is the median over rounds, a time
the median with its range; processor time unless said, one thread unless said. A target is that of
the project; a row without one is for comparison. Peers that are not installed are skipped
(`make bench-peers` makes an environment with them). Quality is measured where `NIDL_DCL_IXI` names
a dataset with age and sex; it trains many networks and takes long.
"""


def main(names: list[str]) -> None:
    """Run benchmarks and write the results."""
    parts: dict[str, str] = {}
    if RESULTS.is_file():
        found = re.split(r"(?m)^## (\w+)\n", RESULTS.read_text("utf-8"))
        parts = dict(zip(found[1::2], found[2::2], strict=True))
    for name in names or NAMES:
        print(f"==> {name}", flush=True)
        module = importlib.import_module(name)
        start = time.monotonic()
        rows = module.main()
        table = io.StringIO()
        with contextlib.redirect_stdout(table):
            measure.print_table(rows)
        print(table.getvalue(), flush=True)
        told = (module.__doc__ or "").split("\n\n")
        about = [part for part in told if not part.startswith("    python")]
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        where = f"{date}, {time.monotonic() - start:.0f} s. {measure.machine(*PACKAGES)}."
        parts[name] = "\n".join(
            ["", *(p.strip() + "\n" for p in about), table.getvalue(), where, "", ""]
        )
        ordered = [f"## {n}\n{parts[n]}" for n in NAMES if n in parts]
        RESULTS.write_text(HEAD + "\n" + "".join(ordered).rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

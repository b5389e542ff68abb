"""How long `import nidl_dcl` and `nidl-dcl --help` take, in processes of their own.

    python benchmarks/starting.py

What Python itself takes to start is told beside them, and is in the second.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import measure

IMPORT = "import time; t = time.perf_counter(); import nidl_dcl; print(time.perf_counter() - t)"


def _run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


def main(rounds: int = 9) -> list[dict[str, Any]]:
    imports: list[float] = []

    def import_() -> None:
        imports.append(float(_run("-c", IMPORT)))

    arms = {
        "import": import_,
        "help": lambda: _run("-m", "nidl_dcl", "--help") and None,
        "python": lambda: _run("-c", "pass") and None,
    }
    times = measure.interleave(arms, rounds)
    one = [1.0] * rounds
    return [
        measure.row("import nidl_dcl (s)", imports[1:], one, 0.3, note="a limit in seconds"),
        measure.row("nidl-dcl --help (s)", times["help"].wall, one, 0.6, note="a limit in seconds"),
        measure.row("python -c pass (s)", times["python"].wall, one, None, note="for comparison"),
    ]


if __name__ == "__main__":
    measure.print_table(main())

"""Run the official BIDS validator on an output folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from nidl_dcl.errors import NidlDclError, UsageError


def validate(folder: Path) -> None:
    """Run the official BIDS validator on an output folder.

    Raises
    ------
    UsageError
        When it is not installed.
    NidlDclError
        When it reports errors.
    """
    found = shutil.which("bids-validator-deno") or shutil.which(
        "bids-validator-deno", path=str(Path(sys.executable).parent)
    )
    if found is None:
        raise UsageError("--validate needs the package bids-validator-deno: pip install it.")
    done = subprocess.run(
        [found, str(folder), "--format", "json"], capture_output=True, text=True, check=False
    )
    try:
        issues = json.loads(done.stdout)["issues"]["issues"]
    except (ValueError, KeyError, TypeError) as error:
        raise NidlDclError(f"The BIDS validator failed: {done.stderr.strip()[-500:]}") from error
    errors = [issue for issue in issues if issue.get("severity") == "error"]
    if errors:
        first = errors[0]
        raise NidlDclError(
            f"The BIDS validator reports {len(errors)} errors in {folder}, first "
            f"{first.get('code')} at {first.get('location')}."
        )

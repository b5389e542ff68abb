"""The record of a run: ``logs/run.json`` with command, options, versions, stages and exit status."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nidl_dcl
from nidl_dcl.errors import describe, exit_status
from nidl_dcl.io.formats import read_json, utc_now, write_json
from nidl_dcl.models.serialization import versions

_MOST_EARLIER = 50
"""Earlier commands that ``logs/run.json`` lists."""


class RunRecord:
    """What a command with some options did, kept true while it runs; `content` goes to the file."""

    def __init__(self, command: Sequence[str], config: Mapping[str, Any] | None = None) -> None:
        self.content: dict[str, Any] = {
            "command": list(command),
            "config": dict(config or {}),
            "versions": versions(),
            "commit": _commit(Path(nidl_dcl.__file__).resolve().parent.parent),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": utc_now(),
            "log": None,
            "stages": [],
            "exit_status": None,
            "earlier": [],
        }

    def follow_earlier(self, file: Path) -> None:
        """List the commands of an earlier record, oldest first; nothing if it is damaged."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            before = read_json(file)
            last = {name: before[name] for name in ("command", "started", "stages", "exit_status")}
            self.content["earlier"] = [*before["earlier"], last][-_MOST_EARLIER:]

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Record a stage: name, start, seconds, the step it resumed from, whether it was skipped."""
        entry: dict[str, Any] = {
            "name": name,
            "started": utc_now(),
            "seconds": None,
            "resumed_from_step": None,
            "skipped": False,
        }
        self.content["stages"].append(entry)
        start = time.monotonic()
        try:
            yield entry
        finally:
            entry["seconds"] = round(time.monotonic() - start, 2)

    def end(self, error: BaseException | None = None) -> None:
        """Note how the command ended."""
        self.content["exit_status"] = 0 if error is None else exit_status(error)
        if error is not None:
            self.content["error"] = describe(error)

    def save(self, file: Path) -> None:
        """Write the record."""
        write_json(file, self.content)


def _commit(folder: Path) -> str | None:
    """Return the Git commit of a source tree, ``-dirty`` when files differ; None elsewhere."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    return None

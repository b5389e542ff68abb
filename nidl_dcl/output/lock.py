"""One writer per folder: a lock file that says who holds it, on local and on network disks.

The file is made in one step that every file system knows (exclusive creation), since advisory locks
often do not reach from one node of a cluster to another. It names the holder (host, process, start)
and is touched again and again while the holder lives, so that a lock left by a dead process is told
from a living one.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nidl_dcl.errors import OutputInUseError

_LOGGER = logging.getLogger(__name__)

BEAT = 15.0
"""Seconds between two signs of life of a holder."""

STALE = 120.0
"""Seconds without one after which the holder on another machine counts as dead."""

_TAKING = 60.0
"""Seconds after which the taking over of a stale lock counts as broken off."""


@dataclass(frozen=True)
class _Holder:
    host: str
    machine: str
    pid: int
    started: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """A lock file, in a folder that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.own = _Holder(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), "")
        self._ended = threading.Event()
        self._lost = False

    def acquire(self) -> None:
        """Take the lock.

        A dead holder is recognized: on the same machine by its process, which is gone or another
        one under the same number; elsewhere by `STALE` seconds without a sign of life, which are
        waited for where the last sign is late.

        Raises
        ------
        OutputInUseError
            Naming the living holder.
        """
        is_waiting = False
        while not self._try():
            holder, silent = self._read()
            if silent is None:
                continue  # released just now
            alive = None if holder is None else _is_alive(holder)
            late = 1.5 * BEAT < silent <= STALE
            if alive is False or (silent > STALE and alive is None):
                self._take_over(holder)
            elif alive is None and late:
                if not is_waiting:
                    _LOGGER.info(
                        f"{self.path.parent} is held by {holder or 'another run'}, silent for "
                        f"{silent:.0f} s: waiting for a sign of life, {STALE - silent:.0f} s at most."
                    )
                is_waiting = True
                time.sleep(min(1.0, BEAT / 4))
            elif holder is None and silent < 5:
                time.sleep(0.05)  # made, not yet written
            else:
                raise OutputInUseError(
                    f"{self.path.parent} is being written by {holder or 'another run'}. Wait for "
                    "it, or choose another OUTPUT_DIR."
                )
        threading.Thread(target=self._live, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        with suppress(OSError):  # a folder that is gone has no lock
            if self._is_own():
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise OutputInUseError if another run took this lock, as this one was silent too long."""
        if self._lost:
            holder, _ = self._read()
            raise OutputInUseError(
                f"{self.path.parent} was taken over by {holder or 'another run'} while this run was "
                f"suspended for more than {STALE:.0f} s; it writes nothing more."
            )

    # -- parts -------------------------------------------------------------------------------

    def _try(self) -> bool:
        self.own = replace(self.own, token=secrets.token_hex(8))
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(self.own)) + "\n")
        return True

    def _read(self) -> tuple[_Holder | None, float | None]:
        """Return who holds the lock, and for how long there was no sign of life; None: released."""
        try:
            # Opening asks a network file system for the times as they are now.
            with self.path.open(encoding="utf-8") as stream:
                text, touched = stream.read(4096), os.fstat(stream.fileno()).st_mtime
        except FileNotFoundError:
            return None, None
        except UnicodeDecodeError:
            text, touched = "", self.path.stat().st_mtime
        holder = None
        with suppress(ValueError, TypeError):
            holder = _Holder(**json.loads(text))
        return holder, max(0.0, self._now() - touched)

    def _now(self) -> float:
        """Return the time by the clock that stamps files, which may be a server's."""
        probe = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        try:
            probe.touch(exist_ok=False)
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _take_over(self, stale: _Holder | None) -> None:
        """Remove a dead holder's lock, if it is still there; one process at a time does so."""
        claim = self.path.with_name(f"{self.path.name}.stale")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            with suppress(FileNotFoundError):
                if self._now() - claim.stat().st_mtime > _TAKING:
                    claim.unlink()
            time.sleep(0.05)
            return
        try:
            holder, _ = self._read()
            if holder == stale:
                _LOGGER.info(
                    f"The lock of {stale or 'an earlier run'}, which has ended, is taken over."
                )
                self.path.unlink(missing_ok=True)
        finally:
            claim.unlink(missing_ok=True)

    def _is_own(self) -> bool:
        return self._read()[0] == self.own

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                if not self._is_own():
                    self._lost = True
                    return
                os.utime(self.path)


@contextmanager
def held(path: Path) -> Iterator[Lock]:
    """Hold a lock file for the length of a block; see `Lock.acquire`."""
    lock = Lock(path)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def _is_alive(holder: _Holder) -> bool | None:
    """Return whether a holder lives; None where this machine cannot tell."""
    if (holder.host, holder.machine) != (socket.gethostname(), _machine()):
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    started = _started(holder.pid)
    return None if not (started and holder.started) else started == holder.started


def _machine() -> str:
    """Return what tells process numbers apart: the start of the machine and, in it, the container."""
    found = ""
    with suppress(OSError):
        found = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        found += " " + os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    return found


def _started(pid: int) -> str:
    """Return when a process started, in ticks since the machine did; empty where unknown."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return ""
    fields = status.rpartition(")")[2].split()
    # A zombie has ended, though its number is not free yet.
    return "ended" if fields[0] in "ZX" else fields[19]

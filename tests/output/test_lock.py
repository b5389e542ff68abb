from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nidl_dcl.errors import OutputInUseError
from nidl_dcl.output import lock
from nidl_dcl.output.lock import Lock, held


def ended() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(path: Path, *, silent: float = 0, **changes: Any) -> None:
    """Write the lock of another holder, who gave the last sign of life `silent` seconds ago."""
    with held(path):
        holder = json.loads(path.read_text())
    path.write_text(json.dumps({**holder, "token": "theirs", **changes}))
    then = time.time() - silent
    os.utime(path, (then, then))


def test_the_second_is_refused_with_the_holders_name_and_the_file_goes_at_the_end(
    tmp_path: Path,
) -> None:
    path = tmp_path / ".lock"
    with held(path):
        with pytest.raises(OutputInUseError, match=f"process {os.getpid()} on"):
            Lock(path).acquire()
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    with held(path):
        pass


@pytest.mark.parametrize("silent", [0, 10_000])
def test_a_dead_process_of_this_machine_holds_nothing(
    silent: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nidl_dcl")
    write(tmp_path / ".lock", pid=ended(), silent=silent)
    with held(tmp_path / ".lock") as mine:
        assert json.loads(mine.path.read_text())["pid"] == os.getpid()
    assert "taken over" in caplog.messages[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_process_that_got_a_dead_ones_number_is_not_the_holder(tmp_path: Path) -> None:
    write(tmp_path / ".lock", pid=os.getppid(), started="17")
    with held(tmp_path / ".lock"):
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_living_process_of_this_machine_keeps_the_lock_however_silent(tmp_path: Path) -> None:
    write(tmp_path / ".lock", silent=10_000)
    with pytest.raises(OutputInUseError), held(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("other", [{"host": "node7"}, {"machine": "another boot"}])
def test_a_holder_on_another_machine_lives_by_its_signs(
    other: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / ".lock"
    write(path, silent=1, pid=ended(), **other)
    with pytest.raises(OutputInUseError):
        Lock(path).acquire()
    write(path.with_name(".other"), silent=lock.STALE + 1, **other)
    with held(path.with_name(".other")):
        pass


def test_a_late_sign_of_life_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nidl_dcl")
    monkeypatch.setattr(lock, "BEAT", 0.5)
    monkeypatch.setattr(lock, "STALE", 3.0)
    path = tmp_path / ".lock"
    write(path, host="node7", silent=1.0)
    touching = threading.Timer(0.3, lambda: os.utime(path))
    touching.start()
    with pytest.raises(OutputInUseError, match="node7"):
        Lock(path).acquire()
    touching.join()
    assert "waiting for a sign of life" in caplog.messages[0]
    os.utime(path, (time.time() - 1,) * 2)
    start = time.monotonic()
    with held(path):  # no further sign comes
        assert 1 < time.monotonic() - start < 10


def test_a_holder_gives_signs_of_life_and_notices_that_it_lost_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path = tmp_path / ".lock"
    with held(path) as mine:
        os.utime(path, (0, 0))
        time.sleep(0.4)
        assert path.stat().st_mtime > 0
        mine.check()
        text = path.read_text().replace(mine.own.token, "theirs")
        path.write_text(text)
        time.sleep(0.4)
        with pytest.raises(OutputInUseError, match="taken over by"):
            mine.check()
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["", "process 12 on node7\n", "[]", '{"pid": 3}', "\xff\xfe"])
def test_a_file_that_names_nobody_holds_for_as_long_as_one_on_another_machine(
    text: str, tmp_path: Path
) -> None:
    path = tmp_path / ".lock"
    path.write_text(text, encoding="latin-1")
    os.utime(path, (time.time() - 10,) * 2)
    with pytest.raises(OutputInUseError, match="another run"):
        Lock(path).acquire()
    os.utime(path, (time.time() - lock.STALE - 1,) * 2)
    with held(path):
        pass


def test_of_many_who_find_a_stale_lock_one_at_a_time_gets_it(tmp_path: Path) -> None:
    path, inside, most, got = tmp_path / ".lock", [], [], []
    write(path, pid=ended())
    start = threading.Barrier(12)

    def work() -> None:
        start.wait()
        for _ in range(400):
            try:
                with held(path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.005)
                    inside.pop()
                got.append(1)
                return
            except OutputInUseError:
                time.sleep(0.01)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 12
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_taking_over_that_was_broken_off_stops_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_TAKING", 0.2)
    write(tmp_path / ".lock", pid=ended())
    (tmp_path / ".lock.stale").touch()
    with held(tmp_path / ".lock"):
        pass

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time

import pytest

from nidl_dcl.io.file_cache import FileMemory, file_status


@pytest.fixture
def file(tmp_path):
    """Return a file that changed an hour ago, as far as its times tell."""
    path = tmp_path / "image.nii"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def settled(monkeypatch):
    """Let an hour pass: what was written is no longer fresh."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3600 * 10**9)


def test_a_file_is_read_once_while_it_does_not_change(file, tmp_path, settled, monkeypatch):
    digest = hashlib.sha256(b"one").hexdigest()
    memory = FileMemory(tmp_path / "files.json")
    assert memory.sha256(file) == digest
    memory.save()
    monkeypatch.setattr(hashlib, "file_digest", None)  # reading again would fail
    assert memory.sha256(file) == digest
    assert FileMemory(tmp_path / "files.json").sha256(file) == digest


def test_a_changed_file_is_read_again_with_one_warning(file, tmp_path, settled):
    memory = FileMemory(tmp_path / "files.json")
    memory.sha256(file)
    memory.note(file, file_status(file), "check", "fine")
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync does
    assert memory.recall(file, "check") is None
    with pytest.warns(UserWarning, match=r"image\.nii has changed") as warned:
        assert memory.sha256(file) == hashlib.sha256(b"two").hexdigest()
    assert len(warned) == 1
    assert memory.recall(file, "check") is None


def test_a_file_with_new_times_and_the_same_content_is_no_change(file, settled):
    memory = FileMemory()
    digest = memory.sha256(file)
    os.utime(file, (1, 1))
    assert memory.sha256(file) == digest


def test_what_is_fresh_is_not_kept_for_the_next_process(file, tmp_path):
    memory = FileMemory(tmp_path / "files.json")
    memory.sha256(file)
    memory.save()
    assert memory.recall(file, "sha256") is not None
    assert FileMemory(tmp_path / "files.json").recall(file, "sha256") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1}', b'{"a": [[], []]}', b"[" * 100_000, b"null"],
)
def test_a_damaged_memory_is_an_empty_one(content, file, tmp_path):
    (tmp_path / "files.json").write_bytes(content)
    memory = FileMemory(tmp_path / "files.json")
    assert memory.sha256(file) == hashlib.sha256(b"one").hexdigest()
    memory.save()


def test_it_follows_into_other_processes(file, settled):
    memory = FileMemory()
    memory.sha256(file)
    copy = pickle.loads(pickle.dumps(memory))
    assert copy.recall(file, "sha256") == memory.sha256(file)


def test_it_saves_itself_now_and_then(file, tmp_path, settled, monkeypatch):
    memory = FileMemory(tmp_path / "files.json")
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start + 60)
    memory.sha256(file)
    assert str(file) in json.loads((tmp_path / "files.json").read_text())

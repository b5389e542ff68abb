from __future__ import annotations

import errno
import multiprocessing
import shutil
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import brain, image, save

from nidl_dcl.errors import NoRoomError
from nidl_dcl.io.file_cache import FileMemory
from nidl_dcl.volumes import cache as prepared
from nidl_dcl.volumes.cache import PreparedVolumes, check_files, thread_map
from nidl_dcl.volumes.preparation import Origin, Preparation, prepare_volume

RULES = Preparation((8, 8, 8), (8, 8, 8))


@pytest.fixture
def images(tmp_path):
    return [save(tmp_path / f"{i}.nii.gz", brain()[0] * (1 + i) + i) for i in range(3)]


@pytest.fixture
def count(monkeypatch):
    """Count how often volumes are prepared."""
    counter = Counter()

    def counted(*args):
        counter["prepared"] += 1
        return prepare_volume(*args)

    monkeypatch.setattr(prepared, "prepare_volume", counted)
    return counter


def volumes(images, folder, rules=RULES, masks=None, memory=None):
    return PreparedVolumes(images, masks or [None] * len(images), rules, folder, memory)


def entries(folder):
    return sorted(folder.rglob("*.f2"))


def test_the_cache_changes_no_bit(images, tmp_path):
    cached, plain = volumes(images, tmp_path / "cache"), volumes(images, None)
    for i in range(3):
        first, again = cached[i], cached[i]
        assert first.dtype == again.dtype == torch.float32
        assert first.shape == again.shape == (1, 8, 8, 8)
        assert torch.equal(first, plain[i])
        assert torch.equal(again, plain[i])
    again.zero_()  # a reader's own copy
    assert torch.equal(cached[2], plain[2])


def test_filling_makes_what_is_missing_and_counts_it(images, tmp_path, count):
    made = volumes(images, tmp_path / "cache")
    assert made.missing() == [0, 1, 2]
    assert list(made.fill(2)) == [(1, 3), (2, 3), (3, 3)]
    assert made.missing() == []
    assert list(made.fill(2)) == []
    assert count["prepared"] == 3
    assert all(entry.stat().st_size == made.entry_bytes for entry in entries(tmp_path / "cache"))


def test_an_interrupted_filling_goes_on(images, tmp_path, count):
    with closing(volumes(images, tmp_path / "cache").fill()) as filling:
        next(filling)
    assert volumes(images, tmp_path / "cache").missing() == [1, 2]
    assert list(volumes(images, tmp_path / "cache").fill()) == [(1, 2), (2, 2)]
    assert count["prepared"] == 3


def test_an_entry_belongs_to_content_and_not_to_a_path(images, tmp_path, count):
    made = volumes(images, tmp_path / "cache")
    list(made.fill())
    moved = [shutil.copy(path, tmp_path / f"moved-{path.name}") for path in images]
    assert volumes(list(map(Path, moved)), tmp_path / "cache").missing() == []
    assert count["prepared"] == 3


def test_an_overwritten_image_gets_another_entry_with_one_warning(images, tmp_path):
    made = volumes(images, tmp_path / "cache")
    list(made.fill())
    before = made[1]
    save(images[1], brain()[0][::-1])
    with pytest.warns(UserWarning, match="has changed"):
        after = made[1]
    assert not torch.equal(before, after)
    assert torch.equal(after, volumes(images, None)[1])


@pytest.mark.parametrize(
    "other",
    [
        Preparation((9, 8, 8), (8, 8, 8)),
        Preparation((8, 8, 8), (8, 8, 9)),
        Preparation((8, 8, 8), (8, 8, 8), intensity="signed"),
    ],
)
def test_other_rules_have_other_entries(other, images, tmp_path):
    list(volumes(images, tmp_path / "cache").fill())
    assert len(volumes(images, tmp_path / "cache", other).missing()) == 3


def test_where_images_come_from_is_no_rule(images, tmp_path):
    list(volumes(images, tmp_path / "cache").fill())
    told = Preparation((8, 8, 8), (8, 8, 8), origin=Origin("T1w", "native"))
    assert volumes(images, tmp_path / "cache", told).missing() == []


def test_another_mask_has_another_entry(images, tmp_path):
    rules = Preparation((8, 8, 8), (8, 8, 8), masked=True)
    mask = tmp_path / "mask.nii.gz"
    image(brain()[1], dtype=np.uint8).to_filename(mask)
    made = volumes(images, tmp_path / "cache", rules, [mask] * 3)
    list(made.fill())
    smaller = brain()[1].copy()
    smaller[:20] = False
    image(smaller, dtype=np.uint8).to_filename(mask)
    with pytest.warns(UserWarning, match="mask"):
        assert len(made.missing()) == 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "long", "empty"])
def test_a_damaged_entry_is_made_again_with_one_warning(damage, images, tmp_path):
    made = volumes(images[:1], tmp_path / "cache")
    list(made.fill())
    (entry,) = entries(tmp_path / "cache")
    whole = entry.read_bytes()
    broken = bytearray(whole)
    broken[17] ^= 4
    entry.write_bytes(
        {"flipped": bytes(broken), "cut": whole[:-1], "long": whole + b"x", "empty": b""}[damage]
    )
    with pytest.warns(UserWarning, match="is damaged; it is made again") as warned:
        volume = made[0]
    assert len(warned) == 1
    assert torch.equal(volume, volumes(images, None)[0])
    assert entry.read_bytes() == whole


def test_without_isal_the_entries_are_the_same(images, tmp_path, monkeypatch):
    list(volumes(images, tmp_path / "cache").fill())
    monkeypatch.setattr(prepared, "_crc32", prepared.zlib.crc32)
    made = volumes(images, tmp_path / "cache")
    assert torch.equal(made[0], volumes(images, None)[0])  # a warning would be an error


def test_too_little_room_is_said_before_anything_is_written(images, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_free", lambda folder: 1000)
    made = volumes(images, tmp_path / "cache")
    with pytest.raises(NoRoomError, match=r"cache: 3 prepared volumes .* --work-dir"):
        list(made.fill())
    assert not entries(tmp_path / "cache")


def test_a_disk_that_runs_full_is_one_message_and_a_sound_cache(images, tmp_path, monkeypatch):
    real = prepared.write_bytes
    room = iter([True, False])

    def write(path, data, **options):
        if next(room):
            return real(path, data, **options)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(prepared, "write_bytes", write)
    with pytest.raises(NoRoomError, match="2 prepared volumes") as caught:
        list(volumes(images, tmp_path / "cache").fill())
    assert caught.value.exit_status == 1
    monkeypatch.undo()
    made = volumes(images, tmp_path / "cache")
    assert made.missing() == [1, 2]
    assert torch.equal(made[0], volumes(images, None)[0])


def _fill(arguments):
    list(volumes(*arguments).fill(2))


@pytest.mark.slow
def test_several_processes_may_fill_one_cache(images, tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(_fill, [(images, tmp_path / "cache")] * 2)
    made = volumes(images, tmp_path / "cache")
    assert made.missing() == []
    assert len(entries(tmp_path / "cache")) == len(list((tmp_path / "cache").rglob("*.*"))) == 3
    assert all(torch.equal(made[i], volumes(images, None)[i]) for i in range(3))


def test_checks_are_remembered_until_a_file_changes(images, tmp_path, monkeypatch):
    memory = FileMemory()
    first = list(check_files(images, memory, intensity="robust", workers=2))
    assert [check.status for check in first] == ["ok"] * 3
    opened = []
    real = prepared.look_at
    monkeypatch.setattr(
        prepared, "look_at", lambda path, **more: opened.append(path) or real(path, **more)
    )
    save(images[1], np.zeros((16, 16, 16)))
    again = list(check_files(images, memory, intensity="robust"))
    assert opened == [images[1]]
    assert [check.code for check in again] == ["ok", "constant", "ok"]
    assert again[0].content == first[0].content != again[2].content
    assert again[0].coarsest == 2.0


def test_a_memory_of_another_shape_is_not_believed(images):
    memory = FileMemory()
    list(check_files(images, memory, intensity="robust"))
    for entry in memory._known.values():
        entry[1][f"check {prepared.FORMAT} robust"] = {"status": "ok", "nonsense": 1}
    assert [c.code for c in check_files(images, memory, intensity="robust")] == ["ok"] * 3


def test_an_interrupted_check_keeps_what_it_found(images, tmp_path, monkeypatch):
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3600 * 10**9)
    with closing(
        check_files(images, FileMemory(tmp_path / "files.json"), intensity="robust")
    ) as checks:
        next(checks)
    known = FileMemory(tmp_path / "files.json")
    assert known.recall(images[0], f"check {prepared.FORMAT} robust")["status"] == "ok"
    assert known.recall(images[2], f"check {prepared.FORMAT} robust") is None


def test_threads_begin_nothing_after_the_caller_stopped():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.01)
        return number

    with closing(thread_map(work, range(1000), 2)) as results:
        assert next(results) == 0
    assert len(begun) < 100


def test_threads_give_results_in_order():
    assert list(thread_map(lambda i: i * i, range(5), 3)) == [0, 1, 4, 9, 16]

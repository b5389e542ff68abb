"""Studies that are killed, and disks that fail, at each stage: nothing is lost, all is said."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import TWO_EPOCHS, give
from soak import Study

from nidl_dcl.models.callbacks import TrainingCurve, latest_valid_checkpoint

pytestmark = pytest.mark.slow

SMALL = TWO_EPOCHS


@pytest.fixture
def whole(studied: Path, heads_made: Path) -> Study:
    """Return a study that nothing disturbed; no test may change it."""
    return Study(heads_made, studied, ("--target", "age", "sex", *SMALL))


@pytest.fixture
def copied(whole: Study, tmp_path: Path) -> Path:
    """Return a copy of its output, to be changed."""
    return shutil.copytree(whole.out, tmp_path / "out", copy_function=shutil.copy2)


def contents(folder: Path) -> dict[str, str]:
    """Return the checksum of every file but logs of runs and their record."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and not path.match("logs/*.log")
        and path.name not in ("run.json", ".lock")
    }


def last_line(folder: Path) -> str:
    """Return the last line of the newest log."""
    newest = max((folder / "logs").glob("*.log"), key=lambda file: file.stat().st_mtime_ns)
    return newest.read_text().splitlines()[-1]


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_as_one_that_is_not(
    heads_made: Path, tmp_path: Path
) -> None:
    options = ("--target", "age", "--spacing", "8", "--max-epochs", "20", "--batch-size", "4")
    whole = Study(heads_made, tmp_path / "whole", options)
    assert give("study", heads_made, whole.out, *options) == 0
    study = Study(heads_made, tmp_path / "out", (*whole.options, "--nprocs", "2"))
    dice = random.Random(11)
    plan = [("train", "group"), ("train", "worker")]
    for stage, way in plan:
        study.kill(stage, way, dice.random())
    assert give("study", heads_made, study.out, *study.options) == 0
    study.check_against(whole)
    assert any(study.resumed())


# -- between write and rename ------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_power_cut_between_write_and_rename_leaves_the_old_file_and_what_is_left_is_removed(
    moment: str, tmp_path: Path
) -> None:
    from nidl_dcl.io.atomic import remove_stale

    file = tmp_path / "results.json"
    file.write_text("old")
    script = f"""
        import os, pathlib
        from nidl_dcl.io.formats import write_text
        gone = lambda *args: os._exit(9)
        if {moment!r} == "fsync": os.fsync = gone
        else: pathlib.Path.replace = gone
        write_text(pathlib.Path({str(file)!r}), "new" * 1000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == 9
    assert file.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {file}
    assert left.name.endswith(".part")
    os.utime(left, (time.time() - 5,) * 2)
    assert remove_stale([tmp_path]) == [left]
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nidl_dcl.io.formats import write_text

    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name[-5:])
        sync(handle)

    def rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write_text(tmp_path / "a.txt", "text")
    assert done == [".part", "rename", tmp_path.name[-5:]]


def test_the_temporary_file_of_a_writer_that_lives_is_not_removed(tmp_path: Path) -> None:
    from nidl_dcl.io.atomic import remove_stale, replacing

    with replacing(tmp_path / "file") as beside:
        beside.write_text("new")
        os.utime(beside, (0, 0))
        assert remove_stale([tmp_path]) == []
    assert (tmp_path / "file").read_text() == "new"


def test_files_that_are_written_together_are_all_old_or_all_new_wherever_the_writer_is_killed(
    tmp_path: Path,
) -> None:
    from nidl_dcl.io.atomic import finish_together, write_together

    seen = set()
    for allowed in range(40):
        folder = tmp_path / str(allowed)
        write_together(folder, "set", {"a": b"old a", "b": b"old b"})
        script = f"""
            import os, pathlib
            from nidl_dcl.io.atomic import write_together
            left, replace = [{allowed}], pathlib.Path.replace
            def rename(self, target):
                left[0] -= 1
                if left[0] < 0: os._exit(9)
                return replace(self, target)
            pathlib.Path.replace = rename
            write_together(pathlib.Path({str(folder)!r}), "set", {{"a": b"new a", "b": b"new b"}})
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
        finish_together(folder, "set")
        state = (folder / "a").read_bytes(), (folder / "b").read_bytes()
        assert state in ((b"old a", b"old b"), (b"new a", b"new b"))
        seen.add(state)
        write_together(folder, "set", {"a": b"newest", "b": b"newest"})
        assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]
        if done.returncode == 0:
            break
    assert len(seen) == 2
    assert allowed == 5  # two files, the folder, and two files to their places


@pytest.mark.slow
@pytest.mark.parametrize("after", ["_embeddings.npy", "Age_metrics.json", ".svg"])
def test_a_study_killed_between_two_files_of_a_stage_writes_the_others_when_it_goes_on(
    after: str,
    whole: Study,
    copied: Path,
    heads_made: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = ("desc-dcl_embeddings.*", "desc-dclAge_*", "figures/embedding_2d.*", "figures/*.svg")
    for pattern in lost:
        for file in copied.glob(pattern):
            file.unlink()
    replace = Path.replace
    killed: list[str] = []

    def stop(self: Path, target: Path) -> Path:
        done = replace(self, target)
        if str(target).endswith(after) and ".making" not in str(target) and not killed:
            killed.append(str(target))
            raise SystemExit(143)
        return done

    monkeypatch.setattr(Path, "replace", stop)
    words = ("study", heads_made, copied, *whole.options)
    assert run(*words).status == 143
    assert killed
    assert run(*words).status == 0
    assert Study(heads_made, copied).digests() == whole.digests()
    newest = max(p.stat().st_mtime_ns for p in (*copied.glob("desc-*"), *copied.glob("figures/*")))
    assert (copied / "report.html").stat().st_mtime_ns >= newest
    assert (copied / "figures" / "embedding_2d.tsv").is_file()


# -- checkpoints and the curve -----------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "no note", "odd note", "other bytes"])
def test_a_damaged_last_checkpoint_is_said_and_the_one_before_is_used(
    damage: str, tmp_path: Path
) -> None:
    from nidl_dcl.models.callbacks import AtomicCheckpointIO

    files = [tmp_path / f"step-{step:08d}.ckpt" for step in (4, 8)]
    for file in files:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(100)}, file)
    note = files[1].with_suffix(".sha256")
    raw = files[1].read_bytes()
    if damage == "cut":
        files[1].write_bytes(raw[:-10])
    elif damage == "empty":
        files[1].write_bytes(b"")
    elif damage == "no note":
        note.unlink()
    elif damage == "odd note":
        note.write_bytes(b"\xff\xfe")
    else:
        files[1].write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    (tmp_path / "step-last.ckpt").write_text("a file of somebody")
    said: list[str] = []
    assert latest_valid_checkpoint(tmp_path, said.append) == files[0]
    assert len(said) == 1
    assert str(files[1]) in said[0]
    assert "damaged" in said[0]


CURVE = (
    "epoch,step,loss/train,loss/val,learning_rate,alignment,uniformity,effective_rank,collapse_loss"
)
ROW = "{0},{0},1.5,n/a,0.001,1,-1,3.5,2"


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", []),
        (b"\x00\xff" * 300_000, []),
        (CURVE.encode(), []),
        (f"{CURVE}\n{ROW.format(1)}\n{ROW.format(2)}\n".encode(), [1, 2]),
        (f"{CURVE}\n{ROW.format(1)}\n{ROW.format(2)[:-2]}".encode(), [1]),
        (f"{CURVE}\n{ROW.format(1)}\n{ROW.format(2)}\n2,3".encode(), [1, 2]),
        (f"{CURVE}\n{ROW.format(1)}\n{ROW.format(1)}\n{ROW.format(3)}\n".encode(), [1]),
        (f"{CURVE}\n{ROW.format(1)}\n".encode() + b"\x00" * 50, [1]),
        (f"{CURVE}\n{ROW.format('x')}\n{ROW.format(2)}\n".encode(), [2]),
        (b"epoch,step\n1,2\n", []),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_damaged_training_curve_stops_no_training_and_no_epoch_is_there_twice(
    content: bytes, kept: list[int], tmp_path: Path
) -> None:
    trainer = SimpleNamespace(
        is_global_zero=True,
        callback_metrics={"loss/train": torch.tensor(0.5)},
        current_epoch=2,
        global_step=3,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.001}])],
    )
    file = tmp_path / "metrics.csv"
    file.write_bytes(content)
    TrainingCurve(file).on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    table = pd.read_csv(file)
    assert list(table["epoch"]) == [*kept, 3]
    assert ",".join(table.columns) == CURVE
    assert list(tmp_path.iterdir()) == [file]


# -- disks that fail ---------------------------------------------------------------------------

WRITES = {
    "cache": (".work/volumes", "*.f2"),
    "checkpoint": ("models", "*/step-*.ckpt"),
    "curve": ("models", "*/metrics.csv"),
    "weights": ("models", "*/weights.safetensors"),
    "embeddings": ("desc-dcl_embeddings.npy", "*_embeddings.ready"),
    "metrics": ("desc-dclAge_metrics.json", "*Age_metrics.json"),
    "figure": ("figures", "*/figures/*.svg"),
    "report": ("report.html", "*/report.html"),
    "inputs": ("logs/inputs.tsv", "*/inputs.tsv"),
    "record": ("report.html", "*/run.json"),
}
IN_PRETRAINING = ("checkpoint", "curve", "weights")
FAULTS = [
    (errno.ENOSPC, 1, "is full"),
    (errno.EDQUOT, 1, "is full"),
    (errno.EROFS, 2, "may not be"),
    (errno.ESTALE, 1, "cannot be reached"),
    (errno.EIO, 1, "cannot be reached"),
]


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        pytest.param(
            place, FAULTS[i % len(FAULTS)], id=f"{place}-{errno.errorcode[FAULTS[i % len(FAULTS)][0]]}",
            marks=[] if place == "record" else pytest.mark.slow,
        )
        for i, place in enumerate(WRITES)
    ],
)  # fmt: skip
def test_a_disk_that_fails_in_any_stage_is_one_message_and_the_old_files_stay(
    place: str,
    fault: tuple[int, int, str],
    whole: Study,
    copied: Path,
    heads_made: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost, pattern = WRITES[place]
    number, status, said = fault
    gone = copied / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    before = contents(copied)
    words = ("study", heads_made, copied, *whole.options)
    if place in IN_PRETRAINING:
        words = ("pretrain", heads_made, copied, *SMALL)
    elif place == "cache":
        words = ("embed", heads_made, copied)
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if fnmatch(str(target), pattern):
            raise OSError(number, os.strerror(number), str(self), None, str(target))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        done = run(*words)
    assert done.status == status, done.err
    message = done.err.splitlines()[-1]
    assert message.startswith("nidl-dcl: ")
    assert said in message or "need" in message
    assert "same command" in message
    assert str(copied) in message
    assert "Traceback" not in done.err
    after = contents(copied)
    assert {name: after.get(name) for name in before if not _may_change(name)} == {
        name: digest for name, digest in before.items() if not _may_change(name)
    }
    assert not [name for name in after if name.endswith(".part")]
    assert f"Exit status {status}: " in last_line(copied)
    again = run(*words)
    assert again.status == 0, again.err
    assert Study(heads_made, copied).digests() == whole.digests()


def _may_change(name: str) -> bool:
    """Return whether a study that goes on writes this file anew, or removes it, by itself."""
    return name.startswith((".work", "figures", "code", "logs", "report.html"))


@pytest.mark.slow
def test_a_file_that_may_not_grow_further_is_a_full_disk(heads_made: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nidl_dcl", "pretrain", heads_made, tmp_path / "out", *SMALL],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "is full" in done.stderr.splitlines()[-1]
    assert str(tmp_path / "out") in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not [p for p in tmp_path.rglob("*.part") if p.is_file()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """Return a mounted disk of half a megabyte; the test is skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", place]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_said_and_a_larger_one_goes_on(
    small_disk: Path, heads_made: Path, run: Callable[..., Any]
) -> None:
    out = small_disk / "out"
    done = run("pretrain", heads_made, out, *SMALL)
    assert done.status == 1, done.err
    assert "Make room" in done.err.splitlines()[-1]
    assert str(out) in done.err.splitlines()[-1]
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert run("pretrain", heads_made, out, *SMALL).status == 0
    assert not list(out.rglob("*.part"))


def test_an_output_on_a_read_only_disk_is_a_usage_error(
    small_disk: Path, heads_made: Path, run: Callable[..., Any]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run("pretrain", heads_made, small_disk / "out", *SMALL)
    assert done.status == 2, done.err
    assert len(done.err.splitlines()) == 1
    assert f"{small_disk / 'out'} may not be read or written" in done.err


@pytest.mark.slow
def test_an_output_folder_that_vanishes_is_not_quietly_made_again(
    heads_made: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nidl_dcl.models.callbacks import StepCheckpoint

    out = tmp_path / "out"
    monkeypatch.setattr(
        StepCheckpoint, "on_train_start", lambda *args: out.rename(tmp_path / "elsewhere")
    )
    done = run("pretrain", heads_made, out, *SMALL)
    assert done.status == 1
    assert f"{out} cannot be reached" in done.err.splitlines()[-1]


# -- signals -----------------------------------------------------------------------------------


def test_a_signal_whose_exception_python_ignores_comes_again(heads_made: Path) -> None:
    script = f"""
        import os, signal, sys, time, types, weakref
        from nidl_dcl import cli
        inputs = sys.modules["nidl_dcl.workflow.inputs"] = types.ModuleType("inputs")
        class Thing: pass
        def index(*args, **kwargs):
            thing = Thing()
            def gone(reference):
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(1000): pass
            reference = weakref.ref(thing, gone)
            del thing
            time.sleep(60)
        inputs.index = index
        cli.main(["index", {str(heads_made)!r}])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 143
    assert done.stderr == "nidl-dcl: Terminated. The same command goes on from here.\n"


def test_a_loading_worker_ignores_sigterm_and_a_dead_one_is_said() -> None:
    from torch.utils.data import DataLoader

    from nidl_dcl.data.samplers import outlast_sigterm
    from nidl_dcl.errors import describe

    class Stubborn(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, number: int) -> int:
            if number == 3:
                time.sleep(0.5)  # until the others are taken
            os.kill(os.getpid(), signal.SIGTERM if number < 3 else signal.SIGKILL)
            return number

    loader = DataLoader(Stubborn(), num_workers=1, worker_init_fn=outlast_sigterm)
    came: list[int] = []

    def take() -> None:
        for number in loader:
            came.append(int(number))  # noqa: PERF401

    with pytest.raises((RuntimeError, ConnectionError, EOFError)) as caught:
        take()
    assert describe(caught.value).startswith("A loading worker died")
    assert "--nprocs" in describe(caught.value)
    assert came == [0, 1, 2]


def test_an_error_in_a_loading_worker_is_said_without_its_traceback() -> None:
    from torch.utils.data import DataLoader

    from nidl_dcl.errors import InputsUnusableError, describe, exit_status

    class Broken(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, number: int) -> int:
            raise InputsUnusableError("a.nii is cut. Copy it again.")

    with pytest.raises(InputsUnusableError) as caught:
        list(DataLoader(Broken(), num_workers=1))
    assert describe(caught.value) == "a.nii is cut. Copy it again."
    assert exit_status(caught.value) == 3


# -- the log -----------------------------------------------------------------------------------


def test_each_line_of_a_log_has_time_stage_and_memory_and_the_last_says_how_it_ended(
    whole: Study,
) -> None:
    (log,) = (whole.out / "logs").glob("*.log")
    assert re.fullmatch(r"\d{8}T\d{6}Z_study\.log", log.name)
    lines = log.read_text().splitlines()
    shape = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (\w+) +(\d+) MB  (.*)")
    parts = [shape.fullmatch(line) for line in lines]
    assert all(parts)
    stages = list(dict.fromkeys(part[1] for part in parts if part))
    assert stages == ["start", "pretrain", "embed", "predict", "report", "end"]
    memory = [int(part[2]) for part in parts if part]
    assert memory == sorted(memory)
    assert 100 < memory[-1] < 5000
    text = log.read_text()
    for words in ("training: 4 of 4", "preparing volumes: 13 of 13", "embed: done in", "commit: "):
        assert words in text
    assert lines[-1].endswith("Done: exit status 0.")


@pytest.mark.filterwarnings("default:the dog")
def test_the_log_of_a_failed_run_has_the_traceback_and_ends_with_what_to_do(
    heads_made: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nidl_dcl.workflow import pretrain as pretrain_stage

    def fault(*args: Any, **kwargs: Any) -> None:
        import warnings

        warnings.warn("the dog looks hungry", stacklevel=1)
        raise RuntimeError("the dog ate\nit")

    monkeypatch.setattr(pretrain_stage, "check_training", fault)
    done = run("pretrain", heads_made, tmp_path, *SMALL)
    assert done.status == 1
    assert done.err.startswith("Warning: the dog looks hungry\n")
    (log,) = (tmp_path / "logs").glob("*.log")
    text = log.read_text()
    assert "Warning: the dog looks hungry" in text
    assert "Traceback (most recent call last):" in text
    assert text.splitlines()[-1].endswith(
        "Exit status 1: Unexpected fault: RuntimeError: the dog ate it. Run with -v to see where."
    )
    record = json.loads((tmp_path / "logs" / "run.json").read_text())
    assert record["exit_status"] == 1
    assert "the dog ate" in record["error"]
    assert record["log"] == f"logs/{log.name}"
    assert record["pid"] == os.getpid()


def test_the_record_names_the_commit_of_a_source_tree_and_none_elsewhere(tmp_path: Path) -> None:
    from nidl_dcl.output.run_record import _commit

    assert _commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    if shutil.which("git") is None:
        pytest.skip("no git")
    (tmp_path / "file").write_text("1")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert _commit(tmp_path) is None
    for words in (["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert _commit(tmp_path) == head.stdout.strip()
    (tmp_path / "file").write_text("2")
    assert _commit(tmp_path) == head.stdout.strip() + "-dirty"

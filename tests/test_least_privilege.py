"""A run writes nothing into the dataset, asks no network, unpickles nothing, keeps its cache private."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import state_of

REPOSITORY = Path(__file__).resolve().parent.parent
STUDY = ("--target", "age", "--spacing", "8", "--max-epochs", "1")

WATCH = '''
"""Put into every Python process of a run: it ends where something forbidden is asked for."""
import os, sys

LOCAL = ("127.", "::1", "localhost")
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate",
          "os.utime", "os.symlink", "os.link", "shutil.rmtree"}
DATASET = os.environ["WATCHED_DATASET"]
LOG = os.environ["WATCH_LOG"]


def refuse(what):
    with os.fdopen(os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as log:
        log.write(what + "\\n")
    raise PermissionError(what)


def watch(event, args):
    if event == "socket.connect" or event == "socket.sendto":
        address = args[1]
        if isinstance(address, tuple) and not str(address[0]).startswith(LOCAL):
            refuse(f"{event} {address}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        name = args[0]
        if name not in (None, "") and not str(name).startswith((*LOCAL, "0.0.0.0")):
            refuse(f"{event} {name}")
    elif event == "open":
        path, mode, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(path, (str, bytes)) and inside(path):
            refuse(f"open {path}")
    elif event in WRITES and any(isinstance(a, (str, bytes)) and inside(a) for a in args):
        refuse(f"{event} {args}")


def inside(path):
    return os.path.realpath(os.fsdecode(path)).startswith(DATASET + os.sep)


sys.addaudithook(watch)
'''


def environment(tmp_path: Path, dataset: Path) -> dict[str, str]:
    """Return the environment in which every Python process is watched."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(WATCH)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(hook), str(REPOSITORY)]),
        "WATCHED_DATASET": os.path.realpath(dataset),
        "WATCH_LOG": str(tmp_path / "log"),
    }


@pytest.mark.slow
def test_a_study_asks_no_network_and_writes_nothing_into_the_dataset(
    make_heads: Callable[..., Path], tmp_path: Path
) -> None:
    bids = make_heads(n=8)
    before = state_of(bids)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nidl_dcl",
            "study",
            bids,
            tmp_path / "out",
            *STUDY,
            "--nprocs",
            "1",
        ],
        env=environment(tmp_path, bids),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "log").exists(), (tmp_path / "log").read_text()
    assert state_of(bids) == before


def test_the_watch_sees_what_is_forbidden(tmp_path: Path) -> None:
    (tmp_path / "bids").mkdir()
    script = (
        "import socket, urllib.request, pathlib\n"
        "for ask in (lambda: socket.getaddrinfo('example.org', 80),\n"
        "            lambda: socket.socket().connect(('192.0.2.1', 80)),\n"
        "            lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9)),\n"
        f"            lambda: pathlib.Path({str(tmp_path / 'bids' / 'x')!r}).touch(),\n"
        f"            lambda: pathlib.Path({str(tmp_path / 'bids' / 'y')!r}).mkdir()):\n"
        "    try: ask()\n"
        "    except OSError: pass\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path, tmp_path / "bids"),
        check=True,
        timeout=300,
    )
    said = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    for event in ("socket.getaddrinfo", "socket.connect", "socket.sendto", "open", "os.mkdir"):
        assert event in said
    assert list((tmp_path / "bids").iterdir()) == []


def may_separate() -> bool:
    """Return whether this user may have a read-only mount and no network, in a process of its own."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-mn", "true"], capture_output=True, check=False)
    return done.returncode == 0 and os.geteuid() == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_separate(), reason="no namespaces of one's own here")
def test_a_training_runs_on_a_read_only_dataset_without_any_network(
    make_heads: Callable[..., Path], tmp_path: Path
) -> None:
    bids = make_heads(n=8)
    script = (
        'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 99\n'
        'touch "$1/x" 2>/dev/null && exit 98\n'
        'exec "$3" -m nidl_dcl pretrain "$1" "$2" --spacing 8 --max-epochs 1\n'
    )
    done = subprocess.run(
        ["unshare", "-mn", "sh", "-c", script, "sh", bids, tmp_path / "out", sys.executable],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode == 99:
        pytest.skip("no read-only mounts here")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "models" / "desc-dcl" / "weights.safetensors").is_file()


# Unpickling -------------------------------------------------------------------------------------

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load"),
    *("joblib.load", "shelve.open", "dill.load", "cloudpickle.load", "cloudpickle.loads"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("pd.read_pickle", "pandas.read_pickle", "np.fromfile", "torch.jit.load"),
    *("torch.hub.load", "torch.hub.load_state_dict_from_url"),
}
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
# TorchScript that an installed package brings is as trusted as the package's own code.
OF_A_PACKAGE = {"brain_extraction.py": ["torch.jit.load"]}
SOURCES = sorted(p for d in ("nidl_dcl", "pipelines") for p in (REPOSITORY / d).rglob("*.py"))


def calls(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return what a module calls, by its name there, with the constant keyword arguments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords if k.arg}
            yield ast.unparse(node.func), given


def faults_of(text: str) -> list[str]:
    """Return the calls of a module that could make code run from a file."""
    found = []
    for name, given in calls(text):
        option, value = NEEDED.get(name, ("", None))
        if (
            name in FORBIDDEN
            or (option and given.get(option) is not value)
            or given.get("shell")
            or (name != "torch.load" and given.get("weights_only") is False and "save" not in name)
            or given.get("allow_pickle") is True
        ):
            found.append(name)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: p.name)
def test_no_module_makes_code_run_from_a_file(file: Path) -> None:
    assert faults_of(file.read_text("utf-8")) == OF_A_PACKAGE.get(file.name, [])


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "pickle.loads(b)",
        "yaml.load(f, Loader)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
        "trainer.fit(m, ckpt_path=f, weights_only=False)",
    ],
)
def test_the_search_finds_such_a_call(text: str) -> None:
    assert len(faults_of(text)) == 1


def test_no_module_talks_to_the_network() -> None:
    # The name of the machine, for the record and for locks; a free port where processes meet.
    known = {"socket": {"run_record.py", "lock.py", "pretrain.py", "launcher.py"}}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                if top in ("socket", "urllib", "http", "requests", "ftplib", "smtplib", "ssl"):
                    assert file.name in known.get(top, ()), f"{file.name} imports {name}"


# Rights -----------------------------------------------------------------------------------------


def rights(path: Path) -> int:
    """Return the permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def test_the_work_folder_is_its_owners_alone_unless_it_was_there(
    run: Callable[..., Any], make_heads: Callable[..., Path], tmp_path: Path
) -> None:
    bids, before = make_heads(n=3, masks=False), os.umask(0o022)
    try:
        assert run("pretrain", bids, tmp_path / "out", *STUDY[2:]).status == 0
        work = tmp_path / "out" / ".work"
        assert rights(work) == 0o700
        assert any(work.rglob("*.f2"))
        assert rights(tmp_path / "out") == 0o755
        assert run("index", bids, "--check", "--work-dir", tmp_path / "new").status == 0
        assert rights(tmp_path / "new") == 0o700
        (tmp_path / "shared").mkdir(mode=0o770)
        (tmp_path / "shared").chmod(0o2770)
        assert run("index", bids, "--check", "--work-dir", tmp_path / "shared").status == 0
        assert rights(tmp_path / "shared") == 0o2770
    finally:
        os.umask(before)

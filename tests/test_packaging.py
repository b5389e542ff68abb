from __future__ import annotations

import email
import email.message
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from nidl_dcl import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))[
    "project"
]
PYTHONS = SpecifierSet(PROJECT["requires-python"])
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text("utf-8")


def build(source: Path, folder: Path, *kinds: str) -> Path:
    """Build from a folder, without the network; return where to."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", folder, source],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the source archive and of the wheel made from it."""
    return build(REPOSITORY, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (file,) = dist.glob("*.whl")
    return file


def files_of_the_package() -> set[str]:
    """Return the files that the package is made of."""
    return {
        p.relative_to(REPOSITORY).as_posix()
        for p in (REPOSITORY / "nidl_dcl").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {n.partition(".dist-info/")[2] for n in archive.namelist()} - {""}
    assert names == files_of_the_package()
    assert {"nidl_dcl/py.typed", "nidl_dcl/report/templates/report.html.jinja"} <= names
    licenses = {f"licenses/{name}" for name in PROJECT["license-files"]}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", *licenses}
    model = ("LICENSE", "README.md", "model.json", "weights.safetensors")
    assert {f"nidl_dcl/models/builtin/{name}" for name in model} <= names


@pytest.mark.slow
def test_the_wheel_says_what_pyproject_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (where,) = {n.partition("/")[0] for n in archive.namelist() if ".dist-info/" in n}
        text = archive.read(f"{where}/METADATA").decode()
        points = archive.read(f"{where}/entry_points.txt").decode()
    said: email.message.Message = email.message_from_string(text)
    assert (said["Name"], said["Version"]) == ("nidl_dcl", __version__)
    assert PROJECT["version"] == __version__
    assert said["License-Expression"] == PROJECT["license"]
    assert SpecifierSet(said["Requires-Python"]) == SpecifierSet(PROJECT["requires-python"])
    required = [r for r in said.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert len(required) == len(PROJECT["dependencies"])
    assert set(said.get_all("Provides-Extra") or ()) == set(PROJECT["optional-dependencies"])
    assert "nidl-dcl = nidl_dcl.cli:main" in points
    assert "# nidl_dcl" in str(said.get_payload())


@pytest.mark.slow
def test_the_source_archive_builds_the_same_wheel_as_the_repository(
    dist: Path, wheel: Path, tmp_path: Path
) -> None:
    (file,) = build(REPOSITORY, tmp_path, "--wheel").iterdir()
    assert file.read_bytes() == wheel.read_bytes()
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of_the_package() <= names
    top = {"pyproject.toml", "LICENSE", "CITATION.cff", "Dockerfile", "constraints.txt", "Makefile"}
    assert top | {"tests/conftest.py", "docs/index.md", "pipelines/study.py"} <= names
    assert not {n for n in names if n.startswith((".venv", ".git/", "dist", "demo"))}
    assert not {n for n in names if "__pycache__" in n or "docs/_build" in n}


def test_the_pinned_versions_install_on_the_first_release_of_each_python() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    firsts = [f"3.{minor}.0" for minor in range(30) if f"3.{minor}.0" in PYTHONS]
    assert len(firsts) == 3
    refused, n_read = [], 0
    for name, version in pins:
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:  # of an extra, or of another system
            continue
        if about["Version"].partition("+")[0] == version:
            n_read += 1
            asked = SpecifierSet(about["Requires-Python"] or "")
            refused += [(name, version, python) for python in firsts if python not in asked]
    assert n_read > len(pins) / 2
    assert refused == []


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder that the wheel is installed in, and nothing can be written to."""
    where = tmp_path_factory.mktemp("installed") / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target")
    subprocess.run([sys.executable, *install, where, wheel], check=True, timeout=300)
    for path in (where, *where.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    yield where
    for path in (where, *where.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)


def python(site: Path, home: Path, *words: str | Path) -> str:
    """Run Python with the installed wheel alone, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=home,
        env={"PATH": os.defpath, "HOME": str(home), "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_wheel_has_the_model_and_gives_copies_that_can_be_written(
    site: Path, tmp_path: Path
) -> None:
    lines = [
        "import sys",
        "from pathlib import Path",
        "from nidl_dcl import load_model",
        "from nidl_dcl.models.model_source import folder_of",
        "from nidl_dcl.workflow.embed import _copy_model",
        "assert folder_of('builtin').parts[-3:] == ('nidl_dcl', 'models', 'builtin')",
        "assert str(folder_of('builtin')).startswith(sys.argv[1])",
        "assert load_model('builtin').fitted",
        "_copy_model('builtin', Path('own'))",
        "assert load_model('own').fitted",
    ]
    python(site, tmp_path, "-c", "\n".join(lines), site)
    copied = list((tmp_path / "own").iterdir())
    assert {p.name for p in copied} == {"README.md", "model.json", "weights.safetensors"}
    assert all(p.stat().st_mode & 0o200 for p in copied)


@pytest.mark.slow
def test_the_installed_wheel_runs_a_demo_far_from_the_repository(
    site: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()

    def call(*words: str) -> str:
        return python(site, home, site / "bin" / "nidl-dcl", *words)

    assert call("--version").strip() == __version__
    said = call("demo", "out", "--n-participants", "10", "--max-epochs", "1", "--threads", "1")
    page = home / "out" / "study" / "report.html"
    assert said.splitlines()[-1] == str(page)
    assert "</html>" in page.read_text()
    record = json.loads((home / "out" / "study" / "logs" / "run.json").read_text())
    assert (record["commit"], record["exit_status"]) == (None, 0)


def test_the_citation_file_is_of_this_version_and_names_the_method() -> None:
    known = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert known["cff-version"] == "1.2.0"
    assert known["title"] == PROJECT["name"]
    assert known["version"] == __version__
    assert PROJECT["license"] == f"{known['license']} AND CC-BY-SA-3.0"  # of the model in it
    assert known["abstract"] == PROJECT["description"]
    assert [a["name"] for a in known["authors"]] == [a["name"] for a in PROJECT["authors"]]
    method = known["references"][0]
    assert (method["title"], method["year"]) == ("Decoupled Contrastive Learning", 2022)
    assert method["authors"][0]["family-names"] == "Yeh"
    assert method["doi"] == "10.1007/978-3-031-19809-0_38"


def test_the_image_is_of_this_version_and_a_python_that_is_supported() -> None:
    assert f'image.version="{__version__}"' in DOCKERFILE
    assert f'image.licenses="{PROJECT["license"]}"' in DOCKERFILE
    bases = [line.split()[1] for line in DOCKERFILE.splitlines() if line.startswith("FROM")]
    versions = {base.removeprefix("python:").partition("-")[0] for base in bases}
    assert len(versions) == 1
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{versions.pop()}.0")


def test_what_the_image_copies_exists_and_reaches_the_build() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored
    words = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY")]
    copied = [name for line in words if not line[0].startswith("--from") for name in line]
    assert copied
    for name in copied:
        assert (REPOSITORY / name).exists()
        assert f"!{name}" in ignored


def test_the_dockerfile_passes_its_linter(tmp_path: Path) -> None:
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if tool is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([tool, REPOSITORY / "Dockerfile"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\n")
    untagged = subprocess.run([tool, tmp_path / "Dockerfile"], capture_output=True, check=False)
    assert b"DL3006" in untagged.stdout  # it does look


def test_the_image_runs_the_command_without_rights_from_a_home_that_can_be_written() -> None:
    lines = DOCKERFILE.splitlines()
    assert lines[-1] == 'ENTRYPOINT ["nidl-dcl"]'
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert "ENV HOME=/home/nidl USER=nidl" in lines
    assert "chmod 1777 /home/nidl" in DOCKERFILE

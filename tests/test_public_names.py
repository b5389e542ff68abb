"""The public names: few, sorted, importable, and cheap until used."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import nidl_dcl

HEAVY = ("torch", "lightning", "monai", "bids", "sklearn", "pandas", "nibabel", "matplotlib")
PROMISED = {
    "BIDSDataModule",
    "BaseEstimator",
    "DCL",
    "DCLLoss",
    "DCLWLoss",
    "MultiViewsTransform",
    "TwoViews",
    "__version__",
    "index_bids",
    "load_embeddings",
    "load_model",
    "predict_phenotype",
}


def isort_key(name: str) -> tuple[int, str]:
    """Return the order that ruff gives `__all__`: constants, classes, the rest."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


def loaded_after(code: str) -> set[str]:
    """Return which of the heavy modules a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.split())


def test_exactly_the_promised_names_are_public() -> None:
    assert set(nidl_dcl.__all__) == PROMISED
    assert set(dir(nidl_dcl)) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_a_public_name_can_be_imported(name: str) -> None:
    assert getattr(nidl_dcl, name) is not None


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "load_embeddings" else [])
        for name in sorted(PROMISED - {"__version__"})
    ],
)
def test_a_public_name_has_examples_that_run(
    name: str,
    heads_made: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "MY_DATASET").symlink_to(heads_made)
    if name == "load_embeddings":
        (tmp_path / "MY_OUTPUT").symlink_to(request.getfixturevalue("studied"))
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(getattr(nidl_dcl, name), name, globs={})  # they import what they use
    runs = any(doctest.SKIP not in example.options for example in test.examples)
    assert runs
    assert "Examples\n" in (test.docstring or "")
    monkeypatch.chdir(tmp_path)
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert failures == []


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="simclr"):
        _ = nidl_dcl.simclr


def test_all_is_sorted_as_ruff_sorts_it() -> None:
    assert list(nidl_dcl.__all__) == sorted(nidl_dcl.__all__, key=isort_key)


def test_the_version_is_the_one_of_the_distribution() -> None:
    assert nidl_dcl.__version__ == version("nidl_dcl")


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import nidl_dcl") == set()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["study", "--help"]])
def test_version_and_help_load_no_learning_library(arguments: list[str]) -> None:
    code = (
        "import contextlib, io, nidl_dcl.cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    nidl_dcl.cli.main({arguments!r})"
    )
    assert loaded_after(code) & {"torch", "lightning", "monai", "bids"} == set()

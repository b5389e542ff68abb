from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nidl_dcl.errors import UsageError
from nidl_dcl.models.trust import refuse_untrusted
from nidl_dcl.workflow.options import read_study

FILES = {
    "encoder": "encoder: brought_along:Net\n",
    "trust": "trust: [brought_along]\n",
    "both": "trust: [brought_along]\nencoder: brought_along:Net\n",
}


@pytest.mark.parametrize(
    ("named", "trusted"),
    [
        ("monai.networks.nets:AutoEncoder", []),
        ("torch.nn:Conv3d", []),
        ("mine", ["mine"]),
        ("mine.nets:Net", ["mine"]),
        ("mine.nets:Net", ["mine.nets:Net"]),
        ("mine.nets:Other", ["mine.nets:Net"]),
    ],
)
def test_known_and_trusted_packages_may_be_named(named: str, trusted: list[str]) -> None:
    refuse_untrusted("options.yaml", [named], trusted)


@pytest.mark.parametrize(
    ("named", "trusted"),
    [
        ("mine:Net", []),
        ("mine", ["mine.nets:Net"]),
        ("minefield:Net", ["mine"]),
        ("torch:Net", []),
        ("monaix:Net", []),
    ],
)
def test_other_code_is_refused(named: str, trusted: list[str]) -> None:
    with pytest.raises(UsageError, match=f"options.yaml names {named}"):
        refuse_untrusted("options.yaml", [named], trusted)


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the mark that a module, which Python finds, leaves when it is imported."""
    mark = tmp_path / "mark"
    source = (
        f"open({str(mark)!r}, 'w').close()\n"
        "from encoders_for_tests import GroupNormed\n"
        "class Net(GroupNormed): pass\n"
    )
    (tmp_path / "brought_along.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brought_along", raising=False)
    return mark


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_options_alone_makes_no_code_run(
    kind: str, run: Callable[..., Any], heads_made: Path, tmp_path: Path, brought: Path
) -> None:
    file = tmp_path / "options.yaml"
    places = f"bids_dir: {heads_made}\noutput_dir: {tmp_path / 'out'}\ntarget: [age]\n"
    file.write_text(places + FILES[kind])
    done = run("study", "--config", file, "--dry-run")
    assert done.status == 2
    assert f"{file} names brought_along" in done.err
    with pytest.raises(UsageError, match="names brought_along"):
        read_study(file)
    assert not brought.exists()


@pytest.mark.parametrize("words", ["--trust=brought_along", "--encoder brought_along:Net"])
def test_the_command_line_says_what_a_file_may_name(
    words: str, run: Callable[..., Any], heads_made: Path, tmp_path: Path, brought: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"target: [age]\nspacing: 8\n{FILES['encoder']}")
    done = run("study", heads_made, tmp_path / "out", "--config", file, "--dry-run", *words.split())
    assert done.status == 0, done.err
    assert brought.exists()
    places = f"bids_dir: {heads_made}\noutput_dir: {tmp_path / 'out'}\n"
    file.write_text(places + file.read_text())
    assert read_study(file, trust=["brought_along"]).training.encoder == "brought_along:Net"

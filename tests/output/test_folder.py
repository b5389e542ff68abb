from __future__ import annotations

import time
from pathlib import Path

import pytest

from nidl_dcl.errors import OutputInUseError
from nidl_dcl.output import lock
from nidl_dcl.output.folder import Output


def test_a_run_that_was_suspended_and_replaced_writes_no_more(
    heads_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    output = Output(heads_made, tmp_path / "out")
    file, records = tmp_path / "out" / ".lock", []

    def work() -> None:
        with output.writing():
            file.write_text(file.read_text().replace('"token": "', '"token": "x'))
            time.sleep(0.5)
            records.append((tmp_path / "out" / "logs" / "run.json").read_bytes())
            with output.stage("embed"):
                pass

    with pytest.raises(OutputInUseError, match="taken over"):
        work()
    assert (tmp_path / "out" / "logs" / "run.json").read_bytes() == records[0]


def test_an_output_of_a_version_before_learns_which_files_are_not_of_bids(
    heads_made: Path, tmp_path: Path
) -> None:
    output = Output(heads_made, tmp_path / "out")
    with output.writing():
        file = tmp_path / "out" / ".bidsignore"
        whole = file.read_text()
        file.write_text("mine\n" + whole.replace("desc-*_folds.*\n", ""))
    with output.writing():
        pass
    assert set(file.read_text().splitlines()) == {"mine", *whole.splitlines()}
    assert "desc-*_folds.*" in whole

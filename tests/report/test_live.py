from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nidl_dcl.errors import UsageError
from nidl_dcl.io.formats import write_json, write_text
from nidl_dcl.report import live as live_page
from nidl_dcl.report.build import is_under_way, write_report
from nidl_dcl.report.live import LivePage
from nidl_dcl.workflow.inputs import Study

ZERO: Any = SimpleNamespace(is_global_zero=True)
OTHER: Any = SimpleNamespace(is_global_zero=False)


def record(folder: Path, **more: Any) -> None:
    write_json(
        folder / "logs/run.json",
        {
            "command": ["nidl-dcl", "study"],
            "started": "2026-11-24T10:03:21+00:00",
            "stages": [{"name": "pretrain", "started": "2026-11-24T10:04:00", "seconds": None}],
            "exit_status": None,
            "earlier": [],
            **more,
        },
    )


def test_a_page_in_progress_says_since_when_and_at_which_stage(tmp_path: Path) -> None:
    record(tmp_path)
    LivePage(tmp_path, "dcl").write()
    text = (tmp_path / "report.html").read_text()
    assert (
        "Not finished: in progress since 2026-11-24 10:03 UTC, at this stage: pretraining" in text
    )
    assert is_under_way(tmp_path / "report.html")


def test_the_final_page_has_no_such_line(tmp_path: Path) -> None:
    record(tmp_path)
    live = LivePage(tmp_path, "dcl")
    live.write()
    text = write_report(tmp_path).read_text()
    assert "Not finished" not in text
    assert not is_under_way(tmp_path / "report.html")


def test_before_the_first_stage_and_between_stages_the_page_says_so(tmp_path: Path) -> None:
    live = LivePage(tmp_path, "dcl")
    record(tmp_path, stages=[])
    live.write()
    assert "the inputs are checked" in (tmp_path / "report.html").read_text()
    record(tmp_path, stages=[{"name": "embed", "started": "x", "seconds": 3.0}])
    live.write()
    assert "computing embeddings is done" in (tmp_path / "report.html").read_text()


def test_it_is_needed_unless_a_finished_page_is_there(tmp_path: Path) -> None:
    live = LivePage(tmp_path, "dcl")
    assert live.is_needed
    write_report(tmp_path)
    assert not live.is_needed
    live.write()
    assert live.is_needed
    assert LivePage(tmp_path, "dcl").is_needed  # a killed run left its page


def test_in_training_it_waits_thirty_seconds_and_fifty_times_its_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, pages = [100.0], []

    def slow(folder: Path, **more: Any) -> None:
        pages.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(live_page.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live_page, "write_report", slow)
    live = LivePage(tmp_path, "dcl")
    for _ in range(4000):
        live.on_train_epoch_end(OTHER, ZERO)
        live.on_train_epoch_end(ZERO, ZERO)
        now[0] += 0.1
    assert pages == pytest.approx([100.0, 202.0, 304.0, 406.0], abs=0.2)
    live._not_before = 0.0
    monkeypatch.setattr(live_page, "write_report", lambda folder, **more: pages.append(now[0]))
    pages.clear()
    start = now[0]
    for _ in range(1000):
        live.on_train_epoch_end(ZERO, ZERO)
        now[0] += 0.1
    assert [page - start for page in pages] == pytest.approx([0, 30, 60, 90], abs=0.3)


def test_a_page_that_cannot_be_written_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(folder: Path, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(live_page, "write_report", broken)
    live = LivePage(tmp_path, "dcl")
    with caplog.at_level("INFO", "nidl_dcl"):
        live.write()
    assert "No space left" in caplog.messages[0]
    assert "the run continues" in caplog.messages[0]
    assert not live.written


def test_an_error_is_told_on_a_page_in_progress_and_nowhere_else(tmp_path: Path) -> None:
    record(tmp_path)
    write_text(tmp_path / "report.html", "finished")
    live = LivePage(tmp_path, "dcl")
    with pytest.raises(ValueError, match="spoon"), live.following():
        raise ValueError("There is no <spoon>.")
    assert (tmp_path / "report.html").read_text() == "finished"
    live.write()
    record(tmp_path, stages=[{"name": "pretrain", "started": "x", "seconds": 4.0}])
    with pytest.raises(ValueError, match="spoon"), live.following():
        raise ValueError("There is no <spoon>.")
    text = (tmp_path / "report.html").read_text()
    assert "ended with an error (pretraining): There is no &lt;spoon&gt;." in text


def test_a_report_of_a_killed_study_says_that_it_was_not_finished(tmp_path: Path) -> None:
    record(tmp_path)
    killed = json.loads((tmp_path / "logs/run.json").read_text())
    report = [{"name": "report", "started": "x", "seconds": None}]
    record(tmp_path, stages=report, earlier=[killed])
    assert "ended early (pretraining)" in write_report(tmp_path).read_text()
    record(tmp_path, stages=report, earlier=[killed, {**killed, "exit_status": 0}])
    assert "Not finished" not in write_report(tmp_path).read_text()


def test_a_study_has_a_page_before_its_first_stage(
    heads_made: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def pretrain(study: Study, *_: Any, **__: Any) -> None:
        seen.append((study.output.path / "report.html").read_text("utf-8"))
        raise UsageError("It ends here.")

    monkeypatch.setattr("nidl_dcl.workflow.study.pretrain", pretrain)
    words = ("study", heads_made, tmp_path / "out", "--target", "age", "--spacing", "8")
    done = run(*words, page="live")
    assert done.status == 2
    (page,) = seen
    assert "Not finished: in progress since" in page
    assert "rows were listed" in page
    assert "It ends here." in (tmp_path / "out" / "report.html").read_text("utf-8")

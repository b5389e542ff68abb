from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nidl_dcl.io.console import handled_by

COMMAND = [sys.executable, "-m", "nidl_dcl"]
SMALL = ("--spacing", "8", "--max-epochs", "1", "--batch-size", "8")


def test_a_call_without_a_command_shows_the_commands(run: Any) -> None:
    done = run()
    assert done.status == 0
    for command in ("index", "pretrain", "embed", "predict", "report", "study", "demo"):
        assert command in done.out


@pytest.mark.parametrize("command", ["index", "pretrain", "embed", "predict", "report", "study"])
def test_the_usage_shows_folders_before_options(run: Any, command: str) -> None:
    usage = run(command, "--help").out.splitlines()[0]
    assert usage.startswith(f"Usage: nidl-dcl {command} BIDS_DIR")
    assert usage.endswith("[OPTIONS]")


def test_the_version_is_printed(run: Any) -> None:
    done = run("--version")
    assert done.status == 0
    assert done.out.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study", "BIDS", "OUT"], "--target is missing"),
        (["study", "--target", "age", "BIDS", "OUT"], "BIDS_DIR is missing. Give folders first"),
        (["study", "BIDS", "--target", "age", "OUT"], "OUTPUT_DIR is missing. Give folders first"),
        (
            ["predict", "BIDS", "OUT", "--target", "age", "--dry-run"],
            "for preprocess, pretrain, embed and study",
        ),
        (["report", "BIDS", "BIDS", "--dry-run"], "for preprocess, pretrain, embed and study"),
        (["demo", "OUT", "--dry-run"], "for preprocess, pretrain, embed and study"),
        (["demo"], "OUTPUT_DIR is missing. See nidl-dcl demo --help."),
        (["study", "BIDS", "OUT", "--target", "age", "--max-epoch", "3"], "--max-epoch"),
        (["study", "BIDS", "OUT", "--target", "age", "--max-epochz", "3"], "--max-epochs"),
        (["study", "BIDS", "OUT", "--target", "age", "--max-epochs", "many"], "many"),
        (["study", "BIDS", "OUT", "--target", "age", "--max-epochs", "0"], "max-epochs"),
        (["study", "BIDS", "OUT", "--target", "age", "--batch-size", "1"], "batch-size"),
        (["study", "BIDS", "OUT", "--target", "age", "--spacing", "-1"], "spacing"),
        (["study", "BIDS", "OUT", "--target", "age", "--temperature", "0"], "temperature"),
        (["study", "BIDS", "OUT", "--target", "age", "--max-skipped", "2"], "max-skipped"),
        (["study", "BIDS", "OUT", "--target", "age", "--nprocs", "-1"], "nprocs"),
        (["study", "BIDS", "OUT", "--target", "height"], "sex"),
        (["study", "BIDS", "OUT", "--target", "age", "--group", "family"], "family"),
        (["study", "BIDS", "OUT", "--target", "age", "--confounds", "weight"], "weight"),
        (
            ["study", "BIDS", "OUT", "--target", "age", "--confounds", "sex", "age"],
            "both a --target",
        ),
        (["study", "BIDS", "OUT", "--target", "age", "--site", "hospital"], "hospital"),
        (["study", "BIDS", "OUT", "--target", "age", "--site", "age"], "the --site"),
        (["study", "BIDS", "OUT", "--target", "age", "--harmonize"], "--site; there are: age, sex"),
        (["study", "BIDS", "OUT", "--target", "age", "--encoder", "vit"], "resnet18"),
        (["study", "BIDS", "OUT", "--target", "age", "--encoder", "no.such:Net"], "no.such"),
        (["study", "BIDS", "OUT", "--target", "age", "--preset", "t9"], "raw-t1w"),
        (["study", "BIDS", "OUT", "--target", "age", "--mask", "nowhere"], "nowhere"),
        (["study", "BIDS", "OUT", "--target", "age", "--model", "NONE"], "NONE"),
        (["study", "BIDS", "OUT", "--target", "age", "--init", "NONE"], "NONE"),
        (["study", "BIDS", "OUT", "--target", "age", "--phenotypes", "NONE"], "NONE"),
        (["study", "BIDS", "OUT", "--target", "age", "--bids-filter-file", "NONE"], "NONE"),
        (["study", "BIDS", "OUT", "--target", "age", "--model-name", "a b"], "a b"),
        (["study", "BIDS", "OUT", "--target", "age", "--participant-label", "77"], "77"),
        (["study", "BIDS", "OUT", "--target", "age", "--session-label", "nine"], "nine"),
        (["index", "BIDS", "--participant-label", "01,02"], "a word of its own: 01 02"),
        (["index", "BIDS", "--exclude-participant-label", "sub–01"], "is no hyphen (-): sub-01"),
        (["index", "BIDS", "–participant-label", "01"], "type --participant-label"),
        (["study", "BIDS", "OUT", "—target", "age"], "type --target"),
        (["study", "NONE", "OUT", "--target", "age"], "NONE"),
        (["study", "BIDS", "BIDS", "--target", "age"], "choose another folder"),
        (["study", "BIDS", "BIDS/..", "--target", "age"], "choose another folder"),
        (["study", "BIDS", "BIDS/sub-01/out", "--target", "age"], "derivatives"),
        (["study", "BIDS", "BIDS/participants.tsv", "--target", "age"], "is a file"),
        (["study", "BIDS", "BIDS/participants.tsv/out", "--target", "age"], "which is a file"),
        (["study", "--config", "NONE"], "NONE"),
        (["embed", "BIDS", "OUT", "--model", "NONE"], "NONE"),
        (["embed", "BIDS", "OUT"], "pretrain"),
        (["predict", "BIDS", "OUT", "--target", "age"], "embed"),
        (["report", "BIDS", "OUT"], "OUT"),
        (["index", "NONE"], "NONE"),
        (["frobnicate", "BIDS"], "frobnicate"),
        (["study", "BIDS", "OUT", "--target", "age", "--random-seed", "-1"], "random-seed"),
        (["BIDS", "OUT"], "participant or group"),
        (["BIDS", "OUT", "subject"], "'subject'"),
        (["BIDS", "OUT", "--participant-label", "01", "participant"], "before any option"),
        (["NONE", "OUT", "participant"], "NONE"),
        (["BIDS", "OUT", "participant"], "pretrain"),
        (["BIDS", "OUT", "participant", "--participant-label", "77", "--model", "NONE"], "NONE"),
        (["BIDS", "OUT", "group"], "--target"),
    ],
    ids=lambda value: " ".join(value[1:])[-44:] if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_message_that_names_it_and_status_2(
    words: list[str], said: str, run: Any, heads_made: Path, tmp_path: Path
) -> None:
    places = {"BIDS": str(heads_made), "OUT": str(tmp_path / "out"), "NONE": str(tmp_path / "none")}
    words = [part.replace("BIDS", places["BIDS"], 1) for part in words]
    before = snapshot(heads_made)
    done = run(*(places.get(word, word) for word in words))
    assert done.status == 2, done.err
    assert places.get(said, said) in done.err
    assert "Traceback" not in done.err
    assert done.err.startswith("nidl-dcl: ")
    assert done.out == ""
    assert snapshot(heads_made) == before


def test_ctrl_c_is_status_130_and_says_what_to_do(
    run: Any, heads_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nidl_dcl.workflow.inputs.index", stop)
    done = run("index", heads_made)
    assert done.status == 130
    assert done.err == "nidl-dcl: Interrupted. The same command goes on from here.\n"


def test_an_empty_dataset_is_status_3(run: Any, tmp_path: Path) -> None:
    (tmp_path / "bids").mkdir()
    done = run("study", tmp_path / "bids", tmp_path / "out", "--target", "age")
    assert done.status == 3
    assert "no usable image" in done.err
    assert "Is this the folder that holds the sub-* folders?" in done.err


@pytest.mark.parametrize("words", [[], ["--strict"], ["--max-skipped", "0.01"]])
def test_too_many_broken_images_are_status_3_before_training(
    words: list[str], run: Any, make_heads: Any, tmp_path: Path
) -> None:
    bids = make_heads(n=6)
    for image in sorted(bids.glob("sub-*/ses-01/anat/*.nii.gz"))[: 1 if words else 3]:
        image.write_bytes(image.read_bytes()[:200])
    done = run("study", bids, tmp_path / "out", "--target", "age", *SMALL, *words)
    assert done.status == 3
    assert "truncated" in done.err
    assert not (tmp_path / "out" / "models").exists()


def test_options_may_be_written_with_underscores_and_labels_with_their_prefix(
    run: Any, heads_made: Path, tmp_path: Path
) -> None:
    done = run("pretrain", heads_made, tmp_path, "--participant_label", "sub-01", "02", "--dry_run")
    assert done.status == 0
    assert "2 participants to train on" in done.out


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    run: Any, heads_made: Path, tmp_path: Path
) -> None:
    done = run("study", heads_made, tmp_path / "out", "--target", "age", *SMALL, "--dry-run")
    assert done.status == 0
    assert "10 participants to train on" in done.out
    assert "brain-masked" in done.out
    assert re.search(r"about .* per epoch, .* for the training \(.* s a step on cpu, mea", done.out)
    assert re.search(r"about [\d.]+ GB of memory", done.out)
    assert re.search(r"about .* to embed 13 images\n", done.out)
    assert re.search(r"about .* to predict age, permutations included\n", done.out)
    assert re.search(r"about .* for the report", done.out)
    assert "where the readouts look" not in done.out
    (whole,) = re.findall(r"about (.*) in all, if nothing is there yet.*: (.*)", done.out)
    assert {"predicting age", "report"} <= {part.rpartition(" ")[0].rpartition(" ")[0]
                                            for part in whole[1].split(", ")}  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_is_odd(run: Any, make_heads: Any, tmp_path: Path) -> None:
    bids = make_heads(n=9)
    (bids / "sub-02/ses-01/anat/sub-02_ses-01_T1w.nii.gz").write_bytes(b"")
    table = bids / "participants.tsv"
    table.write_text(table.read_text().replace("\t", ",").replace("sub-0", ""))
    done = run(
        "study",
        bids,
        tmp_path / "out",
        "--target",
        "age",
        *SMALL,
        "--dry-run",
        "--max-skipped",
        "0.2",
    )
    assert done.status == 0, done.err
    assert "1 skip: empty (nidl-dcl index --check)" in done.out
    assert "cells are separated by ','" in done.out
    assert "prefix" in done.out or "zeros" in done.out


def test_the_printed_configuration_is_one_that_config_takes(
    run: Any, heads_made: Path, tmp_path: Path
) -> None:
    words = ("study", heads_made, tmp_path / "out", "--target", "age", "sex", *SMALL)
    words += ("--confounds", "weight", "icv", "--site", "hospital", "--harmonize")
    printed = run(*words, "--print-config").out
    values = yaml.safe_load(printed)
    assert values["confounds"] == ["weight", "icv"]
    assert (values["site"], values["harmonize"]) == ("hospital", True)
    assert values["target"] == ["age", "sex"]
    assert values["spacing"] == [8.0]
    file = tmp_path / "config.yaml"
    file.write_text(printed)
    again = run("study", "--config", file, "--print-config")
    assert again.out == printed
    won = run("study", "--config", file, "--max-epochs", "7", "--print-config")
    assert yaml.safe_load(won.out) == {**values, "max_epochs": 7}


@pytest.mark.parametrize(
    ("level", "command", "options"),
    [
        ("participant", "embed", ("--participant_label", "sub-01", "02", "--model", "m")),
        ("group", "study", ("--target", "age", "--max-epochs", "3")),
    ],
)
def test_an_analysis_level_of_a_bids_app_is_a_command(
    level: str, command: str, options: tuple[str, ...], run: Any, tmp_path: Path
) -> None:
    own = run(command, "bids", "out", *options, "--print-config")
    assert own.status == 0
    assert run("bids", "out", level, *options, "--print-config").out == own.out
    assert run("--print-config", "-v", "bids", "out", level, *options).out == own.out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max-epochs", "2"], ["--max-epochs"]),
        (["--max-steps", "300"], ["--max-steps"]),  # the default, but it was asked for
        (["--encoder", "cnn", "--spacing", "4"], ["--encoder", "--spacing"]),
        (["--views", "strong", "--batch_size", "8"], ["--views", "--batch-size"]),
        (["--accelerator=gpu"], ["--accelerator"]),
        (["--init", "builtin"], ["--init"]),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_options_of_a_training_are_refused_beside_a_model(
    words: list[str], named: list[str], more: list[str], run: Any, heads_made: Path, tmp_path: Path
) -> None:
    given = ("study", heads_made, tmp_path / "out", "--target", "age", "--model", "builtin")
    done = run(*given, *words, *more)
    assert done.status == 2
    assert f"{', '.join(named)}: for a training, and --model builtin is trained" in done.err
    assert not (tmp_path / "out").exists()


def test_options_of_a_training_in_a_file_are_refused_beside_a_model(
    run: Any, heads_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("target: [age]\nmax_epochs: 3\nencoder: regional\n")
    given = ("study", heads_made, tmp_path / "out", "--model", "builtin")
    done = run(*given, "--config", file)
    assert done.status == 2
    assert "nidl-dcl: --max-epochs: for a training" in done.err
    monkeypatch.setenv("NIDL_DCL_SPACING", "4")
    done = run(*given, "--target", "age")
    assert done.status == 2
    assert "--spacing: for a training" in done.err


@pytest.mark.slow
def test_participants_in_turn_and_then_the_group_end_like_a_study(
    run: Any, heads_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, app = tmp_path / "whole", tmp_path / "app"
    target = ("--target", "age")
    assert run("study", heads_made, whole, *target, *SMALL).status == 0
    model = ("--model", whole / "models" / "desc-dcl")
    for who in ("01", "02"):
        done = run(heads_made, app, "participant", "--participant-label", who, *model)
        assert done.status == 0, done.err
    rows = (app / "desc-dcl_embeddings.tsv").read_text().splitlines()[1:]
    assert [row[:6] for row in rows] == ["sub-01", "sub-02"]
    monkeypatch.setattr(sys, "argv", ["nidl-dcl", str(heads_made), str(app), "group", *target])
    done = run(heads_made, app, "group", *target, *model)
    assert done.status == 0, done.err
    assert "13 images of 10 participants, 11 computed now" in done.err
    for name in ("README.md", "model.json"):
        assert (app / "models/desc-dcl" / name).read_bytes() == (model[1] / name).read_bytes()
    for file in ("embeddings.npy", "embeddings.tsv", "Age_predictions.tsv"):
        (name,) = (p.name for p in whole.glob(f"desc-dcl*{file}"))
        assert (app / name).read_bytes() == (whole / name).read_bytes()
    assert len(list((app / "logs").glob("*_group.log"))) == 1


def test_a_configuration_with_an_unknown_option_is_refused(
    run: Any, heads_made: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("target: [age]\nmax_epoch: 3\n")
    done = run("study", heads_made, tmp_path / "out", "--config", file)
    assert done.status == 2
    assert "max" in done.err


def test_index_prints_the_columns_of_inputs_with_one_row_for_each_image(
    run: Any, heads_made: Path
) -> None:
    done = run("index", heads_made)
    lines = done.out.splitlines()
    assert lines[0] == "participant_id\tsession_id\tpath\tstatus\tcode\tmessage"
    assert len(lines) == 1 + 13
    assert all("\tok\tok\t" in line for line in lines[1:])
    assert run("index", heads_made, "--check").out == done.out


@pytest.mark.parametrize("words", [[], ["--check"]])
def test_index_of_a_folder_without_images_asks_whether_it_is_the_right_one(
    words: list[str], run: Any, heads_made: Path
) -> None:
    done = run("index", heads_made / "sub-01", *words)
    assert done.status == 3
    assert len(done.out.splitlines()) == 1
    assert "no candidate. Is this the folder that holds the sub-* folders?" in done.err


def test_index_says_what_lies_there_in_place_of_images(
    run: Any, make_heads: Any, tmp_path: Path
) -> None:
    bids = make_heads(n=3)
    for image in bids.glob("sub-*/ses-*/anat/*_T1w.nii.gz"):
        image.rename(image.with_name(image.name.replace("_T1w", "_T1w_defaced")))
    done = run("index", bids)
    assert done.status == 3
    assert "goes on after T1w, by '_defaced'" in done.out
    assert "files are not taken: names go on after T1w" in done.err
    for folder in bids.glob("sub-*"):
        folder.rename(folder.with_name(folder.name.removeprefix("sub-")))
    assert run("index", bids).status == 3


def test_index_judges_by_name_and_opens_files_only_when_asked(run: Any, make_heads: Any) -> None:
    bids = make_heads(n=2)
    next(bids.glob("sub-01/ses-01/anat/*.nii.gz")).write_bytes(b"")
    assert "\tempty\t" not in run("index", bids).out
    checked = run("index", bids, "--check")
    assert checked.status == 0
    assert "\tskip\tempty\t" in checked.out


def test_an_unexpected_fault_is_one_line_with_status_1_and_a_traceback_with_v(
    run: Any, heads_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nidl_dcl.workflow import inputs

    def fault(*args: Any, **kwargs: Any) -> str:
        raise RuntimeError("the dog ate it")

    monkeypatch.setattr(inputs, "index", fault)
    done = run("index", heads_made)
    assert done.status == 1
    assert len(done.err.splitlines()) == 1
    assert "the dog ate it" in done.err
    more = run("index", heads_made, "-v")
    assert more.status == 1
    assert "Traceback" in more.err
    assert more.err.splitlines()[-1] == done.err.splitlines()[0]


@pytest.mark.parametrize(("words", "shown"), [((), False), (("-v",), True)])
def test_details_are_let_through_with_v(
    words: tuple[str, ...], shown: bool, run: Any, heads_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nidl_dcl.workflow import inputs

    def index(*args: Any, **kwargs: Any) -> tuple[str, bool]:
        with handled_by(logging.NullHandler()):  # the log of a run
            return str(logging.getLogger("nidl_dcl").isEnabledFor(logging.DEBUG)), True

    monkeypatch.setattr(inputs, "index", index)
    assert run("index", heads_made, *words).out == str(shown)
    assert not logging.getLogger("nidl_dcl").isEnabledFor(logging.DEBUG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written_names_the_path(
    run: Any, heads_made: Path, tmp_path: Path
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    done = run("study", heads_made, tmp_path / "closed" / "out", "--target", "age", *SMALL)
    assert done.status != 0
    assert "closed" in done.err


def test_a_second_writer_exits_with_4(run: Any, heads_made: Path, tmp_path: Path) -> None:
    from nidl_dcl.output.folder import Output

    with Output(heads_made, tmp_path / "out").writing():
        done = run("study", heads_made, tmp_path / "out", "--target", "age", *SMALL)
    assert done.status == 4
    assert f"process {os.getpid()}" in done.err
    record = json.loads((tmp_path / "out" / "logs" / "run.json").read_text())
    assert record["exit_status"] == 0


def test_help_and_version_load_neither_torch_nor_pybids() -> None:
    script = (
        "import sys\nfrom nidl_dcl.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'bids', 'lightning', 'monai', 'sklearn'} & set(sys.modules)))\n"
    )
    for words in (["--help"], ["--version"], ["study", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file of a folder."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "agee"], "'agee'"),
        (["--target", "age", "--confounds", "sexx"], "'sexx'"),
        (["--target", "age", "--site", "clinic"], "'clinic'"),
        (["--target", "age", "--harmonize"], "--site"),
    ],
)
def test_a_dry_run_refuses_a_column_that_no_table_has(
    words: list[str], said: str, run: Any, heads_made: Path, tmp_path: Path
) -> None:
    done = run("study", heads_made, tmp_path / "out", *words, "--dry-run")
    assert done.status == 2
    assert said in done.err

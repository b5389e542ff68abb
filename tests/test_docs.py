"""What is written for people, held against what the program does."""

from __future__ import annotations

import ast
import html
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import TWO_EPOCHS, give
from faults import faults, mask_faults
from lightning.pytorch.callbacks import Callback
from PIL import Image

import nidl_dcl
from nidl_dcl import cli, errors
from nidl_dcl.bids.index import find_images
from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.bids.recode import decode
from nidl_dcl.bids.subject_ids import match_ids
from nidl_dcl.bids.synthetic import write_demo_dataset
from nidl_dcl.bids.tables import read_table
from nidl_dcl.data.views import STRENGTHS, draw_view
from nidl_dcl.evaluation.metrics import classification_scores, regression_scores
from nidl_dcl.models.encoders import ENCODERS
from nidl_dcl.models.losses import unit_rows
from nidl_dcl.models.serialization import read_description
from nidl_dcl.preprocessing import verdict
from nidl_dcl.preprocessing.measures import MEASURES
from nidl_dcl.preprocessing.verdict import PREPROCESSING_CODES
from nidl_dcl.report import predictions as scorecard
from nidl_dcl.status import Code
from nidl_dcl.workflow.options import DataOptions, PredictionOptions, RunOptions, TrainingOptions

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [*REPOSITORY.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("decisions/*.md")]
TUTORIALS = sorted(DOCS.glob("tutorials/*.py"))
README = (REPOSITORY / "README.md").read_text("utf-8")
COMMANDS = [
    "index",
    "preprocess",
    "pretrain",
    "embed",
    "predict",
    "report",
    "study",
    "demo",
    "share",
]
CODES = set(get_args(Code))
"""All that the program can write: the type checker lets no other word through."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z_-]*[a-z]")
EXAMPLE = re.compile(
    r"(<!-- not run: \S[^\n]* -->\n)?^ *```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE
)
RUN = {"analysis.md", "scores_again.md"}
"""Pages whose examples are run by a test: by test_analysis.py, or by one here marked with `runs`."""


def page(name: str) -> str:
    """Return a page of the documentation."""
    return (REPOSITORY / "docs" / name).read_text("utf-8")


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, up to the next one of its level."""
    level = heading.split()[0]
    return re.split(rf"^{level} ", text.split(f"{heading}\n", 1)[1], flags=re.MULTILINE)[0]


def examples(file: str) -> list[str]:
    """Return the Python blocks of a page, without those that it says are not run, and why."""
    text = README if file == "README.md" else page(file)
    return [code for not_run, code in EXAMPLE.findall(text) if not not_run]


def runs(file: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark the test that runs all examples of a page."""
    RUN.add(file)
    return lambda test: test


def options_in(text: str) -> set[str]:
    """Return the long options that a text names."""
    return {option.replace("_", "-") for option in OPTION.findall(text)}


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """Return the help text of every command, as a user sees it on a wide terminal."""
    script = (
        "import contextlib, sys\nfrom nidl_dcl.cli import main\n"
        f"for command in {COMMANDS!r}:\n"
        "    print('@@', command)\n"
        "    with contextlib.suppress(SystemExit): main([command, '--help'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={"COLUMNS": "200", "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
    )
    parts = re.split(r"^@@ (\w+)$", done.stdout, flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_help_is_documented(command: str, help_of: dict[str, str]) -> None:
    offered = options_in(help_of[command])
    assert {"--config", "--verbose"} <= offered
    assert offered - options_in(page("command_line.md")) == set()


@pytest.mark.parametrize(
    "text",
    [
        README,
        *map(page, ("command_line.md", "quickstart.md", "your_dataset.md")),
        *(file.read_text("utf-8") for file in TUTORIALS),
    ],
)
def test_every_documented_option_exists(text: str, help_of: dict[str, str]) -> None:
    offered = options_in(" ".join(help_of.values()))
    assert options_in(text) - offered - {"--version", "--help"} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str, help_of: dict[str, str]) -> None:
    assert f"`nidl-dcl {command} " in page("command_line.md")
    assert help_of[command].startswith(f"Usage: nidl-dcl {command} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_the_defaults_that_say_something(
    command: str, help_of: dict[str, str]
) -> None:
    shown = set(re.findall(r"\[default:\s+([^]]*)\]?", help_of[command]))
    assert not shown & {"", "[", "None", "False"}
    assert command in ("demo", "index", "share") or "dcl" in shown


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_documented(preset: str) -> None:
    row = f"| `{preset}` | {PRESETS[preset].summary} |"
    assert row in section(page("command_line.md"), "## Presets")


@pytest.mark.parametrize("option", ["preset", "encoder"])
def test_the_help_names_all_that_an_option_takes(option: str, help_of: dict[str, str]) -> None:
    names = PRESETS if option == "preset" else ENCODERS
    said = re.split(rf"--{option} ", " ".join(help_of["pretrain"].split()))[1].split("--")[0]
    assert [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", said)] == []


def test_every_encoder_is_documented() -> None:
    assert [
        n for n in ENCODERS if f"`{n}`" not in section(page("command_line.md"), "## Training")
    ] == []


def test_every_score_is_documented_and_has_a_name_in_the_report() -> None:
    x = np.array([0.0, 1, 1, 0])
    scores = [
        *regression_scores(x, x, np.ones(4)),
        *classification_scores(x, np.eye(2)[x.astype(int)], np.ones(4), ["<class>", "<class>"]),
    ]
    (row,) = (line for line in page("files.md").splitlines() if "Regression: `mae`" in line)
    assert [name for name in scores if f"`{name}`" not in row] == []
    named = scorecard._METRICS
    assert [n for n in scores if n not in named and not n.startswith("recall_")] == []


@pytest.mark.parametrize("name", sorted(nidl_dcl.__all__))
def test_every_public_name_is_documented(name: str) -> None:
    api = page("api.md")
    assert name == "__version__" or re.search(rf":: (nidl_dcl\.)?{name}$", api, flags=re.MULTILINE)


def test_exit_statuses_are_the_same_everywhere() -> None:
    rows = re.compile(r"^\| (\d+) \|", flags=re.MULTILINE)
    written = [
        int(status)
        for status in rows.findall(
            section(page("when_things_go_wrong.md"), "## Exit statuses").split("| status | what")[0]
        )
    ]
    assert written == [0, 1, 2, 3, 4, 130, 143]
    raised = {kind.exit_status for kind in vars(errors).values() if hasattr(kind, "exit_status")}
    assert raised <= set(written)


def documented_codes() -> set[tuple[str, str]]:
    """Return status and code of each row of the table of codes, which has all its cells."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section(page("when_things_go_wrong.md"), "## Codes").splitlines()
        if line.startswith("| `")
    ]
    assert {len(row) for row in rows} == {4}
    assert all(meaning and todo for _, _, meaning, todo in rows)
    found = {(row[1].strip("`"), row[0].strip("` |")) for row in rows}
    assert len(found) == len(rows)
    return found


def test_every_code_of_inputs_is_documented_with_what_to_do() -> None:
    assert {code for _, code in documented_codes()} == CODES


def test_every_documented_code_is_that_of_a_fault_and_the_other_way_round() -> None:
    shown = {row for fault in faults() for row in fault.expected}
    shown.add(("skip", "permission"))  # root may read all; test_reading.py shows it
    shown |= {(status, code) for status, code, _ in mask_faults().values()}
    shown.add(("skip", "excluded"))  # no fault of an image
    assert shown == documented_codes()


def test_every_code_of_preprocessing_is_documented_with_what_to_do() -> None:
    text = section(page("when_things_go_wrong.md"), "## Codes of preprocessing")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \| .+ \|$", text, flags=re.MULTILINE)
    assert [code for code, _ in rows] == list(PREPROCESSING_CODES)
    limits = (*verdict._OF_ANY, *verdict._OF_ALIGNED, *verdict._OF_OTHERS)
    both = {limit.code for limit in limits}
    assert {code for code, statuses in rows if statuses == "`warn`, `skip`"} == both


def limit_of(limits: Iterable[Any], measure: str, field: str) -> str:
    """Return how a page tells from where on a measure is odd, or too odd."""
    return ", ".join(
        f"{'below' if limit.warn > limit.skip else 'above'} {getattr(limit, field):g}"
        for limit in limits
        if limit.measure == measure
    )


def test_the_measures_of_preprocessing_are_documented_with_their_limits() -> None:
    aligned = (*verdict._OF_ANY, *verdict._OF_ALIGNED)
    codes = {limit.measure: limit.code for limit in aligned}
    found = table("measures", "preprocessing.md")
    assert found == [
        [
            f"`{name}`",
            text,
            limit_of(aligned, name, "warn"),
            limit_of(aligned, name, "skip"),
            f"`{codes[name]}`",
        ]
        for name, text in MEASURES.items()
    ]
    others = verdict._OF_OTHERS
    assert table("strip", "preprocessing.md") == [
        [
            f"`{limit.measure}`",
            limit_of(others, limit.measure, "warn"),
            limit_of(others, limit.measure, "skip"),
        ]
        for limit in others
    ]


def test_the_columns_of_tables_are_documented() -> None:
    from nidl_dcl.bids.index import INPUT_COLUMNS
    from nidl_dcl.output.embeddings import COLUMNS

    text = page("files.md")
    for heading, columns in (
        ("## `desc-<model>_embeddings.tsv`", COLUMNS),
        ("## `logs/inputs.tsv`", INPUT_COLUMNS),
    ):
        named = re.findall(r"`(\w+)`", section(text, heading))
        assert [c for c in columns if c not in named] == []


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as MyST and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,3} (.+)$", text, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 1
        while (one := slug if number == 1 else f"{slug}-{number - 1}") in found:
            number += 1
        found.add(one)
    return found


def broken_links(file: Path, text: str) -> list[str]:
    """Return the links of a page that lead to no file, or to no heading of it."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    broken = []
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        there = file.parent / path if path else file
        if not there.exists() or (anchor and anchor not in anchors(there.read_text("utf-8"))):
            broken.append(f"{path}#{anchor}" if anchor else path)
    return broken


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings_that_exist(file: Path) -> None:
    text = file.read_text("utf-8").replace("(generated/tutorials/index)", "(tutorials/README.rst)")
    assert broken_links(file, text) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    links = (
        "[](no.md) [](files.md#no) [x](#no) [](files.md) [a](files.md#logsrunjson) [](https://x.y)"
    )
    found = broken_links(REPOSITORY / "docs" / "index.md", links)
    assert found == ["no.md", "files.md#no", "#no"]


def test_every_example_is_run_or_says_why_not() -> None:
    written = {file.name for file in PAGES if "```python" in file.read_text("utf-8")}
    assert {name for name in written if examples(name)} == RUN
    from output import test_analysis

    assert examples("analysis.md") == test_analysis.EXAMPLES
    from evaluation import test_fold_table

    assert examples("scores_again.md") == test_fold_table.EXAMPLES


@runs("README.md")
@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_demo_dataset(tmp_path / "my_dataset", n_participants=16, seed=0)
    (example,) = examples("README.md")
    assert "max_epochs=60" in example
    exec(example.replace("max_epochs=60", "max_epochs=1, lr_scheduler=None"), {})
    assert nidl_dcl.load_model("my_model").fitted


@runs("quickstart.md")
def test_the_short_example_of_the_quick_start_runs() -> None:
    (example,) = examples("quickstart.md")
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["features"].shape == (64, 4)


@runs("builtin.md")
def test_the_example_and_what_is_said_of_the_shipped_model_hold() -> None:
    (example,) = examples("builtin.md")
    names: dict[str, Any] = {}
    exec(example, names)
    about = read_description("builtin")
    assert names["model"].fitted
    assert about["encoder"]["class"] == "nidl_dcl.models.encoders:RegionalEncoder"
    assert about["input_contract"]["origin"]["preprocessing"] == "align"
    assert about["provenance"]["license"].replace("CC-BY-SA-", "CC BY-SA ") in page("builtin.md")


@runs("estimator.md")
@pytest.mark.filterwarnings("ignore:.*many workers.*", "ignore:.*loader shuffles.*")
@pytest.mark.slow
def test_the_examples_of_the_estimators_page_run() -> None:
    names: dict[str, Any] = {}
    for example in examples("estimator.md"):
        exec(example, names)
    assert len(examples("estimator.md")) == 14
    assert names["features"].shape == (40, 8)
    assert list(names["who"]) == names["names"]
    assert float(names["collapsed"]) == pytest.approx(math.log(30), abs=1e-4)
    assert names["side_by_side"].shape == (40, 24)
    assert names["columns"][[0, -1]].tolist() == [
        "dcl_region000_feature000",
        "dcl_region002_feature007",
    ]
    assert names["same"]
    assert names["table"].shape == (40, 8)
    assert names["again"].fitted
    assert names["other"].fitted
    assert names["epoch"] == 2
    assert "max_epochs" in names["said"]


# Tutorials; `make docs` runs them -----------------------------------------------------------------


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda p: p.name)
def test_a_tutorial_has_a_title_and_is_run_in_its_place(file: Path) -> None:
    title, line = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").splitlines()[:2]
    assert line == "=" * len(title)
    conf = (DOCS / "conf.py").read_text("utf-8")
    pattern = re.findall(r'"filename_pattern": r"(.*)"', conf)
    assert re.search(pattern[0], str(file))
    assert '"within_subsection_order": "FileNameSortKey"' in conf
    assert re.match(r"\d\d_[a-z_]+\.py", file.name)


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda p: p.name)
def test_a_tutorial_imports_public_names_of_what_is_installed(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names = {alias.name for alias in node.names}
            ours = getattr(module, "__all__", dir(module))
            assert names <= set(ours if str(node.module).startswith("nidl_dcl") else dir(module))
            assert not any(name.startswith("_") for name in names)


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda p: p.name)
def test_links_of_a_tutorial_hold(file: Path) -> None:
    text = file.read_text("utf-8")
    for _, target in re.findall(r":doc:`([^`<]*<)?([^`>]+)>?`", text):
        source = DOCS / f"{target[1:]}.md" if target[0] == "/" else file.with_name(f"{target}.py")
        assert source.is_file(), target
    template = (REPOSITORY / "nidl_dcl" / "report" / "templates" / "report.html.jinja").read_text(
        "utf-8"
    )
    sections = set(re.findall(r'\{\{ open\("(\w+)"', template))
    for name, anchor in re.findall(r"<\.\./\.\./reports/(\w+)\.html#(\w+)>`__", text):
        assert name == file.stem
        assert anchor in sections


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda p: p.name)
def test_each_picture_of_a_tutorial_has_a_title_which_becomes_its_alternative_text(
    file: Path,
) -> None:
    for cell in file.read_text("utf-8").split("\n# %%"):
        if "plt.subplots(" in cell:
            assert re.search(r"title\(|title=", cell), cell


def test_a_report_that_a_tutorial_made_is_shown_in_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = script("tutorial_runs")
    monkeypatch.setattr(frame, "REPORTS", tmp_path / "reports")
    report = tmp_path / "report.html"
    report.write_text("<p>Found.</p>")
    block = {"src_file": "04_x.py", "example_globals": {"report_page": report}}
    assert frame.report_scraper(("code", "x = 1", 1), block, {}) == ""
    shown = frame.report_scraper(("code", "report_page = x", 1), block, {})
    assert (tmp_path / "reports" / "04_x.html").read_text() == "<p>Found.</p>"
    source = re.findall(r'<iframe src="([^"]+)" title="[^"]+"', shown)
    assert source == ["../../reports/04_x.html"]


# The loss -------------------------------------------------------------------------------------

# That of collapse, of parts in several processes and of DCLW's gradient are in test_losses.py.


def test_what_the_page_of_the_loss_shows_is_in_the_code() -> None:
    blocks = re.findall(r"```{literalinclude} (\S+)\n(.*?)```", page("dcl.md"), flags=re.DOTALL)
    assert len(blocks) == 7
    for file, options in blocks:
        code = (REPOSITORY / "docs" / file).read_text("utf-8")
        asked = dict(re.findall(r"^:([a-z-]+): (.+)$", options, flags=re.MULTILINE))
        names = asked.pop("pyobject").split(".")
        inside = code.split(f"class {names[0]}" if len(names) > 1 else f"def {names[0]}", 1)[1]
        inside = inside.split(f"def {names[-1]}(", 1)[1] if len(names) > 1 else inside
        for text in asked.values():
            assert text in inside


def test_the_identities_of_the_page_of_the_loss_hold() -> None:
    tutorial = REPOSITORY / "docs" / "tutorials" / "05_dcl_against_infonce.py"
    names: dict[str, Any] = {
        "torch": torch,
        "F": torch.nn.functional,
        "DCLLoss": nidl_dcl.DCLLoss,
        "unit_rows": unit_rows,
    }
    for node in ast.parse(tutorial.read_text("utf-8")).body:
        if getattr(node, "name", "") in ("InfoNCELoss", "dcl_of_anchors"):
            exec(compile(ast.Module([node], []), "tutorial", "exec"), names)
    z1, z2 = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, dcl = names["InfoNCELoss"](), names["dcl_of_anchors"]
    close = torch.testing.assert_close
    close(dcl(z1, z2).mean(), nidl_dcl.DCLLoss()(z1, z2))
    close(loss.of_anchors(z1, z2), torch.nn.functional.softplus(dcl(z1, z2)))
    close(loss(z1, z2), loss.of_anchors(z1, z2).mean())
    slope = torch.autograd.functional.jacobian
    q = 1 - torch.exp(-loss.of_anchors(z1, z2))
    ours, theirs = slope(lambda z: dcl(z, z2), z1), slope(lambda z: loss.of_anchors(z, z2), z1)
    close(theirs, q[:, None, None] * ours)
    assert q.min() < 0.9  # the two differ here
    weights = nidl_dcl.DCLWLoss(0.5).pos_weight_fn(z1, z2)
    close(weights.mean(), torch.ones_like(weights.mean()))


@runs("your_encoder.md")
def test_the_encoder_of_the_page_is_trained_kept_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    encoder, training, regional = examples("your_encoder.md")
    (tmp_path / "my_encoders.py").write_text(encoder)
    names: dict[str, Any] = {}
    exec(training, names)
    assert np.array_equal(names["again"].transform(names["volumes"]), names["embeddings"])
    exec(regional, names)
    assert names["embeddings"].shape == (8, 2 * 2 * 2 * 40)
    with pytest.raises(errors.UsageError, match="--trust my_encoders"):
        nidl_dcl.load_model("small_net")


@pytest.mark.slow
def test_the_commands_with_the_encoder_of_the_page_run(
    make_heads: Callable[..., Path], tmp_path: Path
) -> None:
    make_heads("MY_DATASET", 8)
    (tmp_path / "my_encoders.py").write_text(examples("your_encoder.md")[0])
    commands = re.findall(r"^PYTHONPATH=\. nidl-dcl (.*)$", page("your_encoder.md"), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = command.split() + (["--max-epochs", "1"] if "study" in command else [])
        subprocess.run(
            [sys.executable, "-m", "nidl_dcl", *words],
            check=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([".", str(REPOSITORY)])},
        )
    assert (tmp_path / "MY_OUTPUT" / "desc-dclSex_metrics.json").exists()


class Killer(Callback):
    """Ends a training in its third epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("killed")


@runs("resume_and_share.md")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_training_goes_on_and_a_model_is_trained_further_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    training, further = examples("resume_and_share.md")
    whole: dict[str, Any] = {}
    exec(training, whole)
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()

    shutil.rmtree("checkpoints")
    with pytest.raises(RuntimeError, match="killed"):
        exec(training.replace("[keep]", "[keep, Killer()]"), {"Killer": Killer})
    resumed: dict[str, Any] = {}
    exec(training, resumed)
    assert resumed["model"].transform(whole["x"]).equal(whole["model"].transform(whole["x"]))

    still = further.replace("max_epochs=2", "max_epochs=2, learning_rate=0.0, weight_decay=0.0")
    exec(further, whole)
    exec(still, resumed)
    assert resumed["again"].transform(whole["x"]).equal(whole["model"].transform(whole["x"]))
    assert not whole["again"].transform(whole["x"]).equal(whole["model"].transform(whole["x"]))


# From nidl -------------------------------------------------------------------------------------


def script_for(package: str) -> str:
    """Return the script of from_nidl.md with the imports of nidl or of nidl_dcl."""
    imports = page("from_nidl.md").split("<!-- imports -->")[1].split("<!--")[0]
    sign = {"nidl": "-", "nidl_dcl": "+"}[package]
    lines = [line[1:] for line in imports.splitlines() if line.startswith(sign)]
    assert all(f"from {package}" in line for line in lines)
    return "\n".join([*lines, examples("from_nidl.md")[0]])


def check_script(names: dict[str, Any]) -> None:
    """Hold what the script leaves against what its page says."""
    assert names["features"].shape == (48, 32)
    assert names["known"].shape == (64, 32)
    assert torch.equal(names["radius"], names["seen"].dataset.radius)
    truth = names["Spheres"](48, 2).radius
    assert np.corrcoef(names["predicted"], truth)[0, 1] > 0.8
    assert 0 < float(names["loss"]) < math.log(2 * 16 - 2)
    assert sorted(n for n in names["model"].state_dict() if n.startswith("projection_head")) == [
        f"projection_head.layers.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")
    ]


@runs("from_nidl.md")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_script_written_for_nidl_runs_after_changing_the_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(script_for("nidl_dcl"), names)
    check_script(names)
    assert list(tmp_path.iterdir()) == []
    exec(examples("from_nidl.md")[1], names)
    loader = names["DataLoader"](names["Spheres"](48, 2), batch_size=16)
    assert torch.equal(names["again"].transform(loader), names["features"])


@pytest.mark.filterwarnings("ignore")
def test_the_same_script_runs_with_nidl_and_its_weights_give_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nidl.estimators.ssl")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(script_for("nidl"), names)
    check_script(names)
    exec(examples("from_nidl.md")[1], {**names, "DCL": nidl_dcl.DCL}, after := {})
    loader = names["DataLoader"](names["Spheres"](48, 2), batch_size=16)
    assert torch.equal(after["again"].transform(loader), names["features"])


@pytest.mark.parametrize("line", re.findall(r"^\| `nidl\..*", page("from_nidl.md"), re.MULTILINE))
def test_what_stands_beside_a_name_of_nidl_exists(line: str) -> None:
    ours = line.split(" | ")[1]
    for name in re.findall(r"`((?:nidl_dcl\.)[\w.]+)`", ours):
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last) or importlib.import_module(name)


# Views ----------------------------------------------------------------------------------------


def script(name: str) -> Any:
    """Return a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_images() -> Any:
    """Return the script that draws the pictures of the views."""
    return script("make_images")


def limits_of(picture: bytes | Path) -> Any:
    """Return the limits that a picture of views was drawn with."""
    from io import BytesIO

    with Image.open(picture if isinstance(picture, Path) else BytesIO(picture)) as image:
        return json.loads(image.text["Comment"])


def test_the_table_of_views_holds_the_limits_in_use() -> None:
    rows = re.findall(r"\| `(\w+)\.(\w+)` \| (.*) \| (.*) \| (.*) \|", page("views.md"))
    found = {
        (kind, name): [
            float(v.removesuffix(" %")) / (100 if v.endswith(" %") else 1) for v in values
        ]
        for kind, name, *values in rows
    }
    used = {
        (kind, name): [STRENGTHS[s][kind][name] for s in ("light", "default", "strong")]
        for kind, limits in STRENGTHS["light"].items()
        for name in limits
    }
    assert found == used


def test_the_pictures_of_views_were_drawn_with_the_limits_in_use(make_images: Any) -> None:
    folder = REPOSITORY / "docs" / "images"
    names = [name for name, _ in make_images.pictures()]
    assert sorted(names) == sorted(p.name for p in folder.glob("views-*.png"))
    assert list(make_images.KINDS) == list(STRENGTHS["default"])
    for name in names:
        part = name.removeprefix("views-").removesuffix(".png")
        expected = STRENGTHS.get(part) or {s: STRENGTHS[s][part] for s in ("default", "strong")}
        assert limits_of(folder / name) == expected, "draw it again: python docs/make_images.py"
        assert (folder / name).stat().st_size < 300_000
        assert re.search(rf"!\[[^]]{{30,}}\]\(images/{name}\)", page("views.md"))


@pytest.mark.parametrize(
    "name", ["views-light.png", pytest.param("views-blur.png", marks=pytest.mark.slow)]
)
def test_a_picture_of_views_is_drawn_the_same_again(make_images: Any, name: str) -> None:
    draw = dict(make_images.pictures())[name]
    x = torch.rand(1, 80, 96, 80, generator=torch.Generator().manual_seed(0))
    first = draw(x)
    torch.manual_seed(7)
    assert draw(x) == first
    assert limits_of(first)


@pytest.mark.slow
def test_the_pictures_of_views_show_what_is_drawn_now(make_images: Any) -> None:
    from io import BytesIO

    brain = make_images.brain()
    for name, draw in make_images.pictures():
        with Image.open(REPOSITORY / "docs" / "images" / name) as shown:
            there = np.asarray(shown, dtype=float)
        with Image.open(BytesIO(draw(brain))) as drawn:
            now = np.asarray(drawn, dtype=float)
        assert now.shape == there.shape
        assert np.abs(now - there).mean() < 1, f"{name}: run python docs/make_images.py"


@runs("your_views.md")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_the_examples_of_views_of_your_own_run() -> None:
    names: dict[str, Any] = {}
    code = examples("your_views.md")
    exec(code[0], names)
    again = draw_view(names["views"], names["volume"], 0, 3, "sub-01", 2)
    assert torch.equal(names["second"], again)
    assert not torch.equal(names["first"], names["second"])
    for example in code[1:]:
        exec(example, names)
    assert torch.equal(names["first"], draw_view(names["mine"], names["volume"], 0, 0, "sub-01", 1))
    assert names["model"].fitted
    assert [len(names["two"]), len(names["different"])] == [2, 2]


# Use your own BIDS dataset ----------------------------------------------------------------------


def table(name: str, file: str = "your_dataset.md") -> list[list[str]]:
    """Return the rows of a marked table of a page, without its head."""
    text = page(file).split(f"<!-- {name} -->\n")[1].split("<!--")[0]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.strip().splitlines()[2:]
    ]


def quoted(cell: str) -> list[str | None]:
    """Return what a cell names as code, None for the word "missing"."""
    return [code or None for code, _ in re.findall("`([^`]+)`|(missing)", cell)]


def layout_row(preset: str) -> list[str]:
    """Return what the page has to say of a preset."""
    form = PRESETS[preset]

    def listed(values: Iterable[str]) -> str:
        return ", ".join(f"`{value}`" for value in values)

    names = f"{listed(f'{p}sub-…_{form.suffix}' for p in form.prefixes)}; {listed(form.extensions)}"
    asked = [f"{key}-{value}" for key, value in form.entities.items() if value is not None]
    absent = [f"{key}-" for key, value in form.entities.items() if value is None]
    names += f"; with {listed(asked)}" if asked else ""
    names += f"; without {listed(absent)}" if absent else ""
    values = {"intensity": "scan", "probability": "tissue map", "signed": "signed map"}[form.kind]
    masks = {"any": "of any derivative", "own": "its own", "none": "none needed"}[form.masks]
    if form.masks == "any" and form.derivatives:
        masks = f"its own, else {masks}"
    return [
        f"`{preset}`",
        listed(form.folders),
        f"`{form.file_name}`" if form.file_name else names,
        listed(f"{name}*" for name in form.derivatives) or "raw data",
        values,
        masks,
    ]


def test_the_page_says_of_each_preset_what_it_looks_for() -> None:
    found = {row[0]: row for row in table("layouts")}
    assert found == {f"`{preset}`": layout_row(preset) for preset in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_example_of_a_preset_is_found(preset: str, tmp_path: Path) -> None:
    examples = {str(quoted(name)[0]): str(quoted(path)[0]) for name, path in table("examples")}
    places = [f"derivatives/{name}-1.0" for name in PRESETS[preset].derivatives] or ["."]
    for number, place in enumerate([*places, "."]):
        image = tmp_path / str(number) / place / examples[preset]
        image.parent.mkdir(parents=True)
        image.touch()
        (tmp_path / str(number) / "sub-01").mkdir(exist_ok=True)
        found = find_images(tmp_path / str(number), preset=preset, mask="none")
        assert [found.root / path for path in found.images["path"]] == [image]
        assert list(found.inputs["code"]) == ["ok"]
    assert set(examples) == set(PRESETS)


def filters() -> list[dict[str, Any]]:
    """Return the filters that the page shows."""
    blocks = re.findall(r"```json\n(.*?)```", page("your_dataset.md"), flags=re.DOTALL)
    return [json.loads(block) for block in blocks if "Levels" not in block]


@pytest.mark.parametrize(
    ("number", "preset", "wanted", "other"),
    [
        (0, "raw-t1w", "sub-1_T2w", "sub-1_T1w"),
        (1, "raw-t1w", "sub-1_acq-mprage_run-02_T1w", "sub-1_acq-mprage_ce-gd_run-1_T1w"),
        (1, "raw-t1w", "sub-1_acq-mprage_run-1_T1w", "sub-1_acq-mprage_run-3_T1w"),
        (
            *(2, "fmriprep-mni", "sub-1_space-MNI152NLin6Asym_desc-preproc_T1w"),
            "sub-1_space-MNI152NLin2009cAsym_desc-preproc_T1w",
        ),
        (3, "raw-t1w", "sub-1_acq-mprage_T1w", "sub-1_acq-fast_T1w"),
    ],
)
def test_the_filters_of_the_page_do_what_it_says(
    number: int, preset: str, wanted: str, other: str, tmp_path: Path
) -> None:
    for name in (wanted, other):
        path = tmp_path / f"sub-1/anat/{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = find_images(tmp_path, preset=preset, filters=filters()[number], mask="none").images
    assert list(found["path"]) == [f"sub-1/anat/{wanted}.nii.gz"]
    assert len(filters()) == 4


def test_ids_are_matched_as_the_page_says() -> None:
    rows = table("ids")
    folders = [str(quoted(folder)[0]) for _, folder, _ in rows if folder != "none"]
    found = match_ids([str(quoted(row[0])[0]) for row in rows], [*folders, "sub-07a", "sub-070"])
    for text, folder, rule in rows:
        told = found.get(str(quoted(text)[0]), (None, "none"))
        assert told == ((quoted(folder) or [None])[0], quoted(rule)[0])
    assert {quoted(row[2])[0] for row in rows} == {"exact", "prefix", "case", "zeros", "none"}


def test_values_are_read_as_the_page_says(tmp_path: Path) -> None:
    for column, written, expected in table("values"):
        file = tmp_path / "table.tsv"
        file.write_text("\n".join(["x", *(str(cell) for cell in quoted(written))]) + "\n")
        cells = [row[0] for row in read_table(file).rows]
        found, _ = decode(str(quoted(column)[0]), cells, {})
        assert found == quoted(expected)
    block = next(b for b in page("your_dataset.md").split("```json\n") if "Levels" in b)
    about = json.loads(block.split("```")[0])["sex"]
    assert decode("sex", ["1", "2"], about)[0] == ["M", "F"]


@pytest.mark.slow
def test_the_commands_of_the_page_run(
    run: Callable[..., Any],
    make_heads: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_heads("MY_DATASET", 10)
    make_heads("OTHER_DATASET", 12)
    (tmp_path / "filter.json").write_text(json.dumps(filters()[3]["t1w"] | {"acquisition": None}))
    first = ["study", "MY_DATASET", "MY_OUTPUT", "--target", "age", "--max-epochs", "2"]
    assert run(*first).status == 0
    text = page("your_dataset.md")
    blocks = re.findall(r"^nidl-dcl (.*)$", text, flags=re.MULTILINE)
    inline = [m.replace("\n", " ") for m in re.findall(r"`nidl-dcl ([^`]+)`", text)]
    commands = [c for c in [*blocks, *inline] if "index MY" not in c or ">" not in c]
    assert len(commands) == 8
    for command in commands:
        assert run(*command.split()).status == 0, command


# For those who carry on ------------------------------------------------------------------------


def written_in(picture: str) -> list[str]:
    """Return the texts in typewriter letters of an SVG."""
    return [html.unescape(text) for text in re.findall(r'class="name"[^>]*>([^<]+)<', picture)]


def test_the_picture_of_a_study_names_files_and_commands_that_are_documented() -> None:
    draw = script("draw_architecture")
    files = written_in(draw.draw_study())
    assert files == [file for _, _, left in draw.STEPS for file in left]
    assert [file for file in files if f"`{file}`" not in page("files.md")] == []
    steps = [name for name, _, _ in draw.STEPS]
    assert all(steps.index(a) < steps.index(b) for a, b, _ in draw.SHORTCUTS)


def folders() -> list[Path]:
    """Return the folders of the package."""
    return [file.parent for file in sorted((REPOSITORY / "nidl_dcl").glob("*/__init__.py"))]


@pytest.mark.slow
def test_the_picture_of_the_layers_shows_each_folder_and_what_it_is_for() -> None:
    draw = script("draw_architecture")
    texts = re.findall(r"<text[^>]*>([^<]+)<", draw.draw_layers())
    shown, listed = html.unescape(" ".join(texts)), draw.list_files()
    for folder in folders():
        tree = ast.parse((folder / "__init__.py").read_text("utf-8"))
        words = str(ast.get_docstring(tree)).replace("`", "").split()
        assert " ".join([folder.name, *words]) in shown
        assert [file.stem for file in folder.glob("[a-z]*.py") if file.stem not in listed] == []


def test_the_modules_that_the_architecture_names_exist() -> None:
    names = "|".join(folder.name for folder in folders())
    named = re.findall(rf"`((?:{names})/\w+)`", page("architecture.md"))
    assert {name.split("/")[0] for name in named} == {folder.name for folder in folders()}
    assert [n for n in named if not (REPOSITORY / "nidl_dcl" / f"{n}.py").is_file()] == []


DECISIONS = sorted((REPOSITORY / "docs" / "decisions").glob("0*.md"))


@pytest.mark.parametrize("file", DECISIONS, ids=lambda p: p.stem)
def test_a_decision_says_what_one_has_to_know(file: Path) -> None:
    headings = re.findall(r"^## (.*)$", file.read_text("utf-8"), flags=re.MULTILINE)
    *parts, last = headings
    assert parts == ["Context", "Considered", "Decision", "Consequences"]
    assert last == "How we would notice that it was wrong"


CODE_PATH = re.compile(r"`((?:nidl_dcl|tests|docs|benchmarks|pipelines)/[\w/.-]+|pyproject\.toml)`")


@pytest.mark.parametrize(
    "file",
    [*DECISIONS, DOCS / "architecture.md", REPOSITORY / "CONTRIBUTING.md"],
    ids=lambda p: p.stem,
)
def test_files_named_to_those_who_carry_on_exist(file: Path) -> None:
    named = CODE_PATH.findall(file.read_text("utf-8"))
    assert named
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


# Files, columns and keys ------------------------------------------------------------------------

FILES = page("files.md").replace("`…", "`desc-<model><Target>_occlusion")
CODE = re.compile(r"`([^`\n]+)`")
PLACES = tuple(
    f"{derivative}{folder}"
    for derivative in ("", "derivatives/preproc/")
    for folder in ("", "figures/", "models/desc-<model>/")
)
WORDS = {
    "<model>": "[a-z]+",
    "<Target>": "[A-Z][A-Za-z]*",
    "<UTC time>": r"\d{8}T\d{6}Z",
    "<command>": "[a-z]+",
    "<n>": r"\d+",
    "…": ".*",
}


def matches(name: str, path: str) -> bool:
    """Whether a documented name, such as `desc-<model>_loss.tsv`, is that of a file."""
    parts = re.split(f"({'|'.join(WORDS)})", name)
    return (
        re.fullmatch("".join(WORDS.get(part) or re.escape(part) for part in parts), path)
        is not None
    )


def is_documented(path: str) -> bool:
    """Whether files.md names a file of an output folder."""
    names = {
        name for name in CODE.findall(FILES) if re.search(r"[\w>…]\.\w|^\.\w+$|^CHANGES$", name)
    }
    return any(matches(place + name, path) for name in names for place in PLACES)


def words_about(path: str) -> set[str]:
    """Return what files.md names as code where it tells of a file."""
    parts = re.split(r"^(?=##+ )", FILES, flags=re.MULTILINE)
    told = ""
    for part in parts:
        heading = CODE.findall(part.split("\n", 1)[0]) or [""]
        stem = heading[0] if "." in heading[0] else f"{heading[0]}….…"
        if any(matches(place + stem, path) for place in PLACES) or path.startswith(
            heading[0].replace("<model>", "dcl") if heading[0].endswith("/") else "/"
        ):
            told += part
    told += "".join(
        line
        for line in FILES.splitlines(keepends=True)
        if any(matches(place + n, path) for n in CODE.findall(line) for place in PLACES)
    )
    named = set(CODE.findall(told))
    for other in re.findall(r"[Tt]he columns of `([^`]+)`", told):
        if not matches(other, path):
            named |= words_about(other.replace("<model>", "dcl").replace("<Target>", "Age"))
    return named | {name.partition(".")[0] for name in named}


@pytest.fixture(scope="module")
def outputs(
    tmp_path_factory: pytest.TempPathFactory, heads_writer: Callable[..., Path]
) -> dict[str, Path]:
    """Return output folders that hold, together, everything that a study writes."""
    folder = tmp_path_factory.mktemp("written")
    bids = heads_writer(folder / "MY_DATASET", 34)
    head, *rows = (bids / "participants.tsv").read_text().splitlines()
    sites = [f"{row}\t{'NS'[i % 2]}" for i, row in enumerate(rows)]
    (bids / "participants.tsv").write_text("\n".join([f"{head}\tsite", *sites]) + "\n")
    heads_writer(folder / "OTHER_DATASET", 6, first=50)
    more = ["--holdout", "0.2", "--occlusion", "--parquet"]
    other = ["--model", "MY_OUTPUT/models/desc-dcl", "--readout", "MY_OUTPUT"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ["MY_DATASET", "MY_OUTPUT", "--target", "age", "sex", *TWO_EPOCHS, *more],
            ["OTHER_DATASET", "OTHER_OUTPUT", "--target", "age", *other],
        ):
            assert give("study", *words) == 0
        assert give("share", "MY_OUTPUT", "SHARED", "--key-file", "key") == 0
        write_demo_dataset(Path("HEADS"), n_participants=3)
        words = ["HEADS", "PREPROCESSED/derivatives/preproc", "--preprocess", "align"]
        assert give("preprocess", *words, "--nprocs", "1") == 0
    names = ("MY_OUTPUT", "OTHER_OUTPUT", "SHARED", "PREPROCESSED")
    return {name: folder / name for name in names}


def written(outputs: dict[str, Path]) -> list[tuple[str, Path]]:
    """Return path in its output, and path, of each file, those of the work folder left out."""
    found = [
        (path.relative_to(folder).as_posix(), path)
        for folder in outputs.values()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".work" not in path.relative_to(folder).parts
    ]
    assert len(found) > 200
    return found


@pytest.mark.slow
def test_every_file_that_is_written_is_documented(outputs: dict[str, Path]) -> None:
    paths = {path for path, _ in written(outputs)}
    assert sorted(path for path in paths if not is_documented(path)) == []
    assert not is_documented("figures/other.tsv")
    assert not is_documented("logs/other.json")


@pytest.mark.slow
def test_no_file_is_documented_that_is_not_written(outputs: dict[str, Path]) -> None:
    paths = {path for path, _ in written(outputs)}
    rows = re.findall(r"^\| (`[^|]*) \|", FILES, flags=re.MULTILINE)
    names = {n for row in rows for n in CODE.findall(row) if re.search(r"\.[a-z]+(\.gz)?$", n)}
    names = {n for n in names if n.endswith((".tsv", ".json", ".npy", ".csv", ".md", ".html"))}
    unseen = {n for n in names if not any(matches(pl + n, p) for pl in PLACES for p in paths)}
    assert unseen == set()


@pytest.mark.slow
def test_every_column_that_is_written_is_documented(outputs: dict[str, Path]) -> None:
    unknown = set()
    for path, file in written(outputs):
        if file.suffix in (".tsv", ".csv"):
            header = file.read_text("utf-8").split("\n", 1)[0]
            columns = header.split("\t" if file.suffix == ".tsv" else ",")
            named = words_about(path)
            named |= {"age", "sex", "site"} if "embedding_2d" in path else set()
            named |= {"F", "M"} if "confusion" in path else set()
            for column in columns:
                name = re.sub("^probability_.*", "probability_<class>", column)
                if name not in named and name.removesuffix("_z") not in named:
                    unknown.add((path, column))
    assert sorted(unknown) == []


@pytest.mark.slow
def test_every_key_that_is_written_is_documented(outputs: dict[str, Path]) -> None:
    unknown = set()
    for path, file in written(outputs):
        # BIDS says what is in a description of a dataset.
        if file.suffix == ".json" and file.name != "dataset_description.json":
            named = words_about(path) | words_about(path.removesuffix(".json") + ".tsv")
            for key in json.loads(file.read_text("utf-8")):
                name = re.sub("^probability_.*", "probability_<class>", key)
                if name not in named:
                    unknown.add((path, key))
    assert sorted(unknown) == []


@runs("files.md")
@pytest.mark.slow
def test_the_example_of_the_files_page_runs(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outputs["MY_OUTPUT"].parent)
    (example,) = examples("files.md")
    names: dict[str, Any] = {}
    exec(example, names)
    assert len(names["table"]) == len(names["embeddings"]) > 16
    assert list(names["table"]["row"]) == list(range(len(names["table"])))


# Options and Python names -----------------------------------------------------------------------


def defaults() -> dict[str, Any]:
    """Return the default of each option."""
    found: dict[str, Any] = {}
    for group in (DataOptions, TrainingOptions, PredictionOptions, RunOptions):
        for option in fields(group):
            made = option.default_factory
            value = option.default if made is MISSING else made()
            found["--" + option.name.replace("_", "-")] = value
    return found


def option_rows() -> list[tuple[list[str], str]]:
    """Return the options and the meaning in each row of the tables of command_line.md."""
    rows = re.findall(r"^\| (`-.*?) \| (.*) \|$", page("command_line.md"), flags=re.MULTILINE)
    return [(OPTION.findall(names), meaning) for names, meaning in rows]


def test_each_option_of_the_help_has_a_row_and_the_other_way_round(help_of: dict[str, str]) -> None:
    named = [name for names, _ in option_rows() for name in names]
    assert [name for name in set(named) if named.count(name) > 1] == ["--max-epochs"]  # of the demo
    assert set(named) - {"--version", "--help"} == options_in(" ".join(help_of.values()))


def as_written(value: Any) -> str:
    """Return a default as the page writes it."""
    value = value[0] if isinstance(value, list) else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_defaults_are_stated_and_are_the_defaults() -> None:
    stated: dict[str, list[str]] = {}
    for names, meaning in option_rows():
        said = re.search(r"\. Default: ((?:`[^`]+`(?:, )?)+)$", meaning)
        values = CODE.findall(said[1]) if said else []
        assert len(values) in (0, len(names))
        for name, value in zip(names, values, strict=False):
            stated.setdefault(name, []).append(value)
    real = {
        name: [as_written(value)]
        for name, value in defaults().items()
        if value not in (None, []) and value is not False
    }
    of_the_demo = signature(cli.demo).parameters
    real["--n-participants"] = [as_written(of_the_demo["n_participants"].default)]
    assert stated == real


def test_names_that_pages_import_from_submodules_are_in_the_reference() -> None:
    api = page("api.md")
    wanted = set()
    for file in ("README.md", *(p.name for p in (REPOSITORY / "docs").glob("*.md"))):
        for code in examples(file):
            for module, names in re.findall(
                r"^from (nidl_dcl\.[\w.]+) import (.+)$", code, re.MULTILINE
            ):
                wanted |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert wanted
    missing = [
        name
        for name in sorted(wanted)
        if not re.search(rf":: {re.escape(name)}$", api, flags=re.MULTILINE)
        and not re.search(rf"automodule:: {name.rpartition('.')[0]}\n   :members:", api)
    ]
    assert missing == []


def test_what_the_reference_names_exists() -> None:
    names = re.findall(
        r"^\.\. auto(?:class|function|data):: ([\w.]+)$", page("api.md"), re.MULTILINE
    )
    assert len(names) > 20
    for name in names:
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module or "nidl_dcl"), last), name

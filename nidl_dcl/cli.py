"""The command ``nidl-dcl``: parses, calls a stage, turns errors into messages and exit statuses.

Options and their help are the fields of `workflow.options`; the stages are in `workflow`.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter
from cyclopts.config import Env, Yaml

from nidl_dcl._version import __version__
from nidl_dcl.errors import (
    InputsUnusableError,
    LostProcessError,
    NonFiniteError,
    OnAnotherProcessError,
    OutputInUseError,
    UsageError,
    describe,
    exit_status,
)
from nidl_dcl.io.console import ConsoleHandler, handled_by
from nidl_dcl.models.model_source import ModelSource
from nidl_dcl.models.trust import refuse_untrusted
from nidl_dcl.workflow.options import (
    DataOptions,
    PredictionOptions,
    RunOptions,
    StudyOptions,
    TrainingOptions,
    as_yaml,
    code_named,
    read_options,
    refuse_gone,
    refuse_training,
)

_LOGGER = logging.getLogger(__name__)

_COMMAND: list[str] = []
"""What Python was started with, to start more processes of it."""

_ENVIRONMENT = Env("NIDL_DCL_", command=False)
"""Options may be set by variables such as ``NIDL_DCL_WORK_DIR``; the command line wins."""

_Data = Annotated[DataOptions, Parameter(name="*", group="Data")]
_Training = Annotated[TrainingOptions, Parameter(name="*", group="Training")]
_Prediction = Annotated[PredictionOptions, Parameter(name="*", group="Prediction")]
_Run = Annotated[RunOptions, Parameter(name="*", group="Run")]
_BidsDir = Annotated[Path, Parameter(help="BIDS dataset; never written to.")]
_OutputDir = Annotated[Path, Parameter(help="Folder of the derivative.")]
_Target = Annotated[list[str], Parameter(help="Columns of the phenotype tables.")]
_Trust = Annotated[
    list[str] | None, Parameter(help="Packages whose encoders may be imported by name.")
]


def _shown(default: Any) -> str | None:
    """Return a default as the help shows it; one that is none, empty or off needs no word."""
    if default is None or default is False or default == []:
        return None
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


_LEVELS = {"participant": "embed", "group": "study"}
"""The analysis levels of a BIDS App, and the commands that do them."""

app = App(
    name="nidl-dcl",
    help="From a BIDS dataset of 3D brain MRI to embeddings, predictions and a report. As a BIDS App: nidl-dcl BIDS_DIR OUTPUT_DIR participant|group, which are embed and study.",
    version=__version__,
    version_flags=["--version"],
    default_parameter=Parameter(consume_multiple=True, negative=(), show_default=_shown),
)

app.meta.suppress_keyboard_interrupt = False  # `main` says what to do after Ctrl-C


@app.command(usage="Usage: nidl-dcl index BIDS_DIR [OPTIONS]")
def index(
    bids_dir: _BidsDir,
    *,
    check: Annotated[bool, Parameter(help="Open every image too.")] = False,
    data: _Data = DataOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """List every candidate image of a dataset (TSV on standard output)."""
    from nidl_dcl.workflow.inputs import index

    table, usable = index(bids_dir, data, run, check=check)
    sys.stdout.write(table)
    if not usable:
        raise InputsUnusableError(f"{bids_dir}: no image can be used; the table says why.")


@app.command(usage="Usage: nidl-dcl preprocess BIDS_DIR OUTPUT_DIR [OPTIONS]")
def preprocess(
    bids_dir: _BidsDir,
    output_dir: _OutputDir,
    *,
    data: _Data = DataOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Make masked, aligned brains of raw scans, as a BIDS derivative with a report.

    A study does so by itself. With --participant-label or --session-label many such commands may run
    at once; one without labels, at the end, writes the tables and the report of all.
    """
    from nidl_dcl.output.description import describe_brains
    from nidl_dcl.workflow.preprocess import dry_run
    from nidl_dcl.workflow.study import preprocess

    if data.preprocess == "none":
        raise UsageError("preprocess with --preprocess none would do nothing.")
    if data.preprocess == "auto":
        data = replace(data, preprocess="align")
    if run.dry_run:
        lines = dry_run(bids_dir, output_dir, data, run.nprocs)
        _write_lines([*lines, "nothing was written (--dry-run)"])
        return
    study = _open(bids_dir, output_dir, data, run, describe=describe_brains)
    if study.selection:
        with study.output.logging():
            preprocess(study)
    elif _is_not_first():
        return
    try:
        with study.output.writing():
            page = preprocess(study)
    except OutputInUseError as error:
        if not study.selection:
            raise
        _LOGGER.info(
            f"{error} The images of this selection are preprocessed; `nidl-dcl preprocess` without "
            "labels writes the tables of all."
        )
        return
    _validate(study)
    sys.stdout.write(f"{page}\n")


@app.command(usage="Usage: nidl-dcl pretrain BIDS_DIR OUTPUT_DIR [OPTIONS]")
def pretrain(
    bids_dir: _BidsDir,
    output_dir: _OutputDir,
    *,
    group: Annotated[
        str | None,
        Parameter(
            help="With --holdout: column whose equal values (a family) are held out together."
        ),
    ] = None,
    data: _Data = DataOptions(),  # noqa: B008
    training: _Training = TrainingOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Train an encoder without labels, by decoupled contrastive learning."""
    from nidl_dcl.workflow.dry_run import dry_run
    from nidl_dcl.workflow.pretrain import join_training, pretrain

    _set_threads(run)
    if run.dry_run:
        _write_lines(dry_run(bids_dir, output_dir, data, training, run, embeds=False))
        return
    with _team(training) as team:
        if team.rank > 0:
            join_training(team, bids_dir, data, run)
            return
        study = _open(bids_dir, output_dir, data, run, training)
        study.group = group
        with study.output.writing():
            folder = pretrain(study, training, team=team)
    _validate(study)
    sys.stdout.write(f"{folder}\n")


@app.command(usage="Usage: nidl-dcl embed BIDS_DIR OUTPUT_DIR [OPTIONS]")
def embed(
    bids_dir: _BidsDir,
    output_dir: _OutputDir,
    *,
    model: Annotated[
        ModelSource | None,
        Parameter(
            help="Model folder, or builtin: the model that nidl_dcl ships; default: the one that pretrain wrote in OUTPUT_DIR."
        ),
    ] = None,
    trust: _Trust = None,
    data: _Data = DataOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Write one embedding per image.

    With --participant-label or --session-label many such commands may run at once: each computes
    its share into the work folder, and one without labels, at the end, writes the table of all.
    """
    from nidl_dcl.workflow.dry_run import dry_run
    from nidl_dcl.workflow.embed import cache_features, embed

    _set_threads(run)
    if run.dry_run:
        _write_lines(dry_run(bids_dir, output_dir, data, None, run, model=model, trust=trust))
        return
    study = _open(bids_dir, output_dir, data, run, trust=trust)
    if study.selection:
        with study.output.logging():
            cache_features(study, model)
    elif _is_not_first():
        return
    try:
        with study.output.writing():
            embed(study, model)
    except OutputInUseError as error:
        if not study.selection:
            raise
        _LOGGER.info(
            f"{error} The embeddings of this selection are computed and kept; `nidl-dcl embed` "
            "without labels writes the table of all."
        )
    _validate(study)


@app.command(usage="Usage: nidl-dcl predict BIDS_DIR OUTPUT_DIR --target COLUMN ... [OPTIONS]")
def predict(
    bids_dir: _BidsDir,
    output_dir: _OutputDir,
    *,
    target: _Target,
    trust: _Trust = None,
    data: _Data = DataOptions(),  # noqa: B008
    prediction: _Prediction = PredictionOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Predict phenotypes from embeddings, cross-validated by participant."""
    from nidl_dcl.evaluation.summary import summary_table
    from nidl_dcl.workflow.predict import predict

    if _is_not_first():
        return
    study = _open(bids_dir, output_dir, data, run, prediction, trust=trust)
    with study.output.writing():
        rows = predict(study, target, prediction)
    _validate(study)
    sys.stdout.write(summary_table(rows) + "\n")


@app.command(usage="Usage: nidl-dcl report BIDS_DIR OUTPUT_DIR [OPTIONS]")
def report(
    bids_dir: _BidsDir,
    output_dir: _OutputDir,
    *,
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Write the HTML report again, from the files."""
    from nidl_dcl.workflow.study import report

    if not output_dir.is_dir():
        raise UsageError(f"OUTPUT_DIR {output_dir} is not a folder.")
    if _is_not_first():
        return
    study = _open(bids_dir, output_dir, DataOptions(), run)
    with study.output.writing():
        page = report(study)
    sys.stdout.write(f"{page}\n")


@app.command(usage="Usage: nidl-dcl study BIDS_DIR OUTPUT_DIR --target COLUMN ... [OPTIONS]")
def study(
    bids_dir: _BidsDir,
    output_dir: _OutputDir,
    *,
    target: _Target,
    model: Annotated[
        ModelSource | None,
        Parameter(
            help="An existing model folder, or builtin, the model that nidl_dcl ships: no pretraining."
        ),
    ] = None,
    trust: _Trust = None,
    data: _Data = DataOptions(),  # noqa: B008
    training: _Training = TrainingOptions(),  # noqa: B008
    prediction: _Prediction = PredictionOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Pretrain, embed, predict and report, in one go."""
    from nidl_dcl.evaluation.summary import summary_table
    from nidl_dcl.workflow.dry_run import dry_run
    from nidl_dcl.workflow.pretrain import join_training
    from nidl_dcl.workflow.study import run_study

    _set_threads(run)
    trained = training if model is None else None
    if run.dry_run:
        lines = dry_run(
            bids_dir,
            output_dir,
            data,
            trained,
            run,
            model=model,
            trust=trust,
            targets=target,
            prediction=prediction,
        )
        _write_lines(lines)
        return
    options = StudyOptions(
        bids_dir=bids_dir,
        output_dir=output_dir,
        target=target,
        model=model,
        trust=trust or [],
        data=data,
        training=training,
        prediction=prediction,
        run=run,
    )
    if model is not None and _is_not_first():
        return
    with _team(trained) as team:
        if team.rank > 0:
            join_training(team, bids_dir, data, run)
            return
        opened = _open(bids_dir, output_dir, data, run, training, prediction, trust=trust)
        with opened.output.writing():
            rows = run_study(opened, options, team)
    _validate(opened)
    page = opened.output.path / "report.html"
    sys.stdout.write(summary_table(rows) + f"\n\n{page}\n")


@app.command(usage="Usage: nidl-dcl share OUTPUT_DIR SHARED_DIR [OPTIONS]")
def share(
    output_dir: Annotated[Path, Parameter(help="Folder of the derivative; stays as it is.")],
    shared_dir: Annotated[
        Path, Parameter(help="Folder to give away: new, or an earlier copy to bring up to date.")
    ],
    *,
    key_file: Annotated[
        Path | None,
        Parameter(
            help="Secret key that makes the pseudonyms, made if it is missing; default: in the user's configuration."
        ),
    ] = None,
    pseudonyms: Annotated[
        Path | None,
        Parameter(help="File to write, for yourself: which participant has which pseudonym."),
    ] = None,
    validate: Annotated[
        bool, Parameter(help="Run the BIDS validator on the copy (package bids-validator-deno).")
    ] = False,
) -> None:
    """Copy a finished output so that it can be given away: pseudonyms for ids, no single heads."""
    from nidl_dcl.output.sharing import share

    if _is_not_first():
        return
    page = share(output_dir, shared_dir, key_file=key_file, pseudonyms=pseudonyms)
    if validate:
        from nidl_dcl.bids import validator

        validator.validate(shared_dir)
    sys.stdout.write(f"{page}\n")


@app.command(usage="Usage: nidl-dcl demo OUTPUT_DIR [OPTIONS]")
def demo(
    output_dir: Annotated[
        Path, Parameter(help="Gets the dataset in bids/ and the study in study/.")
    ],
    *,
    n_participants: Annotated[int, Parameter(help="Size of the dataset.")] = 120,
    max_epochs: Annotated[
        int | None, Parameter(help="Passes over the participants, in place of 300 steps.")
    ] = None,
    occlusion: Annotated[bool, Parameter(help="Also map where the readouts look.")] = False,
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Write a synthetic BIDS dataset and run a study on it."""
    from nidl_dcl.evaluation.summary import summary_table
    from nidl_dcl.workflow.study import demo

    _refuse_dry_run(run)
    _set_threads(run)
    if _is_not_first():
        return
    rows, study = demo(
        output_dir,
        run,
        n_participants=n_participants,
        max_epochs=max_epochs,
        occlusion=occlusion,
        command=["nidl-dcl", *sys.argv[1:]],
    )
    _validate(study)
    page = study.output.path / "report.html"
    sys.stdout.write(summary_table(rows) + f"\n\n{page}\n")


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
    print_config: bool = False,
    verbose: Annotated[bool, Parameter(name=["--verbose", "-v"])] = False,
) -> None:
    """Read the options, from the command line and a file, and run the command.

    Parameters
    ----------
    config
        YAML file of options; the command line wins.
    print_config
        Print the options as YAML and stop.
    verbose
        Say more; show where an error came from.
    """
    if config is not None:
        read_options(config)  # refuses what the library would unfold without end
        app.config = (_ENVIRONMENT, Yaml(config, use_commands_as_keys=False, search_parents=False))
    else:
        app.config = (_ENVIRONMENT,)
    for token in tokens:
        if re.match("[\u2010-\u2015\u2212]+[a-zA-Z]{2}", token):
            plain = token.lstrip("\u2010\u2011\u2012\u2013\u2014\u2015\u2212-")
            raise UsageError(f"{token} begins with a dash that is no hyphen: type --{plain}.")
    words = _command_first(tokens)
    refuse_gone(word.partition("=")[0] for word in words if word.startswith("--"))
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    if config is not None:
        given = bound.arguments
        code = code_named(given.get("training"), given.get("trust"))
        refuse_untrusted(config, code, _code_in(words))
    if (model := bound.arguments.get("model")) is not None and command is study:
        named = (word.partition("=")[0] for word in words if word.startswith("--"))
        refuse_training(bound.arguments.get("training") or TrainingOptions(), model, named)
    if print_config:
        bound.apply_defaults()
        sys.stdout.write(_as_yaml(bound.arguments))
        return
    if verbose:
        logging.getLogger("nidl_dcl").setLevel(logging.DEBUG)
    with nullcontext() if verbose else _only_our_messages():
        command(*bound.args, **bound.kwargs)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status.

    Parameters
    ----------
    argv : list of str, optional
        Words after the command's name; those of the process by default.
    """
    words = sys.argv[1:] if argv is None else argv
    _COMMAND[:] = sys.orig_argv[1:] if argv is None else ["-m", "nidl_dcl", *words]
    verbose = "-v" in words or "--verbose" in words
    signal.signal(signal.SIGTERM, _terminated)
    unraisable, sys.unraisablehook = sys.unraisablehook, _deliver_again
    try:
        with handled_by(ConsoleHandler(), alone=True):
            app.meta(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(_misread(error, words), 2)
    except BaseException as error:
        status = exit_status(error)
        if isinstance(error, OnAnotherProcessError | _ProcessesEnded):
            sys.exit(status)  # it is said where it happened
        if isinstance(error, SystemExit) and status != 143:
            sys.exit(status)
        if verbose and isinstance(error, Exception):
            traceback.print_exception(error)
        _fail(describe(error), status)
    finally:
        sys.unraisablehook = unraisable
    sys.exit(0)


def _command_first(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words of a command; the form of a BIDS App becomes that of its command.

    Raises
    ------
    UsageError
        When a dataset comes first, and no analysis level third.
    """
    if not words or words[0] in app or words[0].startswith("-"):
        return words
    level = words[2] if len(words) > 2 else ""
    if level in _LEVELS:
        return (_LEVELS[level], *words[:2], *words[3:])
    if Path(words[0]).is_dir():
        raise UsageError(
            f"{words[0]} is a folder, no command. As a BIDS App, nidl-dcl takes BIDS_DIR, OUTPUT_DIR "
            f"and the analysis level, participant or group, before any option; the level is {level!r}."
        )
    return words


def _misread(error: CycloptsError, words: list[str]) -> str:
    """Return what is wrong with the words of a command, and where to look."""
    said = str(error)
    if isinstance(error, MissingArgumentError) and error.argument and error.keyword is None:
        name = error.argument.name
        folder = name in ("--bids-dir", "--output-dir", "--shared-dir")
        said = f"{name[2:].replace('-', '_').upper() if folder else name} is missing."
        if folder and any(word.startswith("--") for word in words):
            said += " Give folders first: an option like --target takes all words up to the next option."
    return f"{said} See {' '.join(('nidl-dcl', *(error.command_chain or ())))} --help."


def _code_in(words: tuple[str, ...]) -> list[str]:
    """Return the packages and encoders that the command line itself names."""
    named, option = [], ""
    for word in words:
        if word.startswith("-"):
            option, _, word = word.partition("=")
        if word and option in ("--encoder", "--trust"):
            named.append(word)
    return named


def _open(
    bids_dir: Path,
    output_dir: Path,
    data: DataOptions,
    run: RunOptions,
    *more: Any,
    trust: list[str] | None = None,
    **description: Any,
) -> Any:
    """Return the study that a command works on."""
    from nidl_dcl.workflow.study import open_study

    _refuse_dry_run(run)
    _set_threads(run)
    command = ["nidl-dcl", *sys.argv[1:]]
    return open_study(
        bids_dir, output_dir, data, run, *more, trust=trust or (), command=command, **description
    )


def _refuse_dry_run(run: RunOptions) -> None:
    """Refuse it where nothing answers it, before anything is written."""
    if run.dry_run:
        raise UsageError(
            "--dry-run is for preprocess, pretrain, embed and study; nothing was done."
        )


class _ProcessesEnded(SystemExit):
    """The processes that this one started have ended, and said what there was to say."""


def _team(training: TrainingOptions | None) -> Any:
    """Return the processes of a training, with this one among them; start them if nobody did."""
    from nidl_dcl.workflow.launcher import Rank, Team, start_processes, team_of

    if training is None:
        return Team(Rank())
    status = start_processes(training, [sys.executable, *_COMMAND])
    if status is not None:
        raise _ProcessesEnded(status)
    return team_of(training)


def _is_not_first() -> bool:
    """Return whether this is one of several processes in a command that one does alone."""
    from nidl_dcl.workflow.launcher import find_rank

    return find_rank().rank > 0


def _validate(study: Any) -> None:
    if study.run.validate:
        from nidl_dcl.bids.validator import validate

        validate(study.output.path)


def _set_threads(run: RunOptions) -> None:
    if run.threads is not None:
        import torch

        torch.set_num_threads(run.threads)


def _as_yaml(arguments: dict[str, Any]) -> str:
    from dataclasses import asdict, is_dataclass

    values: dict[str, Any] = {}
    for name, value in arguments.items():
        values.update(asdict(value) if is_dataclass(value) else {name: value})  # type: ignore[arg-type]
    return as_yaml(values)


def _write_lines(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


@contextmanager
def _only_our_messages() -> Iterator[None]:
    """Leave the terminal to our own messages for the length of a block."""
    nothing = logging.NullHandler()
    theirs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    for logger in (logging.getLogger(), *theirs):
        logger.addHandler(nothing)  # else Lightning and Python add one that prints
    for logger in theirs:
        logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="(lightning|torch|monai|nilearn|sklearn)")
            warnings.showwarning = _show_warning
            yield
    finally:
        for logger in (logging.getLogger(), *theirs):
            logger.removeHandler(nothing)
        for logger in theirs:
            logger.propagate = True


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    sys.stderr.write(f"Warning: {message}\n")


def _terminated(number: int, frame: FrameType | None) -> None:
    # In training, Lightning ends the step under way first and then raises; elsewhere nothing waits.
    loaded = sys.modules.get("nidl_dcl.models.callbacks")
    if loaded is None or not loaded.StepCheckpoint.training:
        raise SystemExit(143)


def _deliver_again(lost: Any) -> None:
    """Repeat a signal whose exception was raised where Python ignores them, as in a finalizer."""
    kinds = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    for kind, number in kinds.items():
        if isinstance(lost.exc_value, kind):
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
    sys.__unraisablehook__(lost)


def _fail(message: str, status: int) -> NoReturn:
    loaded = sys.modules.get("nidl_dcl.workflow.launcher")
    place = None if loaded is None else loaded.find_rank()
    if place is not None and place.rank > 0:
        if status in (130, 143) or isinstance(sys.exception(), LostProcessError | NonFiniteError):
            sys.exit(status)  # the first process says it
        message = f"Process {place.rank} of {place.processes}: {message.strip()}"
    sys.stderr.write(f"nidl-dcl: {message.strip()}\n")
    sys.exit(status)

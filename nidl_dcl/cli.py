"""The command ``nidl-dcl``: parses, calls a stage, turns errors into messages and exit statuses.

Options and their help are the fields of `options`; what they do is in `stages`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter
from cyclopts.config import Yaml

from nidl_dcl._version import __version__
from nidl_dcl.errors import (
    LostProcessError,
    NonFiniteError,
    OnAnotherProcessError,
    UsageError,
    describe,
    exit_status,
)
from nidl_dcl.io.console import ConsoleReporter
from nidl_dcl.models.trust import refuse_unsaid
from nidl_dcl.workflow.options import (
    DataOptions,
    PredictionOptions,
    RunOptions,
    StudyOptions,
    TrainingOptions,
    as_yaml,
    code_named,
    read_options,
)

__all__ = ["main"]

_COMMAND: list[str] = []
"""What Python was started with, to start more processes of it."""

_Data = Annotated[DataOptions, Parameter(name="*", group="Data")]
_Training = Annotated[TrainingOptions, Parameter(name="*", group="Training")]
_Prediction = Annotated[PredictionOptions, Parameter(name="*", group="Prediction")]
_Run = Annotated[RunOptions, Parameter(name="*", group="Run")]


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
    bids_dir: Path,
    *,
    check: bool = False,
    data: _Data = DataOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """List every candidate image of a dataset (TSV on standard output).

    Parameters
    ----------
    bids_dir
        BIDS dataset; never written to.
    check
        Open every image too.
    """
    from nidl_dcl.workflow import study as stages

    sys.stdout.write(stages.index(bids_dir, data, run, check=check, console=ConsoleReporter()))


@app.command(usage="Usage: nidl-dcl pretrain BIDS_DIR OUTPUT_DIR [OPTIONS]")
def pretrain(
    bids_dir: Path,
    output_dir: Path,
    *,
    group: str | None = None,
    data: _Data = DataOptions(),  # noqa: B008
    training: _Training = TrainingOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Train an encoder without labels, by decoupled contrastive learning.

    Parameters
    ----------
    bids_dir
        BIDS dataset; never written to.
    output_dir
        Folder of the derivative.
    group
        With --holdout: column whose equal values (a family) are held out together.
    """
    from nidl_dcl.workflow import study as stages

    console = ConsoleReporter()
    if run.dry_run:
        _set_threads(run)
        _say_lines(stages.dry_run(bids_dir, output_dir, data, training, run, console))
        return
    with _team(training) as team:
        if team.rank > 0:
            _set_threads(run)
            stages.follow(team, bids_dir, data, run)
            return
        output = _output(bids_dir, output_dir, run, data, training)
        with output.writing(console.say):
            folder = stages.pretrain(output, data, training, run, console, group=group, team=team)
    _validate(output.public, run)
    sys.stdout.write(f"{output.public / folder.relative_to(output.path)}\n")


@app.command(usage="Usage: nidl-dcl embed BIDS_DIR OUTPUT_DIR [OPTIONS]")
def embed(
    bids_dir: Path,
    output_dir: Path,
    *,
    model: Path | None = None,
    trust: list[str] | None = None,
    data: _Data = DataOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Write one embedding per image.

    Parameters
    ----------
    bids_dir
        BIDS dataset; never written to.
    output_dir
        Folder of the derivative.
    model
        Model folder; default: the one that pretrain wrote in OUTPUT_DIR.
    trust
        Packages whose encoders may be imported by name.
    """
    from nidl_dcl.workflow import study as stages

    console = ConsoleReporter()
    if run.dry_run:
        _set_threads(run)
        _say_lines(stages.dry_run(bids_dir, output_dir, data, None, run, console))
        return
    output = _output(bids_dir, output_dir, run, data)
    told: dict[str, Any] = {"model_folder": model, "trust": trust or (), "console": console}
    if (data.participant_label or data.session_label) and not run.share:
        with output.beside_others():
            stages.embed_part(output, data, run, **told)
    elif not _is_not_first():
        with output.writing(console.say):
            stages.embed(output, data, run, **told)
    _validate(output.public, run)


@app.command(usage="Usage: nidl-dcl predict BIDS_DIR OUTPUT_DIR --target COLUMN ... [OPTIONS]")
def predict(
    bids_dir: Path,
    output_dir: Path,
    *,
    target: list[str],
    trust: list[str] | None = None,
    data: _Data = DataOptions(),  # noqa: B008
    prediction: _Prediction = PredictionOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Predict phenotypes from embeddings, cross-validated by participant.

    Parameters
    ----------
    bids_dir
        BIDS dataset; never written to.
    output_dir
        Folder of the derivative, with embeddings.
    target
        Columns of the phenotype tables.
    trust
        Packages whose encoders may be imported by name.
    """
    from nidl_dcl.workflow import study as stages

    if _is_not_first():
        return
    output = _output(bids_dir, output_dir, run, data, prediction)
    with output.writing(ConsoleReporter().say):
        rows = stages.predict(
            output, target, data, run, prediction, trust=trust or (), console=ConsoleReporter()
        )
    _validate(output.public, run)
    sys.stdout.write(stages.summary_table(rows) + "\n")


@app.command(usage="Usage: nidl-dcl report BIDS_DIR OUTPUT_DIR [OPTIONS]")
def report(
    bids_dir: Path,
    output_dir: Path,
    *,
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Write the HTML report again, from the files.

    Parameters
    ----------
    bids_dir
        BIDS dataset; never written to.
    output_dir
        Folder of the derivative.
    """
    from nidl_dcl.workflow import study as stages

    if not output_dir.is_dir():
        raise UsageError(f"OUTPUT_DIR {output_dir} is not a folder.")
    if _is_not_first():
        return
    output = _output(bids_dir, output_dir, run)
    with output.writing():
        page = stages.report(output, run)
    sys.stdout.write(f"{page}\n")


@app.command(usage="Usage: nidl-dcl share OUTPUT_DIR SHARED_DIR [OPTIONS]")
def share(
    output_dir: Path,
    shared_dir: Path,
    *,
    key_file: Path | None = None,
    pseudonyms: Path | None = None,
    validate: bool = False,
) -> None:
    """Copy a finished output so that it can be given away: pseudonyms for ids, no single heads.

    Parameters
    ----------
    output_dir
        Folder of the derivative; stays as it is.
    shared_dir
        Folder to give away: new, or an earlier copy, which is brought up to date.
    key_file
        Secret key that makes the pseudonyms; default: in the user's configuration. Made if it is missing.
    pseudonyms
        Also write which participant has which pseudonym to this file, for yourself.
    validate
        Run the BIDS validator on the copy at the end (package bids-validator-deno).
    """
    from nidl_dcl.output import sharing

    if _is_not_first():
        return
    page = sharing.share(
        output_dir,
        shared_dir,
        key_file=key_file,
        pseudonyms=pseudonyms,
        reporter=ConsoleReporter(),
    )
    if validate:
        from nidl_dcl.bids import validator

        validator.validate(shared_dir)
    sys.stdout.write(f"{page}\n")


@app.command(usage="Usage: nidl-dcl study BIDS_DIR OUTPUT_DIR --target COLUMN ... [OPTIONS]")
def study(
    bids_dir: Path,
    output_dir: Path,
    *,
    target: list[str],
    model: Path | None = None,
    trust: list[str] | None = None,
    data: _Data = DataOptions(),  # noqa: B008
    training: _Training = TrainingOptions(),  # noqa: B008
    prediction: _Prediction = PredictionOptions(),  # noqa: B008
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Pretrain, embed, predict and report, in one go.

    Parameters
    ----------
    bids_dir
        BIDS dataset; never written to.
    output_dir
        Folder of the derivative.
    target
        Columns of the phenotype tables.
    model
        An existing model folder: no pretraining.
    trust
        Packages whose encoders may be imported by name.
    """
    from nidl_dcl.workflow import study as stages

    console = ConsoleReporter()
    if run.dry_run:
        _set_threads(run)
        lines = stages.dry_run(
            bids_dir,
            output_dir,
            data,
            training if model is None else None,
            run,
            console,
            targets=target,
            prediction=prediction,
        )
        _say_lines(lines)
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
    with _team(training if model is None else None) as team:
        if team.rank > 0:
            _set_threads(run)
            stages.follow(team, bids_dir, data, run)
            return
        output = _output(bids_dir, output_dir, run, data, training, prediction)
        with output.writing(console.say):
            rows = stages.study(output, options, console, team)
    _validate(output.public, run)
    sys.stdout.write(stages.summary_table(rows) + f"\n\n{output.public / 'report.html'}\n")


@app.command(usage="Usage: nidl-dcl demo OUTPUT_DIR [OPTIONS]")
def demo(
    output_dir: Path,
    *,
    n_participants: int = 120,
    max_epochs: int = 40,
    occlusion: bool = False,
    run: _Run = RunOptions(),  # noqa: B008
) -> None:
    """Write a synthetic BIDS dataset and run a study on it.

    Parameters
    ----------
    output_dir
        Gets the dataset in bids/ and the study in study/.
    n_participants
        Size of the dataset.
    max_epochs
        Length of the training.
    occlusion
        Also map where the readouts look.
    """
    from nidl_dcl.workflow import study as stages

    _refuse_dry_run(run)
    _set_threads(run)
    if _is_not_first():
        return
    rows, page = stages.demo(
        output_dir,
        run,
        n_participants=n_participants,
        max_epochs=max_epochs,
        occlusion=occlusion,
        console=ConsoleReporter(),
        command=["nidl-dcl", *sys.argv[1:]],
    )
    _validate(page.parent, run)
    sys.stdout.write(stages.summary_table(rows) + f"\n\n{page}\n")


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
        app.config = (Yaml(config, use_commands_as_keys=False, search_parents=False),)
    else:
        app.config = ()
    words = _command_first(tokens)
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    if config is not None:
        told = bound.arguments
        refuse_unsaid(config, code_named(told.get("training"), told.get("trust")), _said(words))
    if print_config:
        bound.apply_defaults()
        sys.stdout.write(_as_yaml(bound.arguments))
        return
    if not verbose:
        _silence()
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
        folder = name in ("--bids-dir", "--output-dir")
        said = f"{name[2:].replace('-', '_').upper() if folder else name} is missing."
        if folder and any(word.startswith("--") for word in words):
            said += " Give folders first: an option like --target takes all words up to the next option."
    return f"{said} See {' '.join(('nidl-dcl', *(error.command_chain or ())))} --help."


def _said(words: tuple[str, ...]) -> list[str]:
    """Return the packages and encoders that the command line itself names."""
    said, option = [], ""
    for word in words:
        if word.startswith("-"):
            option, _, word = word.partition("=")
        if word and option in ("--encoder", "--trust"):
            said.append(word)
    return said


def _output(bids_dir: Path, output_dir: Path, run: RunOptions, *options: Any) -> Any:
    from dataclasses import asdict

    from nidl_dcl.output.folder import Output

    _refuse_dry_run(run)
    _set_threads(run)
    config = {k: v for group in (*options, run) for k, v in asdict(group).items()}
    output = Output(
        bids_dir,
        output_dir,
        work_dir=run.work_dir,
        command=["nidl-dcl", *sys.argv[1:]],
        config=config,
        share=run.share,
        share_key=run.share_key,
    )
    if run.share:
        ConsoleReporter().say(f"With real ids, for yourself alone: {output.path}")
    return output


def _refuse_dry_run(run: RunOptions) -> None:
    """Refuse it where nothing answers it, before anything is written."""
    if run.dry_run:
        raise UsageError("--dry-run is for pretrain, embed and study; nothing was done.")


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
    from nidl_dcl.workflow.launcher import find_place

    return find_place().rank > 0


def _validate(folder: Path, run: RunOptions) -> None:
    if run.validate:
        from nidl_dcl.bids.validator import validate

        validate(folder)


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


def _say_lines(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _silence() -> None:
    """Leave the terminal to our own messages."""
    import logging

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", module="(lightning|torch|monai|nilearn|sklearn)")
    warnings.showwarning = _show_warning


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
    place = None if loaded is None else loaded.find_place()
    if place is not None and place.rank > 0:
        if status in (130, 143) or isinstance(sys.exception(), LostProcessError | NonFiniteError):
            sys.exit(status)  # the first process says it
        message = f"Process {place.rank} of {place.processes}: {message.strip()}"
    sys.stderr.write(f"nidl-dcl: {message.strip()}\n")
    sys.exit(status)

"""The stages of a study, from a BIDS dataset and an output folder to the files of the derivative.

Each can be called alone, again (it does what is missing) and after a kill (it goes on). The command
line and the scripts in `pipelines/` call these functions and nothing below them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from nidl_dcl.errors import UsageError
from nidl_dcl.io.console import NullReporter, progress_of
from nidl_dcl.io.formats import write_text
from nidl_dcl.models.serialization import weights_sha256
from nidl_dcl.output.folder import Output
from nidl_dcl.report.build import write_report
from nidl_dcl.report.live import LivePage
from nidl_dcl.workflow.dry_run import dry_run
from nidl_dcl.workflow.embed import embed, embed_part
from nidl_dcl.workflow.external import find_readouts
from nidl_dcl.workflow.factory import check_training, data_module, training_config, trusted_by_name
from nidl_dcl.workflow.inputs import check_inputs, index
from nidl_dcl.workflow.launcher import Team
from nidl_dcl.workflow.options import (
    PredictionOptions,
    RunOptions,
    StudyOptions,
    TrainingOptions,
    study_yaml,
)
from nidl_dcl.workflow.participants import hold_out
from nidl_dcl.workflow.predict import predict
from nidl_dcl.workflow.preflight import (
    check_targets,
    is_trained,
    known_shape,
    refuse_another_model,
    refuse_unusable,
)
from nidl_dcl.workflow.pretrain import follow, pretrain

__all__ = [
    "configure",
    "demo",
    "dry_run",
    "embed",
    "embed_part",
    "follow",
    "index",
    "predict",
    "pretrain",
    "report",
    "study",
    "summary_table",
]


def report(output: Output, run: RunOptions) -> Path:
    """Write ``report.html`` from the files of the output folder.

    Parameters
    ----------
    output : Output
        Held for writing.
    run : RunOptions
        The model's label.
    """
    with output.stage("report", share=run.share):
        if output.sharing is not None:
            write_report(output.path, model=run.model_name)
        return write_report(output.public, model=run.model_name)


def configure(output: Output, options: StudyOptions, console: NullReporter | None = None) -> None:
    """Refuse what could not be studied, and write ``code/config.yaml``, which runs it again.

    Parameters
    ----------
    output : Output
        Dataset and output folder; held for writing.
    options : StudyOptions
        What is to be done.
    console : Quiet, optional
        Told of messages and progress.

    Raises
    ------
    UsageError
        For options that cannot be used, such as a target that no table has.
    InputsUnusableError
        When too few images are usable.
    """
    console = output.heard(console)
    data, run = options.data, options.run
    folder = output.model_folder(run.model_name)
    training = known_shape(options.training, folder)
    if options.model is None:
        check_training(training)
        if options.prediction.readout is not None:
            raise UsageError(
                "--readout needs the model that it reads: give --model FOLDER of that study "
                "(models/desc-… in its OUTPUT_DIR), so that nothing is trained here."
            )
    else:
        digest = weights_sha256(options.model)
        refuse_another_model(folder, options.model, digest)
        find_readouts(
            output.public,
            options.prediction.readout,
            options.target,
            model=run.model_name,
            model_sha256=digest,
        )
    module = data_module(
        output.bids_dir, data, run, training=training, work=output.work, console=console
    )
    check_inputs(output, module)
    check_targets(module, options.target, options.prediction)
    data = hold_out(module, data, run, options.model or folder, options.prediction.group)
    refuse_unusable(module.images, module.persons, options.target, options.prediction)
    if options.model is None and (folder / "model.json").is_file():
        config = training_config(data, training, run, module.preparation, module.group)
        is_trained(folder, config)
    here = replace(options, bids_dir=output.bids_dir, output_dir=output.path, data=data)
    write_text(output.path / "code" / "config.yaml", study_yaml(here))


def study(
    output: Output,
    options: StudyOptions,
    console: NullReporter | None = None,
    team: Team | None = None,
) -> list[dict[str, Any]]:
    """Pretrain, embed, predict and report; with a model folder, without pretraining.

    Parameters
    ----------
    output : Output
        Dataset and output folder; held for writing.
    options : StudyOptions
        What is to be done.
    console : Quiet, optional
        Told of messages and progress.
    team : Team, optional
        The processes that train; this is the first of them.

    Returns
    -------
    list of dict
        As `predict`.
    """
    console = output.heard(console)
    data, run, trust = options.data, options.run, options.trust
    if options.model is None:
        trust = [*trust, *trusted_by_name(options.training.encoder)]
    group = options.prediction.group
    configure(output, options, console)
    live = LivePage(output.path, run.model_name, console)
    if live.is_needed:
        live.write()
    with live.following():
        if options.model is None:
            pretrain(
                output, data, options.training, run, console, group=group, team=team, live=live
            )
            if output.worked:
                live.write()
        embed(
            output, data, run, model_folder=options.model, trust=trust, console=console, group=group
        )
        if output.worked:
            live.write()
        rows = predict(
            output, options.target, data, run, options.prediction, trust=trust, console=console
        )
    old = any(map(_report_is_old, {output.path, output.public}))
    if output.worked or live.is_needed or old:
        report(output, run)
    return rows


def demo(
    output_dir: Path,
    run: RunOptions,
    *,
    n_participants: int,
    max_epochs: int,
    occlusion: bool = False,
    console: NullReporter | None = None,
    command: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], Path]:
    """Write a synthetic BIDS dataset and run a study of age and sex on it.

    Parameters
    ----------
    output_dir : Path
        Gets the dataset in ``bids/`` and the study in ``study/``.
    run : RunOptions
        Options.
    n_participants, max_epochs : int
        Size and length.
    occlusion : bool, default=False
        Also map where the readouts look.
    console : Quiet, optional
        Told of messages and progress.
    command : sequence of str
        For the record.

    Returns
    -------
    rows : list of dict
        As `study`.
    page : Path
        The report.
    """
    from nidl_dcl.bids.synthetic import write_demo_dataset

    console = console or NullReporter()
    bids_dir = output_dir / "bids"
    if not (bids_dir / ".complete").is_file():
        console.say(f"Writing a synthetic BIDS dataset of {n_participants} participants.")
        write_demo_dataset(
            bids_dir,
            n_participants=n_participants,
            seed=run.random_seed,
            progress=progress_of(console, "drawing brains"),
        )
    options = StudyOptions(
        bids_dir=bids_dir,
        output_dir=output_dir / "study",
        target=["age", "sex"],
        training=TrainingOptions(max_epochs=max_epochs, devices="1"),
        prediction=PredictionOptions(occlusion=occlusion),
        run=run,
    )
    config = {**asdict(options.training), **asdict(run), "n_participants": n_participants}
    work = run.work_dir
    if run.share and work is None:
        work = output_dir.with_name(f"{output_dir.resolve().name}-private")
    output = Output(
        bids_dir,
        options.output_dir,
        work_dir=work,
        command=command,
        config=config,
        share=run.share,
        share_key=run.share_key,
    )
    with output.writing():
        rows = study(output, options, console)
    return rows, output.public / "report.html"


def _report_is_old(folder: Path) -> bool:
    """Return whether a result was written after the report, before a run was killed."""
    page = folder / "report.html"
    if not page.is_file():
        return True
    results = ("desc-*", "models/*/*", "figures/*", "logs/*.tsv", "logs/*.csv")
    files = [file for pattern in results for file in folder.glob(pattern)]
    return any(file.stat().st_mtime_ns > page.stat().st_mtime_ns for file in files)


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `predict` as a table to print, and one of external validity below it."""
    shown = []
    with_confounds = any("confounds" in row for row in rows)
    for row in rows:
        if "metric" not in row:  # nothing was cross-validated here
            continue
        shown.append(
            {
                "target": row["target"],
                "metric": row["metric"],
                "score [95 % interval]": _with_ends(row),
                "chance": _two(row.get("chance")),
                "dummy": _two(row.get("dummy")),
                "untrained encoder": _two(row.get("untrained")),
                "voxels": _two(row.get("voxels")),
                "half the labels": _two(row.get("half")),
                **({"confounds": _two(row.get("confounds"))} if with_confounds else {}),
                "n": row["n"],
            }
        )
    outside = [
        {
            "read out from another cohort": row["target"],
            "metric": row["metric"],
            "here [95 % interval]": _with_ends(row),
            "in its own cohort": _with_ends(row, "internal"),
            "dummy": _two(row.get("dummy")),
            "n": row["n"],
            "n there": row["n_internal"],
            "in both, not scored": row["n_overlap"],
        }
        for row in (given["external"] for given in rows if given.get("external"))
    ]
    tables = [pd.DataFrame(part).to_string(index=False) for part in (shown, outside) if part]
    return "\n\n".join(tables)


def _with_ends(row: Mapping[str, Any], inside: str = "") -> str:
    """Return a score with its interval, of another cohort's by the prefix of its names."""
    low, high = (row.get(f"{inside}_{end}" if inside else end) for end in ("low", "high"))
    ends = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return _two(row[inside or "score"]) + ends


def _two(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"

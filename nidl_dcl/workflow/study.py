"""A study from a BIDS dataset to a report: its stages in turn, each of which can be called alone.

Each does what is missing when it is called again, and resumes after a kill. The command line and
the scripts in `pipelines/` call these functions and nothing below them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nidl_dcl.errors import UsageError
from nidl_dcl.io.console import progress_of
from nidl_dcl.io.formats import write_text
from nidl_dcl.models.serialization import weights_sha256
from nidl_dcl.output.description import describe_folder
from nidl_dcl.output.folder import Output
from nidl_dcl.report.build import write_report
from nidl_dcl.report.live import LivePage
from nidl_dcl.workflow.embed import embed
from nidl_dcl.workflow.external import find_readouts
from nidl_dcl.workflow.factory import check_training, training_config, trusted_by_name
from nidl_dcl.workflow.inputs import Study, input_lines
from nidl_dcl.workflow.launcher import Team
from nidl_dcl.workflow.options import (
    DataOptions,
    PredictionOptions,
    RunOptions,
    StudyOptions,
    TrainingOptions,
    refuse_training,
    study_yaml,
)
from nidl_dcl.workflow.predict import predict
from nidl_dcl.workflow.preflight import (
    check_targets,
    is_trained,
    known_shape,
    refuse_another_model,
    refuse_unusable,
)
from nidl_dcl.workflow.pretrain import pretrain

_LOGGER = logging.getLogger(__name__)


def open_study(
    bids_dir: Path,
    output_dir: Path,
    data: DataOptions,
    run: RunOptions,
    *more: TrainingOptions | PredictionOptions,
    trust: Sequence[str] = (),
    command: Sequence[str] = (),
    describe: Callable[[Path, Path], None] = describe_folder,
) -> Study:
    """Return the study that options describe; its ``output.writing()`` is to be entered.

    Parameters
    ----------
    bids_dir, output_dir : Path
        Dataset and output folder.
    data, run : DataOptions, RunOptions
        What all stages share.
    *more : TrainingOptions, PredictionOptions
        Of the stages that will be called: for the record, the encoder to trust and the group.
    trust : sequence of str
        Packages whose encoders may be imported.
    command : sequence of str
        For the record.
    describe : callable
        As of `Output`.
    """
    config = {name: value for group in (data, *more, run) for name, value in asdict(group).items()}
    output = Output(
        bids_dir,
        output_dir,
        work_dir=run.work_dir,
        command=command,
        config=config,
        describe=describe,
    )
    trusted = [*trust, *trusted_by_name(config.get("encoder") or "")]
    return Study(output, data, run, config.get("group"), trusted)


def configure(study: Study, options: StudyOptions) -> None:
    """Refuse what could not be studied, and write ``code/config.yaml``, which runs it again.

    Parameters
    ----------
    study : Study
        Dataset, output folder and common options.
    options : StudyOptions
        What is to be done.

    Raises
    ------
    UsageError
        For options that cannot be used, such as a target that no table has.
    InputsUnusableError
        When too few images are usable.
    """
    folder = study.model_folder
    training = known_shape(options.training, folder)
    if options.model is None:
        check_training(training)
        if options.prediction.readout is not None:
            raise UsageError(
                "--readout needs the model that it reads: give --model FOLDER of that study "
                "(models/desc-… in its OUTPUT_DIR), so that nothing is trained here."
            )
    else:
        refuse_training(options.training, options.model)
        refuse_another_model(folder, options.model)
        find_readouts(
            study.output.path,
            options.prediction.readout,
            options.target,
            model=study.run.model_name,
            model_sha256=weights_sha256(options.model),
        )
    check_targets(study.table, options.target, options.prediction)
    module = study.data_module(options.model or folder, training=training)
    study.announce(refuse_unusable(module.images, options.target, options.prediction, study.table))
    if options.model is None and (folder / "model.json").is_file():
        is_trained(folder, training_config(module, study.data, training))
    here = replace(
        options,
        bids_dir=study.output.bids_dir,
        output_dir=study.output.path,
        data=replace(options.data, holdout=module.holdout or None),
    )
    write_text(study.output.path / "code" / "config.yaml", study_yaml(here))


def run_study(
    study: Study, options: StudyOptions, team: Team | None = None
) -> list[dict[str, Any]]:
    """Pretrain, embed, predict and report; with a model folder, without pretraining.

    Parameters
    ----------
    study : Study
        Of `open_study`; its output is held for writing.
    options : StudyOptions
        What is to be done.
    team : Team, optional
        The processes that train; this is the first of them.

    Returns
    -------
    list of dict
        As `predict`.
    """
    output, name = study.output, study.run.model_name
    study.model = options.model
    configure(study, options)
    live = LivePage(output.path, name)
    if live.is_needed:
        live.write()
    with live.following():
        if options.model is None:
            pretrain(study, options.training, team=team, live=live)
            if output.worked:
                live.write()
        embed(study, options.model)
        if output.worked:
            live.write()
        rows = predict(study, options.target, options.prediction)
    if output.worked or live.is_needed or _report_is_old(output.path):
        report(study)
    return rows


def preprocess(study: Study) -> Path | None:
    """Preprocess the scans of a dataset into the output folder, and return the report.

    Without holding the folder, such as one of many jobs, each for some participants, the images are
    written, and no table.

    Raises
    ------
    UsageError, InputsUnusableError
        As `Study.table`.
    """
    study.brains = study.output.path
    study.table.check()
    if not study.output.is_held:
        return None
    for line in input_lines(study.table, "logs/inputs.tsv"):
        _LOGGER.info(line)
    study.write_inputs(study.table)
    return report(study)


def report(study: Study) -> Path:
    """Write ``report.html`` from the files of the output folder."""
    with study.output.stage("report"):
        return write_report(study.output.path, model=study.run.model_name)


def demo(
    output_dir: Path,
    run: RunOptions,
    *,
    n_participants: int,
    max_epochs: int | None,
    occlusion: bool = False,
    command: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], Study]:
    """Write a synthetic BIDS dataset and run a study of age and sex on it.

    Parameters
    ----------
    output_dir : Path
        Gets the dataset in ``bids/`` and the study in ``study/``.
    run : RunOptions
        Options.
    n_participants : int
        Size of the dataset.
    max_epochs : int, optional
        Length of the training; default: as of `TrainingOptions`.
    occlusion : bool, default=False
        Also map where the readouts look.
    command : sequence of str
        For the record.

    Returns
    -------
    rows : list of dict
        As `predict`.
    study : Study
        Its output holds the report.
    """
    from nidl_dcl.bids.synthetic import write_demo_dataset  # nilearn takes seconds to import

    bids_dir = output_dir / "bids"
    if not (bids_dir / ".complete").is_file():
        _LOGGER.info(f"Writing a synthetic BIDS dataset of {n_participants} participants.")
        write_demo_dataset(
            bids_dir,
            n_participants=n_participants,
            seed=run.random_seed,
            progress=progress_of("drawing brains"),
        )
    options = StudyOptions(
        bids_dir=bids_dir,
        output_dir=output_dir / "study",
        target=["age", "sex"],
        training=TrainingOptions(max_epochs=max_epochs, devices="1"),
        prediction=PredictionOptions(occlusion=occlusion),
        run=run,
    )
    study = open_study(
        bids_dir,
        options.output_dir,
        options.data,
        run,
        options.training,
        options.prediction,
        command=command,
    )
    with study.output.writing():
        rows = run_study(study, options)
    return rows, study


def _report_is_old(folder: Path) -> bool:
    """Return whether a result was written after the report, before a run was killed."""
    page = folder / "report.html"
    if not page.is_file():
        return True
    results = ("desc-*", "models/*/*", "figures/*", "logs/*.tsv", "logs/*.csv")
    files = [file for pattern in results for file in folder.glob(pattern)]
    return any(file.stat().st_mtime_ns > page.stat().st_mtime_ns for file in files)

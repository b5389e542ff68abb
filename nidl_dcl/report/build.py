"""One self-contained page about an output folder, from its files alone.

Assembles: numbers come from the files (`results`), pictures from `figures`, looks and prose from
`page` and the templates.
"""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nidl_dcl._version import __version__
from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.metrics import multiplicity_note
from nidl_dcl.io.formats import write_text
from nidl_dcl.report.html import Gallery, Table, format_duration, format_number, render_page
from nidl_dcl.report.images import show_average, show_outliers, show_retrieval
from nidl_dcl.report.occlusion import show_occlusion
from nidl_dcl.report.predictions import (
    audit_holdout,
    audit_sites,
    describe_features,
    score_external,
    score_target,
)
from nidl_dcl.report.preprocessing import is_preprocessing, show_preprocessing
from nidl_dcl.report.reader import Results, as_dict, as_list, as_number
from nidl_dcl.report.training import show_embeddings, show_training, show_views

_MOST_ROWS = 200

_SMALL_SAMPLE = 200

_SECTIONS = {
    "headline": "Headline",
    "participants": "Participants",
    "preprocessing": "Preprocessing",
    "brains": "Average brain",
    "views": "Views",
    "training": "Training",
    "embeddings": "Embeddings",
    "retrieval": "Same participant",
    "outliers": "Outlying scans",
    "predictions": "Predictions",
    "holdout": "Held-out people",
    "occlusion": "Where it looks",
    "external": "External validity",
    "exposure": "Exposure",
    "site": "Site audit",
    "limits": "Limits",
    "methods": "Methods text",
    "citation": "Citation",
    "settings": "Settings",
    "versions": "Versions",
    "files": "Files",
}

_OF_PREPROCESSING = (
    *("preprocessing", "participants", "limits", "methods", "citation", "settings", "versions"),
    "files",
)
"""Sections of the page about preprocessing alone, the only one with "files"."""

_UNDER_WAY = '<meta name="nidl-dcl" content="in progress">'

_STAGES = {
    "preprocess": "preprocessing",
    "pretrain": "pretraining",
    "embed": "computing embeddings",
    "predict": "predicting",
    "report": "writing the report",
}

_INPUTS = ("participant_id", "session_id", "path", "status", "code", "message")


def write_report(
    output_dir: str | Path, *, model: str = "dcl", under_way: bool = False, error: str = ""
) -> Path:
    """Write ``report.html``, and its pictures into ``figures/``, from the files of a folder.

    Parameters
    ----------
    output_dir : path
        OUTPUT_DIR of a study, complete or not: what is missing is said in a line, what is broken
        is listed at the end of the page. Or of preprocessing, of which the page tells alone.
    model : str, default="dcl"
        The label of the model in file names.
    under_way : bool, default=False
        Whether a study is writing there now; the page then says so, since when and at which stage.
    error : str, optional
        What ended that study.

    Returns
    -------
    Path
        The page: one file without external resources.

    Raises
    ------
    UsageError
        When `output_dir` is not a folder.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise UsageError(
            f"There is no folder {folder} to report on. Give the OUTPUT_DIR of a study."
        )
    results, gallery = Results(folder, model), Gallery(folder, model)
    found, citation = results.targets(), results.text("logs/CITATION.md").split("\n## ")[0]
    title = str(results.json("dataset_description.json").get("Name") or "Report of nidl_dcl")
    run = _run(results)
    alone = is_preprocessing(results, run["words"])
    context: dict[str, Any] = {
        "version": __version__,
        "model": model,
        "alone": alone,
        "sections": {
            name: _SECTIONS[name]
            for name in (_OF_PREPROCESSING if alone else _SECTIONS)
            if alone or name != "files"
        },
        "title": title,
        "citation": citation.removeprefix("# How to cite").strip(),
        "rerun": results.has("code/config.yaml"),
        "shared": results.has("logs/sharing.json"),
        "run": run,
        "under_way": _UNDER_WAY if under_way else "",
        "unfinished": _unfinished(results, under_way=under_way, error=error),
        "inputs": _inputs(results),
        "preprocessing": show_preprocessing(results, gallery, title),
        "brains": show_average(results, gallery),
        "views": show_views(results, gallery),
        "training": show_training(results, gallery),
        "embeddings": show_embeddings(results, gallery),
        "retrieval": show_retrieval(results),
        "outliers": show_outliers(results, gallery),
        "targets": [score_target(target, gallery) for target in found],
        "occlusion": show_occlusion(results, gallery),
        "holdout": audit_holdout(found),
        "sites": audit_sites(found),
        "combat": any(
            target.metrics.get("harmonization")
            or as_dict(target.metrics.get("site")).get("harmonized")
            for target in found
        ),
        "external": [score_external(metrics) for metrics in results.external()],
    }
    names = dict.fromkeys(name for t in context["targets"] for name in t["baselines"])
    context |= {
        # Being worse than a baseline, then not beating it, is what a reader has to know first.
        "verdicts": sorted(
            context["targets"], key=lambda t: (t["beats"], t["verdict"]["kind"] != "worse")
        ),
        "baselines": [describe_features(name) for name in names],
        "facts": _facts(context),
        "several": multiplicity_note(len(context["targets"])),
        "setting": _settings(results, context["run"]["options"]),
        "credits": _credits(results),
    }
    context |= {"limits": _limits(context), "problems": list(dict.fromkeys(results.problems))}
    page = folder / "report.html"
    write_text(page, render_page(context))
    return page


def is_under_way(page: Path) -> bool:
    """Return whether a page says that its study was going on when it was written."""
    with page.open("rb") as stream:
        return _UNDER_WAY.encode() in stream.read(4096)


def _unfinished(results: Results, *, under_way: bool, error: str) -> str:
    """Return in words that the study is not finished, since when and at which stage; else nothing."""
    run = results.json("logs/run.json")
    if not under_way:
        return _left_unfinished(run)
    doing = "the inputs are checked, nothing else is done yet"
    if stages := as_list(run.get("stages")):
        last = as_dict(stages[-1])
        doing = _STAGES.get(str(last.get("name")), str(last.get("name")))
        if not error and as_number(last.get("seconds")) is not None:
            doing = f"{doing} is done"
    since, now = _minute(run.get("started")), datetime.datetime.now(datetime.UTC)
    if error:
        return (
            f"Not finished: the run that began at {since} ended with an error ({doing}): {error} "
            "What was done until then stands below."
        )
    return (
        f"Not finished: in progress since {since}, at this stage: {doing}. This page was written at "
        f"{now:%Y-%m-%d %H:%M} UTC with what was done by then; load it again for more. If it does not "
        "change any more, the run has ended early: the same command goes on from there."
    )


def _left_unfinished(run: Mapping[str, Any]) -> str:
    """Return in words that the run before this report ended early; else nothing."""
    commands = [as_dict(one) for one in (*as_list(run.get("earlier")), run)]
    worked = [
        (one, names)
        for one in commands
        if (names := [as_dict(s).get("name") for s in as_list(one.get("stages"))])
        and set(names) != {"report"}
    ]
    if not worked or worked[-1][0] is commands[-1] or worked[-1][0].get("exit_status") == 0:
        return ""
    last, names = worked[-1]
    return (
        f"Not finished: the run that began at {_minute(last.get('started'))} ended early "
        f"({_STAGES.get(str(names[-1]), names[-1])}). What was done until then stands below; the same "
        "command goes on from there."
    )


def _minute(time: Any) -> str:
    return f"{str(time)[:16].replace('T', ' ')} UTC" if time else "an unknown time"


def _run(results: Results) -> dict[str, Any]:
    run = results.json("logs/run.json")
    stages = [as_dict(s) for s in as_list(run.get("stages"))]
    seconds = [as_number(s.get("seconds")) for s in stages]
    options = dict(_flatten(as_dict(run.get("config"))))
    command = run.get("command")
    took = sum(s for s in seconds if s is not None)
    return {
        "known": bool(run),
        "words": as_list(command),
        "doing": [*as_list(command)[1:2], *(s.get("name") for s in stages)],
        "command": command if isinstance(command, str) else shlex.join(map(str, as_list(command))),
        "started": str(stages[0].get("started") or "")[:16].replace("T", " ") if stages else "",
        "took": format_duration(took) if took else "",
        "exit_status": as_number(run.get("exit_status")),
        "options": options,
        "config": Table(("option", "value"), list(options.items())),
        "versions": Table(("name", "version"), list(as_dict(run.get("versions")).items())),
        "stages": Table(
            ("stage", "started", "seconds", "resumed from step"),
            [
                (s.get("name"), s.get("started"), took, as_number(s.get("resumed_from_step")))
                for s, took in zip(stages, seconds, strict=True)
            ],
            numeric=("seconds", "resumed from step"),
        ),
    }


def _inputs(results: Results) -> dict[str, Any] | None:
    table = results.table("logs/inputs.tsv")
    if table.empty:
        return None
    table = table.reindex(columns=list(_INPUTS)).astype("object")
    order = table["status"].map({"ok": 0, "warn": 1, "skip": 2}).fillna(3).astype(int)
    codes = [
        (status, code, len(rows), rows["message"].iloc[0] if status != "ok" else "")
        for (_, status, code), rows in table.groupby([order, "status", "code"], dropna=False)
    ]
    odd = table.loc[order[order > 0].sort_values(ascending=False, kind="stable").index]
    everyone = table["participant_id"].nunique()
    return {
        "listed": len(table),
        **{status: int((table["status"] == status).sum()) for status in ("ok", "warn", "skip")},
        "excluded": int((table["code"] == "excluded").sum()),
        "without_image": int(table["path"].isna().sum()),
        "participants": everyone,
        "unused": everyone - table.loc[order < 2, "participant_id"].nunique(),
        "codes": Table(("status", "code", "rows", "for instance"), codes, numeric=("rows",)),
        "odd": Table(_INPUTS, odd.head(_MOST_ROWS).to_numpy().tolist()),
        "hidden": max(0, len(odd) - _MOST_ROWS),
        "splits": _splits(results),
    }


def _splits(results: Results) -> Table | None:
    table = results.table(f"desc-{results.model}_embeddings.tsv")
    if not {"split", "participant_id"} <= set(table.columns):
        return None
    groups = table.groupby("split", sort=False, dropna=False)["participant_id"]
    rows = [(split, ids.nunique(), len(ids)) for split, ids in groups]
    order = {"train": 0, "val": 1, "holdout": 2, "not_in_training": 3}
    rows.sort(key=lambda row: order.get(str(row[0]), 4))
    return Table(("split", "participants", "images"), rows, numeric=("participants", "images"))


def _facts(context: Mapping[str, Any]) -> list[tuple[str, int]]:
    facts = []
    if inputs := context["inputs"]:
        facts += [
            ("participants used", inputs["participants"] - inputs["unused"]),
            ("images used", inputs["ok"] + inputs["warn"]),
            ("skipped", inputs["skip"]),
        ]
    if shape := context["embeddings"]["shape"]:
        facts.append(("numbers per embedding", shape[1]))
    if training := context["training"]:
        facts.append(("training epochs", training["epochs"]))
    return facts


def _limits(context: Mapping[str, Any]) -> list[str]:
    """Return the limits that the files show; those of every study stand in the template."""
    targets, inputs, training = context["targets"], context["inputs"], context["training"]
    limits = []
    counts = [t["n_participants"] for t in targets if t["n_participants"]]
    if counts and min(counts) < _SMALL_SAMPLE:
        limits.append(
            f"The sample is small ({format_number(min(counts))} participants), so "
            "intervals are wide, and a difference that matters may not show."
        )
    if training and training["collapsed"]:
        limits.append(f"{training['verdict']} They tell little about people.")
    if inputs and inputs["skip"]:
        limits.append(
            f"{format_number(inputs['skip'])} of {format_number(inputs['listed'])} listed rows were "
            "not used. If those people differ from the others, the results do not speak for them."
        )
    if preprocessing := context["preprocessing"]:
        limits += preprocessing["limits"]
    limits += [
        f"{t['name']}: {t['grid']['sentence']}" for t in targets if t["grid"].get("sentence")
    ]
    if any(as_number(t["exposure"].get("seen")) for t in targets):
        limits.append(
            "Pretraining saw images of the people it was tested on (without labels, see Exposure), "
            "so new people may be predicted less well."
        )
    if any(as_number(t["exposure"].get("unknown")) for t in targets):
        limits.append("Of some participants it is not known whether pretraining saw them.")
    if targets and not context["holdout"]["rows"]:
        limits.append(
            "Nobody was held out (--holdout): whoever chose settings by looking at these scores has "
            "made them too good."
        )
    if targets and not context["external"]:
        limits.append("All scores are of one cohort: no other one was predicted.")
    if targets and not any(t["site"] for t in targets):
        limits.append("There was no site audit: differences between scanners are not ruled out.")
    if context["outliers"] and context["outliers"]["n_flagged"]:
        limits.append(
            f"{format_number(context['outliers']['n_flagged'])} images stand out (see Outlying "
            "scans) and were used like all others."
        )
    if context["setting"]("masked") is False:
        limits.append(
            "Images were not masked to the brain, so scores may come from skull, face or neck, "
            "unless they were skull-stripped. Give brain masks as a derivative, or have them made: "
            "--preprocess align."
        )
    elif _recipe_is_foreign(context["setting"]("origin")):
        limits.append(
            "Images were not aligned to a template, or are no T1-weighted scans. The default training "
            "was chosen on aligned T1-weighted brains, and may make embeddings worse on others."
        )
    return limits


def _recipe_is_foreign(origin: Any) -> bool:
    """Return whether a model's images are other ones than the default training was chosen on."""
    known = as_dict(origin)
    aligned = known.get("preprocessing") == "align" or known.get("space", "native") != "native"
    return bool(known) and not (aligned and known.get("contrast") == "T1w")


def _settings(results: Results, options: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a function from the name of an option to the model's value, or the one asked for."""
    stored = results.json(f"models/desc-{results.model}/model.json")
    known = {
        **as_dict(as_dict(stored.get("provenance")).get("config")),
        **{key.rpartition(".")[2].replace("-", "_"): value for key, value in options.items()},
        **{k: v for k, v in as_dict(stored.get("arguments")).items() if v is not None},
        **as_dict(stored.get("input_contract")),
    }
    encoder = as_dict(stored.get("encoder")).get("class") or known.get("encoder")
    known["encoder"] = str(encoder).rpartition(":")[2].rpartition(".")[2] if encoder else None
    return known.get


def _credits(results: Results) -> list[str]:
    """Return whose data the model, or the one it started from, was trained on, in its own words."""
    stored = results.json(f"models/desc-{results.model}/model.json")
    return [str(s) for s in as_list(as_dict(stored.get("provenance")).get("credits"))]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item

"""One predicted target as the report shows it: scores, plots, verdict, sites and held-out participants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from nidl_dcl.evaluation.metrics import METRIC_WORDS, MIN_FINDING, p_words
from nidl_dcl.report.html import Gallery, Picture, Table, format_number, format_score, row_names
from nidl_dcl.report.plots import (
    RASTER_ABOVE,
    draw_confusion,
    draw_identity,
    draw_intervals,
    draw_learning_curve,
    draw_relation,
)
from nidl_dcl.report.reader import Score, TargetResult, as_dict, as_list, as_number, as_score
from nidl_dcl.report.svg import clean

_METRICS = {
    "mae": "mean absolute error",
    "r2": "R²",
    "r": "correlation r",
    "balanced_accuracy": "balanced accuracy",
    "roc_auc": "ROC AUC",
}

_FEATURES = {
    "dummy": "a constant guess that never sees the image",
    "untrained": "the same encoder before training",
    "voxels": "prepared voxels, reduced by PCA, into the same readout",
    "log_brain_volume": "the logarithm of the brain's volume alone, whose size alignment takes out "
    "of the images",
    "confounds": "the confounds alone",
    "site": "the site alone",
}

_MOST_CLASSES = 30


def describe_features(name: str) -> dict[str, str]:
    """Return a baseline's name and what it is."""
    return {"name": name, "long": f"{name} ({_FEATURES[name]})" if name in _FEATURES else name}


def score_target(found: TargetResult, gallery: Gallery) -> dict[str, Any]:
    """Return what the page says of a target, and write its pictures; any of its metrics may miss."""
    metrics = found.metrics
    headline, permutation = as_dict(metrics.get("headline")), as_dict(metrics.get("permutation"))
    scores = _scores(metrics.get("scores"))
    baselines = {k: _scores(v) for k, v in as_dict(metrics.get("baselines")).items()}
    gains = _scores(headline.get("gains"))
    main = str(headline.get("metric") or permutation.get("metric") or next(iter(scores), "score"))
    is_of_main = permutation.get("metric") == main
    entry: dict[str, Any] = {
        "label": found.label,
        "name": found.name,
        "units": found.units,
        "task": str(metrics.get("task") or "prediction"),
        "n_participants": as_number(metrics.get("n_participants")),
        "n_dropped": metrics.get("n_dropped"),
        "cv": as_dict(metrics.get("cv")),
        "groups": as_dict(metrics.get("groups")),
        "classes": as_dict(metrics.get("classes")),
        "readout": metrics.get("model"),
        "metric": _metric(main),
        "metrics": [_metric(name) for name in scores],
        "own": scores.get(main, Score(None)),
        "chance": as_number(permutation.get("chance") if is_of_main else None),
        "p": as_number(permutation.get("p")),
        "permutations": as_number(permutation.get("n")),
        "observed": as_number(permutation.get("observed") if is_of_main else None),
        "p_words": _p_words(permutation),
        "grid": as_dict(as_dict(metrics.get("cv")).get("grid")),
        "baselines": {name: s.get(main, Score(None)) for name, s in baselines.items()},
        "rows": [
            {"name": "embeddings", "scores": scores, "gain": None},
            *({"name": k, "scores": s, "gain": gains.get(k)} for k, s in baselines.items()),
        ],
        "beats": headline.get("beats") is True,
        "verdict": _verdict(headline),
        "exposure": as_dict(metrics.get("exposure")),
        "site": as_dict(metrics.get("site")),
        "conditions": [
            str(said["sentence"])
            for said in map(
                as_dict,
                (
                    *as_list(metrics.get("features")),
                    *map(metrics.get, ("duplicates", "confounds", "harmonization")),
                    *as_dict(metrics.get("missing")).values(),
                ),
            )
            if said.get("sentence")
        ],
        "curve": as_dict(metrics.get("learning_curve")),
    }
    entry["places"] = _more_places([entry["own"], *entry["baselines"].values()])
    entry["sentence"] = str(headline.get("sentence") or _sentence(entry))
    drawn = (
        _draw_predictions(found, entry, gallery),
        _draw_baselines(entry, gallery),
        _draw_curve(entry, gallery),
    )
    entry["pictures"] = [picture for picture in drawn if picture is not None]
    entry["details"] = [*_draw_errors(found, gallery), *_draw_operation(found, entry, gallery)]
    entry["remarks"] = _remarks(metrics)
    return entry


def score_external(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page says of another cohort's readout; every key may be missing."""
    headline, internal = as_dict(metrics.get("headline")), as_dict(metrics.get("internal"))
    main = str(headline.get("metric") or "score")
    calibration = _scores(metrics.get("calibration"))
    notes = [as_dict(metrics.get(name)).get("sentence") for name in ("overlap", "exposure")]
    reason = metrics.get("cross_validation")
    n = as_number(metrics.get("n_participants"))
    # Files of versions before do not say it.
    few = n is not None and n < MIN_FINDING
    nothing, guess = Score(None), _scores(as_dict(metrics.get("baselines")).get("dummy"))
    return {
        "name": str(metrics.get("target") or ""),
        "metric": _metric(main),
        "n_participants": n,
        "too_few": few,
        "n_inside": as_number(internal.get("n_participants")),
        "n_dropped": as_dict(metrics.get("n_dropped")),
        "own": nothing if few else as_score(headline.get("external")),
        "inside": as_score(headline.get("internal")),
        "guess": nothing if few else guess.get(main, nothing),
        "slope": nothing if few else calibration.get("slope", nothing),
        "intercept": nothing if few else calibration.get("intercept", nothing),
        "sentence": str(headline.get("sentence") or ""),
        "notes": [str(note) for note in (*notes, reason) if note],
        "shift": [str(s) for s in as_list(as_dict(metrics.get("shift")).get("sentences"))],
    }


def _p_words(permutation: Mapping[str, Any]) -> str:
    n = as_number(permutation.get("n"))
    return p_words(as_number(permutation.get("p")), None if n is None else int(n))


def _more_places(scores: Iterable[Score]) -> int:
    """Return how many more decimals than usual tell the scores of a row apart, at most three."""
    known = {score.mean for score in scores if score.mean is not None}
    for more in range(3):
        if len({format_score(value, more) for value in known}) == len(known):
            return more
    return 3


def _scores(value: Any) -> dict[str, Score]:
    return {name: as_score(score) for name, score in as_dict(value).items()}


def _metric(name: str) -> dict[str, str]:
    words = _METRICS.get(name, name.replace("_", " ", 1) if name.startswith("recall_") else name)
    return {"name": name, "words": words}


def _verdict(headline: Mapping[str, Any]) -> dict[str, str]:
    """Return the comparison with the best baseline in a few words, with a sign beside the color."""
    gain, best = as_score(headline.get("gain")), headline.get("best_baseline")
    if not best or gain.mean is None:
        return {"kind": "", "words": "–"}
    if headline.get("beats") and headline.get("within_site") is False:
        return {"kind": "even", "words": "≈ nothing is shown within sites"}
    if headline.get("beats"):
        return {"kind": "better", "words": f"▲ better than {best}"}
    if gain.high is not None and gain.high < 0:
        return {"kind": "worse", "words": f"▼ worse than {best}"}
    return {"kind": "even", "words": f"≈ not shown to be better than {best}"}


def _sentence(entry: Mapping[str, Any]) -> str:
    """Return a plain sentence for a metrics file without a headline."""
    if entry["own"].mean is None:
        return f"There is no score for {entry['name']}."
    scores: Mapping[str, Score] = {**entry["baselines"], "chance": Score(entry["chance"])}
    others = [f"{k} {format_score(s.mean)}" for k, s in scores.items() if s.mean is not None]
    return (
        f"The embeddings predict {entry['name']} with {entry['metric']['words']} "
        f"{format_score(entry['own'].mean)}{' against ' if others else ''}{', '.join(others)}."
    )


def _draw_predictions(
    found: TargetResult, entry: Mapping[str, Any], gallery: Gallery
) -> Picture | None:
    table = found.predictions
    if not {"target", "prediction"} <= set(table.columns):
        return None
    used = table.dropna(subset=["target", "prediction"])
    if "status" in used:  # held-out images are predicted by another model, once
        used = used[used["status"] != "holdout"]
    what = clean(found.name)
    if entry["task"] == "classification":
        seen = sorted({*used["target"], *used["prediction"]})
        names = list(dict.fromkeys([*entry["classes"], *seen]))
        if not names or len(names) > _MOST_CLASSES:
            return None
        counts, of = pd.crosstab(used["target"], used["prediction"]), "images"
        n = len(used)
        if known := as_dict(found.metrics.get("confusion")):  # not in files of versions before
            shares = pd.DataFrame({str(true): as_dict(row) for true, row in known.items()}).T
            counts = shares.apply(pd.to_numeric, errors="coerce").fillna(0)
            of = "participants"
            n = round(float(counts.to_numpy().sum()))
            if (counts % 1 == 0).all(axis=None):
                counts = counts.astype(int)
        counts = counts.reindex(index=names, columns=names, fill_value=0)
        name = f"desc-{gallery.model}{found.label}_confusion"
        alt = f"Confusion matrix of {what}: {n:,} {of}, {len(names)} classes"
        caption = f"Predicted against true {what}: {of}, and their share of the true class."
        counted = counts.rename_axis(index="true", columns=None).reset_index()
        drawn = draw_confusion(name, counts, alt=alt)
        return gallery.svg(name, drawn, alt, caption, table=counted)
    pairs = used[["target", "prediction"]].apply(pd.to_numeric, errors="coerce").dropna()
    if pairs.empty:
        return None
    names = row_names(used.loc[pairs.index])
    hover = [
        f"{who} · true {format_number(true)}, predicted {format_number(predicted)}"
        for who, (true, predicted) in zip(names, pairs.to_numpy(), strict=True)
    ]
    name = f"desc-{gallery.model}{found.label}_truth"
    alt = f"Predicted against true {what}: one point for each of {len(pairs):,} images"
    true, predicted = pairs["target"], pairs["prediction"]
    label = what + (f" ({entry['units']})" if entry["units"] else "")
    drawn = draw_identity(name, true, predicted, label=label, hover=hover, alt=alt)
    caption = f"Predicted against true {what}, one point per image; on the dashed line both agree."
    if len(pairs) > RASTER_ABOVE:
        caption += " The points are one picture, without values under the pointer."
    ids = [c for c in ("participant_id", "session_id", "run") if c in used]
    behind = used.loc[pairs.index, ids].join(pairs)
    return gallery.svg(name, drawn, alt, caption, table=behind)


def _remarks(metrics: Mapping[str, Any]) -> list[str]:
    """Return calibration and regression to the mean in sentences."""
    calibration = as_dict(metrics.get("calibration"))
    remarks = []
    if (slope := as_number(calibration.get("slope"))) is not None:
        offset = format_score(as_number(calibration.get("intercept")))
        remarks.append(
            f"Calibration: the truth regressed on the prediction has slope {format_score(slope)} and "
            f"intercept {offset}; 1 and 0 are perfect."
        )
    if said := as_dict(metrics.get("regression_to_the_mean")).get("sentence"):
        remarks.append(str(said))
    if (brier := as_score(calibration.get("brier"))).mean is not None:
        ends = (
            f" [{format_score(brier.low)}, {format_score(brier.high)}]"
            if brier.low is not None
            else ""
        )
        equal = format_score(as_number(calibration.get("brier_of_equal_shares")))
        remarks.append(
            f"Brier score, with classes weighted equally: {format_score(brier.mean)}{ends} (0 is "
            f"perfect; {equal} is that of equal probabilities)."
        )
    return remarks


def _draw_errors(found: TargetResult, gallery: Gallery) -> list[Picture]:
    """Draw the errors of numbers against the truth, with their trend."""
    trend = as_dict(found.metrics.get("regression_to_the_mean"))
    slope, intercept = (as_number(trend.get(name)) for name in ("slope", "intercept"))
    table = found.predictions
    if slope is None or intercept is None or not {"target", "prediction"} <= set(table.columns):
        return []
    pairs = table[["target", "prediction"]].apply(pd.to_numeric, errors="coerce").dropna()
    if "status" in table:
        pairs = pairs[table.loc[pairs.index, "status"] != "holdout"]
    if pairs.empty:
        return []
    what, name = clean(found.name), f"desc-{gallery.model}{found.label}_errors"
    points = pd.DataFrame(
        {"of": "error", "target": pairs["target"], "error": pairs["prediction"] - pairs["target"]}
    )
    ends = (points["target"].min(), points["target"].max())
    line = (*ends, *(intercept + (slope - 1) * end for end in ends))
    alt = f"Error of {what} against its true value, falling by {1 - slope:.2f} for each unit"
    drawn = draw_relation(
        name,
        points,
        xlabel=f"{what}, true",
        ylabel="predicted − true",
        line=line,
        joined=False,
        alt=alt,
    )
    caption = f"Errors against true {what}, one point per image; dashed: their trend."
    return [gallery.svg(name, drawn, alt, caption, table=points.drop(columns="of"))]


def _draw_operation(
    found: TargetResult, entry: Mapping[str, Any], gallery: Gallery
) -> list[Picture]:
    """Draw the ROC curve, the precision-recall curve and the reliability of classes."""
    calibration, curves = (as_dict(found.metrics.get(n)) for n in ("calibration", "curves"))
    labels = list(entry["classes"])
    if not labels:
        return []
    roc = _curve_table(curves.get("roc"), ("false_positive_rate", "true_positive_rate"))
    precision = _curve_table(curves.get("precision_recall"), ("recall", "precision"))
    parts = [as_dict(part) for part in as_list(calibration.get("bins"))]
    numbers = [[as_number(p.get(c)) for c in ("predicted", "observed", "n")] for p in parts]
    bins = pd.DataFrame(
        [row for row in numbers if None not in row], columns=["predicted", "observed", "n"]
    )
    what, pictures = clean(found.name), []
    rising, falling = (0, 1, 0, 1), (0, 1, 1, 1)
    rates, shares = ("false positive rate", "true positive rate"), ("recall", "precision")
    observed = ("predicted probability", "observed share")
    for ending, points, (across, up), line, words in (
        ("roc", roc, rates, rising, "ROC curve"),
        ("precisionrecall", precision, shares, falling, "Precision and recall"),
        ("reliability", bins, observed, rising, "Reliability"),
    ):
        if points.empty:
            continue
        shown = points if "class" in points else points.assign(**{"class": labels[-1]})
        columns = ["class", *(c for c in points.columns if c not in ("class", "n"))]
        name = f"desc-{gallery.model}{found.label}_{ending}"
        of = "each class against the rest" if len(labels) > 2 else clean(labels[-1])
        alt = f"{words} of {what}: {of}"
        drawn = draw_relation(name, shown[columns], xlabel=across, ylabel=up, line=line, alt=alt)
        caption = f"{words} of {what} ({of}), of participants, by their mean probability."
        if ending == "reliability":
            caption += " Classes are weighted equally; on the dashed line both agree."
        pictures.append(gallery.svg(name, drawn, alt, caption, table=points))
    return pictures


def _curve_table(curves: Any, axes: tuple[str, str]) -> pd.DataFrame:
    """Return the points of curves by class as a table."""
    rows = [
        (label, *map(float, point))
        for label, points in as_dict(curves).items()
        for point in map(as_list, as_list(points))
        if len(point) == 2 and None not in map(as_number, point)
    ]
    return pd.DataFrame(rows, columns=["class", *axes])


def _draw_baselines(entry: Mapping[str, Any], gallery: Gallery) -> Picture | None:
    scores = {"embeddings": entry["own"], **entry["baselines"]}
    rows = pd.DataFrame(
        [(k, s.mean, s.low, s.high) for k, s in scores.items() if s.mean is not None],
        columns=["features", "mean", "low", "high"],
    ).astype({"mean": "float64", "low": "float64", "high": "float64"})
    if rows.empty:
        return None
    words = entry["metric"]["words"]
    name = f"desc-{gallery.model}{entry['label']}_baselines"
    listed = ", ".join(
        f"{k} {format_score(mean)}" for k, mean in zip(rows["features"], rows["mean"], strict=True)
    )
    alt = f"{words} of {clean(entry['name'])}: {listed}"
    labeled, label = rows.rename(columns={"features": "label"}), _axis(entry["metric"], entry)
    drawn = draw_intervals(name, labeled, xlabel=label, chance=entry["chance"], alt=alt)
    caption = f"{words[:1].upper()}{words[1:]} on the same folds; lines are 95 % intervals."
    if entry["chance"] is not None:
        caption += " Dashed: mean score with the target shuffled, on the folds of the first repeat."
    behind = rows.assign(chance=entry["chance"])
    return gallery.svg(name, drawn, alt, caption, table=behind)


def _draw_curve(entry: Mapping[str, Any], gallery: Gallery) -> Picture | None:
    sizes = [as_number(n) for n in as_list(entry["curve"].get("n_participants"))]
    rows = [
        (name, size, score.mean, score.low, score.high)
        for name, points in as_dict(entry["curve"].get("scores")).items()
        for size, score in zip(sizes, map(as_score, as_list(points)), strict=False)
        if size is not None and size > 0 and score.mean is not None
    ]
    table = pd.DataFrame(rows, columns=["features", "n_participants", "mean", "low", "high"])
    table = table.astype(dict.fromkeys(table.columns[1:], "float64"))
    if table["n_participants"].nunique() < 2:
        return None
    metric = _metric(str(entry["curve"].get("metric")))
    words = metric["words"]
    name = f"desc-{gallery.model}{entry['label']}_learningcurve"
    ends = ", ".join(
        f"{features} from {format_score(means.iloc[0])} to {format_score(means.iloc[-1])}"
        for features, means in table.groupby("features", sort=False)["mean"]
    )
    least, most = (format_number(round(n)) for n in table["n_participants"].agg(["min", "max"]))
    alt = f"{words} of {clean(entry['name'])} with {least} to {most} participants: {ends}"
    drawn = draw_learning_curve(name, table, ylabel=_axis(metric, entry), alt=alt)
    caption = (
        f"{words[:1].upper()}{words[1:]} with fewer labeled participants to learn from, on the same "
        f"folds; upright lines are 95 % intervals. {entry['curve'].get('sentence') or ''}"
    )
    return gallery.svg(name, drawn, alt, caption.strip(), table=table)


def _axis(metric: Mapping[str, str], entry: Mapping[str, Any]) -> str:
    """Return the name of an axis that shows a score of a target."""
    if metric["name"] != "mae":
        return f"{metric['words']} (higher is better)"
    return f"{metric['words']} ({entry['units']}{', ' if entry['units'] else ''}lower is better)"


def audit_sites(found: Iterable[TargetResult]) -> dict[str, Any]:
    """Return how well each column of sites is decoded, and targets' scores within and across sites."""
    decoded: dict[str, Any] = {}
    targets = []
    for target in found:
        if site := as_dict(target.metrics.get("site")):
            entry = _decoded(site)
            decoded.setdefault(str((entry["column"], entry["sentences"])), entry)
            targets.append(_by_site(target, site))
    return {"decoded": list(decoded.values()), "targets": list(filter(None, targets))}


def _decoded(site: Mapping[str, Any]) -> dict[str, Any]:
    after, rows = as_dict(site.get("harmonized")), []
    for name, audit in (("as they are", site), ("after ComBat inside the folds", after)):
        score = as_score(audit.get("balanced_accuracy"))
        permutation = as_dict(audit.get("permutation"))
        chance, p = (as_number(permutation.get(what)) for what in ("chance", "p"))
        if score.mean is not None:
            words = _p_words(permutation)
            first = as_number(permutation.get("observed"))
            rows.append(
                {
                    "name": name,
                    "score": score,
                    "first": first,
                    "chance": chance,
                    "p": p,
                    "p_words": words,
                }
            )
    sentences = [site.get("sentence"), site.get("harmonized_sentence")]
    sizes = [(name, as_number(n)) for name, n in as_dict(site.get("sites")).items()]
    return {
        "column": str(site.get("column") or "site"),
        "sentences": [str(sentence) for sentence in sentences if sentence],
        "rows": rows,
        "sites": Table(("site", "participants"), sizes, numeric=("participants",)),
    }


def _by_site(target: TargetResult, site: Mapping[str, Any]) -> dict[str, Any] | None:
    within, left_out = as_dict(site.get("within")), as_dict(site.get("leave_one_site_out"))
    headline = as_dict(target.metrics.get("headline"))
    metric = str(left_out.get("metric") or headline.get("metric") or "")
    all_scores = as_dict(left_out.get("scores"))
    scores = {name: as_dict(as_dict(of).get(metric)) for name, of in all_scores.items()}
    sizes = as_dict(left_out.get("sites")) or {
        label: as_dict(of).get("n_participants") for label, of in within.items()
    }
    if not sizes:
        return None
    rows = [
        {
            "name": label,
            "n": as_number(n),
            "within": as_number(as_dict(within.get(label)).get(metric)),
            "new": [as_number(as_dict(of.get("sites")).get(label)) for of in scores.values()],
        }
        for label, n in sizes.items()
    ]
    return {
        "name": target.name,
        "words": METRIC_WORDS.get(metric, metric),
        "features": list(scores),
        "rows": rows,
        "means": [as_score(of) for of in scores.values()],
        "sentence": str(left_out.get("sentence") or ""),
    }


def audit_holdout(found: Iterable[TargetResult]) -> dict[str, Any]:
    """Return the scores in held-out people, one row for each target that has them."""
    rows, names = [], {}
    for target in found:
        last = as_dict(target.metrics.get("holdout"))
        if not last:
            continue
        metric = str(as_dict(target.metrics.get("headline")).get("metric") or "")
        others = {
            name: as_score(as_dict(scores).get(metric))
            for name, scores in as_dict(last.get("baselines")).items()
        }
        names.update(dict.fromkeys(others))
        rows.append(
            {
                "name": target.name,
                "metric": metric,
                "words": METRIC_WORDS.get(metric, metric),
                "n_participants": as_number(last.get("n_participants")),
                "own": as_score(as_dict(last.get("scores")).get(metric)),
                "baselines": others,
                "times": as_number(last.get("times_scored")),
                "sentence": str(last.get("sentence") or ""),
            }
        )
    return {"rows": rows, "baselines": list(names)}

"""What the report says of the conditions of a score: sites and held-out people.

Takes what `prediction` wrote, with tolerance for what is missing; compares nothing anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nidl_dcl.page import Table
from nidl_dcl.results import TargetResult, as_dict, as_number, as_score
from nidl_dcl.scores import METRIC_WORDS

__all__ = ["audit_holdout", "audit_sites"]


def audit_sites(found: Iterable[TargetResult]) -> dict[str, Any]:
    """Return how well sites are decoded, and each target's scores within and across them.

    Parameters
    ----------
    found : iterable of TargetResult

    Returns
    -------
    dict
        ``decoded``: one entry for each column of sites; ``targets``: one for each target with sites.
    """
    decoded: dict[str, Any] = {}
    targets = []
    for target in found:
        site = as_dict(target.metrics.get("site"))
        if not site:
            continue
        entry = _decoded(site)
        decoded.setdefault(str((entry["column"], entry["sentences"])), entry)
        if of_target := _by_site(target, site):
            targets.append(of_target)
    return {"decoded": list(decoded.values()), "targets": targets}


def _decoded(site: Mapping[str, Any]) -> dict[str, Any]:
    after = as_dict(site.get("harmonised"))
    rows = []
    for name, audit in (("as they are", site), ("after ComBat inside the folds", after)):
        score = as_score(audit.get("balanced_accuracy"))
        permutation = as_dict(audit.get("permutation"))
        if score.mean is not None:
            rows.append(
                {
                    "name": name,
                    "score": score,
                    "chance": as_number(permutation.get("chance")),
                    "p": as_number(permutation.get("p")),
                }
            )
    sentences = [site.get("sentence"), site.get("harmonised_sentence")]
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
    scores = {
        k: as_dict(as_dict(v).get(metric)) for k, v in as_dict(left_out.get("scores")).items()
    }
    sizes = as_dict(left_out.get("sites")) or {
        label: as_dict(of).get("n_participants") for label, of in within.items()
    }
    if not sizes:
        return None
    rows: list[dict[str, Any]] = [
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
        own = as_score(as_dict(last.get("scores")).get(metric))
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
                "own": own,
                "baselines": others,
                "times": as_number(last.get("times_scored")),
                "sentence": str(last.get("sentence") or ""),
            }
        )
    return {"rows": rows, "baselines": list(names)}

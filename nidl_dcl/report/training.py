"""What the report shows of a run, beside scores: views, training curves, embeddings.

Turns files into pictures by `figures`; the words around them are the template's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.report.html import Gallery, format_cell, format_number, row_names
from nidl_dcl.report.plots import (
    RASTER_ABOVE,
    draw_curves,
    draw_embedding,
    draw_slices,
    slice_indices,
)
from nidl_dcl.report.reader import Results, as_list, as_number, as_spacing
from nidl_dcl.report.svg import clean

_MOST_PHENOTYPES = 12

_COLLAPSED_WITHIN = 0.05
"""A loss this close to log(2N-2), or above it, is that of a constant embedding."""

_FEW_DIRECTIONS = 2.0
"""An effective rank below this is a point or a line."""

_NOT_PHENOTYPES = {
    *("participant_id", "session_id", "run", "path", "source", "row", "split", "x", "y")
}

_CURVES = {
    "loss": "Loss; an encoder that gives every image the same embedding has the dotted level.",
    "alignment": "Alignment: mean squared distance of the two views of an image; 0 is the same.",
    "uniformity": "Uniformity: lower is more evenly spread; 0 is all in one point.",
    "effective_rank": "Effective rank: directions that the embeddings use; 1 is a line.",
}


def show_views(results: Results, gallery: Gallery) -> list[dict[str, Any]]:
    """Return the saved volumes as pictures: the prepared image and its two views, per participant.

    Every function here takes the files and the gallery, writes its pictures there, and returns what
    the template needs; an empty value where there is nothing to show.
    """
    volumes = results.array("figures/views.npy")
    if volumes is None:
        return []
    if volumes.ndim != 5 or volumes.shape[1] != 3 or volumes.size == 0:
        results.problems.append(
            f"figures/views.npy has the shape {volumes.shape}, not (n, 3, d, h, w)."
        )
        return []
    rows = results.table("figures/views.tsv").reindex(range(len(volumes)))
    rows = rows.reindex(columns=["participant_id", "path"]).astype("object")
    spacing = as_spacing(results.json("figures/views.json").get("spacing"))
    views = []
    for number, (stack, who, path) in enumerate(
        zip(volumes, rows["participant_id"], rows["path"], strict=True), start=1
    ):
        name = f"image {number}" if pd.isna(who) else format_cell(who)
        original = np.nan_to_num(np.asarray(stack[0], dtype=np.float32))
        low, high = np.percentile(original, [0.5, 99.7])
        at, pictures = slice_indices(original, spacing), []
        for what, volume in zip(("original", "view 1", "view 2"), stack, strict=True):
            sides = what == "original"
            drawn = draw_slices(volume, spacing, at=at, window=(low, high), sides=sides)
            file = f"desc-{gallery.model}{number}_{what.replace(' ', '')}"
            alt = f"{name}, {what}: axial, coronal and sagittal slice"
            pictures.append(gallery.volume(file, drawn, alt, what, "figures/views.npy"))
        views.append({"name": name, "path": path, "pictures": pictures})
    return views


def show_training(results: Results, gallery: Gallery) -> dict[str, Any] | None:
    """Return the training curves and a plain word on collapse; None where nothing was trained."""
    curves = results.numbers("logs/metrics.csv").select_dtypes("number")
    if curves.empty or "epoch" not in curves:
        return None
    last = {str(c): as_number(v) for c, v in curves.ffill().iloc[-1].items()}
    level, pictures = last.get("collapse_loss"), []
    for name, caption in _CURVES.items():
        label = name.replace("_", " ")
        known = {name: label.capitalize(), f"{name}/train": "training", f"{name}/val": "validation"}
        lines = {known[c]: curves[c] for c in curves if c in known and curves[c].notna().any()}
        if not lines:
            continue
        ends = ", ".join(
            f"{line.lower()} {format_number(values.dropna().iloc[-1])}"
            for line, values in lines.items()
        )
        alt = f"{label} over epochs; at the end {ends}"
        file = f"desc-{gallery.model}_{name.replace('_', '')}"
        epochs = curves["epoch"]
        behind, line = pd.DataFrame({"epoch": epochs, **lines}), None
        if name == "loss" and level is not None:
            behind["collapse"], line = curves["collapse_loss"], ("collapse", level)
        drawn = draw_curves(file, epochs, lines, xlabel="epoch", ylabel=label, level=line, alt=alt)
        caption = f"{caption} At the end: {ends}."
        pictures.append(gallery.svg(file, drawn, alt, caption, table=behind))
    return {
        "pictures": pictures,
        "epochs": int(curves["epoch"].nunique()),
        "steps": last.get("step"),
        **_collapse(last.get("loss/train"), level, last.get("effective_rank")),
    }


def _collapse(loss: float | None, level: float | None, rank: float | None) -> dict[str, Any]:
    """Return the plain word on collapse, its reason, and whether it is bad news."""
    reasons = []
    if loss is not None and level is not None:
        reasons.append(
            f"The last training loss is {format_number(loss)}; an encoder that gives every image "
            f"the same embedding would have {format_number(level)}, that is log(2N−2)."
        )
    if rank is not None:
        reasons.append(
            f"The embeddings use about {format_number(rank)} directions (effective rank)."
        )
    flat = loss is not None and level is not None and loss > level - _COLLAPSED_WITHIN
    thin = rank is not None and rank < _FEW_DIRECTIONS
    if flat:
        verdict = "The encoder has collapsed: it gives nearly the same embedding to every image."
    elif thin:
        verdict = "The encoder has nearly collapsed: its embeddings lie close to a line."
    elif reasons:
        verdict = "No sign of collapse."
    else:
        verdict = "Whether the encoder collapsed cannot be told from these curves."
    return {"verdict": verdict, "reason": " ".join(reasons), "collapsed": flat or thin}


def show_embeddings(results: Results, gallery: Gallery) -> dict[str, Any]:
    """Return the embeddings in two dimensions, once for each phenotype that tells images apart."""
    matrix = results.array(f"desc-{results.model}_embeddings.npy")
    table = results.numbers("figures/embedding_2d.tsv")
    how = results.json("figures/embedding_2d.json")
    shares = [as_number(share) or 0.0 for share in as_list(how.get("explained_variance"))][:2]
    found: dict[str, Any] = {
        "shape": matrix.shape if matrix is not None and matrix.ndim == 2 else None,
        "method": str(how.get("method") or ""),
        "explained": f"{sum(shares):.0%}" if len(shares) == 2 else "",
        "pictures": [],
        "notes": [],
    }
    if not {"x", "y"} <= set(table.select_dtypes("number").columns):
        return found
    table = table[np.isfinite(table["x"]) & np.isfinite(table["y"])]
    phenotypes = [c for c in table.columns if c not in _NOT_PHENOTYPES]
    drawn_ones = [c for c in phenotypes if _tells_apart(table[c])]
    dull = [clean(c) for c in phenotypes if c not in drawn_ones]
    if dull:
        found["notes"].append(
            "Not drawn, as all images share one value or nearly each has its own: "
            f"{', '.join(dull[:20])}{' …' if len(dull) > 20 else ''}."
        )
    if len(drawn_ones) > _MOST_PHENOTYPES:
        found["notes"].append(
            f"{_MOST_PHENOTYPES} of {len(drawn_ones)} phenotypes are drawn; the others are in "
            "figures/embedding_2d.tsv too."
        )
    if len(table) > RASTER_ABOVE:
        found["notes"].append(
            f"More than {RASTER_ABOVE} points are drawn as one image, without values under the "
            "pointer; each point is a row of figures/embedding_2d.tsv."
        )
    labels = ("first axis", "second axis")
    if len(shares) == 2:
        labels = (f"first axis ({shares[0]:.0%} of variance)", f"second axis ({shares[1]:.0%})")
    who = row_names(table)
    for column in drawn_ones[:_MOST_PHENOTYPES] or [""]:
        values = table[column] if column else pd.Series("image", index=table.index)
        name, title = gallery.name(column or "all", "embedding"), clean(column)
        alt = f"{len(table):,} images in two dimensions" + (f", colored by {title}" * bool(column))
        hover = [
            f"{one} · {title} {format_cell(value)}" if column else one
            for one, value in zip(who, values, strict=True)
        ]
        drawn = draw_embedding(
            name, table["x"], table["y"], values, axis_labels=labels, hover=hover, alt=alt
        )
        caption = f"Colored by {title}." if column else "All images."
        found["pictures"].append(gallery.svg(name, drawn, alt, caption, "figures/embedding_2d.tsv"))
    return found


def _tells_apart(values: pd.Series[Any]) -> bool:
    """Return whether colors by `values` could show anything."""
    levels = values.nunique()
    return levels > 1 and (
        pd.api.types.is_numeric_dtype(values) or levels <= max(20, int(values.notna().sum()) // 4)
    )

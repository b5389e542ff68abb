"""What the report shows of the images as such: their average, the odd ones, who finds whom.

Reads what the stages left in ``figures/``; ranks and shares are theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.report.html import Gallery, Picture, Table, format_cell, format_number, row_names
from nidl_dcl.report.plots import draw_slices, slice_indices
from nidl_dcl.report.reader import Results, Score, as_list, as_number, as_spacing

_LISTED = 20

_SHOWN = 4

_FARTHEST = 10

_AVERAGES = {
    "mean": "Mean of the prepared volumes",
    "spread": "Standard deviation of each voxel over them; bright is where brains differ",
}

_MEASURES = {
    "embedding_distance": "embedding",
    "brain_distance": "brain",
    "noise": "noise",
    "sharpness": "blur",
    "contrast_to_noise": "low contrast",
}
"""Column of ``outliers.tsv`` to the word for what is odd about it."""


def show_average(results: Results, gallery: Gallery) -> dict[str, Any]:
    """Return the average brain, its spread, and the brains farthest from it.

    Every function here returns what the template needs, empty where there is nothing to show.
    """
    about, volumes = results.json("figures/average.json"), results.array("figures/average.npy")
    pictures = []
    if volumes is not None and (
        volumes.ndim != 4
        or len(volumes) not in (1, 2)
        or volumes.size == 0
        or not np.issubdtype(volumes.dtype, np.floating)
    ):
        results.problems.append(
            f"figures/average.npy has the shape {volumes.shape}, not (2, d, h, w)."
        )
    elif volumes is not None:
        shown = [np.nan_to_num(np.asarray(v, dtype=np.float32)) for v in volumes]
        spacing = as_spacing(about.get("spacing"))
        at = slice_indices(shown[0], spacing)
        # A shared output has the mean alone.
        for (name, words), volume in zip(_AVERAGES.items(), shown, strict=False):
            low, high = np.percentile(volume, [0.5, 99.7])
            window = (float(low), float(high))
            if name == "spread":
                window = (0.0, float(np.percentile(volume, 99.7)))
            drawn = draw_slices(volume, spacing, at=at, window=window)
            file, alt = f"desc-{gallery.model}_{name}", f"{words}: axial, coronal, sagittal slice"
            pictures.append(gallery.volume(file, drawn, alt, f"{words}.", "figures/average.npy"))
    table = results.numbers("figures/average.tsv")
    rows, captions = [], []
    if {"rank", "distance"} <= set(table.select_dtypes("number").columns):
        far = table.sort_values("rank", kind="stable").head(_FARTHEST)
        sources = far.get("source", far["rank"])
        rows = list(zip(far["rank"], row_names(far), sources, far["distance"], strict=True))
        captions = [f"{name}: distance {format_number(d)}" for _, name, _, d in rows]
    return {
        "pictures": pictures,
        "odd": _thumbnails(results, gallery, "odd", captions, "figures/average.tsv"),
        "table": Table(("rank", "image", "source", "distance"), rows, numeric=("rank", "distance")),
        **{
            fact: as_number(about.get(fact))
            for fact in ("n_images", "n_participants", "mean_inside", "sd_inside")
        },
        "median": as_number(about.get("distance_median")),
        "block_mm": as_list(about.get("block_mm")),
    }


def show_outliers(results: Results, gallery: Gallery) -> dict[str, Any] | None:
    """Return the images that stand out most, with pictures; None where they were not ranked."""
    table = results.numbers("figures/outliers.tsv")
    if not {"rank", "worst_z"} <= set(table.columns):
        return None
    table = table.sort_values("rank", kind="stable").astype("object")
    known = [name for name in _MEASURES if f"{name}_z" in table]
    top = table.head(_LISTED)
    names = row_names(top)
    reasons = top["reasons"] if "reasons" in top else pd.Series(None, index=top.index)
    told = ["within the usual range" if pd.isna(r) else format_cell(r) for r in reasons]
    columns = ("rank", "image", "reasons", "worst z", *(f"{_MEASURES[name]} z" for name in known))
    scores = top[["worst_z", *(f"{name}_z" for name in known)]].to_numpy().tolist()
    rows = [
        (rank, name, reason, *map(as_number, numbers))
        for rank, name, reason, numbers in zip(top["rank"], names, told, scores, strict=True)
    ]
    flagged = int((table["flagged"] == "yes").sum()) if "flagged" in table else 0
    captions = [f"{n}: {t}" for n, t in zip(names, told, strict=True)][: max(flagged, _SHOWN)]
    return {
        "n_images": len(table),
        "n_flagged": flagged,
        "hidden": max(0, flagged - _LISTED),
        "with_quality": "noise" in known,
        "table": Table(columns, rows, numeric=("rank", *columns[3:])),
        "pictures": _thumbnails(results, gallery, "outlier", captions, "figures/outliers.tsv"),
    }


def show_retrieval(results: Results) -> dict[str, Any]:
    """Return how often an image finds another one of its participant, or why that is not known."""
    words, table = results.json("figures/retrieval.json"), results.numbers("figures/retrieval.tsv")
    needed = ["n_images", "n_participants", "n_candidates", "share", "low", "high", "chance"]
    rows = []
    if {"features", *needed} <= set(table.columns):
        for name, *numbers in table[["features", *needed]].astype("object").to_numpy().tolist():
            row = dict(zip(needed, map(as_number, numbers), strict=True))
            share = Score(row["share"], row["low"], row["high"])
            rows.append({**row, "name": name, "share": share})
    return {"rows": rows, "sentence": str(words.get("sentence") or "")}


def _thumbnails(
    results: Results, gallery: Gallery, label: str, captions: list[str], source: str
) -> list[Picture]:
    """Return the pictures ``<label>_1.png`` and so on, one for each caption, as far as there are."""
    pictures = []
    for number, caption in enumerate(captions, 1):
        if not results.has(f"figures/{label}_{number}.png"):
            break
        if drawn := results.png(f"figures/{label}_{number}.png"):
            alt = f"{caption}; axial, coronal and sagittal slice"
            pictures.append(gallery.volume("", drawn, alt, f"{number}. {caption}", source))
    return pictures

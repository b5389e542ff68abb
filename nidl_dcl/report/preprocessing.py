"""What the report shows of preprocessing: the verdicts, the measures, and every image worst first.

Reads the table that the stage left; measures and verdicts are its own. The first pictures stand in
the page; all of them are on a page of their own, which loads them from their files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.bids.presets import PREPROCESSED_SPACE
from nidl_dcl.data import preprocessed
from nidl_dcl.io.atomic import keep_bytes
from nidl_dcl.report.html import (
    Gallery,
    Picture,
    Table,
    format_cell,
    format_number,
    render_mosaics,
    row_names,
)
from nidl_dcl.report.plots import RASTER_ABOVE, draw_strips
from nidl_dcl.report.reader import Results

TABLE = f"{preprocessed.TABLE}.tsv"
"""Has a row for each image; lies in the output of preprocessing alone, else in `_WITHIN`."""

_WITHIN = f"derivatives/{preprocessed.DERIVATIVE}/"

_DONE = {
    "align": f"aligned to {PREPROCESSED_SPACE} by an affine transform",
    "rigid": f"aligned to {PREPROCESSED_SPACE} by rotation and translation",
    "strip": "left in their own space",
}
"""Mode of the stage to what was done beyond bias correction and brain extraction."""

_LIMITS = {
    "align": "The affine transform takes out the size of the head and leaves the shape of the brain.",
    "rigid": "Brains were moved and turned: their size is in the images.",
    "strip": "Brains were extracted and not moved: how heads lay in the scanner is in the images.",
}

_STATUSES = {"skip": "skipped", "warn": "flagged", "ok": "ok"}
"""Worst first, and as they are called on the page."""

_NUMBERS = {
    "overlap": "overlap {}",
    "correlation": "correlation {}",
    "upright": "upright {}",
    "mask_ml": "brain {} ml",
    "determinant": "determinant {}",
}
"""Measures under each picture, and how they are told."""

_DRAWN = {
    "overlap": "overlap of the aligned brain's mask with the template's (Dice)",
    "correlation": "correlation with the template, where both are brain",
    "mask_ml": "volume of the brain mask before alignment (ml)",
    "determinant": "determinant of the transform (above 1: made larger)",
}

_IN_PAGE, _AT_ONCE = 12, 100

_PICTURE = re.compile(r"figures/[\w+-][\w.+-]*\.png", re.ASCII)

_FILES = (
    ("sub-*/…/anat/", "images, masks and transforms; beside each a JSON file on how it was made"),
    (TABLE, "verdict and measures of each image; the JSON file beside it explains them"),
    ("figures/preprocessing.html", "the picture of every image, worst first"),
    ("logs/inputs.tsv", "every candidate image and what became of it"),
    ("logs/run.json", "what was run, when, with which versions"),
)

_REFERENCES = (
    (
        "Tustison NJ, Avants BB, Cook PA, et al. N4ITK: improved N3 bias correction. IEEE "
        "Transactions on Medical Imaging 29:1310-1320, 2010. doi:10.1109/TMI.2010.2046908."
    ),
    (
        "Fisch L, Zumdick S, Barkhau C, et al. deepbet: fast brain extraction of T1-weighted MRI "
        "using convolutional neural networks. Computers in Biology and Medicine 179:108845, 2024. "
        "doi:10.1016/j.compbiomed.2024.108845."
    ),
    (
        "Lowekamp BC, Chen DT, Ibáñez L, Blezek D. The design of SimpleITK. Frontiers in "
        "Neuroinformatics 7:45, 2013. doi:10.3389/fninf.2013.00045."
    ),
    (
        "Fonov V, Evans AC, Botteron K, et al. Unbiased average age-appropriate atlases for "
        "pediatric studies. NeuroImage 54:313-327, 2011. doi:10.1016/j.neuroimage.2010.07.033."
    ),
)


@dataclass(frozen=True)
class _Image:
    """One image: `file` is its picture as seen from the page of all, `picture` the one in the page."""

    anchor: str
    name: str
    status: str
    reason: str
    numbers: str
    file: str
    picture: Picture | None = None

    @property
    def verdict(self) -> str:
        return _STATUSES.get(self.status, self.status)

    @property
    def alt(self) -> str:
        return (
            f"{self.name}: slices of the head with the outline of its mask, and of the brain that "
            "came out"
        )


def is_preprocessing(results: Results, command: Sequence[Any]) -> bool:
    """Return whether a folder holds preprocessing alone, given the command that wrote it."""
    return list(command[1:2]) == ["preprocess"] or results.has(TABLE)


def show_preprocessing(results: Results, gallery: Gallery, title: str) -> dict[str, Any] | None:
    """Return what the template needs, None where nothing was preprocessed; write the page of all images.

    Parameters
    ----------
    results : Results
        The output folder, of a study or of preprocessing alone.
    gallery : Gallery
        Where pictures go.
    title : str
        Of the report.
    """
    base = "" if results.has(TABLE) else _WITHIN
    table, about = results.table(base + TABLE), results.json(f"{base}{TABLE[:-4]}.json")
    if table.empty:
        return None
    needed = ["participant_id", "status", "code", "message", "figure"]
    table = table.reindex(columns=list(dict.fromkeys([*table, *needed, *_NUMBERS])))
    table = table.astype("object")
    for name in _NUMBERS:
        numbers = pd.to_numeric(table[name], errors="coerce").astype("float64")
        table[name] = numbers.where(np.isfinite(numbers))
    ranks = {status: rank for rank, status in enumerate(_STATUSES)}
    # A status that is not known is looked at first: nothing passes silently.
    table["rank"] = table["status"].map(ranks).fillna(-1)
    table = table.sort_values(["rank", "upright"], kind="stable", ignore_index=True)
    images = _images(results, table, base)
    shown = [image for image in images if image.file][:_IN_PAGE]
    pictures = [_embed(results, gallery, base, image) for image in shown]
    mode = str(about.get("Mode") or "")
    found: dict[str, Any] = {
        "mode": mode,
        "space": PREPROCESSED_SPACE,
        "n_images": len(table),
        **{status: int((table["status"] == status).sum()) for status in _STATUSES},
        "sentence": _sentence(table, mode),
        "codes": _codes(table),
        "strips": _strips(table, gallery, base + TABLE),
        "images": [image for image in pictures if image.picture],
        "without_picture": sum(not image.file for image in images),
        "table": base + TABLE,
        "limits": _limits(table, mode),
        "references": _REFERENCES[: -1 if mode == "strip" else None],  # the last is the template's
        "files": Table(("file", "what it is"), _FILES),
        "page": "",
    }
    if any(image.file for image in images) and not results.has("logs/sharing.json"):
        # All are drawn alike: one tells how much room to keep for those that are not loaded yet.
        size = next((image.picture for image in pictures if image.picture), None)
        context = {**found, "title": title, "groups": _groups(images), "size": size}
        keep_bytes(gallery.folder / "preprocessing.html", render_mosaics(context).encode())
        found["page"] = "figures/preprocessing.html"
    return found


def _images(results: Results, table: pd.DataFrame, base: str) -> list[_Image]:
    """Return all images in the order of the table."""
    folder = results.folder / base / "figures"
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    up = "" if not base else f"../{base}figures/"
    images, lost = [], 0
    columns = ["status", "code", "message", "figure", *_NUMBERS]
    rows = table[columns].astype("object").to_numpy().tolist()
    for number, (name, row) in enumerate(zip(row_names(table), rows, strict=True), 1):
        status, code, message, figure, *values = row
        file = ""
        if not pd.isna(figure):
            if _PICTURE.fullmatch(figure) and figure[8:] in there:
                file = up + figure[8:]
            else:
                lost += 1
        images.append(
            _Image(
                anchor=f"image{number}",
                name=name,
                status=format_cell(status),
                reason=_reason(code, message),
                numbers=" · ".join(_numbers(dict(zip(_NUMBERS, values, strict=True)))),
                file=file,
            )
        )
    if lost:
        results.problems.append(
            f"{format_number(lost)} pictures that {base}{TABLE} names are missing."
        )
    return images


def _numbers(values: Mapping[str, float]) -> list[str]:
    """Return measures in words, those that are known."""
    found = values.items()
    return [_NUMBERS[name].format(format_number(v)) for name, v in found if not pd.isna(v)]


def _reason(code: Any, message: Any) -> str:
    """Return code and message in words, empty where there is nothing to say."""
    words = "" if pd.isna(code) or code == "ok" else format_cell(code).replace("_", " ")
    return ": ".join(filter(None, [words, "" if pd.isna(message) else format_cell(message)]))


def _embed(results: Results, gallery: Gallery, base: str, image: _Image) -> _Image:
    """Return the image with its picture as part of the page."""
    drawn = results.png(f"{base}figures/{image.file.rpartition('/')[2]}")
    picture = gallery.volume("", drawn, image.alt, "", "") if drawn else None
    return replace(image, picture=picture)


def _sentence(table: pd.DataFrame, mode: str) -> str:
    """Return what was done to how many images."""
    done = f", {_DONE[mode]}" if mode in _DONE else ""
    flagged, skipped = (_counted(table[table["status"] == status]) for status in ("warn", "skip"))
    used = int(table["status"].isin(["ok", "warn"]).sum())
    return (
        f"Bias field corrected, brain extracted{done}: {format_number(used)} of "
        f"{format_number(len(table))} images of {format_number(table['participant_id'].nunique())} "
        f"participants; flagged among them: {flagged}; skipped: {skipped}."
    )


def _limits(table: pd.DataFrame, mode: str) -> list[str]:
    limits = []
    if flagged := int((table["status"] == "warn").sum()):
        limits.append(
            "Images flagged in preprocessing and used like all others: "
            f"{format_number(flagged)} (see Preprocessing)."
        )
    if mode in _LIMITS:
        limits.append(
            f"{_LIMITS[mode]} There was no nonlinear registration and no tissue segmentation. Results "
            "were judged by numbers alone: look at the pictures."
        )
    return limits


def _counted(rows: pd.DataFrame) -> str:
    """Return the number of rows and of each code among them."""
    codes = rows["code"].fillna("no code").value_counts(sort=False)
    codes = codes.sort_index().sort_values(ascending=False, kind="stable")
    words = [f"{format_cell(c).replace('_', ' ')} {format_number(n)}" for c, n in codes.items()]
    return f"{format_number(len(rows))} ({', '.join(words)})" if words else "none"


def _codes(table: pd.DataFrame) -> Table:
    rows = [
        (status, code, len(those), "" if status == "ok" else those["message"].iloc[0])
        for (_, status, code), those in table.groupby(["rank", "status", "code"], dropna=False)
    ]
    return Table(("status", "code", "images", "for instance"), rows, numeric=("images",))


def _strips(table: pd.DataFrame, gallery: Gallery, source: str) -> Picture | None:
    """Return the main measures of all images, a strip for each measure that there is."""
    known = [name for name in _DRAWN if table[name].notna().any()]
    if not known:
        return None
    values = table[known].rename(columns=_DRAWN)
    words = table["status"].map(_STATUSES).fillna(_STATUSES["skip"])
    order = list(_STATUSES.values())[::-1]
    alt = f"A point for each image, a line for each measure: {'; '.join(map(str, values.columns))}"
    name = f"desc-{gallery.model}_preprocessing"
    drawn = draw_strips(name, values, words, order=order, hover=row_names(table), alt=alt)
    middle = ", ".join(_numbers({measure: table[measure].median() for measure in known}))
    caption = f"Medians: {middle}. Values far outside stand at the edge."
    if words.value_counts().max() > RASTER_ABOVE:
        caption += f" Points of more than {RASTER_ABOVE} images are drawn as one image."
    return gallery.svg(name, drawn, alt, caption, source)


def _groups(images: Sequence[_Image]) -> list[dict[str, Any]]:
    """Return the images by status, in parts that a heading is put above."""
    groups: list[dict[str, Any]] = []
    for image in images:
        if not groups or groups[-1]["title"] != image.verdict:
            groups.append({"title": image.verdict, "id": f"group{len(groups)}", "images": []})
        groups[-1]["images"].append(image)
    for group in groups:
        starts = range(0, len(group["images"]), _AT_ONCE)
        group["parts"] = [(at, group["images"][at : at + _AT_ONCE]) for at in starts]
    return groups

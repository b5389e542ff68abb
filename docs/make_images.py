"""Draw the pictures of docs/views.md: python docs/make_images.py [FOLDER], default docs/images.

The brain is the MNI152 template of nilearn, prepared as every image is; the views are drawn by the
package itself, under fixed keys, so the same versions draw the same pictures.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from nilearn import datasets
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from nidl_dcl.data.transforms import (
    RandBiasField,
    RandBlur,
    RandContrast,
    RandCutout,
    RandForegroundNoise,
    RandSpatial,
)
from nidl_dcl.data.views import STRENGTHS, draw_view, volume_views
from nidl_dcl.volumes.preparation import Preparation, prepare_volume

KINDS: dict[str, Callable[..., Any]] = {
    "placement": RandSpatial,
    "blur": RandBlur,
    "contrast": RandContrast,
    "bias": RandBiasField,
    "noise": RandForegroundNoise,
    "cutout": RandCutout,
}
SPACING = 2.0  # mm
VIEWS = 6
SCALE = 2  # pixels for a voxel
GAP, MARGIN, HEAD = 6, 34, 30  # pixels: between panels, for the names of rows and of columns

Planes = Callable[[Tensor], Any]


def axial(volume: Tensor) -> Any:
    """Return a slice through the ventricles, seen from above, the front at the top."""
    return volume[0, :, :, 40].numpy().T[::-1]


def coronal(volume: Tensor) -> Any:
    return volume[0, :, 46, :].numpy().T[::-1]


def sagittal(volume: Tensor) -> Any:
    return volume[0, 38, :, :].numpy().T[::-1]


def zoomed(volume: Tensor) -> Any:
    """Return the middle of the axial slice, each voxel twice as large."""
    part = axial(volume)[24:72, 16:64]
    return part.repeat(2, axis=0).repeat(2, axis=1)


def seen_through(volume: Tensor) -> Any:
    """Return the sum of the axial slices, in which every box is seen."""
    return volume[0].mean(2).numpy().T[::-1] * 1.7


PLANES: dict[str, Planes] = {"blur": zoomed, "noise": zoomed, "cutout": seen_through}


def brain() -> Tensor:
    """Return the prepared brain, shape (1, d, h, w)."""
    template = datasets.load_mni152_template(resolution=1)
    mask = datasets.load_mni152_brain_mask(resolution=1)
    preparation = Preparation(spacing=(SPACING,) * 3, masked=True)
    return torch.from_numpy(prepare_volume(template, preparation, mask))


def limits(kind: str, strength: str) -> dict[str, Any]:
    """Return the limits of one kind of change, such that it always happens."""
    return STRENGTHS[strength][kind] | {"prob": 1.0}


def pictures() -> Iterator[tuple[str, Callable[[Tensor], bytes]]]:
    """Yield the name of each picture, and what draws it of a brain."""
    for strength in STRENGTHS:
        yield f"views-{strength}.png", partial(draw_strength, strength=strength)
    for kind in KINDS:
        yield f"views-{kind}.png", partial(draw_kind, kind=kind)


def draw_strength(volume: Tensor, strength: str) -> bytes:
    """Draw the brain and views of it, three planes of each."""
    views = [draw_view(volume_views(strength), volume, "page", i) for i in range(VIEWS)]
    rows = [[plane(v) for v in (volume, *views)] for plane in (axial, coronal, sagittal)]
    heads = ["original", *(f"view {i + 1}" for i in range(VIEWS))]
    return draw_panels(rows, ["axial", "coronal", "sagittal"], heads, STRENGTHS[strength])


def draw_kind(volume: Tensor, kind: str) -> bytes:
    """Draw the brain and one kind of change of it, at two strengths."""
    plane = PLANES.get(kind, axial)
    rows = []
    for strength in ("default", "strong"):
        change = KINDS[kind](**limits(kind, strength))
        drawn = [draw_view(change, volume, "page", kind, i) for i in range(VIEWS)]
        rows.append([plane(v) for v in (volume, *drawn)])
    heads = ["original", *(f"draw {i + 1}" for i in range(VIEWS))]
    used = {strength: STRENGTHS[strength][kind] for strength in ("default", "strong")}
    return draw_panels(rows, ["default", "strong"], heads, used)


def draw_panels(
    rows: Sequence[Sequence[Any]], names: Sequence[str], heads: Sequence[str], used: dict[str, Any]
) -> bytes:
    """Return a PNG of panels on black; `used`, the limits they were drawn with, goes with it."""
    width = max(panel.shape[1] for row in rows for panel in row) * SCALE
    heights = [max(panel.shape[0] for panel in row) * SCALE for row in rows]
    total = MARGIN + len(heads) * (width + GAP), HEAD + sum(heights) + len(rows) * GAP
    with mpl.rc_context({"font.size": 11, "text.color": "#d0d0d0"}):
        figure = Figure(figsize=(total[0] / 100, total[1] / 100), dpi=100, facecolor="black")
        top = HEAD
        for row, name, height in zip(rows, names, heights, strict=True):
            middle = 1 - (top + height / 2) / total[1]
            figure.text(MARGIN / 2 / total[0], middle, name, rotation=90, ha="center", va="center")
            for column, panel in enumerate(row):
                high, wide = (n * SCALE for n in panel.shape)
                left = MARGIN + column * (width + GAP) + (width - wide) / 2
                low = total[1] - top - height / 2 - high / 2
                axes = figure.add_axes(
                    (left / total[0], low / total[1], wide / total[0], high / total[1])
                )
                axes.imshow(panel, cmap="gray", vmin=0, vmax=1.25, interpolation="bilinear")
                axes.set_axis_off()
            top += height + GAP
        for column, head in enumerate(heads):
            left = MARGIN + column * (width + GAP) + width / 2
            figure.text(left / total[0], 1 - HEAD / 2 / total[1], head, ha="center", va="center")
        drawn, stream = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png")
    about = PngInfo()
    about.add_text("Comment", json.dumps(used))
    Image.open(drawn).convert("L").save(stream, format="png", optimize=True, pnginfo=about)
    return stream.getvalue()


def main(folder: Path) -> None:
    volume = brain()
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures():
        (folder / name).write_bytes(draw(volume))
        sys.stdout.write(f"{folder / name}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")

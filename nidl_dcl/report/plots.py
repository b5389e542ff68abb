"""Pictures of the report, as PNG or SVG bytes, from arrays and tables that others computed.

Knows nothing of files or HTML; colors and the form of an SVG are `sheet`'s. The same input gives
the same bytes: an SVG, but for slices of a brain, which are a PNG.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from nidl_dcl.report.svg import INK, MUTED, OKABE_ITO, PAPER, STYLE, clean, drawing

_MARKERS = "os^DvPX"

RASTER_ABOVE = 500
"""More points than this become one picture inside the SVG, without values under the pointer."""

_TURNS = 20

_FOR_RASTER = ("#0073b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4ea")
"""Much the same colors, none of which a dark page exchanges: it could do so in the legend only."""


def slice_indices(volume: NDArray[Any], spacing: Sequence[float]) -> tuple[int, int, int]:
    """Return the voxel (i, j, k) through which slices show a brain best; axes RAS, spacing in mm.

    That is the center of what is bright, but not lower than 65 mm below its top: with a neck in the
    image the center is below the brain.
    """
    weight = np.nan_to_num(np.asarray(volume, dtype=np.float64))
    weight = np.clip(weight - np.median(weight), 0.0, None)
    if weight.max() <= 0:
        weight = np.ones_like(weight)
    grids = np.ogrid[tuple(slice(n) for n in weight.shape)]
    i, j, k = (round(float((grid * weight).sum() / weight.sum())) for grid in grids)
    heights = weight.sum(axis=(0, 1))
    top = int(np.flatnonzero(heights > 0.05 * heights.max())[-1])
    return i, j, max(k, top - round(65 / spacing[2]))


def draw_slices(
    volume: NDArray[Any],
    spacing: Sequence[float],
    *,
    at: Sequence[int],
    window: tuple[float, float],
    sides: bool = True,
    width: float = 4.8,
) -> bytes:
    """Draw an axial, a coronal and a sagittal slice side by side, as a PNG on black.

    Parameters
    ----------
    volume : ndarray of shape (d, h, w)
        Axes right, anterior, superior (RAS), so that the left of a picture is the left of the head.
    spacing : sequence of three float
        Size of a voxel in mm.
    at : sequence of three int
        Voxel (i, j, k) that the slices share.
    window : tuple of float
        Values shown black and white.
    sides : bool, default=True
        Whether to write L and R, P and A; not for views, which may be mirrored.
    width : float, default=4.8
        In inches of 125 pixels.
    """
    x, y, z = (float(n * mm) for n, mm in zip(volume.shape, spacing, strict=True))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 0.91 * width * max(y, z) / (2 * x + y)), facecolor="black")
        _add_slices(figure, (0, 0, 1, 1), volume, spacing, at, window, sides)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=125, metadata={"Software": None})
    return stream.getvalue()


def draw_mosaic(
    volumes: Sequence[NDArray[Any]], labels: Sequence[str], spacing: Sequence[float]
) -> bytes:
    """Draw many volumes, three slices of each under its label, as a PNG on black.

    Parameters
    ----------
    volumes : sequence of ndarray of shape (d, h, w)
        Axes right, anterior, superior; one shape. Each has a gray scale of its own.
    labels : sequence of str
        One per volume.
    spacing : sequence of three float
        Size of a voxel in mm.
    """
    x, y, z = (float(n * mm) for n, mm in zip(volumes[0].shape, spacing, strict=True))
    columns = min(4, len(volumes))
    rows = -(-len(volumes) // columns)
    width, label = 3.4, 0.2
    height = label + width * max(y, z) / (2 * x + y)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(columns * width, rows * height), facecolor="black")
        for number, (volume, text) in enumerate(zip(volumes, labels, strict=True)):
            left, row = number % columns / columns, number // columns
            bottom = 1 - (row + 1) / rows
            box = (left, bottom, 1 / columns, (1 - label / height) / rows)
            values = np.nan_to_num(np.asarray(volume, dtype=np.float32))
            low, high = np.percentile(values, [0.5, 99.7])
            at = slice_indices(values, spacing)
            _add_slices(figure, box, values, spacing, at, (low, high), sides=number == 0)
            x, y = left + 0.03 / columns, bottom + box[3]
            figure.text(x, y, clean(text), color="white", fontsize=8, va="bottom")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()


def _add_slices(
    figure: Figure,
    box: tuple[float, float, float, float],
    volume: NDArray[Any],
    spacing: Sequence[float],
    at: Sequence[int],
    window: tuple[float, float],
    sides: bool,
) -> None:
    """Add an axial, a coronal and a sagittal slice to a part of a figure, given in its fractions."""
    i, j, k = (int(np.clip(index, 0, n - 1)) for index, n in zip(at, volume.shape, strict=True))
    x, y, z = (float(n * mm) for n, mm in zip(volume.shape, spacing, strict=True))
    slices = (
        (volume[:, :, k], x, y, "LR"),
        (volume[:, j, :], x, z, "LR"),
        (volume[i, :, :], y, z, "PA"),
    )
    gap, left = 0.03, 0.015
    for plane, across, up, letters in slices:
        share, part = (1 - 3 * gap) * across / (2 * x + y), up / max(y, z)
        corner = (box[0] + left * box[2], box[1] + (0.5 - part / 2) * box[3])
        axes = figure.add_axes((*corner, share * box[2], part * box[3]))
        left += share + gap
        axes.imshow(
            np.nan_to_num(plane.T.astype(np.float32)),
            cmap="gray",
            origin="lower",
            aspect="auto",
            vmin=window[0],
            vmax=max(window[1], np.nextafter(window[0], np.inf)),
            interpolation="bilinear",
        )
        axes.set_axis_off()
        for place, letter in enumerate(letters if sides else ""):
            text = axes.text(place, 0.5, letter, color="white", fontsize=8, va="center")
            text.set(transform=axes.transAxes, ha=("left", "right")[place])


def draw_curves(
    name: str,
    x: ArrayLike,
    curves: Mapping[str, ArrayLike],
    *,
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None = None,
    alt: str,
) -> bytes:
    """Draw one line for each of `curves` over `x`, and a dashed `level`.

    Parameters
    ----------
    name : str
        Unique on a page: prefix of the ids inside the SVG.
    x, curves : array of shape (n,), mapping of label to array of shape (n,)
        Points that are not finite are left out.
    xlabel, ylabel : str
        Names of the axes, with units.
    level : tuple of str and float, optional
        Label and height of a dashed line.
    alt : str
        The picture in words, for those who cannot see it.
    """
    texts: dict[str, list[str]] = {}
    with drawing(name, 2.9) as sheet:
        axes = sheet.axes
        at = np.asarray(x, dtype=np.float64)
        for (label, curve), color in zip(curves.items(), OKABE_ITO, strict=False):
            values = np.asarray(curve, dtype=np.float64)
            seen = np.isfinite(values) & np.isfinite(at)
            gid, points = f"points{len(texts)}", (at[seen], values[seen])
            texts[gid] = [
                f"{xlabel} {one:g} · {label} {value:.4g}"
                for one, value in zip(*points, strict=True)
            ]
            axes.plot(
                *points,
                color=color,
                label=clean(label),
                marker="o" if seen.sum() <= 40 else "",
                markersize=3,
                linestyle="-" if color == OKABE_ITO[0] else (0, (4, 1.5)),
                gid=gid,
            )
        if level is not None and np.isfinite(level[1]):
            axes.axhline(level[1], color=MUTED, linestyle=(0, (1, 1.2)), label=clean(level[0]))
        axes.set(xlabel=clean(xlabel), ylabel=clean(ylabel))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.margins(y=0.12)
        if len(curves) + (level is not None) > 1:
            sheet.figure.legend(loc="outside upper left", ncols=3)
    return sheet.svg(alt, texts)


def draw_embedding(
    name: str,
    x: ArrayLike,
    y: ArrayLike,
    values: pd.Series,
    *,
    axis_labels: tuple[str, str] = ("first axis", "second axis"),
    hover: Sequence[str] = (),
    alt: str,
) -> bytes:
    """Draw one point for each image, colored by `values`.

    Parameters
    ----------
    name : str
        Prefix of ids.
    x, y : array of shape (n,)
        Finite coordinates.
    values : Series of length n
        Numbers are shown on the viridis scale; labels in the colors and shapes of `OKABE_ITO`,
        the most frequent first, those beyond as "other". Missing values are gray crosses.
        Its name labels the legend.
    axis_labels : tuple of two str
        Names of the axes.
    hover : sequence of n str, optional
        What the pointer shows over each point of at most 500.
    alt : str
        The picture in words.
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    missing = values.isna().to_numpy()
    # Five numbers or fewer, as of visits, are told apart better than on a scale.
    on_scale = pd.api.types.is_numeric_dtype(values) and values.nunique() > 5
    points: dict[str, NDArray[Any]] = {}
    raster = len(across) > RASTER_ABOVE
    look = {"s": 6, "linewidths": 0.3} if raster else {"s": 20, "linewidths": 0.6}
    # Where points hide one another, groups are laid in turn, so that none covers the others.
    turns = np.arange(len(across)) % (_TURNS if raster else 1)
    with drawing(name, 4.1) as sheet:
        axes = sheet.axes

        def scatter(chosen: NDArray[np.bool_], **kwargs: Any) -> Any:
            gid = f"points{len(points)}"
            points[gid] = np.flatnonzero(chosen)
            numbers = kwargs.pop("c", None)
            options = {"edgecolors": MUTED, "gid": gid, "rasterized": raster, **look, **kwargs}
            for turn in range(turns.max(initial=0) + 1):
                now = chosen & (turns == turn)
                if numbers is not None:
                    options["c"] = numbers[now]
                # Below the spines, which would part the raster.
                layer = axes.scatter(across[now], up[now], zorder=2 + turn / _TURNS / 4, **options)
            return layer

        entries = []
        if missing.any():
            crosses = scatter(missing, color=MUTED, marker="x", linewidths=1.0, edgecolors=None)
            entries.append((crosses, f"missing ({missing.sum():,})"))
        if on_scale and not missing.all():
            scale = values.to_numpy(dtype=np.float64)
            norm = Normalize(np.nanmin(scale), np.nanmax(scale))
            seen = scatter(~missing, c=scale, norm=norm, cmap="viridis")
            bar = sheet.figure.colorbar(seen, ax=axes, shrink=0.85, aspect=30, pad=0.02)
            bar.set_label(clean(values.name))
            bar.outline.set_visible(False)
        elif not missing.all():
            text = values.astype("string")
            levels = text.value_counts().sort_index().sort_values(ascending=False, kind="stable")
            colors = _FOR_RASTER if raster else OKABE_ITO
            most = len(colors) if len(levels) <= len(colors) else len(colors) - 1
            shown = list(levels.index[:most])
            for order, level in enumerate(shown):
                chosen = (text == level).fillna(False).to_numpy(dtype=bool)
                group = scatter(chosen, color=colors[order], marker=_MARKERS[order])
                entries.insert(order, (group, f"{clean(level, 24)} ({levels[level]:,})"))
            rest = ~missing & ~text.isin(shown).to_numpy()
            if rest.any():
                words = f"other, {len(levels) - len(shown):,} levels ({rest.sum():,})"
                entries.append((scatter(rest, color=MUTED, marker="."), words))
        axes.set(xlabel=clean(axis_labels[0]), ylabel=clean(axis_labels[1]))
        sheet.legend(entries, scale=1.8 if raster else 1.0)
    texts = {gid: [hover[i] for i in rows] for gid, rows in points.items()} if hover else {}
    return sheet.svg(alt, texts)


def draw_identity(
    name: str,
    truth: ArrayLike,
    prediction: ArrayLike,
    *,
    label: str,
    hover: Sequence[str] = (),
    alt: str,
) -> bytes:
    """Draw predictions against true values, with the line on which both are equal.

    Parameters
    ----------
    name : str
        Prefix of ids.
    truth, prediction : array of shape (n,)
        Finite values in the same unit.
    label : str
        What is predicted, with its unit.
    hover : sequence of n str, optional
        What the pointer shows over each point of at most 500.
    alt : str
        The picture in words.
    """
    true, predicted = (np.asarray(v, dtype=np.float64) for v in (truth, prediction))
    raster = true.size > RASTER_ABOVE
    with drawing(name, 4.1) as sheet:
        axes = sheet.axes
        if true.size:
            ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
            axes.plot(ends, ends, color=MUTED, linestyle=(0, (4, 2)), linewidth=1.2)
        axes.scatter(
            *(true, predicted),
            color=OKABE_ITO[0],
            edgecolors=PAPER,
            s=8 if raster else 22,
            alpha=0.4 if raster else 0.75,
            linewidths=0.3,
            gid="points",
            rasterized=raster,
        )
        axes.set(xlabel=f"{clean(label)}, true", ylabel=f"{clean(label)}, predicted")
    return sheet.svg(alt, {"points": list(hover)})


def draw_relation(
    name: str,
    points: pd.DataFrame,
    *,
    xlabel: str,
    ylabel: str,
    line: Sequence[float],
    joined: bool = True,
    alt: str,
) -> bytes:
    """Draw one quantity against another, of several groups, and a dashed straight line.

    Parameters
    ----------
    name : str
        Prefix of ids.
    points : DataFrame
        Columns: the group, then the two quantities. Of more than seven groups, the first are drawn.
    xlabel, ylabel : str
        Names of the axes.
    line : sequence of four float
        Both ends of the dashed line: x, x, y, y.
    joined : bool, default=True
        Whether points are joined, instead of one mark each.
    alt : str
        The picture in words.
    """
    group, across, up = points.columns
    with drawing(name, 3.4) as sheet:
        axes = sheet.axes
        axes.plot(line[:2], line[2:], color=MUTED, linestyle=(0, (4, 2)), linewidth=1.2)
        handles = []
        groups = list(points.groupby(group, sort=False))
        for order, (label, rows) in enumerate(groups[: len(_MARKERS)]):
            color = OKABE_ITO[order % len(OKABE_ITO)]
            style = {"linewidth": 1.6} if joined else {"linestyle": "", "marker": "o"}
            drawn = axes.plot(
                *(rows[across], rows[up]),
                color=color,
                markersize=3,
                alpha=1.0 if joined else 0.6,
                rasterized=len(rows) > RASTER_ABOVE,
                gid=f"points{order}",
                **style,
            )
            handles.append((drawn[0], clean(str(label), 30)))
        if len(handles) > 1:
            sheet.legend(handles)
        axes.set(xlabel=clean(xlabel, 60), ylabel=clean(ylabel, 60))
    return sheet.svg(alt, {})


def draw_confusion(name: str, counts: pd.DataFrame, *, alt: str) -> bytes:
    """Draw how often each true class (rows of `counts`) was predicted as each class (columns).

    Parameters
    ----------
    name : str
        Prefix of ids.
    counts : DataFrame of shape (n_classes, n_classes)
        Numbers of participants; the color is the share of the row.
    alt : str
        The picture in words.
    """
    cells = counts.to_numpy(dtype=np.float64)
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1.0)
    with drawing(name, 3.6) as sheet:
        axes = sheet.axes
        axes.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto", rasterized=True)
        look = {"ha": "center", "va": "center", "fontsize": 10 if len(cells) <= 6 else 7}
        for (row, column), part in np.ndenumerate(share):
            if len(cells) <= 12:
                ink, words = "#fefefe" if part < 0.47 else "#010101", f"{part:.0%}"
                axes.text(column, row, f"{cells[row, column]:,.0f}\n{words}", color=ink, **look)
        for axis, names in ((axes.xaxis, counts.columns), (axes.yaxis, counts.index)):
            axis.set_ticks(range(len(names)), [clean(n, 14) for n in names])
        if max((len(str(n)) for n in counts.columns), default=0) > 6:
            axes.tick_params(axis="x", labelrotation=35)
        axes.set(xlabel="predicted", ylabel="true")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return sheet.svg(alt)


def draw_intervals(
    name: str, rows: pd.DataFrame, *, xlabel: str, chance: float | None = None, alt: str
) -> bytes:
    """Draw a score with its interval for each of `rows`, the first one from the top highlighted.

    Parameters
    ----------
    name : str
        Prefix of ids.
    rows : DataFrame
        Columns `label`, `mean`, `low`, `high`; an interval that is not finite is left out.
    xlabel : str
        The score, and which direction is better.
    chance : float, optional
        Where to draw the chance level.
    alt : str
        The picture in words.
    """
    texts = {}
    with drawing(name, 1.2 + 0.36 * len(rows)) as sheet:
        axes = sheet.axes
        scores = rows[["mean", "low", "high"]].to_numpy(float)
        for order, (label, (mean, low, high)) in enumerate(zip(rows["label"], scores, strict=True)):
            texts[f"points{order}"] = [_interval(label, mean, low, high)]
            color = OKABE_ITO[0] if order == 0 else MUTED
            if np.isfinite([low, high]).all():
                axes.plot([low, high], [order, order], color=color, linewidth=2.4)
            size = 7 if order == 0 else 5.5
            axes.plot([mean], [order], "o", color=color, markersize=size, gid=f"points{order}")
        if chance is not None and np.isfinite(chance):
            line = axes.axvline(chance, color=OKABE_ITO[1], linestyle=(0, (4, 2)), linewidth=1.2)
            sheet.legend([(line, "chance, from permutations")])
        axes.set_yticks(range(len(rows)), [clean(label, 30) for label in rows["label"]])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(clean(xlabel, 60))
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return sheet.svg(alt, texts)


def draw_strips(
    name: str,
    values: pd.DataFrame,
    groups: pd.Series,
    *,
    order: Sequence[str],
    hover: Sequence[str],
    alt: str,
) -> bytes:
    """Draw one point for each row of `values` on a line for each of its columns.

    Parameters
    ----------
    name : str
        Prefix of ids.
    values : DataFrame of shape (n, m)
        Missing ones are left out; those far from the others stand at the edge.
    groups : Series of length n
        Which of `order` each row belongs to.
    order : sequence of at most three str
        Names of the groups: what is usual, then what has to be seen, in front of it.
    hover : sequence of n str
        Names of the rows; the pointer shows them with the value in groups of at most 500, those of
        larger ones become one picture.
    alt : str
        The picture in words.
    """
    texts: dict[str, list[str]] = {}
    entries: dict[str, Any] = {}
    # The same places for the same number of rows, spread evenly.
    heights = np.arange(len(values)) * ((np.sqrt(5) - 1) / 2) % 1
    with drawing(name, 0.45 + 0.72 * len(values.columns), len(values.columns)) as sheet:
        for axes, (title, column) in zip(np.atleast_1d(sheet.axes), values.items(), strict=True):
            numbers = column.to_numpy(dtype=np.float64)
            low, high = _whiskers(numbers)
            inside = np.clip(numbers, low, high)
            for place, group in enumerate(order):
                rows = np.flatnonzero(np.isfinite(numbers) & (groups == group).to_numpy())
                if not rows.size:
                    continue
                gid, raster = f"points{len(texts)}", rows.size > RASTER_ABOVE
                texts[gid] = [f"{hover[row]} · {numbers[row]:.4g}" for row in rows.tolist()]
                sign = axes.scatter(
                    *(inside[rows], heights[rows]),
                    color=(_FOR_RASTER if raster else (*OKABE_ITO[:2], INK))[place],
                    marker="ovX"[place],
                    s=6 if raster else 32 if place else 20,
                    edgecolors=PAPER,
                    linewidths=0.3 if raster else 0.6,
                    rasterized=raster,
                    gid=gid,
                    clip_on=False,
                )
                entries.setdefault(f"{group} ({(groups == group).sum():,})", sign)
            margin = 0.03 * (high - low) or 1.0
            axes.set(xlim=(low - margin, high + margin), ylim=(-0.15, 1.15))
            axes.set_title(clean(title, 90), loc="left", fontsize=9)
            axes.yaxis.set_major_locator(NullLocator())
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
            axes.spines["left"].set_visible(False)
        sheet.legend([(sign, label) for label, sign in entries.items()], columns=3)
    return sheet.svg(alt, {gid: said for gid, said in texts.items() if len(said) <= RASTER_ABOVE})


def _whiskers(numbers: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of an axis on which what most values are can be told apart."""
    known = numbers[np.isfinite(numbers)]
    low, middle, high = np.percentile(known, [25, 50, 75])
    reach = 4 * max(high - low, 1e-3 * abs(middle))
    return max(float(known.min()), middle - reach), min(float(known.max()), middle + reach)


def draw_learning_curve(name: str, points: pd.DataFrame, *, ylabel: str, alt: str) -> bytes:
    """Draw the score of each kind of features, with intervals, over the participants learned from.

    Parameters
    ----------
    name : str
        Prefix of ids.
    points : DataFrame
        Columns `features`, `n_participants`, `mean`, `low`, `high`, one row per point; the features
        that come first are highlighted. An interval that is not finite is left out.
    ylabel : str
        The score, and which direction is better.
    alt : str
        The picture in words.
    """
    texts = {}
    with drawing(name, 3.2) as sheet:
        axes = sheet.axes
        groups = list(points.groupby("features", sort=False))
        for order, (label, rows) in enumerate(groups):
            scores = rows[["n_participants", "mean", "low", "high"]].to_numpy(float)
            sizes, mean, low, high = scores.T
            # Beside one another, so that no interval hides another one.
            at = sizes * 1.03 ** (order - (len(groups) - 1) / 2)
            color = OKABE_ITO[order % len(OKABE_ITO)]
            axes.plot(
                *(at, mean),
                color=color,
                label=clean(label),
                marker=_MARKERS[order % len(_MARKERS)],
                markersize=5 if order == 0 else 4,
                linestyle="-" if order == 0 else (0, (4, 1.5)),
                gid=f"points{order}",
            )
            texts[f"points{order}"] = [
                f"{size:,.0f} participants · {_interval(label, *score)}" for size, *score in scores
            ]
            axes.vlines(at, low, high, color=color, linewidth=1.6 if order == 0 else 0.9)
        axes.set_xscale("log")
        ticks = sorted(points["n_participants"].unique())
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="labeled participants to learn from", ylabel=clean(ylabel, 60))
        sheet.figure.legend(loc="outside upper left", ncols=3)
    return sheet.svg(alt, texts)


def _interval(label: object, mean: float, low: float, high: float) -> str:
    """Return a score with its interval as the pointer shows it."""
    ends = f" [{low:.3g}, {high:.3g}]" if np.isfinite([low, high]).all() else ""
    return f"{label} {mean:.3g}{ends}"

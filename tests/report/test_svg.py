from __future__ import annotations

import base64
import io
import itertools
import re
from importlib.resources import files

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from colors import SIGHT, contrast, distance

from nidl_dcl.report.plots import (
    draw_confusion,
    draw_curves,
    draw_embedding,
    draw_intervals,
    draw_learning_curve,
)
from nidl_dcl.report.svg import INK, MUTED, OKABE_ITO, PAPER

STYLE = (files("nidl_dcl.report") / "templates/report.css").read_text(encoding="utf-8")
DARK = STYLE[STYLE.index("(prefers-color-scheme: dark)") : STYLE.index("(forced-colors: active)")]


def shown(color: str, theme: str) -> str:
    """Return what the style sheet makes of a drawn color."""
    if theme == "dark":
        exchanged = dict(re.findall(r'svg \[stroke="(#\w+)"\] \{ stroke: (#\w+); \}', DARK))
        return exchanged.get(color, color)
    return color


def paper(theme: str) -> str:
    found = re.search(r"--page: (#\w+);", DARK if theme == "dark" else STYLE)
    assert found is not None
    return found.group(1)


def test_known_contrasts_and_distances_come_out() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert distance("#000000", "#ffffff") == pytest.approx(100, abs=0.1)
    # Traffic lights: the textbook case.
    assert distance("#d00000", "#508000") > 2 * distance("#d00000", "#508000", "protanopia")


def test_lines_and_fills_are_exchanged_alike_on_a_dark_page() -> None:
    rules = {kind: dict(re.findall(rf'\[{kind}="(#\w+)"\] \{{ {kind}: (#\w+);', DARK)) for kind in
             ("fill", "stroke")}  # fmt: skip
    assert {**rules["stroke"], **rules["fill"]} == rules["stroke"]
    assert INK in rules["fill"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_colors_of_groups_are_told_apart(sight: str, theme: str) -> None:
    colors = [shown(color, theme) for color in OKABE_ITO]
    apart = {pair: distance(*pair, sight) for pair in itertools.combinations(colors, 2)}
    assert len(apart) == 21
    assert min(apart.values()) > 11, min(apart, key=apart.__getitem__)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("color", [*OKABE_ITO[:5], MUTED, INK])
def test_lines_stand_out_from_the_page(color: str, theme: str) -> None:
    assert contrast(shown(color, theme), paper(theme)) >= 3
    assert paper("light") == PAPER


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "soft", "accent", "good", "bad"])
def test_text_of_every_color_stands_out_from_page_and_panel(name: str, theme: str) -> None:
    style = DARK if theme == "dark" else STYLE
    colors = dict(re.findall(r"--(\w+): (#\w{6});", style)[:: 1 if theme == "dark" else -1])
    assert contrast(colors[name], colors["page"]) >= 4.5
    assert contrast(colors[name], colors["panel"]) >= 4.5


def test_numbers_in_a_confusion_matrix_can_be_read_on_every_color() -> None:
    for part in (0, 20, 44, 46, 48, 50, 54):
        counts = pd.DataFrame([[part, 100 - part], [0, 1]], columns=["a", "b"], index=["a", "b"])
        drawn = draw_confusion("x", counts, alt="x").decode()
        inks = re.findall(r'fill="(#fefefe|#010101)"', drawn)
        for ink, share in zip(inks[:: len(inks) // 4], (part / 100, 1 - part / 100), strict=False):
            assert contrast(ink, mpl.colors.to_hex(mpl.colormaps["cividis"](share))) >= 4.5, part


def test_points_of_lines_tell_their_values() -> None:
    rows = pd.DataFrame({"label": ["mine", "theirs <b>"], "mean": [3.25, 4], "low": [3, np.nan]})
    drawn = draw_intervals("x", rows.assign(high=[3.5, np.nan]), xlabel="score", alt="x").decode()
    assert re.findall("<title>(.*?)</title>", drawn) == ["mine 3.25 [3, 3.5]", "theirs &lt;b&gt; 4"]

    curves = {"training": [4.0, np.nan, 2.5], "validation": [5.0, 4.5, 4.0]}
    drawn = draw_curves("x", [1, 2, 3], curves, xlabel="epoch", ylabel="loss", alt="x").decode()
    titles = re.findall("<title>(.*?)</title>", drawn)
    assert titles[:2] == ["epoch 1 · training 4", "epoch 3 · training 2.5"]
    assert len(titles) == 5

    points = pd.DataFrame({"features": "mine", "n_participants": [10, 20], "mean": [3.0, 2.0]})
    drawn = draw_learning_curve(
        "x", points.assign(low=1.0, high=[4.0, np.nan]), ylabel="error", alt="x"
    ).decode()
    assert re.findall("<title>(.*?)</title>", drawn) == [
        "10 participants · mine 3 [1, 4]",
        "20 participants · mine 2",
    ]


def test_no_group_covers_the_others_where_points_are_many() -> None:
    n = 4_000
    groups = pd.Series(["first", "second"] * (n // 2), name="group")
    across, up = np.random.default_rng(0).normal(0, 1, (2, n))
    drawn = draw_embedding("x", across, up, groups, hover=["id"] * n, alt="x").decode()
    assert "<title>" not in drawn
    (raster,) = re.findall(r'href="data:image/png;base64,([^"]+)"', drawn)
    pixels = mpl.image.imread(io.BytesIO(base64.b64decode(raster)))[..., :3].reshape(-1, 3)
    one, other = (
        (np.abs(pixels - mpl.colors.to_rgb(c)).max(axis=1) < 0.02).sum()
        for c in ("#0073b2", "#d55e00")
    )
    assert 0.5 < one / other < 2

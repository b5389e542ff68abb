"""Draw the pictures of architecture.md: python docs/draw_architecture.py [FOLDER].

Sphinx draws them at each build, into docs/generated. The layers are read from the contract in
pyproject.toml, so the picture of them shows what import-linter checks.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

PARTS = {
    "command, output": "",  # and the ground: whatever no other part names
    "dataset": (
        "bids_index bids_walk bids_names bids_layout listings candidates places presets brain_masks "
        "phenotypes folder_tables tables ids coding together"
    ),
    "images": (
        "datamodule image_file nifti_header mgh_header npy_header grid volumes image_checks "
        "input_contract prepared file_memory quality average_brain views monai_random "
        "volume_transforms"
    ),
    "learning": (
        "dcl estimator batches loaders samples probe loss encoder optimization distributed watching "
        "training model_folder embedding embedding_table exposure"
    ),
    "prediction": (
        "baselines transfer external readout_file linear_readout cohort prediction "
        "prediction_table evaluation folds features cleaning coordinates readout scores targets "
        "learning_curve site_audit site_scores holdout neighbors outliers occlusion"
    ),
    "report": (
        "report scorecard exhibits image_exhibits occlusion_figure audits results page figures sheet "
        "figure_data live_page occlusion_files occlusion_words summary"
    ),
}
"""The columns of the layers: what each part of the program is made of."""

STEPS = [
    ("dataset", "BIDS_DIR, never written to", ()),
    (
        "index",
        "every candidate image, judged and opened",
        ("logs/inputs.tsv", "logs/phenotypes.tsv"),
    ),
    ("prepared volumes", "one grid, one scale, half precision", ("logs/quality.tsv", ".work/")),
    ("two views", "drawn anew in each epoch, under a key", ()),
    ("DCL", "pretrain: encoder, head and loss", ("models/desc-<model>/", "logs/metrics.csv")),
    (
        "embeddings",
        "embed: one row per image",
        ("desc-<model>_embeddings.tsv", "desc-<model>_embeddings.npy"),
    ),
    (
        "predictions",
        "predict: folds by participant, baselines",
        (
            "desc-<model><Target>_predictions.tsv",
            "desc-<model><Target>_metrics.json",
        ),
    ),
    ("report", "report: from the files alone", ("report.html", "figures/")),
]
"""What a study goes through: name, what happens, and the files that are left."""

SHORTCUTS = [
    ("prepared volumes", "embeddings", "the volumes as they are"),
    ("prepared volumes", "predictions", "baselines: voxels, untrained encoders"),
    ("index", "predictions", "phenotypes"),
]
"""What goes past the steps in between: from, to, what."""

STYLE = """<style>
  .drawing {font: 11px var(--font-stack, sans-serif); fill: var(--color-foreground-primary, #111)}
  .drawing .name {font-family: var(--font-stack--monospace, monospace)}
  .drawing .head {font-weight: bold; font-size: 12px}
  .drawing .soft {fill: var(--color-foreground-secondary, #555)}
  .drawing .band {fill: var(--color-background-secondary, #f4f4f6)}
  .drawing .line {fill: none; stroke: var(--color-foreground-muted, #777); stroke-width: 1.2}
  .drawing .tip {fill: var(--color-foreground-muted, #777)}
</style>"""
WIDTH = 738
COLUMN = WIDTH / len(PARTS)
HEAD, LINE, PAD = 26, 16, 5
BOX, GAP, LEFT = 46, 22, 150  # pixels: height of a step, between two, left of them
STEP = 258  # width of a step


def layers() -> list[list[str]]:
    """Return the modules of each layer of the contract, from top to bottom."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return [layer.split(" | ") for layer in contract]


def part_of(module: str) -> int:
    """Return the column of a module."""
    return next((i for i, names in enumerate(PARTS.values()) if module in names.split()), 0)


def text(x: float, y: float, words: str, kind: str, **more: object) -> str:
    """Return a text; `more` are attributes of SVG."""
    given = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:g}" y="{y:g}" class="{kind}"{given}>{escape(words)}</text>'


def framed(height: float, title: str, parts: Iterator[str]) -> str:
    """Return the SVG of what was drawn, with what it shows in words."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="100%" role="img" aria-label="{escape(title)}">\n{STYLE}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def draw_layers() -> str:
    """Draw the layers as rows and the parts as columns; each row has its modules in its columns."""
    rows = [[[m for m in row if part_of(m) == i] for i in range(len(PARTS))] for row in layers()]
    heights = [max(map(len, row)) * LINE + 2 * PAD for row in rows]

    def drawn() -> Iterator[str]:
        for i, part in enumerate(PARTS):
            yield text(i * COLUMN + 5, 16, part, "head")
        top = HEAD
        for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
            if number % 2 == 0:
                yield f'<rect y="{top}" width="{WIDTH}" height="{height}" rx="4" class="band"/>'
            for i, modules in enumerate(row):
                for k, module in enumerate(modules):
                    size = {"textLength": f"{len(module) * 6.6:g}"}  # whatever the font
                    y = top + PAD + k * LINE + 12
                    yield text(i * COLUMN + 5, y, module, "name", **size)
            top += height

    title = (
        f"The {len(rows)} layers of the package as rows, its parts as columns: "
        f"{', '.join(PARTS)}. A module imports from the rows below its own."
    )
    return framed(HEAD + sum(heights), title, drawn())


def arrow(path: str, x: float, y: float, down: bool) -> Iterator[str]:
    """Yield a line that ends at (x, y), and its tip, which points down or to the right."""
    tip = f"M{x:g} {y:g} l-4 -7 l8 0 z" if down else f"M{x:g} {y:g} l-7 -4 l0 8 z"
    yield f'<path d="{path}" class="line"/><path d="{tip}" class="tip"/>'


def draw_study() -> str:
    """Draw the steps of a study from top to bottom, with what goes past and the files left."""
    tops = {name: HEAD + i * (BOX + GAP) for i, (name, _, _) in enumerate(STEPS)}
    files = LEFT + STEP + 24

    def drawn() -> Iterator[str]:
        yield text(LEFT, 16, "what happens", "head")
        yield text(files, 16, "what it leaves in OUTPUT_DIR", "head")
        for (name, about, left), top in zip(STEPS, tops.values(), strict=True):
            if top > HEAD:
                x = LEFT + STEP / 2
                yield from arrow(f"M{x:g} {top - GAP} V{top - 6}", x, top, down=True)
            yield (
                f'<rect x="{LEFT}" y="{top}" width="{STEP}" height="{BOX}" rx="5" class="band"/>'
                f'<rect x="{LEFT}" y="{top}" width="{STEP}" height="{BOX}" rx="5" class="line"/>'
            )
            yield text(LEFT + 10, top + 19, name, "head")
            yield text(LEFT + 10, top + 36, about, "soft")
            for k, file in enumerate(left):
                y = top + BOX / 2 + (k - (len(left) - 1) / 2) * LINE + 4
                yield text(files, y, file, "name")
        for k, (start, end, what) in enumerate(SHORTCUTS):
            x = LEFT - 26 - 44 * k
            above, below = tops[start] + 12 + 11 * k, tops[end] + 12 + 11 * k
            path = f"M{LEFT} {above} H{x} V{below} H{LEFT - 6}"
            yield from arrow(path, LEFT, below, down=False)
            turned = f"rotate(-90 {x - 7} {(above + below) / 2:g})"
            more = {"transform": turned, "text_anchor": "middle"}
            yield text(x - 7, (above + below) / 2, what, "soft", **more)

    title = (
        f"A study as a chain of {len(STEPS)} steps: {', '.join(name for name, _, _ in STEPS)}. "
        + " ".join(f"From {a} to {b}: {what}." for a, b, what in SHORTCUTS)
    )
    return framed(HEAD + len(STEPS) * (BOX + GAP) - GAP + 4, title, drawn())


def main(folder: Path) -> None:
    """Write both pictures; files that would not change stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("layers.svg", draw_layers()), ("study.svg", draw_study())):
        file = folder / name
        if not file.exists() or file.read_text("utf-8") != picture:
            file.write_text(picture, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "generated")

"""Draw the pictures of architecture.md: python docs/draw_architecture.py [FOLDER].

Sphinx draws them at each build, into docs/generated. The layers are those of the contract in
pyproject.toml, which import-linter checks; what is said of a folder or a file is its docstring.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterator
from html import escape
from importlib.metadata import packages_distributions
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "nidl_dcl"
SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))

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
        ("desc-<model><Target>_predictions.tsv", "desc-<model><Target>_metrics.json"),
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
  .drawing .frame {fill: none; stroke: var(--color-background-border, #ddd)}
  .drawing .line {fill: none; stroke: var(--color-foreground-muted, #777); stroke-width: 1.2}
  .drawing .tip {fill: var(--color-foreground-muted, #777)}
</style>"""
WIDTH = 738
HEAD, LINE, PAD = 26, 16, 5
BOX, GAP, LEFT = 46, 22, 150  # pixels: height of a step, between two, left of them
STEP = 258  # width of a step
EDGE, SPACE, INDENT = 28, 8, 10  # of the layers: left of the boxes, between them, inside them
LETTER = 5.6  # width of one, in the widest of the fonts that browsers take


def layers() -> list[list[str]]:
    """Return the folders and modules of each layer of the contract, from top to bottom."""
    contract = SETTINGS["tool"]["importlinter"]["contracts"][0]["layers"]
    return [layer.split(" | ") for layer in contract]


def purpose(name: str) -> str:
    """Return what the docstring of a folder says, or the first paragraph of a module's."""
    folder = PACKAGE / name
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    said = str(ast.get_docstring(ast.parse(file.read_text("utf-8")))).replace("`", "")
    return " ".join((said if folder.is_dir() else said.split("\n\n")[0]).split())


def libraries(folder: str) -> list[str]:
    """Return the dependencies that a folder imports, the most used first, without numpy and pandas."""
    wanted = {re.split("[^a-z0-9-]", name)[0] for name in SETTINGS["project"]["dependencies"]}
    homes = packages_distributions()
    found: Counter[str] = Counter()
    for file in (PACKAGE / folder).glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
        found.update({home.lower() for name in names for home in homes.get(name.split(".")[0], [])})
    kept = (wanted & set(found)) - {"numpy", "pandas"}
    return sorted(kept, key=lambda name: (-found[name], name))


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


def arrow(path: str, x: float, y: float, down: bool) -> Iterator[str]:
    """Yield a line that ends at (x, y), and its tip, which points down or to the right."""
    tip = f"M{x:g} {y:g} l-4 -7 l8 0 z" if down else f"M{x:g} {y:g} l-7 -4 l0 8 z"
    yield f'<path d="{path}" class="line"/><path d="{tip}" class="tip"/>'


def draw_box(name: str, x: float, y: float, width: float) -> tuple[float, list[str]]:
    """Return the height that a folder or module needs in the picture, and the texts in its box."""
    is_folder = (PACKAGE / name).is_dir()
    left, above = (INDENT, LINE + 2) if is_folder else (2 * INDENT + 7 * len(name), 0)
    letters = int((width - left - INDENT) / LETTER)
    lines = [(line, "") for line in textwrap.wrap(purpose(name), letters)]
    if is_folder:
        used = textwrap.wrap(", ".join(libraries(name)), letters)
        lines += [(line, "soft") for line in used]
    parts = [text(x + INDENT, y + 17, name, "name head" if is_folder else "name")]
    parts += [
        text(x + left, y + 17 + above + k * LINE, line, kind)
        for k, (line, kind) in enumerate(lines)
    ]
    return above + len(lines) * LINE + 2 * PAD, parts


def draw_layers() -> str:
    """Draw each layer as a row of boxes, with what each folder is for and the libraries it uses."""
    y, parts = 2.0, []
    for row in layers():
        width = (WIDTH - 1 - EDGE - SPACE * (len(row) - 1)) / len(row)
        lefts = [EDGE + k * (width + SPACE) for k in range(len(row))]
        boxes = [draw_box(name, x, y, width) for name, x in zip(row, lefts, strict=True)]
        height = max(needed for needed, _ in boxes)
        for name, x, (_, inside) in zip(row, lefts, boxes, strict=True):
            kind = "band" if (PACKAGE / name).is_dir() else "frame"
            size = f'width="{width:g}" height="{height:g}" rx="5"'
            parts += [f'<rect x="{x:g}" y="{y:g}" {size} class="{kind}"/>', *inside]
        y += height + SPACE
    y -= SPACE
    turned = {"transform": f"rotate(-90 10 {y / 2:g})", "text_anchor": "middle"}
    parts.append(text(10, y / 2, "imports go down", "soft", **turned))
    parts += arrow(f"M18 4 V{y - 6:g}", 18, y, down=True)
    title = f"The {len(layers())} layers of the package, from top to bottom. " + " ".join(
        f"{name}: {purpose(name)}" for row in layers() for name in row
    )
    return framed(y + 2, title, iter(parts))


def list_files() -> str:
    """Return HTML that unfolds to the files of each folder, and what each is for."""
    parts = []
    for folder in (name for row in layers() for name in row if (PACKAGE / name).is_dir()):
        names = sorted(f.stem for f in (PACKAGE / folder).glob("*.py") if f.stem != "__init__")
        rows = (
            f"<dt><code>{name}</code></dt><dd>{escape(purpose(f'{folder}/{name}'))}</dd>"
            for name in names
        )
        parts.append(
            f"<details><summary><code>{folder}</code>: {len(names)} files</summary>"
            f"<dl>{''.join(rows)}</dl></details>"
        )
    return "\n".join(parts) + "\n"


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
    """Write pictures and list; files that would not change stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"layers.svg": draw_layers(), "study.svg": draw_study(), "files.html": list_files()}
    for name, content in made.items():
        file = folder / name
        if not file.exists() or file.read_text("utf-8") != content:
            file.write_text(content, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "generated")

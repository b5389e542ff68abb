"""Docstrings name every parameter that a reader may have to give."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nidl_dcl

PACKAGE = Path(nidl_dcl.__file__).parent
SECTION = re.compile(r"^Parameters\n-{10}\n(.*?)(?=^\w[\w ]*\n-{3,}$|\Z)", re.DOTALL | re.MULTILINE)

INCOMPLETE = {
    "bids/entities.py": "passes",
    "cli.py": "demo embed index predict pretrain report study",
    "data/datamodule.py": "BIDSDataModule.sample_name split_of",
    "data/datasets.py": "TwoViewSamples",
    "data/loaders.py": "Loaders Loaders.sample_name",
    "data/transforms.py": "RandContrast RandCutout",
    "evaluation/cross_validation.py": "check_counts dummy_prediction permuted_scores",
    "evaluation/features.py": "read_column read_labels read_sources",
    "evaluation/folds.py": "make_design make_external_design make_units",
    "evaluation/learning_curve.py": "labeled_groups",
    "evaluation/linear_models.py": "Logistic.predict Ridge.predict",
    "evaluation/metrics.py": "balanced_accuracies chance_level mean_absolute_errors recalls",
    "evaluation/occlusion.py": "where",
    "evaluation/prediction.py": "count_exposure count_used read_seen",
    "evaluation/prediction_table.py": "describe_predictions passed_on read_persons",
    "evaluation/readout_file.py": "readout_path",
    "io/atomic.py": "write_bytes",
    "io/console.py": "NullReporter.progress",
    "io/file_cache.py": "FileMemory.note",
    "output/embeddings.py": "is_written",
    "output/parts.py": "Part.write merge_embeddings merge_inputs merge_matches waiting_parts",
    "output/run_log.py": "Logged.progress",
    "report/html.py": "Gallery.svg Gallery.volume",
    "report/svg.py": "Sheet.legend drawing",
    "volumes/cache.py": "in_threads",
    "volumes/checks.py": "tell",
    "workflow/baselines.py": "baseline_features untrained_encoder",
    "workflow/embed.py": "merge_parts",
    "workflow/external.py": "find_readouts",
    "workflow/factory.py": "data_module refuse_changes training_config",
    "workflow/figure_data.py": "write_plane",
    "workflow/inputs.py": "draw_volumes logged set_up",
    "workflow/participants.py": "held_out_rows hold_out recognized tell_people undivided_groups",
    "workflow/preflight.py": "check_targets refuse_another_model refuse_unusable site_column",
}
"""Functions and classes of each file whose parameters are not described yet; to become empty."""


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Yield name, definition and docstring of each public function, method and class."""

    def visit(
        node: ast.Module | ast.ClassDef, path: str
    ) -> Iterator[tuple[str, ast.FunctionDef, str]]:
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                yield path + child.name, child, ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                for method in child.body:  # the class's docstring describes its constructor
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                        yield path + child.name, method, ast.get_docstring(child) or ""
                yield from visit(child, f"{path}{child.name}.")

    yield from visit(tree, "")


def parameters(function: ast.FunctionDef) -> list[str]:
    """Return the names of a function's parameters, as numpydoc writes them."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [f"*{a.arg}" for a in [given.vararg] if a] + [f"**{a.arg}" for a in [given.kwarg] if a]
    return [name for name in names if name not in ("self", "cls")]


def described(docstring: str) -> set[str] | None:
    """Return the names that a docstring's Parameters section describes; None without a section."""
    section = SECTION.search(docstring)
    if section is None:
        return None
    heads = re.findall(r"^\S.*$", section[1], re.MULTILINE)
    return {name.strip() for head in heads for name in head.partition(" : ")[0].split(",")}


def is_complete(function: ast.FunctionDef, docstring: str) -> bool:
    """Return whether a section describes all parameters, and no others; one or two need none."""
    names, found = parameters(function), described(docstring)
    return len(names) < 3 if found is None else set(names) == found


def test_every_parameter_of_a_public_function_is_described() -> None:
    files = {f.relative_to(PACKAGE).as_posix(): f.read_text("utf-8") for f in PACKAGE.rglob("*.py")}
    gaps = {
        (file, name)
        for file, source in files.items()
        for name, function, docstring in public_functions(ast.parse(source))
        if not is_complete(function, docstring)
    }
    known = {(file, name) for file, names in INCOMPLETE.items() for name in names.split()}
    assert sorted(gaps - known) == []
    assert sorted(known - gaps) == [], "described by now: remove them from INCOMPLETE"


def test_a_parameter_that_is_not_described_is_found() -> None:
    function = ast.parse("def f(self, a, b, *args, c=1, **kwargs): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    section = "Do.\n\nParameters\n----------\na, b : int\n    Numbers.\n*args : object\n    More.\n"
    rest = (
        "c : int, default=1\n    One.\n**kwargs : object\n    Options.\n\nReturns\n-------\nint\n"
    )
    assert is_complete(function, section + rest)
    assert not is_complete(function, section + rest.replace("c :", "d :"))
    assert not is_complete(function, section.replace("a, b", "a") + rest)
    assert not is_complete(function, section.replace("a, b", "a, b, z") + rest)
    assert not is_complete(function, "Do.")

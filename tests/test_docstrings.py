"""Docstrings name every parameter that a reader may have to give."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nidl_dcl

PACKAGE = Path(nidl_dcl.__file__).parent
SECTION = re.compile(r"^Parameters\n-{10}\n(.*?)(?=^\w[\w ]*\n-{3,}$|\Z)", re.DOTALL | re.MULTILINE)

ELSEWHERE = {"cli.py"}
"""Files whose parameters are described in their annotations, from which `--help` is made."""


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
    assert sorted(gap for gap in gaps if gap[0] not in ELSEWHERE) == []


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

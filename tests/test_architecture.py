"""The structure, read from the source: imports point one way, and a file is one idea of moderate length."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers.paths import ROOT

# From the ground up; a module of `steer` imports from its own floor and those below. Modules of one floor may
# import each other, in one direction.
FLOORS = [
    "errors names stats threads versions extras recipe_files arguments files outputs hub pages "
    "sharded compat",
    "prompt config expression",
    "hooks sites kinds prompt_watch batching saving tasks",
    "final_norm identity probe places artifact_scores card weights quantization models base_adapter "
    "stop_tokens",
    "artifact_file artifact_tensors artifact pack",
    "vectors vector_sets mixture",
    "generation engine export transfer",
    "evaluation",
    "training",
    "lens sae extract play",
    "cli",
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names.split()}
TOPS = ("steer", "recipes", "evals")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))}


def imports(name: str) -> Iterator[str]:
    """The modules of this project that a module imports, in functions too; not for type checkers alone."""
    tree = ast.parse(FILES[name].read_text())
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for child in branch.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in TOPS)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            module = node.module or ""
            if module.split(".")[0] in TOPS:
                whole = [f"{module}.{alias.name}" for alias in node.names]
                yield from (one if one in FILES else module for one in whole)


@cache
def graph() -> dict[str, set[str]]:
    return {name: set(imports(name)) - {name} for name in FILES}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_module_has_a_floor() -> None:
    rooms = {room(name) for name in FILES if name.startswith("steer.")}
    assert rooms - FLOOR.keys() == set(), "place the new module on its floor in tests/test_architecture.py"
    assert FLOOR.keys() - rooms == set(), "no such module any more"


def test_the_page_has_these_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    cells = re.findall(r"^\| [a-z ]+ \| (.*?) \|", page, re.MULTILINE)[1:]  # without the head of the table
    told = [set(re.findall(r"`(\w+)`", cell)) for cell in cells]
    assert [names for names in told if names] == [set(names.split()) for names in reversed(FLOORS)]


def test_no_import_circle() -> None:
    # a module is imported after its package, and `import steer` alone imports no other module
    within = {name: {other for other in found if other in FILES} for name, found in graph().items()}
    try:
        TopologicalSorter(within).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_imports_point_downwards() -> None:
    upwards = [
        f"{name} -> {other}"
        for name, found in graph().items()
        for other in found
        if name.startswith("steer.") and other.startswith("steer.") and FLOOR[room(other)] > FLOOR[room(name)]
    ]
    assert upwards == []


def test_recipes_and_evals_are_imported_by_nothing() -> None:
    wrong = [
        f"{name} -> {other}"
        for name, found in graph().items()
        for other in found
        for top in ("recipes", "evals")
        if other.split(".")[0] == top and name.split(".")[0] != top
    ]
    assert wrong == []


def test_recipes_hold_no_code() -> None:
    for path in (ROOT / "recipes").rglob("*.py"):
        assert {type(node) for node in ast.parse(path.read_text()).body} <= {
            ast.Expr, ast.Import, ast.ImportFrom, ast.If,
        }, path.name  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("steer")])
def test_files_are_of_moderate_length(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 500

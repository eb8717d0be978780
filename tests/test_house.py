"""The house rules that CONTRIBUTING.md names, measured over the library's own files."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("planner", "comm", "parallel", "faults", "runtime")
MODULES, LINES, FUNCTION_LINES = 15, 500, 50


def files() -> list[Path]:
    return [*(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")), *ROOT.glob("*.py")]


TREES = {path: ast.parse(path.read_text()) for path in files()}


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_no_folder_has_more_than_fifteen_modules() -> None:
    counts = Counter(path.parent for path in TREES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MODULES} == {}


def test_files_and_functions_are_short() -> None:
    long = {str(path): lines for path in TREES if (lines := path.read_text().count("\n")) > LINES}
    others = [path for name in ("tests", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py")]
    long |= {str(path): lines for path in others if (lines := path.read_text().count("\n")) > LINES}
    sizes = ((path, node, (node.end_lineno or 0) - node.lineno + 1) for path, node in functions())
    long |= {f"{path}:{node.name}": size for path, node, size in sizes if size > FUNCTION_LINES}
    assert long == {}


def test_no_public_class_name_is_defined_twice() -> None:
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def imports(tree: ast.AST) -> set[str]:
    """Of modules of ours, also inside functions; those for type checkers alone don't count."""
    checked = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in checked and (node.module or "").startswith("heteromesh"):
            found |= {str(node.module), *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_imports_make_no_circle() -> None:
    def module(path: Path) -> str:
        words = ("heteromesh", *path.relative_to(ROOT).with_suffix("").parts)
        return ".".join(words).removesuffix(".__init__")

    graph = {module(path): imports(tree) for path, tree in TREES.items()}
    left = {name: {other for other in others if other in graph and other != name} for name, others in graph.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}, "these import each other, or what does"


def test_every_folder_is_a_package_that_is_installed_and_says_what_it_is() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in TREES if path.parent != ROOT}
    assert sorted(".".join(("heteromesh", *folder.relative_to(ROOT).parts)) for folder in folders) == sorted(
        set(listed) - {"heteromesh"}
    )
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


COLLECTIVES = re.compile(r"dist\.(all_|broadcast|reduce|gather|scatter|barrier|i?send|i?recv|batch_|new_group|init_)")


def test_only_comm_calls_torchs_collectives() -> None:
    callers = {str(path.relative_to(ROOT)) for path in TREES if COLLECTIVES.search(path.read_text())}
    assert {name for name in callers if not name.startswith("comm/")} == set()


@pytest.mark.parametrize("kind", ["returns", "arguments"])
def test_everything_is_annotated(kind: str) -> None:
    missing = set()
    for path, node in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        if (node.returns is None) if kind == "returns" else bare:
            missing.add(f"{path}:{node.name}")
    assert missing == set()

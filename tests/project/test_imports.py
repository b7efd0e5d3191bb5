"""The import graph of the package: no cycles, neither between modules nor hidden in functions."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"awnet": "awnet", "kernels": "awnet.kernels", "benchmarks": "awnet.benchmarks"}
# Packages whose functions may import the package, so that a command loads only what it runs.
LAZY = ("awnet.cli.", "awnet.benchmarks.")
Graph = dict[str, set[str]]
CASES = [
    ("from . import b", ({"p.b"}, {"p.b"})),
    ("from p.b import name", ({"p.b"}, {"p.b"})),
    ("import p.b", ({"p.b"}, {"p.b"})),
    ("from p import name", ({"p"}, {"p"})),
    ("def f():\n    from p import b", (set(), {"p.b"})),
    ("class C:\n    def f(self):\n        import p.b", (set(), {"p.b"})),
    ("class C:\n    from . import b", ({"p.b"}, {"p.b"})),
    ("try:\n    import p.b\nexcept ImportError:\n    pass", ({"p.b"}, {"p.b"})),
    ("if TYPE_CHECKING:\n    import p.b", (set(), set())),
    ("import os, p.unknown", (set(), set())),
]


def module_files() -> dict[str, Path]:
    """Every module of the package, ``awnet.kernels`` and ``awnet.benchmarks`` included."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return files


def imports_in(body: Iterable[ast.AST], *, in_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a module, except those below ``if TYPE_CHECKING``."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports_in(node.orelse, in_functions=in_functions)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            children = (
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
            )
            yield from imports_in(children, in_functions=in_functions)


def imported(
    statement: ast.Import | ast.ImportFrom, module: str, is_package: bool, known: set[str]
) -> set[str]:
    """The modules of the package that a statement in ``module`` imports."""
    if isinstance(statement, ast.Import):
        names = {alias.name for alias in statement.names}
    else:
        base = statement.module or ""
        if statement.level:
            parts = module.split(".")
            parts = parts[: len(parts) - statement.level + is_package]
            base = ".".join([*parts, base] if base else parts)
        # "from package import submodule" imports the submodule, any other name its package
        names = {
            f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in statement.names
        }
    return names & known


def import_graph(files: dict[str, Path], *, in_functions: bool) -> Graph:
    graph: Graph = {}
    for module, path in files.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        is_package = path.name == "__init__.py"
        targets: set[str] = set()
        for statement in imports_in(body, in_functions=in_functions):
            targets |= imported(statement, module, is_package, set(files))
        graph[module] = targets - {module}
    return graph


def cycles(graph: Graph) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                result.append(sorted(component))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return result


FILES = module_files()


@functools.cache
def package_graph(in_functions: bool) -> Graph:
    return import_graph(FILES, in_functions=in_functions)


def test_the_graph_covers_the_package() -> None:
    assert {"awnet", "awnet.ops", "awnet.training.train", "awnet.kernels", "awnet.benchmarks.runner"} <= set(
        FILES
    )
    graph = package_graph(in_functions=False)
    assert "awnet.rng" in graph["awnet.training.train"]  # from a package
    assert "awnet.training.checkpoint" in graph["awnet.training.train"]
    assert "awnet.benchmarks.results" in graph["awnet.benchmarks.runner"]  # relative


@pytest.mark.parametrize(("source", "expected"), CASES)
def test_imports_are_found_in_source_text(
    source: str, expected: tuple[set[str], set[str]], tmp_path: Path
) -> None:
    files = {name: tmp_path / f"{name}.py" for name in ("p", "p.a", "p.b")}
    files["p"] = tmp_path / "__init__.py"
    for path in files.values():
        path.write_text("")
    files["p.a"].write_text(source)
    for in_functions, targets in zip((False, True), expected, strict=True):
        assert import_graph(files, in_functions=in_functions)["p.a"] == targets


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}}, [["d", "e"], ["a", "b", "c"]]),
    ],
)
def test_import_cycles_are_detected(graph: Graph, expected: list[list[str]]) -> None:
    assert cycles(graph) == expected


@pytest.mark.parametrize("in_functions", [False, True], ids=["at the top", "in functions too"])
def test_the_package_has_no_import_cycle(in_functions: bool) -> None:
    assert cycles(package_graph(in_functions=in_functions)) == []


def test_only_commands_and_benchmarks_import_the_package_in_functions() -> None:
    top, everywhere = (package_graph(in_functions=inside) for inside in (False, True))
    lazy = {module: everywhere[module] - top[module] for module in FILES if not module.startswith(LAZY)}
    assert {module: names for module, names in lazy.items() if names} == {}

"""docs/architecture.md: its tree is complete, and the files that a call passes are the ones it lists."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import awnet
from awnet.ops.dispatch import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SOURCES = {
    "awnet": (".py",),
    "kernels": (".py",),
    "csrc": (".py", ".cpp", ".h", ".inl", ".cu"),
    "benchmarks": (".py",),
}


def listed() -> set[str]:
    """The files of the tree, by its indentation."""
    lines = TEXT.split("## Files\n\n```\n")[1].split("```")[0].splitlines()
    files, folders = set(), []
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            files.add("".join(folders) + name)
    return files


def test_the_tree_lists_every_source_file() -> None:
    present = {
        path.relative_to(ROOT).as_posix()
        for folder, endings in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in endings
    }
    assert sorted(present - listed()) == [], "add these to the tree in docs/architecture.md"
    assert sorted(listed() - present) == [], "remove these from the tree in docs/architecture.md"


def path_of(backend: str) -> list[str]:
    body = re.search(rf"On `{backend}`.*?:\n\n((?:(?:\d\.|  ) .*\n)+)", TEXT)
    assert body is not None
    return re.findall(r"^\d\. `([\w./]+)`", body[1], re.MULTILINE)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_call_passes_at_most_eight_files_from_the_public_function_to_the_kernel(backend: str) -> None:
    path = path_of(backend)
    assert path[0] == "awnet/ops/functional.py"
    assert 5 <= len(path) == len(set(path)) <= 8
    assert [name for name in path if not (ROOT / name).is_file()] == []


def python_files_of_a_call(backend: str) -> set[str]:
    """The files whose functions a call of aw_conv2d in train mode runs, apart from the records and helpers."""
    files: set[str] = set()

    def profile(frame: object, event: str, argument: object) -> None:
        files.add(frame.f_code.co_filename)  # type: ignore[attr-defined]

    x, table = torch.rand(2, 1, 4, 4), torch.ones(1, 1)
    sys.setprofile(profile)
    try:
        awnet.functional.aw_conv2d(
            x, torch.rand(1, 1, 3, 3), None, table, table, table, table, training=True, backend=backend
        )
    finally:
        sys.setprofile(None)
    return {Path(f).relative_to(ROOT).as_posix() for f in files if f.startswith(str(ROOT / "awnet" / "ops"))}


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_the_python_files_of_a_call_are_the_listed_ones(backend: str) -> None:
    chosen = next(b for b in BACKENDS if b.name == backend)
    if chosen.not_supported(awnet.ops.args.LayerArgs(torch.empty(1, 1, 1, 1))) is not None:
        pytest.skip("the backend is not built")
    run = python_files_of_a_call(backend)
    helpers = {"awnet/ops/args.py", "awnet/ops/transforms.py", "awnet/ops/backends/base.py"}
    helpers.add("awnet/ops/running_statistics.py")  # after the kernels
    documented = {name for name in path_of("cpp") if name.startswith("awnet/ops/")}
    if backend == "eager":
        documented.remove("awnet/ops/backends/native.py")
        documented |= {"awnet/ops/backends/eager.py", "awnet/ops/coefficients.py"}
    assert run - helpers == documented


def test_the_functions_and_tables_it_names_exist() -> None:
    named = re.findall(r"`([\w.]+)` in `(?:awnet/)?([\w/]+)\.py`", TEXT)
    assert len(named) > 12
    for name, file in named:
        if file.startswith("kernels/"):  # Triton may not be installed
            assert f"def {name}(" in (ROOT / f"{file}.py").read_text(encoding="utf-8")
            continue
        module = importlib.import_module("awnet." + file.replace("/", "."))
        assert callable(attrgetter(name)(module)) or name.isupper() or name.startswith("_"), name


PYTHON = sorted(
    path for folder in SOURCES for path in (ROOT / folder).rglob("*.py") if "configs" not in path.parts
)


def positional_parameters(node: ast.AST) -> int:
    """How many arguments a function, or the constructor of a dataclass, takes positionally; 0 for other nodes."""
    decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        # a Triton kernel takes pointers, sizes and strides
        triton = any("jit" in d for d in decorators)
        return 0 if triton else len(node.args.posonlyargs + node.args.args)
    if isinstance(node, ast.ClassDef) and any("dataclass" in d and "kw_only" not in d for d in decorators):
        fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
        return len([f for f in fields if "ClassVar" not in f and "kw_only" not in f])
    return 0


def test_no_function_takes_more_than_twelve_positional_arguments() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno}"  # type: ignore[attr-defined]
        for path in [*PYTHON, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if positional_parameters(node) > 12
    ]
    assert long == []


def cpp_parameters(text: str) -> list[int]:
    """The length of every parameter list in C++ ``text``, calls left out: each item is a type and a name."""
    text = re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"', "", text)
    while (shorter := re.sub(r"<[^<>;{}()]*>", "", text)) != text:  # template arguments
        text = shorter
    parameter = re.compile(
        r"(?:const |unsigned )*[\w:]+(?: const)?(?:[\s*&]+\w+(?:\[\w*\])?(?:\s*=.*)?|[*&]+)$", re.S
    )
    lists = [group.split(",") for group in re.findall(r"\(([^()]*)\)", text)]
    return [len(items) for items in lists if all(parameter.match(item.strip()) for item in items)]


def test_no_cpp_function_takes_more_than_ten_parameters() -> None:
    assert cpp_parameters("std::pair<int, int> f(const T* x, std::map<int, A>& y, bool z = true) {") == [3]
    lengths = {
        path.relative_to(ROOT).as_posix(): cpp_parameters(path.read_text(encoding="utf-8"))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in SOURCES["csrc"] and path.suffix != ".py"
    }
    assert {name: max(n) for name, n in lengths.items() if n and max(n) > 10} == {}
    assert max(lengths["csrc/library.cpp"]) == 10, "this test no longer finds convolve_back"


def test_no_python_file_is_longer_than_600_lines() -> None:
    files = [
        *PYTHON,
        *(path for folder in ("tests", "examples", "docs") for path in (ROOT / folder).rglob("*.py")),
    ]
    lengths = {
        str(path): path.read_text(encoding="utf-8").count("\n") for path in (*files, ROOT / "setup.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 600} == {}


def test_no_row_of_positional_nones_is_passed() -> None:
    documents = sorted((ROOT / "docs").glob("*.md"))
    sources = [*PYTHON, *(p for p in (ROOT / "csrc").rglob("*") if p.suffix in SOURCES["csrc"]), *documents]
    assert [str(p) for p in sources if re.search(r"None,\) ?\*", p.read_text(encoding="utf-8"))] == []

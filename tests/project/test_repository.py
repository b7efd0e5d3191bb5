"""The repository as a whole: what a wheel holds, what an import costs, what the documents claim."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import awnet

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
HEAVY = ("sklearn", "matplotlib", "tensorboard", "pooch", "triton", "PIL", "huggingface_hub", "timm")


def run_python(code: str, *options: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- packaging


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the repository gets no build folder; without isolation or network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("awnet", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-index", "--wheel-dir", str(folder), str(source)],
        capture_output=True,
        text=True,
        env=os.environ | {"AWNET_BUILD": "none"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def sources_of(folder: str, package: str) -> Iterator[str]:
    for path in (ROOT / folder).rglob("*.py"):
        yield f"{package}/{path.relative_to(ROOT / folder).as_posix()}"


def test_the_wheel_holds_every_module_where_it_is_imported_from(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"awnet/py.typed"}
    for folder, package in (
        ("awnet", "awnet"),
        ("kernels", "awnet/kernels"),
        ("benchmarks", "awnet/benchmarks"),
    ):
        expected |= set(sources_of(folder, package))
    assert expected <= names
    # `kernels`, `benchmarks` and `tests` at the top of site-packages would be other people's
    assert {name.split("/")[0] for name in names} == {"awnet", f"awnet-{awnet.__version__}.dist-info"}


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import json, sys
sys.path[:0] = {[str(tmp_path), *filter(None, sys.path)]!r}
import awnet, awnet.benchmarks, awnet.kernels
print(json.dumps([module.__file__ for module in (awnet, awnet.benchmarks, awnet.kernels)]))
"""
    files = json.loads(run_python(code, "-S", cwd=tmp_path))
    assert [Path(file).relative_to(tmp_path).as_posix() for file in files] == [
        "awnet/__init__.py",
        "awnet/benchmarks/__init__.py",
        "awnet/kernels/__init__.py",
    ]


def test_the_wheel_installs_where_triton_does_not_exist(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"awnet-{awnet.__version__}.dist-info/METADATA").decode()
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    (triton,) = [line for line in needed if line.startswith("triton")]
    assert "platform_machine" in triton
    assert "platform_system" in triton
    assert not [line for line in needed if line.startswith("torchvision")]
    assert re.search(r"^License-Expression: MIT$", metadata, re.MULTILINE)


def test_run_from_the_root_without_an_install_kernels_and_benchmarks_are_found() -> None:
    # -S leaves out the .pth files, and with them an editable install's finder
    code = f"""
import json, sys
sys.path[:0] = {[str(ROOT), *filter(None, sys.path)]!r}
import awnet, awnet.benchmarks, awnet.kernels
assert not [name for name in sys.modules if name.startswith("__editable__")]
print(json.dumps([module.__file__ for module in (awnet, awnet.benchmarks, awnet.kernels)]))
"""
    files = json.loads(run_python(code, "-S"))
    assert [Path(file).relative_to(ROOT).as_posix() for file in files] == [
        "awnet/__init__.py",
        "benchmarks/__init__.py",
        "kernels/__init__.py",
    ]


# --- import


def test_import_awnet_loads_nothing_heavy() -> None:
    code = f"import sys, awnet; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python(code) == "[]\n"


def test_the_public_names_load_nothing_heavy_but_what_torch_does() -> None:
    code = f"""
import sys, torch
import torch._dynamo
by_torch = set(sys.modules)
import awnet
for name in awnet.__all__:
    getattr(awnet, name)
print([name for name in {HEAVY!r} if name in sys.modules and name not in by_torch])
"""
    # huggingface_hub gives the models push_to_hub and from_pretrained
    assert run_python(code) in ("[]\n", "['huggingface_hub']\n")


def public_objects() -> Iterator[tuple[str, object]]:
    for name in awnet.__all__:
        value = getattr(awnet, name)
        yield f"awnet.{name}", value
        if isinstance(value, ModuleType):
            for inner in getattr(value, "__all__", ()):
                yield f"{value.__name__}.{inner}", getattr(value, inner)


def test_every_public_name_has_a_docstring() -> None:
    def lacks_one(value: object) -> bool:
        if not isinstance(value, ModuleType | type) and not inspect.isroutine(value):
            return False  # constants and type aliases cannot have one
        documented = inspect.getdoc(value) if inspect.isroutine(value) else value.__doc__
        return not documented or documented.startswith(
            f"{getattr(value, '__name__', '')}("
        )  # a dataclass's own

    assert [name for name, value in public_objects() if lacks_one(value)] == []


def test_dir_lists_the_public_names_and_an_unknown_one_is_an_attribute_error() -> None:
    assert set(awnet.__all__) <= set(dir(awnet))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        awnet.nonsense  # noqa: B018


# --- documents


def test_the_citation_and_the_changelog_know_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [awnet.__version__]
    assert re.search(r"^cff-version: 1\.2\.0$", citation, re.MULTILINE)
    assert re.search(r"^license: MIT$", citation, re.MULTILINE)
    assert "2306.03430" in citation
    assert awnet.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_resolve(document: Path) -> None:
    broken = []
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", without_code(document.read_text())):
        if re.match(r"[a-z]+:|\.\./\.\./actions/", target):  # the latter is GitHub's page of a repository
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        reference = anchor.startswith("awnet.")  # made by mkdocstrings; `make docs` checks these
        if not path.exists() or (anchor and not reference and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    named = re.findall(
        r"`((?:awnet|benchmarks|csrc|docs|examples|kernels|tests)/[\w/.-]+)`", document.read_text()
    )
    generated = {"benchmarks/results/figures"}  # by a command
    assert [name for name in named if not (ROOT / name).exists() and name not in generated] == []


def test_the_derivation_names_functions_that_exist() -> None:
    from awnet.ops import coefficients
    from awnet.ops.backends.base import Passes

    text = (ROOT / "docs" / "equations.md").read_text()
    named = set(re.findall(r"`coefficients\.(\w+)`", text))
    assert named >= {"eval_coefficients", "train_gradients", "batch_statistics", "Propagation"}
    assert [name for name in named if not hasattr(coefficients, name)] == []
    assert {"apply", "statistics", "reduce", "propagate"} <= set(dir(Passes))
    parameters = inspect.signature(awnet.functional.aw_conv2d).parameters
    for name in ("filter_scale", "p_clean", "is_clean", "bn_weight", "bn_bias", "running_mean", "residual"):
        assert f"`{name}`" in text
        assert name in parameters


def test_every_fault_on_the_page_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (?!fault \|)([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) == text.count("\n| ") - text.count("\n| fault |") >= 20  # all but the heads
    for fault, _, shown in rows:
        groups = re.findall(r"((?:\*?`test_\w+`\*?(?:, )?)+) in `(tests/[\w/]+\.py)`", shown)
        assert groups, fault
        assert shown.count("`test_") == sum(names.count("`test_") for names, _ in groups), fault
        for names, file in groups:
            source = (ROOT / file).read_text()
            for slow, name in re.findall(r"(\*?)`(test_\w+)`", names):
                match = re.search(rf"((?:^@.*\n(?:^[ )].*\n)*)*)^def {name}\(", source, re.MULTILINE)
                assert match, f"{file} has no {name}"
                assert bool(re.search(r"^@pytest\.mark\.slow", match[1], re.MULTILINE)) == bool(slow), name


def test_every_page_is_in_the_sites_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    entry = r'^ +- (?:(?:"[^"]+"|[^:"\n]+): )?(\S+\.md)$'
    navigation = re.findall(entry, text, re.MULTILINE)
    generated = re.findall(r"^  (\S+\.md)$", text, re.MULTILINE)
    assert generated == ["kernel-resources.md", "cuda-resources.md"]
    navigation += generated
    docs = ROOT / "docs"
    assert sorted(navigation) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def test_the_example_on_the_first_page_runs() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "index.md").read_text(), re.M | re.S)
    names: dict[str, object] = {}
    exec(compile(example, "docs/index.md", "exec"), names)
    assert names["x_adv"].shape == (64, 1, 8, 8)  # type: ignore[attr-defined]


def test_the_readme_is_short_and_claims_what_was_measured() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 200
    recorded = json.loads((ROOT / "docs" / "results" / "digits-seeds.json").read_text())["accuracies"]
    rows = {line.split("`")[1]: line for line in lines if re.match(r"\| `(awnet|resnet)_tiny", line)}
    assert rows.keys() == {"awnet_tiny", "resnet_tiny", "resnet_tiny_wide"}
    for name, row in rows.items():
        means = [100 * recorded[name][kind]["mean"] for kind in ("clean", "fgsm", "pgd_sat", "cw")]
        assert [float(cell) for cell in row.split("|")[2:6]] == [round(mean, 1) for mean in means], name
    (caught,) = re.findall(r"^(\d+) of \1 are caught", (ROOT / "docs" / "mutations.md").read_text(), re.M)
    assert f" {caught} [seeded faults]" in "\n".join(lines)


def test_the_ablations_tables_are_its_data() -> None:
    recorded = json.loads((ROOT / "docs" / "results" / "digits-ablation.json").read_text())["systems"]
    text = (ROOT / "docs" / "why-not-digits.md").read_text()
    rows = [
        line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| (AW|with|static)", line)
    ]
    attacks = ("fgsm", "pgd_sat", "cw")
    for row, (name, one) in zip(rows, recorded.items(), strict=False):
        means = [one["clean"][0], *(one[attack]["w_robust"][0] for attack in attacks)]
        assert row[1:] == [f"{one['parameters']:,}", *(f"{100 * mean:.1f}" for mean in means)], name
    others = [one["minus_awnet"] for one in recorded.values() if "minus_awnet" in one]
    others.append(recorded["AW-Net, half width"]["minus_static_twin_half_width"])
    assert len(rows) == len(recorded) + len(others)
    for row, differences in zip(rows[len(recorded) :], others, strict=True):
        for cell, kind in zip(row[1:], ("clean", *attacks), strict=True):
            shown = [float(n) for n in re.findall(r"[+-]?\d+\.\d", cell.replace("−", "-"))]
            assert shown == pytest.approx([100 * value for value in differences[kind][:3]], abs=0.0501)
            low, high = differences[kind][1:3]
            assert ("**" in cell) == (not low <= 0 <= high)


def test_each_job_runs_a_command_of_the_makefile() -> None:
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = {
        path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").glob("workflows/*.yml")
    }
    assert workflows.keys() == {"ci.yml", "docs.yml", "gpu.yml", "publish.yml"}
    for name, workflow in workflows.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        for job in workflow["jobs"].values():
            assert "timeout-minutes" in job
            for command in (step["run"] for step in job["steps"] if "run" in step):
                words = command.split()
                assert words[0] == "make", f"{name}: {command}"
                assert words[1] in targets, f"{name}: {command}"
    matrix = workflows["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert matrix == {
        "python": ["3.11", "3.12", "3.13"],
        "torch": [f"{oldest[1]}.0", "newest"],
        "build": ["cpu", "none"],
    }


def test_issue_forms_ask_for_what_a_diagnosis_needs() -> None:
    yaml = pytest.importorskip("yaml")
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {
        path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yml") if path.stem != "config"
    }
    for name, form in forms.items():
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        if name in ("bug", "performance"):
            text = json.dumps(form)
            assert "awnet info --json" in text
            assert "awnet.explain" in text


def test_the_command_lines_page_is_what_the_commands_say() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "command_line.py"))
    assert (ROOT / "docs" / "command-line.md").read_text() == names["page"](), "run docs/command_line.py"


def test_no_document_names_a_module_that_does_not_import() -> None:
    missing = []
    for document in DOCUMENTS:
        for name in set(re.findall(r"`(awnet(?:\.[a-z_]+)+)`", document.read_text())):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                if not hasattr(importlib.import_module(module), attribute):
                    missing.append(f"{document.name}: {name}")
    assert missing == []


def test_only_ops_benchmarks_and_the_command_line_know_the_kernels() -> None:
    # what import-linter cannot see: kernels/ and benchmarks/ join the package only when it is installed
    def imports(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        return names

    allowed = {"kernels": {"ops"}, "benchmarks": {"cli"}}
    for path in (ROOT / "awnet").rglob("*.py"):
        room = path.relative_to(ROOT / "awnet").parts[0]
        for folder, rooms in allowed.items():
            known = any(name.startswith(f"awnet.{folder}") for name in imports(path))
            assert not known or room in rooms, f"{path} imports awnet.{folder}"
    for path in (ROOT / "kernels").rglob("*.py"):
        above = {n for n in imports(path) if n.startswith("awnet") and not n.startswith("awnet.kernels")}
        assert not above, f"{path} imports {above}"

"""What users install: sdist, wheel and editable, each in a fresh environment, used outside the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

import awnet

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"AWNET_BUILD": "none"}


def run(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, in a folder called awnet, as a clone would be."""
    folder = tmp_path_factory.mktemp("parent") / "awnet"
    folder.mkdir()
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A fresh environment that sees this one's dependencies, but no awnet of its own; without network."""
    venv.create(tmp_path / "env", with_pip=False)
    bin = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    site = Path(
        run(
            bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
        ).strip()
    )
    base = [path for path in sys.path if path.endswith("-packages") and Path(path) != site]
    # a plain line is read as a path, and its own .pth files (an editable awnet among them) are not
    (site / "dependencies.pth").write_text("\n".join([*base, sysconfig.get_path("purelib")]) + "\n")
    return bin / "python"


QUICKSTART = """
import awnet, awnet.kernels, awnet.benchmarks
trained = awnet.load_model("zoo:awnet_tiny_digits")
splits = awnet.load_dataset("digits")
splits = splits._replace(train=splits.train.subset(64), validation=splits.validation.subset(16))
model = awnet.create_model("awnet_tiny", num_classes=10, in_channels=1)
recipe = awnet.training.recipe_for("pgd_at", "digits", epochs=1)
result = awnet.train(recipe, model, splits, out="run", quiet=True)
report = awnet.evaluate(result.model, splits.test, attacks=["fgsm"], limit=20, out="run")
print(awnet.__version__, awnet.__file__, report)
"""

TYPED = """
import awnet
reveal_type(awnet.convert)
reveal_type(awnet.create_model("awnet_tiny"))
"""


def install(python: Path, cwd: Path, *what: object) -> None:
    pip = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", "--no-index"]
    run(sys.executable, *pip, *what, cwd=cwd)


def use(python: Path, folder: Path) -> str:
    """The quickstart, the command and mypy in ``folder``; where awnet was found."""
    folder.mkdir()
    said = run(python, "-c", QUICKSTART, cwd=folder)
    assert said.startswith(awnet.__version__)
    assert (folder / "run" / "evaluations" / "default" / "report.html").is_file()
    assert run(python.parent / "awnet", "--version", cwd=folder) == f"awnet {awnet.__version__}\n"
    (folder / "typed.py").write_text(TYPED)
    seen = run(python, "-m", "mypy", "--cache-dir", os.devnull, "typed.py", cwd=folder)
    assert 'Revealed type is "def (module: torch.nn' in seen
    return said.split()[1]


def test_the_sdist_and_the_wheel_install_elsewhere(clone: Path, python: Path, tmp_path: Path) -> None:
    # what `make dist` makes by way of the build package
    (tmp_path / "dist").mkdir()
    for what in ("sdist", "wheel"):
        code = f"from setuptools import build_meta; build_meta.build_{what}({str(tmp_path / 'dist')!r})"
        run(sys.executable, "-c", code, cwd=clone)
    (sdist,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    assert wheel.name == f"awnet-{awnet.__version__}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        names = {re.sub(r"^[^/]+/", "", name) for name in archive.getnames()}
    for name in (
        "setup.py",
        "csrc/layer.cpp",
        "csrc/ops.h",
        "kernels/passes.py",
        "tests/project/test_packaging.py",
        "LICENSE",
    ):
        assert name in names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    for number, archive_file in enumerate((wheel, sdist)):
        install(python, tmp_path, "--force-reinstall", archive_file)
        assert "env" in Path(use(python, tmp_path / f"elsewhere{number}")).parts


def test_an_editable_install_works_from_the_clones_parent_and_shows_its_types(
    clone: Path, python: Path, tmp_path: Path
) -> None:
    install(python, tmp_path, "--editable", clone)
    assert Path(use(python, tmp_path / "elsewhere")) == clone / "awnet" / "__init__.py"
    # the parent holds a folder called awnet, the clone, which is no package
    said = run(python, "-c", "import awnet, awnet.kernels; print(awnet.__version__)", cwd=clone.parent)
    assert said.strip() == awnet.__version__


def test_old_setuptools_are_told_apart_from_a_broken_project(clone: Path, tmp_path: Path) -> None:
    code = "import setuptools, runpy; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert 'pip install "setuptools>=77"' in done.stderr

"""Maps the repository's folders to the package and builds csrc/ where torch is importable.

Everything else about the build is in pyproject.toml. ``AWNET_BUILD`` chooses what is compiled:

    none   nothing: pure Python, everything still works
    cpu    the C++ kernels; an error if they cannot be built
    auto   (default) what this machine can build; says what it left out and why, and never fails
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

# kernels/ and benchmarks/ stand at the top of the repository but install inside the package:
# distributions called `kernels` and `benchmarks` belong to others.
FOLDERS = {"awnet": "awnet", "awnet.kernels": "kernels", "awnet.benchmarks": "benchmarks"}
CHOICES = ("auto", "none", "cpu")


def packages() -> list[str]:
    found: list[str] = []
    for package, folder in FOLDERS.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return found


def say(text: str) -> None:
    print(f"awnet: {text}", file=sys.stderr)


def obstacle() -> str | None:
    """Why the native module cannot be built here, or None."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable at build time (install torch, then pip install --no-build-isolation)"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "there is no C++ compiler"
    return None


def native() -> dict[str, Any]:
    """The arguments of ``setup`` that build ``awnet._C``; none where it is not to be built."""
    choice = os.environ.get("AWNET_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"AWNET_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "none":
        return {}
    reason = obstacle()
    if reason is not None:
        if choice == "cpu":
            raise SystemExit(f"AWNET_BUILD=cpu, but {reason}")
        say(f"no native kernels: {reason}")
        return {}

    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if choice != "auto":
                    raise
                say(f"no native kernels, the build failed: {error}")
                self.extensions = []

    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    extension = CppExtension(
        "awnet._C",
        sources,
        extra_compile_args=["-O3", "-g0", "-Wno-psabi", f'-DAWNET_TORCH_VERSION="{torch.__version__}"'],
        depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inl"}),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={"awnet": ["py.typed", "ops/configs/*.json"]},
    **native(),
)

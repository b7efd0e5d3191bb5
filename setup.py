"""Maps the repository's folders to the package and builds csrc/ where torch is importable.

Everything else about the build is in pyproject.toml. ``AWNET_BUILD`` chooses what is compiled:

    none   nothing: pure Python, everything still works
    cpu    the C++ kernels; an error if they cannot be built
    cuda   the C++ and the CUDA kernels (csrc/cuda/build.py); an error if they cannot be built
    auto   (default) what this machine can build; says what it left out and why, and never fails

``AWNET_SANITIZE=1`` compiles the C++ kernels with GCC's sanitizers (`make sanitize`).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools import find_packages, setup

if int(setuptools.__version__.split(".")[0]) < 77:  # which fail on pyproject.toml with a page of schema
    raise SystemExit(
        f"awnet: building needs setuptools 77 or newer, this is {setuptools.__version__}: "
        'pip install "setuptools>=77", then install again'
    )

# kernels/ and benchmarks/ stand at the top of the repository but install inside the package:
# distributions called `kernels` and `benchmarks` belong to others.
FOLDERS = {"awnet": "awnet", "awnet.kernels": "kernels", "awnet.benchmarks": "benchmarks"}
SLOW_TO_COMPILE = ("autograd.cpp", "passes_avx512.cpp")
CHOICES = ("auto", "none", "cpu", "cuda")
# An editable install puts this folder on the path, as a src layout would. With FOLDERS, setuptools would
# write an import hook instead, which a folder called awnet in the working directory hides and which type
# checkers do not follow. awnet/__init__.py finds kernels/ and benchmarks/.
EDITABLE = "editable_wheel" in sys.argv


def packages() -> list[str]:
    if EDITABLE:
        return find_packages(include=["awnet", "awnet.*"])
    names: list[str] = []
    for package, folder in FOLDERS.items():
        names += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return names


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


def gnu() -> bool:
    """Whether the C++ compiler is GCC, whose OpenMP runtime is torch's too."""
    version = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True)
    return "Free Software Foundation" in version.stdout


def cuda_compiler() -> ModuleType:
    """csrc/cuda/build.py, which is no part of any package."""
    path = Path("csrc/cuda/build.py")
    spec = importlib.util.spec_from_file_location("awnet_cuda_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_cuda(extension: Any) -> None:
    """Compiles the CUDA kernels and adds them to the native module. Raises RuntimeError where it cannot."""
    build = cuda_compiler()
    nvcc = build.nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc (set CUDA_HOME, or put it on the PATH)")
    version, libraries = build.toolkit(nvcc)
    extension.extra_objects += [str(path) for path in build.objects(nvcc)]
    extension.sources.append("csrc/cuda/binding.cpp")
    extension.extra_compile_args.append(f'-DAWNET_CUDA="{version}"')
    # its own runtime, whose symbols must not be taken for those of the one that torch has loaded
    extension.extra_link_args += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    extension.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")


def native() -> dict[str, Any]:
    """The arguments of ``setup`` that build ``awnet._C``; none where it is not to be built."""
    choice = os.environ.get("AWNET_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"AWNET_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "none":
        return {}
    reason = obstacle()
    if reason is not None:
        if choice != "auto":
            raise SystemExit(f"AWNET_BUILD={choice}, but {reason}")
        say(f"no native kernels: {reason}")
        return {}

    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        extensions: list[Any]

        def run(self) -> None:
            if choice in ("auto", "cuda"):
                try:
                    add_cuda(self.extensions[0])
                except RuntimeError as error:
                    if choice == "cuda":
                        raise SystemExit(f"AWNET_BUILD=cuda, but {error}") from error
                    say(f"no CUDA kernels: {error}")
            try:
                super().run()
            except Exception as error:
                if choice != "auto":
                    raise
                say(f"no native kernels, the build failed: {error}")
                self.extensions = []

    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    paths = (path for path in Path("csrc").rglob("*.cpp") if path.parent.name != "cuda")
    # those that take half a minute first: started last, they would leave the other cores idle at the end
    sources = [str(path) for path in sorted(paths, key=lambda path: (path.name not in SLOW_TO_COMPILE, path))]
    flags = ["-O3", "-g0", "-Wno-psabi", f'-DAWNET_TORCH_VERSION="{torch.__version__}"']
    if gnu():
        # at::parallel_for is a plain loop without it. Torch has loaded the runtime that it calls, so nothing
        # is linked: a second runtime would bring a second set of threads.
        flags.append("-fopenmp")
    link: list[str] = []
    if os.environ.get("AWNET_SANITIZE") == "1":
        # vptr would need type information of torch's classes, which torch does not export
        link = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
        flags = [*flags, "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", *link]
        flags.append("-Wno-maybe-uninitialized")  # of the compiler's own headers
    suffixes = {".h", ".inl", ".cu", ".py"}
    extension = CppExtension(
        "awnet._C",
        sources,
        extra_compile_args=flags,
        extra_link_args=link,
        depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in suffixes),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(
    packages=packages(),
    package_dir={"": "."} if EDITABLE else FOLDERS,
    package_data={"awnet": ["py.typed", "ops/configs/*.json", "evaluation/paper.csv", "zoo/**/*"]},
    **native(),
)

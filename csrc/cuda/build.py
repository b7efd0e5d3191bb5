"""Compiles csrc/cuda/*.cu with nvcc, without torch: objects to link, and what each kernel uses on a device.

setup.py and the tests load this file by its path. Objects and reports are kept under ``build/cuda`` by
everything they depend on: architectures, flags, the compiler's version and the contents of all sources.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "cuda"
SOURCES = sorted(HERE.glob("*.cu"))
HEADERS = [*sorted(HERE.glob("*.h")), HERE.parent / "arithmetic.h"]

FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC"]
# machine code for A100 and its family and for H100/H200; what is newer compiles the PTX when it starts
ARCHITECTURES = ["sm_80", "sm_90a"]
PTX = "compute_90"


def nvcc() -> str | None:
    """The compiler: ``CUDA_HOME``'s, else the PATH's, else /usr/local/cuda's."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    for folder in [*folders, None, Path("/usr/local/cuda/bin")]:
        found = shutil.which("nvcc", path=None if folder is None else str(folder))
        if found is not None:
            return found
    return None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def toolkit(compiler: str) -> tuple[str, Path]:
    """The toolkit's version, "13.0" say, and the folder of libcudart_static.a. Raises RuntimeError."""
    version = re.search(r"release (\d+\.\d+)", _run([compiler, "--version"]))
    # nvcc may be a script that calls another one; its dry run names the folder that it works from
    top = re.search(r"^#\$ TOP=(.*)$", _run([compiler, "--dryrun", "-c", "-x", "cu", os.devnull]), re.M)
    if version is None or top is None:
        raise RuntimeError(f"{compiler} does not answer as nvcc does")
    root = Path(top[1].strip())
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
        if (root / folder / "libcudart_static.a").exists():
            return version[1], (root / folder).resolve()
    raise RuntimeError(f"libcudart_static.a is not in {root}")


def _key(compiler: str, command: list[str], source: Path) -> str:
    digest = hashlib.sha256()
    for part in (_run([compiler, "--version"]), *command):
        digest.update(part.encode() + b"\0")
    for path in (source, *HEADERS):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _compiled(compiler: str, source: Path, options: list[str], suffix: str) -> Path:
    """The output of one compilation, from the cache where it is there; the compiler's words lie beside it."""
    command = [*FLAGS, *options, "-Xptxas", "-v"]
    output = CACHE / _key(compiler, command, source) / (source.stem + suffix)
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        fresh = output.with_name(f"{os.getpid()}-{output.name}")
        said = _run([compiler, *command, str(source), "-o", str(fresh)])
        output.with_suffix(".txt").write_text(said)
        fresh.replace(output)
    return output


def objects(compiler: str) -> list[Path]:
    """All .cu files compiled for ``ARCHITECTURES`` and as PTX. Raises RuntimeError with nvcc's words."""
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch={PTX},code={PTX}")
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "1"))) as pool:
        return list(pool.map(lambda source: _compiled(compiler, source, ["-c", *targets], ".o"), SOURCES))


def cubin(compiler: str, source: Path, architecture: str) -> Path:
    """One file's machine code for one architecture."""
    return _compiled(compiler, source, ["-cubin", f"-arch={architecture}"], ".cubin")


def resources(compiler: str, architecture: str) -> dict[str, dict[str, int]]:
    """What ptxas says each kernel uses: registers; stack (spills included) and shared memory in bytes."""
    report = "".join(
        cubin(compiler, source, architecture).with_suffix(".txt").read_text() for source in SOURCES
    )
    kernels: dict[str, dict[str, int]] = {}
    for block in report.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", block)
        stack = re.search(r"(\d+) bytes stack frame", block)
        if registers is None or stack is None:
            raise RuntimeError(f"ptxas reports in a form that is not understood:\n{block}")
        shared = re.search(r"(\d+) bytes smem", block)
        kernels[block[: block.index("'")]] = {
            "registers": int(registers[1]),
            "stack": int(stack[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    names = dict(zip(kernels, _readable(list(kernels)), strict=True))
    return {names[name]: used for name, used in sorted(kernels.items(), key=lambda item: names[item[0]])}


def _readable(symbols: list[str]) -> list[str]:
    """``over_planes<8, true, Apply<__half> >`` for what the linker calls _ZN5awnet…"""
    if shutil.which("c++filt") is None:
        return symbols
    lines = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [re.sub(r"awnet::cuda::|\(anonymous namespace\)::", "", line) for line in lines]

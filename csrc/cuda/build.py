"""Compiles csrc/cuda/*.cu with nvcc, without torch: objects to link, and what each kernel uses on a device.

setup.py and the tests load this file by its path. Objects and reports are kept under ``build/cuda`` by
everything they depend on: architectures, flags, the compiler's version and the contents of all sources.

    python csrc/cuda/build.py            compiles and prints a table; fails where a kernel spills registers or
                                         takes more of them than csrc/cuda/resources.json allows this nvcc
    python csrc/cuda/build.py --update   writes that file and docs/cuda-resources.md
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESOURCES = HERE / "resources.json"
PAGE = ROOT / "docs" / "cuda-resources.md"
CACHE = ROOT / "build" / "cuda"
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
        path = shutil.which("nvcc", path=None if folder is None else str(folder))
        if path is not None:
            return path
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


def cache_key(compiler: str, command: list[str], source: Path) -> str:
    digest = hashlib.sha256()
    for part in (_run([compiler, "--version"]), *command):
        digest.update(part.encode() + b"\0")
    for path in (source, *HEADERS):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _compiled(compiler: str, source: Path, options: list[str], suffix: str) -> Path:
    """The output of one compilation, cached; the compiler's messages are stored beside it."""
    command = [*FLAGS, *options, "-Xptxas", "-v"]
    output = CACHE / cache_key(compiler, command, source) / (source.stem + suffix)
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        fresh = output.with_name(f"{os.getpid()}-{output.name}")
        messages = _run([compiler, *command, str(source), "-o", str(fresh)])
        output.with_suffix(".txt").write_text(messages)
        fresh.replace(output)
    return output


def objects(compiler: str) -> list[Path]:
    """All .cu files compiled for ``ARCHITECTURES`` and as PTX. Raises RuntimeError with its messages."""
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch={PTX},code={PTX}")
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "1"))) as pool:
        return list(pool.map(lambda source: _compiled(compiler, source, ["-c", *targets], ".o"), SOURCES))


def resources(compiler: str) -> dict[str, dict[str, dict[str, int]]]:
    """What ptxas says each kernel uses, by architecture: registers; bytes of stack (or spills) and shared."""
    report = "".join(output.with_suffix(".txt").read_text() for output in objects(compiler))
    kernels_of: dict[str, dict[str, dict[str, int]]] = {architecture: {} for architecture in ARCHITECTURES}
    for block in report.split("Compiling entry function ")[1:]:
        header = re.match(r"'(\w+)' for '(\w+)'", block)
        registers = re.search(r"Used (\d+) registers", block)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", block)
        if header is None or registers is None or stack is None:
            raise RuntimeError(f"ptxas reports in a form that is not understood:\n{block}")
        shared = re.search(r"(\d+) bytes smem", block)
        kernels_of[header[2]][header[1]] = {
            "registers": int(registers[1]),
            "stack": max(int(stack[1]), int(stack[2])),
            "shared": int(shared[1]) if shared else 0,
        }
    return {architecture: _by_name(kernels) for architecture, kernels in kernels_of.items()}


def _by_name(kernels: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    named = dict(zip(readable(list(kernels)), kernels.values(), strict=True))
    return dict(sorted(named.items()))


def readable(symbols: list[str]) -> list[str]:
    """``over_planes<8, true, Apply<__half> >`` for what the linker calls _ZN5awnet…"""
    if shutil.which("c++filt") is None:
        return symbols
    lines = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [re.sub(r"awnet::cuda::|\(anonymous namespace\)::", "", line) for line in lines]


Resources = dict[str, dict[str, dict[str, int]]]


def faults(measured: Resources, allowed: Resources) -> list[str]:
    """Kernels that spill, and kernels that take more registers than ``allowed`` says, or are not in it."""
    wrong = []
    for architecture, kernels in measured.items():
        for name, used in kernels.items():
            limit = allowed.get(architecture, {}).get(name, {}).get("registers")
            if used["stack"] > 0:
                wrong.append(f"{name} on {architecture} spills: {used['stack']} bytes of stack")
            if limit is None:
                wrong.append(f"{name} on {architecture} has no committed figure (--update writes it)")
            elif used["registers"] > limit:
                wrong.append(f"{name} on {architecture} takes {used['registers']} registers, allowed {limit}")
    return wrong


def _page(version: str, measured: Resources) -> str:
    lines = [
        "# What the CUDA kernels use",
        "",
        f"Generated by `python csrc/cuda/build.py --update` with nvcc {version}: every CUDA C++ kernel,",
        "compiled without a GPU. A spill, or a register more than here, fails the tests.",
        "",
        "| kernel | " + " | ".join(f"registers {a} | stack {a}" for a in measured) + " | shared bytes |",
        "|---|" + "---|" * (2 * len(measured) + 1),
    ]
    for name in next(iter(measured.values())):
        cells = [f"{kernels[name]['registers']} | {kernels[name]['stack']}" for kernels in measured.values()]
        shared = max(kernels[name]["shared"] for kernels in measured.values())
        lines.append(f"| `{name}` | {' | '.join(cells)} | {shared} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    compiler = nvcc()
    if compiler is None:
        print("there is no nvcc (set CUDA_HOME, or put it on the PATH)", file=sys.stderr)
        return 1
    version, _ = toolkit(compiler)
    measured = resources(compiler)
    page = _page(version, measured)
    print(page)
    committed = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    if "--update" in sys.argv[1:]:
        committed[version] = measured
        # one line per kernel
        text = re.sub(
            r"{\s+(\"registers.*),\s+(.*),\s+(.*)\s+}", r"{\1, \2, \3}", json.dumps(committed, indent=1)
        )
        RESOURCES.write_text(text + "\n")
        PAGE.write_text(page)
    wrong = faults(measured, committed.get(version, {}))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

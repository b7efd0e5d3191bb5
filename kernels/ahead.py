"""Compiles every kernel for sm_80 and sm_90 without a GPU: ``python -m awnet.kernels.ahead``.

Each kernel module has ``cases(table)``, which gives the calls to compile at the launch parameters that
awnet/ops/configs/ ships. A case fails if a kernel spills (stack > 0), if one with ``tl.dot`` lacks its
tensor-core instruction, or if one takes more registers than kernels/resources.json allows for this Triton.
``--update`` writes that file and docs/kernel-resources.md from what was compiled; with ``--only`` it replaces
these entries and keeps the others. An entry whose case no longer exists stays until all are updated.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launch import Case, Launched, Table, recorded

MODULES = (
    *("passes", "eval_backward", "eval_coefficients", "train_coefficients"),
    *("sign_step", "fused_conv"),
)
TARGETS = (80, 90)
RESOURCES = Path(__file__).parent / "resources.json"
PAGE = Path(__file__).parent.parent / "docs" / "kernel-resources.md"

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel of a case on one target."""

    name: str
    target: int  # 80: sm_80
    registers: int  # per thread
    stack: int  # bytes; more than 0 is a spill
    shared: int  # bytes per program
    instruction: str  # "wgmma", "mma" or "": the best tensor-core instruction that it holds
    problem: str | None = None


def shipped_launches() -> dict[str, dict[str, int]]:
    """All entries of awnet/ops/configs/*.json; for a key in several tables one entry each, "key@device"."""
    package = importlib.util.find_spec("awnet.ops")
    assert package is not None
    assert package.submodule_search_locations is not None
    launches: dict[str, dict[str, int]] = {}
    for path in sorted(Path(package.submodule_search_locations[0], "configs").glob("*.json")):
        device = "" if path.stem == "default" else f"@{path.stem}"
        content = json.loads(path.read_text())
        for key, entry in (content["launches"] | content.get("convolutions", {})).items():
            launches[key + device] = entry
    return launches


def cases(table: Table) -> Iterator[Case]:
    """The cases of every kernel module."""
    for name in MODULES:
        full = f"{__package__}.{name}"
        if importlib.util.find_spec(full) is not None:
            yield from importlib.import_module(full).cases(table)


def _specialized(launched: Launched) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes as Triton's own launcher would derive them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for parameter in launched.kernel.params:
        name, value = parameter.name, launched.arguments[parameter.name]
        key = (parameter.num,)
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[key] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[name], constants[name] = "constexpr", 1
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[key] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of the one kernel in ``cubin``."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(program), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {text!r}")
    return int(match[1]), int(match[2])


def compile_launch(name: str, launched: Launched, target: int, instruction: str) -> Resources:
    """Compiles one recorded launch and measures it; ``problem`` is set if a rule is broken."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialized(launched)
    source = ASTSource(launched.kernel, signature, constants, attributes)
    options = {"num_warps": launched.warps, "num_stages": launched.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    tensor_core = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    problem = None
    if stack > 0:
        problem = f"spills: {stack} bytes of stack"
    elif instruction and "tl.dot(" in launched.kernel.src:
        expected = "mma" if target < 90 else instruction
        if tensor_core not in (expected, "wgmma"):
            problem = f"has no {expected} instruction"
    return Resources(name, target, registers, stack, compiled.metadata.shared, tensor_core, problem)


def launches_of(case: Case) -> list[tuple[str, Launched]]:
    """The kernels that ``case`` launches, under distinct names."""
    with recorded() as launches:
        case.run()
    if not launches:
        raise RuntimeError(f"the case {case.name!r} launches no kernel")
    named: dict[str, Launched] = {}
    for launched in launches:
        name = f"{case.name}: {launched.kernel.__name__}"
        while name in named:
            name += "'"
        named[name] = launched
    return list(named.items())


def check(
    chosen: Sequence[Case], targets: Sequence[int] = TARGETS, allowed: dict[str, int] | None = None
) -> Iterator[Resources]:
    """Compiles ``chosen``, each distinct kernel once. ``allowed``: registers by "name sm_NN"."""
    seen: set[str] = set()
    for case in chosen:
        for name, launched in launches_of(case):
            for target in targets:
                key = repr(
                    (launched.kernel, *_specialized(launched), launched.warps, launched.stages, target)
                )
                if key in seen:
                    continue
                seen.add(key)
                result = compile_launch(name, launched, target, case.instruction)
                limit = (allowed or {}).get(f"{name} sm_{target}")
                if result.problem is None and limit is not None and result.registers > limit:
                    excess = f"takes {result.registers} registers, the committed figure is {limit}"
                    result = replace(result, problem=excess)
                yield result


def _row(r: Resources) -> str:
    return (
        f"| {r.name} | sm_{r.target} | {r.registers} | {r.stack} | {r.shared} | {r.instruction or '–'} "
        f"| {r.problem or 'ok'} |"
    )


_HEAD = "| kernel | target | registers | stack | shared | tensor cores | |\n|---|---|---:|---:|---:|---|---|"


def _write(version: str, results: Sequence[Resources], keep: bool) -> None:
    """Writes resources.json and the page; with ``keep`` the entries that are not among ``results`` stay."""
    stored = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    before = stored.get(version, {}) if keep else {}
    stored[version] = before | {f"{r.name} sm_{r.target}": r.registers for r in results}
    RESOURCES.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    rows: dict[tuple[str, ...], str] = {}
    if keep and PAGE.exists():
        if f"with Triton {version}:" not in PAGE.read_text():
            return  # the page is another version's
        table = PAGE.read_text().partition(_HEAD)[2].strip().splitlines()
        rows = {tuple(row.split(" | ")[:2]): row for row in table}
    rows |= {tuple(row.split(" | ")[:2]): row for row in map(_row, results)}
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Generated by `python -m awnet.kernels.ahead --update` with Triton {version}: every Triton kernel",
        "at its shipped launch parameters, compiled without a GPU. Registers are a thread's, stack and",
        "shared memory are bytes; a stack above 0 would be a spill. kernels/resources.json holds the",
        "registers that later versions must not exceed, for each tested version of Triton.",
        "",
        _HEAD,
        *rows.values(),
    ]
    PAGE.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m awnet.kernels.ahead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the part that `make test` compiles")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument("--target", type=int, nargs="+", default=list(TARGETS), help="80, 90")
    parser.add_argument("--update", action="store_true", help="write resources.json and its page")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter and the compiler cannot share a process")
    if options.update and (options.quick or options.target != list(TARGETS)):
        parser.error("--update needs all cases, or those of --only, on all targets")

    import triton

    all_cases = list(cases(shipped_launches()))
    chosen = [c for c in all_cases if options.only in c.name and (c.quick or not options.quick)]
    if not chosen:
        parser.error(f"no case name contains {options.only!r}")
    stored = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    allowed = None if options.update else stored.get(triton.__version__)
    if allowed is None and not options.update:
        print(f"no registers are committed for Triton {triton.__version__}: they are not compared")
    print(_HEAD)
    results = []
    for result in check(chosen, options.target, allowed):
        print(_row(result), flush=True)
        results.append(result)
    broken = [r for r in results if r.problem]
    print(f"{len(results)} kernels, {len(broken)} with a problem, Triton {triton.__version__}")
    if options.update:
        _write(triton.__version__, results, keep=bool(options.only))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

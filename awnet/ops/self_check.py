"""The self-check: whether a backend's kernels compile, run and compute correctly on a device.

It runs once per backend and kind of device, at the first call that could use the backend. One tiny kernel is
compiled, launched and read back; then every pass and every coefficient function is compared with ``eager`` in
float64 on the same device: both layouts, three dtypes, shapes that are vectorized, ragged and split, with
masks, residuals, NaN and in place. Each case runs twice with equal bits, between guard bands. A backend that
fails is not used, and the reason is given.

The result is stored in the user's cache folder, under a hash of everything that it depends on. If no kernel
can be compiled or launched, nothing is stored, and the next process checks again. Calls that torch.compile
traces or a CUDA graph captures never run a check: they use the stored result.

``AWNET_SELF_CHECK=0`` skips the check, ``AWNET_SELF_CHECK=always`` ignores stored results.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from awnet.files import cache_folder, read_json, write_json
from awnet.ops import self_check_cases
from awnet.ops.backends.base import Passes, constant_in_graphs

VARIABLE = "AWNET_SELF_CHECK"
FAILED = "its self-check failed"


@dataclass(frozen=True)
class Kernels:
    """The kernels of a backend, for its self-check."""

    backend: str
    passes: Passes
    probe: Callable[[torch.device], str | None]  # runs one tiny kernel: raises, or returns what was wrong
    sources: Callable[[], Iterable[Path]]  # the files that the kernels are compiled from
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # that not every backend has


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check."""

    reason: str | None  # why the backend must not be used; None if the check passed
    cases: int = 0
    seconds: float = 0.0
    day: str = ""

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{FAILED}: {self.reason}"
        return f"self-check passed on {self.day} ({self.cases} cases, {self.seconds:.1f} s)"


_results: dict[tuple[str, torch.device], CheckResult] = {}
_reasons: dict[tuple[str, torch.device], str | None] = {}  # looked up at every call
_warned: set[str] = set()
_lock = threading.Lock()
_renewed = False


def mode() -> str:
    """The value of ``AWNET_SELF_CHECK``: "", "0" or "always"."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "always"):
        raise ValueError(f"{VARIABLE} must be 0 or always, got {value!r}")
    return value


def obstacle(kernels: Kernels, device: torch.device) -> str | None:
    """Why ``kernels`` must not be used on ``device``; None if the check passed or cannot run now."""
    key = (kernels.backend, device)
    if key not in _reasons:
        with _lock:
            return _decide(kernels, device)
    return _reasons[key]


def _decide(kernels: Kernels, device: torch.device) -> str | None:
    key = (kernels.backend, device)
    if key in _reasons:  # another thread was first
        return _reasons[key]
    if mode() == "0":
        _reasons[key] = None
        return None
    path = _path(kernels, device)
    result = None if mode() == "always" or _renewed else _read(path)
    if result is None and _postponed(device):
        _warn(
            f"backend {kernels.backend!r} runs unchecked on {device}: it cannot be checked while a call is "
            "traced or captured; `awnet info --self-check` checks it and stores the result"
        )
        return None
    if result is None:
        result, stored = check(kernels, device)
        if stored:
            _write(path, result)
    _results[key] = result
    _reasons[key] = None if result.reason is None else str(result)
    return _reasons[key]


@constant_in_graphs
def report(backend: str, reason: str) -> None:
    """Warns, once, that ``backend`` is not used because its self-check failed."""
    _warn(f"backend {backend!r} is not used: {reason}")


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def status(backend: str) -> str | None:
    """The results for ``backend`` in this process, as text; None if it was not checked."""
    texts = [f"{result} on {device}" for (name, device), result in _results.items() if name == backend]
    return "; ".join(texts) or None


def forget(*, renewed: bool = False) -> None:
    """Forgets this process's results and warnings; with ``renewed`` stored results are ignored too."""
    global _renewed
    with _lock:
        _renewed = renewed
        _results.clear()
        _reasons.clear()
        _warned.clear()


def _postponed(device: torch.device) -> bool:
    if torch._guards.TracingContext.try_get() is not None or torch.compiler.is_compiling():
        return True
    if _get_current_dispatch_mode() is not None:
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# --- the check


def check(kernels: Kernels, device: torch.device) -> tuple[CheckResult, bool]:
    """Runs the check. Returns the result, and whether to store it for later processes."""
    # a separate thread: the caller's autocast, inference mode and stream do not apply to it
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_check, kernels, device).result()


def _check(kernels: Kernels, device: torch.device) -> tuple[CheckResult, bool]:
    start, checker, stored = time.monotonic(), _Checker(kernels, device), False
    reason: str | None
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            reason = kernels.probe(device)
        except Exception as error:
            reason = _environment(error)
        if reason is None:
            try:
                self_check_cases.run(checker, kernels.functions.keys())
                stored = True
            except _WrongError as error:
                reason, stored = str(error), True
            except Exception as error:  # a full device, a launch that this device refuses
                reason = f"{checker.label}: {_text(error)}"
    seconds = time.monotonic() - start
    return CheckResult(reason, checker.cases, round(seconds, 2), date.today().isoformat()), stored


def _text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")


def _environment(error: Exception) -> str:
    text = f"no kernel can be compiled and launched here ({_text(error)})"
    if isinstance(error, subprocess.CalledProcessError | FileNotFoundError) or "compiler" in str(error):
        text += "; it needs a C compiler and the headers of Python (Debian, Ubuntu: gcc, python3-dev)"
    return text


class _WrongError(Exception):
    """A kernel computed something else than ``eager``."""


_GUARD = 512  # bytes, so that tensors stay as aligned as torch allocates them
_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class _GuardedMemory(TorchDispatchMode):
    """A mode in which new tensors are filled with NaN and stored between two guard bands of NaN."""

    def __init__(self) -> None:
        super().__init__()
        self._bands: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return self.between_bands(out) if func.overloadpacket.__name__ in _ALLOCATIONS else out

    def between_bands(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        if size == 0:
            return like
        whole = torch.full((size + 2 * _GUARD,), 255, dtype=torch.uint8, device=like.device)
        self._bands.append((whole, size))
        inside = whole[_GUARD : _GUARD + size].view(like.dtype)
        return inside.as_strided(like.shape, like.stride())

    def copied_to(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda x: self.between_bands(torch.empty_like(x, device=device)).copy_(x)

    def intact(self) -> bool:
        """Whether all bands are as they were; forgets them."""
        bands = [part for whole, size in self._bands for part in (whole[:_GUARD], whole[_GUARD + size :])]
        self._bands.clear()
        return not bands or bool((torch.cat(bands) == 255).all())


class _Checker:
    """Calls a function of the kernels twice and ``eager``'s in float64 once, and compares."""

    def __init__(self, kernels: Kernels, device: torch.device) -> None:
        self.kernels, self.device = kernels, device
        self.cases, self.label = 0, ""

    def __call__(
        self, label: str, name: str, *arguments: Any, limit: float | None = None, writes: Iterable[int] = ()
    ) -> Any:
        """Raises _WrongError if the results differ.

        Args:
            label: names the case in messages.
            name: of the function.
            arguments: on the CPU.
            limit: the largest error of float32 results, as a share of the largest value.
            writes: positions of the arguments that the function overwrites.

        Returns:
            The results in float64, on the CPU.
        """
        self.label = f"{name}, {label}"
        function = self.kernels.functions.get(name) or getattr(self.kernels.passes, name)
        expected = self_check_cases.expected(name, *(self._mapped(x, _widened) for x in arguments))
        inputs = [_tensors(x) for i, x in enumerate(arguments) if i not in set(writes)]
        results = []
        for _ in range(2):
            memory = _GuardedMemory()
            guarded = [self._mapped(x, memory.copied_to(self.device)) for x in arguments]
            with memory:
                results.append(_flat(function(*guarded)))
            if not memory.intact():
                raise _WrongError(f"{self.label}: it wrote outside its tensors")
            after = [_tensors(x) for i, x in enumerate(guarded) if i not in set(writes)]
            for before, now in zip(inputs, after, strict=True):
                if not all(_same_bits(a.to(self.device), b) for a, b in zip(before, now, strict=True)):
                    raise _WrongError(f"{self.label}: it changed its inputs")
        for got, again, want in zip(*results, _flat(expected), strict=True):
            if want is not None and want.numel() > 0:
                if not _same_bits(got, again):
                    raise _WrongError(f"{self.label}: two calls gave different bits")
                self._compare(got, want.to(self.device), limit)
        self.cases += 1
        return self._mapped(expected, lambda x: x.cpu())

    def _compare(self, got: Tensor, want: Tensor, limit: float | None) -> None:
        if got.shape != want.shape:
            raise _WrongError(f"{self.label}: a result has shape {list(got.shape)}, not {list(want.shape)}")
        # one rounding of the result and one of a sum before it; the rest is exact in float32
        tolerance = 2 * torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
        tolerance = max(tolerance, limit or 1e-5) if got.dtype == torch.float32 else tolerance
        got, want = got.double(), want.double()
        if not torch.equal(got.isnan(), want.isnan()):
            raise _WrongError(f"{self.label}: NaN at other positions than in eager")
        got, want = got.nan_to_num(0), want.nan_to_num(0)
        # a mean may be far smaller than the values it averages, which are about 1
        error, size = float((got - want).abs().max()), max(1.0, float(want.abs().max()))
        if not error <= tolerance * size:
            raise _WrongError(f"{self.label}: wrong by {error:.2g}, with values up to {size:.2g}")

    def _mapped(self, x: Any, function: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(x, tuple):
            parts = [self._mapped(part, function) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return function(x) if isinstance(x, Tensor) else x


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x.clone()


def _flat(results: Any) -> list[Any]:
    if isinstance(results, tuple):
        return [leaf for part in results for leaf in _flat(part)]
    return [results]


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in _flat(x) if isinstance(leaf, Tensor)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    as_bytes = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*as_bytes)


# --- stored results


def _path(kernels: Kernels, device: torch.device) -> Path | None:
    """The file of the stored result; None if the user has no home folder."""
    try:
        folder = cache_folder("self-check")
    except RuntimeError:
        return None
    return folder / f"{kernels.backend}-{_fingerprint(kernels, device)}.json"


def _fingerprint(kernels: Kernels, device: torch.device) -> str:
    digest = hashlib.sha256()
    here = Path(__file__).parent
    checks = (here / "self_check.py", here / "self_check_cases.py", here / "backends" / "base.py")
    for path in sorted((*checks, *kernels.sources())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(json.dumps([*_versions(), *_device_names(device)]).encode())
    return digest.hexdigest()[:24]


def _versions() -> Iterator[str]:
    from importlib import metadata

    yield torch.__version__
    yield str(torch.version.cuda)
    try:
        yield metadata.version("triton")
    except metadata.PackageNotFoundError:
        yield ""


def _device_names(device: torch.device) -> Iterator[str]:
    yield device.type
    if device.type == "cuda":
        yield torch.cuda.get_device_name(device)
        yield str(torch.cuda.get_device_capability(device))
        driver = Path("/proc/driver/nvidia/version")
        yield driver.read_text() if driver.exists() else ""


def _read(path: Path | None) -> CheckResult | None:
    if path is None:
        return None
    try:
        return CheckResult(**read_json(path))
    except (OSError, ValueError, TypeError):  # none yet, or a damaged file
        return None


def _write(path: Path | None, result: CheckResult) -> None:
    if path is None:
        return
    try:
        # the write is atomic, so several ranks may check at the same time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(result))
    except OSError:  # a folder that cannot be written to: the next process checks again
        pass

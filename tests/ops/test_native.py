"""The compiled module: that it fits, what it registers, how it is built, and what nvcc makes of its kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from awnet import ops
from awnet.ops.backends import native

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = (
    "statistics", "apply", "reduce", "propagate", "eval_coefficients", "eval_gradients",
    "batch_statistics", "train_coefficients", "train_sums", "train_gradients", "layer_native",
    "layer_native_backward",
)  # fmt: skip
ON_CPU = ("convolves", "convolve_apply", "convolve_back")

built = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("awnet_cuda_build", ROOT / "csrc" / "cuda" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvcc(build: ModuleType) -> str:
    compiler = build.nvcc()
    if compiler is None:
        pytest.skip("there is no nvcc")
    return compiler


# --- the module


@built
def test_build_info_reports_how_the_module_was_built() -> None:
    info = native.build_info()
    assert info["torch"] == torch.__version__
    assert info["instruction_set"] in ("avx512", "avx2", "baseline")
    # without it at::parallel_for is a plain loop, and every pass leaves all cores but one idle
    assert info["parallel"] or "clang" in info["compiler"].lower()
    assert info["cuda"] is False or re.fullmatch(r"\d+\.\d+", info["cuda"])


@built
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_its_kernels(name: str) -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert registered(f"awnet::{name}", "CPU")
    # loading needs no driver; without one the CUDA kernels are there all the same
    assert registered(f"awnet::{name}", "CUDA") == (native.build_info()["cuda"] is not False)


@built
@pytest.mark.parametrize("name", ON_CPU)
def test_the_direct_convolution_is_available_on_the_cpu(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"awnet::{name}", "CPU")


# --- the direct convolution, which takes float32 images of few channels on processors with AVX512

direct = pytest.mark.skipif(
    native.load() is not None or native.build_info()["instruction_set"] != "avx512",
    reason="the direct convolution needs the native module and AVX512",
)
# channels in and out, image, filter, stride, padding, dilation, batch
GEOMETRIES = [
    (3, 16, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (16, 20, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1), 3),  # more than two blocks of outputs, the last not full
    (5, 7, (10, 13), (3, 3), (2, 2), (1, 1), (1, 1), 1),  # one sample, shared by threads; odd and even sizes
    (4, 6, (7, 8), (1, 1), (2, 2), (0, 0), (1, 1), 2),  # phases of the gradient that no tap reaches
    (4, 6, (9, 8), (5, 5), (3, 3), (2, 2), (1, 1), 2),
    (4, 9, (12, 9), (3, 3), (1, 1), (2, 2), (2, 2), 2),
    (3, 3, (11, 12), (3, 3), (2, 2), (2, 2), (2, 2), 2),
    (4, 4, (6, 6), (1, 3), (1, 2), (0, 1), (1, 1), 2),
    (3, 4, (4, 5), (3, 3), (4, 4), (0, 0), (1, 1), 2),  # pixels that no output reads
    (3, 4, (1, 1), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (64, 64, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (5, 10, (7, 32), (3, 3), (1, 1), (1, 1), (1, 1), 3),  # rows of two vectors
    (4, 11, (32, 16), (3, 3), (2, 2), (1, 1), (1, 1), 2),  # to rows of half a vector, 8 vectors of them
    (3, 8, (5, 32), (3, 3), (2, 2), (1, 1), (1, 1), 2),
    (3, 8, (6, 33), (1, 1), (2, 2), (0, 0), (1, 1), 2),  # 17 of a row, of which every second is taken
    (6, 5, (9, 16), (3, 3), (1, 1), (2, 2), (2, 2), 2),
    (4, 9, (3, 8), (3, 3), (1, 1), (1, 1), (1, 1), 2),  # half vectors in an odd number of rows
    (4, 9, (10, 10), (3, 3), (1, 1), (0, 0), (1, 1), 2),  # whole halves out, not in
    (4, 9, (34, 18), (3, 3), (2, 2), (0, 0), (1, 1), 2),  # the last row and column unread
    (128, 12, (6, 7), (3, 3), (2, 2), (1, 1), (1, 1), 2),
    # outputs in bands of four rows, eight channels and more: Winograd's way
    (8, 16, (12, 32), (3, 3), (1, 1), (1, 1), (1, 1), 3),
    (9, 8, (8, 16), (3, 3), (1, 1), (1, 1), (1, 1), 7),  # groups of three and two samples
    (16, 24, (16, 8), (3, 3), (1, 1), (1, 1), (1, 1), 5),  # two bands in a vector
    (16, 8, (4, 48), (3, 3), (1, 1), (1, 1), (1, 1), 1),  # one sample, shared by threads
    (8, 8, (10, 18), (3, 3), (1, 1), (0, 0), (1, 1), 2),
    (8, 8, (6, 14), (3, 3), (1, 1), (2, 2), (1, 1), 2),
    (8, 8, (8, 16), (3, 3), (1, 1), (3, 3), (1, 1), 2),
    (8, 8, (64, 64), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (128, 128, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    (8, 8, (12, 8), (3, 3), (1, 1), (1, 1), (1, 1), 2),  # three bands are no pairs
]


@direct
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_direct_convolution_and_its_gradients_equal_the_librarys(geometry, threads: int) -> None:
    channels, outputs, size, kernel, stride, padding, dilation, batch = geometry
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, weight = random(batch, channels, *size), random(outputs, channels, *kernel)
    scale, shift = random(batch, outputs), random(batch, outputs)
    place = (stride, padding, dilation)
    wide = [v.double().requires_grad_() for v in (x, scale, shift)]
    u = torch.nn.functional.conv2d(wide[0], weight.double(), None, *place)
    residual, grad = random(*u.shape), random(*u.shape)
    wide.append(residual.double().requires_grad_())
    y = (u * wide[1][..., None, None] + wide[2][..., None, None] + wide[3]).relu()
    gradients = torch.autograd.grad(y, wide, grad.double())

    ops, before = torch.ops.awnet, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert ops.convolves(x, weight, 1, *place)
        epilogue = (scale, shift, residual, True)
        got_y, got_u, mask = ops.convolve_apply(x, weight, *epilogue, *place, True, True)
        center = got_u[:, :, 0, 0].contiguous()
        tables = (got_u, center, mask, scale)
        d_x, d_residual, g1, gc = ops.convolve_back(grad, *tables, weight, x.shape, *place, True)
        alone = ops.convolve_back(grad, None, None, mask, scale, weight, x.shape, *place, False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(mask, got_y > 0)
    assert torch.equal(alone[0], d_x)  # other requested results change no bit
    actual = (got_y, got_u, d_x, gc + center * g1, g1, d_residual)
    names = ("y", "u", "input", "scale", "shift", "residual")
    for name, one, other in zip(names, actual, (y, u, *gradients), strict=True):
        # sums of at most 1152 products in float32: below 1e-6 of their norm, below 2e-6 by Winograd's way
        error = (one - other.detach()).norm() / other.detach().norm().clamp(min=1e-6)
        assert error <= 1e-5, (name, float(error))


@direct
def test_the_direct_convolution_leaves_other_calls_to_the_library() -> None:
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 3, 3)
    takes = torch.ops.awnet.convolves
    assert takes(x, weight, 1)
    assert not takes(x, weight[:, :4], 2)
    assert not takes(x.bfloat16(), weight.bfloat16(), 1)
    assert not takes(x.contiguous(memory_format=torch.channels_last), weight, 1)
    assert not takes(x, torch.zeros(1000, 8, 3, 3), 1)
    assert not takes(torch.zeros(1, 8, 256, 256), weight, 1)


@direct
def test_the_direct_convolution_refuses_what_it_cannot_read() -> None:
    def apply(x: torch.Tensor) -> None:
        tables = torch.ones(1, 8), torch.zeros(1, 8)
        torch.ops.awnet.convolve_apply(
            x, torch.zeros(8, 8, 3, 3), *tables, None, False, (1, 1), (0, 0), (1, 1), False, False
        )

    with pytest.raises(RuntimeError, match="does not take these images, weights and sizes"):
        apply(torch.zeros(1, 7, 4, 4))  # 8 channels are expected
    with pytest.raises(RuntimeError, match="does not take these images, weights and sizes"):
        apply(torch.zeros(1, 8, 2, 4))  # the filter is larger than the image


# sizes that make a packed image much larger than the image, and their output, which is small all the same
SPREAD: list[dict[str, object]] = [
    {"padding": 2**29, "dilation": 2**29},
    {"padding": 2**40, "dilation": 2**40},
    {"padding": 10**5, "dilation": 10**5},
    {"padding": (0, 10**6), "dilation": (1, 10**6)},
    {"padding": 300},
    {"stride": 2**31},
    {"stride": (1, 2**62), "padding": (1, 2**61)},
    {"stride": 300, "padding": 1},
]


@built
@pytest.mark.parametrize("sizes", SPREAD, ids=str)
def test_sizes_beyond_the_packed_image_are_the_librarys(sizes: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator) for s in ((1, 2, 4, 5), (3, 2, 3, 3)))
    window = [value if isinstance(value := sizes.get(name, default), tuple) else (value, value)
              for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]  # fmt: skip
    assert not torch.ops.awnet.convolves(x, weight, 1, *window)
    expected_of = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.nn.functional.conv2d(*expected_of, **sizes)
    inputs = [
        x.clone().requires_grad_(),
        weight.clone().requires_grad_(),
        torch.ones(1, 3, requires_grad=True),
    ]
    got = ops.filter_scaled_conv2d(*inputs, **sizes, backend="cpp")
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(got.shape, generator=generator)
    gradients = torch.autograd.grad(got, inputs, upstream)
    for one, other in zip(gradients, torch.autograd.grad(expected, expected_of, upstream), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@direct
@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": torch.ones(1, 7)},
        {"scale": torch.ones(1, 8, dtype=torch.float64)},
        {"residual": torch.zeros(1, 8, 3, 4)},
        {"residual": torch.zeros(1, 8, 4, 4, dtype=torch.float64)},
        {"stride": (0, 1)},
        {"padding": (-1, 1)},
        {"dilation": (1, 1, 1)},
    ],
    ids=str,
)
def test_the_direct_convolution_checks_every_size_before_it_reads(wrong: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "input": torch.zeros(1, 8, 4, 4), "weight": torch.zeros(8, 8, 3, 3), "scale": torch.ones(1, 8),
        "shift": torch.zeros(1, 8), "residual": None, "activation": 0, "stride": (1, 1), "padding": (1, 1),
        "dilation": (1, 1), "keep_u": False, "keep_mask": False,
    }  # fmt: skip
    torch.ops.awnet.convolve_apply(**arguments)
    with pytest.raises(RuntimeError, match=r"must be float32|does not take|expected 2 sizes"):
        torch.ops.awnet.convolve_apply(**arguments | wrong)


@direct
@pytest.mark.parametrize("wrong", ["grad", "u", "center", "relu_mask", "scale", "input_shape", "slope"])
def test_the_direct_convolutions_gradient_checks_every_size_before_it_reads(wrong: str) -> None:
    image, table = torch.ones(2, 8, 4, 4), torch.ones(2, 8)
    arguments: dict[str, object] = {
        "grad": image, "u": image, "center": table, "relu_mask": image > 0, "scale": table,
        "weight": torch.zeros(8, 8, 3, 3), "input_shape": (2, 8, 4, 4), "stride": (1, 1), "padding": (1, 1),
        "dilation": (1, 1), "residual": True, "slope": image,
    }  # fmt: skip
    torch.ops.awnet.convolve_back(**arguments)
    given = arguments[wrong]
    arguments[wrong] = (2, 8, 4, 5) if isinstance(given, tuple) else given[:1]  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"must be float32|does not take"):
        torch.ops.awnet.convolve_back(**arguments)


# --- sums over pixels

# csrc/cpu/passes.inl: at most 64 additions in a row, and what the blocks' totals and the results add
BOUND = (64 + 8) * 2.0**-24


@built
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, (4096, 4096)), (torch.bfloat16, (513, 1030)), (torch.float16, (700, 700))],
    ids=str,
)
def test_sums_over_a_plane_have_an_error_that_does_not_grow_with_it(dtype, size, last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    channels = 1 if size[0] == 4096 else 17  # a whole vector of columns, and one column that is left
    u = torch.rand(1, channels, *size, generator=generator).mul_(2).add_(2)  # all of a sign: the worst case
    u, grad = u.to(dtype), torch.rand(1, channels, *size, generator=generator).to(dtype)
    layout = torch.channels_last if last else torch.contiguous_format
    if last and channels == 1:  # which would be NCHW too
        u, grad = (x[..., ::2, ::2].expand(1, 2, -1, -1) for x in (u, grad))
    u, grad = u.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    mean, m2 = torch.ops.awnet.statistics(u)
    # a center below all values, which makes the products all of a sign
    g1, gc = torch.ops.awnet.reduce(grad, u, torch.ones_like(mean), None)
    wide, grad_wide = u.double().flatten(2), grad.double().flatten(2)
    expected = {
        "mean": (mean, wide.mean(2)),
        "m2": (m2, (wide - mean.double()[..., None]).square().sum(2)),
        "g1": (g1, grad_wide.sum(2)),
        "gc": (gc, (grad_wide * (wide - 1)).sum(2)),
    }
    for name, (got, exact) in expected.items():
        error = float(((got - exact) / exact).abs().max())
        assert error <= BOUND, (name, error)


@direct
def test_sums_of_a_packed_plane_have_an_error_that_does_not_grow_with_it() -> None:
    grad, u = (torch.rand(1, 1, 512, 512, generator=torch.Generator().manual_seed(s)) + 1 for s in (0, 1))
    one, weight = torch.ones(1, 1), torch.ones(1, 1, 3, 3)
    place = ((1, 1), (1, 1), (1, 1))
    assert torch.ops.awnet.convolves(grad, weight, 1, *place)
    actual = torch.ops.awnet.convolve_back(grad, u, 0 * one, None, one, weight, u.shape, *place, False)
    expected = grad.double().sum(), (grad.double() * u.double()).sum()
    for got, exact in zip(actual[2:], expected, strict=True):
        assert float(abs(got.double().sum() - exact) / exact) <= BOUND


@built
def test_an_infinite_value_stays_infinite_in_a_long_sum() -> None:
    grad = torch.ones(1, 17, 20, 20).contiguous(memory_format=torch.channels_last)
    grad[0, 0, 0, 0] = float("inf")
    g1, _ = torch.ops.awnet.reduce(grad, torch.zeros_like(grad), torch.zeros(1, 17), None)
    assert g1[0, 0] == float("inf")
    assert torch.equal(g1[0, 1:], torch.full((16,), 400.0))


@built
def test_the_self_test_runs_a_kernel_or_reports_the_reason() -> None:
    module = importlib.import_module("awnet._C")
    answer = module.self_test()
    if native.build_info()["cuda"] is False:
        assert "no CUDA part" in answer
    elif torch.cuda.is_available():
        assert answer is None
    else:
        assert "CUDA" in answer


@built
def test_the_cuda_part_links_its_own_runtime() -> None:
    if native.build_info()["cuda"] is False or shutil.which("readelf") is None:
        pytest.skip("no CUDA part, or no readelf")
    path = importlib.import_module("awnet._C").__file__
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    assert "libcuda.so" not in needed
    assert "libtorch_cuda" not in needed
    # and keeps it to itself: torch may have loaded another one
    exported = subprocess.run(["readelf", "-W", "--dyn-syms", path], capture_output=True, text=True).stdout
    assert not re.search(r"\bcuda(Malloc|LaunchKernel)", exported)


def fake_module(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> str:
    """A package with a file that Python would load as an extension module."""
    import importlib.machinery

    package = folder / f"fakes_{folder.name}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return f"{package.name}._C"


def test_a_module_for_another_torch_is_refused_unloaded(tmp_path, monkeypatch) -> None:
    # loading this file would fail in another way: that the message is ours shows that nobody tried
    name = fake_module(tmp_path, monkeypatch, b"\x7fELF...awnet-built-for-torch=1.0.0+cu1;...")
    reason = native.load(name)
    assert reason is not None
    assert f"built for torch 1.0.0+cu1 and this is torch {torch.__version__}" in reason
    assert "pip install" in reason
    assert name not in sys.modules


@pytest.mark.parametrize("rest", ["...", "interface=1;...", "interface=20;..."])
def test_a_module_of_another_versions_operators_is_refused_unloaded(tmp_path, monkeypatch, rest: str) -> None:
    mark = f"\x7fELF...awnet-built-for-torch={torch.__version__};{rest}".encode()
    name = fake_module(tmp_path, monkeypatch, mark)
    reason = native.load(name)
    assert reason is not None
    assert "was built from another version's sources; build it again" in reason
    assert name not in sys.modules


def test_a_foreign_file_is_refused(tmp_path, monkeypatch) -> None:
    reason = native.load(fake_module(tmp_path, monkeypatch, b"\x7fELF of somebody else"))
    assert reason is not None
    assert "was not built by awnet" in reason


def test_a_broken_file_with_the_right_mark_gives_a_reason(tmp_path, monkeypatch) -> None:
    mark = f"\x7fELF...awnet-built-for-torch={torch.__version__};{native.INTERFACE};".encode()
    reason = native.load(fake_module(tmp_path, monkeypatch, mark))
    assert reason is not None
    assert "does not load" in reason


def test_another_build_is_loaded_from_its_file_or_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AWNET_NATIVE", str(tmp_path / "missing.so"))
    assert native.load() == f"AWNET_NATIVE is not a file: {tmp_path / 'missing.so'}"
    (tmp_path / "foreign.so").write_bytes(b"not built here")
    monkeypatch.setenv("AWNET_NATIVE", str(tmp_path / "foreign.so"))
    assert "foreign.so was not built by awnet" in str(native.load())


def test_a_missing_module_is_named() -> None:
    reason = native.load("awnet._no_such_module")
    assert reason is not None
    assert "is not built" in reason
    assert "pip install" in reason


# --- setup.py


def setup(choice: str | None, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "AWNET_BUILD"}
    if choice is not None:
        variables["AWNET_BUILD"] = choice
    return subprocess.run(
        [sys.executable, "setup.py", *(command or ("--name",))],
        cwd=ROOT, env=variables | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which ``import torch`` fails as it does where there is none."""
    (folder / "torch.py").write_text("raise ImportError('No module named torch')")
    return {"PYTHONPATH": str(folder)}


def test_awnet_build_must_be_a_choice() -> None:
    done = setup("gpu")
    assert done.returncode != 0
    assert "AWNET_BUILD must be one of auto, none, cpu, cuda, got 'gpu'" in done.stderr


def test_awnet_build_none_builds_nothing(tmp_path) -> None:
    command = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = setup("none", *command)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_auto_without_torch_or_a_compiler_skips_the_build_and_reports_it(tmp_path) -> None:
    done = setup("auto", **without_torch(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no native kernels: torch is not importable" in done.stderr
    done = setup(None, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no native kernels: there is no C++ compiler" in done.stderr


def test_an_explicit_choice_that_cannot_be_built_is_an_error(tmp_path) -> None:
    done = setup("cpu", **without_torch(tmp_path))
    assert done.returncode != 0
    assert "AWNET_BUILD=cpu, but torch is not importable" in done.stderr
    done = setup("cuda", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "AWNET_BUILD=cuda, but there is no C++ compiler" in done.stderr


def test_cuda_without_nvcc_is_an_error_before_anything_is_compiled(tmp_path) -> None:
    # an nvcc that is no nvcc stands for a broken toolkit; it comes first wherever a real one is
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvcc"
    fake.write_text("#!/bin/sh\necho nonsense\n")
    fake.chmod(0o755)
    command = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = setup("cuda", *command, CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "AWNET_BUILD=cuda, but " in done.stderr
    assert "does not answer as nvcc does" in done.stderr
    assert not list(tmp_path.rglob("*.o"))


def test_nvcc_is_searched_in_cuda_home_first(build: ModuleType, tmp_path, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvcc"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.nvcc() == str(fake)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert build.nvcc() == str(fake)


def test_the_object_cache_knows_flags_and_headers(
    build: ModuleType, nvcc: str, tmp_path, monkeypatch
) -> None:
    source, header = tmp_path / "a.cu", tmp_path / "a.h"
    source.write_text("__global__ void f() {}")
    header.write_text("")
    monkeypatch.setattr(build, "HEADERS", [header])
    keys = [build.cache_key(nvcc, ["-arch=sm_80"], source), build.cache_key(nvcc, ["-arch=sm_90a"], source)]
    header.write_text("// changed")
    keys.append(build.cache_key(nvcc, ["-arch=sm_80"], source))
    source.write_text("__global__ void g() {}")
    keys.append(build.cache_key(nvcc, ["-arch=sm_80"], source))
    assert len(set(keys)) == 4
    assert build.cache_key(nvcc, ["-arch=sm_80"], source) == keys[3]


# --- what nvcc makes of the kernels


def test_no_kernel_spills_or_takes_more_registers_than_committed(build: ModuleType, nvcc: str) -> None:
    version, _ = build.toolkit(nvcc)
    committed = json.loads(build.RESOURCES.read_text())
    used_resources = build.resources(nvcc)
    assert set(used_resources) == {"sm_80", "sm_90a"}
    assert all(len(kernels) > 70 for kernels in used_resources.values())
    if version not in committed:
        # registers differ from compiler to compiler; spills are wrong with each
        assert not [
            name for kernels in used_resources.values() for name, used in kernels.items() if used["stack"]
        ]
        pytest.skip(f"no figures of nvcc {version} are committed, only of {', '.join(committed)}")
    assert build.faults(used_resources, committed[version]) == []
    page = build.PAGE.read_text()
    assert all(f"| `{name}` |" in page for name in used_resources["sm_90a"])


def test_kernels_that_spill_or_exceed_their_registers_are_reported(build: ModuleType) -> None:
    allowed = {"sm_80": {"f": {"registers": 32, "stack": 0, "shared": 0}}}

    def fault(name: str, registers: int, stack: int) -> str:
        used = {name: {"registers": registers, "stack": stack, "shared": 0}}
        return " ".join(build.faults({"sm_80": used}, allowed))

    assert fault("f", 32, 0) == ""
    assert "takes 33 registers, allowed 32" in fault("f", 33, 0)
    assert "spills: 8 bytes" in fault("f", 30, 8)
    assert "no committed figure" in fault("g", 30, 0)


def test_the_passes_move_sixteen_bytes_at_once(build: ModuleType, nvcc: str) -> None:
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for path in build.objects(nvcc):
        if path.stem not in ("apply", "statistics", "reduce", "propagate"):
            continue
        dump = subprocess.run(
            [str(program), "--dump-sass", "-arch", "sm_90a", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        sections = re.split(r"Function : (\S+)", dump)[1:]
        names, bodies = build.readable(sections[::2]), sections[1::2]
        wide = re.compile(r"<(\w+, )?[48][,>]")  # instantiated for vectors of 4 or 8 values
        assert sum(bool(wide.search(name)) for name in names) >= 6, names
        for name, body in zip(names, bodies, strict=True):
            assert not re.search(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
            if wide.search(name):
                assert "LDG.E.128" in body, name
                if path.stem in ("apply", "propagate"):
                    assert "STG.E.128" in body, name

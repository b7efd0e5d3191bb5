"""Launches that skip Triton's own path from a call to the compiled kernel, against that path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.launch_path import Launches
from torch import Tensor

triton = pytest.importorskip("triton")

from awnet.kernels import passes  # noqa: E402
from awnet.kernels.launch import launch  # noqa: E402

CONSTANTS: dict[str, Any] = {"CHANNELS_LAST": False, "RELU": True, "BLOCK_M": 4, "BLOCK_P": 16}


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that Triton's own path launched."""
    names: list[str] = []
    run = triton.runtime.JITFunction.run

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", counted)
    return names


def images(dtype: torch.dtype = torch.float32, offset: int = 0, batch: int = 2) -> list[Tensor]:
    """y and u; with an ``offset`` u is not aligned to 16 bytes."""
    u = torch.zeros(batch * 4 * 16 + offset, dtype=dtype)[offset:].view(batch, 4, 4, 4)
    return [torch.zeros(batch, 4, 4, 4, dtype=dtype), u]


def call(y: Tensor, u: Tensor, residual: bool = False, hw: int = 16, splits: int = 1) -> tuple[Any, ...]:
    """The run-time arguments of apply_kernel."""
    table = torch.zeros(u.shape[:2])
    return y, None, u, table, table, u if residual else None, None, None, u.shape[0] * 4, 4, hw, splits


CALLS = {
    "float32": lambda: call(*images()),
    "bfloat16": lambda: call(*images(torch.bfloat16)),
    "unaligned": lambda: call(*images(offset=1)),
    "residual": lambda: call(*images(), residual=True),
    "another size": lambda: call(*images(batch=3)),
    "a size divisible by 16": lambda: call(*images(batch=4)),
    "an odd size": lambda: call(*images(), hw=13),
    "a size of 1": lambda: call(*images(), hw=1),
    "two splits": lambda: call(*images(), splits=2),
}


def test_each_call_launches_the_variant_that_triton_chooses(
    triton_launches: Launches, by_triton: list[str]
) -> None:
    """In any order, with other tensors of the same kind in the second round, which Triton's path never sees."""
    for round in range(2):
        by_triton.clear()
        for name, arguments in CALLS.items():
            for changes in ({}, {"RELU": False}, {"warps": 8}) if name == "float32" else ({},):
                options: dict[str, Any] = {"warps": 4} | CONSTANTS | changes
                launch(passes.apply_kernel, 3, *arguments(), **options)
                launched = triton_launches.functions[-1]
                count = len(by_triton)
                settings = {"num_warps": options.pop("warps"), "num_stages": 3}  # in launch's order
                expected = passes.apply_kernel[(3,)](*arguments(), **settings, **options)
                assert launched is expected.function
                del by_triton[count:]
        if round == 0:
            assert len(set(triton_launches.functions)) >= 9
    assert by_triton == []


def test_a_hook_sees_every_launch(triton_launches: Launches, by_triton: list[str]) -> None:
    arguments = CALLS["float32"]()
    hooks = (
        (triton.knobs.runtime.launch_enter_hook.add, triton.knobs.runtime.launch_enter_hook.remove),
        (triton.knobs.runtime.launch_exit_hook.add, triton.knobs.runtime.launch_exit_hook.remove),
        (passes.apply_kernel.add_pre_run_hook, passes.apply_kernel.pre_run_hooks.remove),
    )
    launch(passes.apply_kernel, 3, *arguments, **CONSTANTS)
    for add, remove in hooks:

        def hook(*arguments: Any, **options: Any) -> None:
            pass

        by_triton.clear()
        add(hook)
        try:
            for _ in range(2):
                launch(passes.apply_kernel, 3, *arguments, **CONSTANTS)
            assert len(by_triton) == 2
        finally:
            remove(hook)
        launch(passes.apply_kernel, 3, *arguments, **CONSTANTS)
        assert len(by_triton) == 2


def test_a_changed_knob_of_triton_takes_effect(
    triton_launches: Launches, by_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = CALLS["float32"]()
    launch(passes.apply_kernel, 3, *arguments, **CONSTANTS)
    by_triton.clear()
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.debug = True
        launch(passes.apply_kernel, 3, *arguments, **CONSTANTS)
    assert len(by_triton) == 1


def test_an_integer_and_a_float_of_one_value_are_kept_apart(
    triton_launches: Launches, by_triton: list[str]
) -> None:
    from awnet.kernels.eval_coefficients import eval_coefficients_kernel as kernel

    names = kernel.arg_names
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    tensor = torch.zeros(2, 4)
    for eps in (1, 1.0, 1, 1.0):
        values = {name: tensor if name.endswith("_ptr") else 2 for name in names}
        values |= {"eps": eps, "layout_ptr": None}
        options = dict.fromkeys(constants, 2)
        run_time = [values[name] for name in names if name not in constants]
        launch(kernel, 1, *run_time, **options)
        expected = kernel[(1,)](*run_time, num_warps=4, num_stages=3, **options)
        assert triton_launches.functions[-2] is expected.function

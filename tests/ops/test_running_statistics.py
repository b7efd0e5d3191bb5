"""Running statistics and counters that are updated once per forward pass, against one update per layer."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from awnet.models import create_model
from awnet.nn import AWConv2d, Backbone, MixBatchNorm2d
from awnet.ops import use_backend
from awnet.ops.backends import native
from awnet.ops.running_statistics import joint_updates

IS_CLEAN = torch.tensor([True, False, True])


def layers(dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """Batch norms of all kinds, with random statistics."""
    generator = torch.Generator().manual_seed(0)
    kinds: list[dict[str, Any]] = [
        {"branches": "mix"},
        {"branches": "mix", "momentum": 0.3},
        {"branches": "mix", "momentum": None},
        {"branches": "dual"},
        {"branches": "one"},
        {"branches": "one", "momentum": None},
        {"branches": "mix"},
        {"branches": "one"},
    ]
    norms = nn.ModuleList(MixBatchNorm2d(3 + i, dtype=dtype, **kind) for i, kind in enumerate(kinds))
    for norm in norms:
        for buffer in (norm.running_mean, norm.running_var):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.1)
    return norms.train()


def run(norms: nn.ModuleList, is_clean: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for norm in norms:
        size = (len(is_clean), norm.num_features, 2 + seed % 3, 3)
        x = torch.randn(size, generator=generator).to(norm.weight.dtype)
        norm(x, is_clean=None if norm.branches == "one" else is_clean)


BUILT = pytest.mark.skipif(native.load() is not None, reason="the C++ backend is not built")


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=BUILT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_joint_updates_give_the_same_bits_as_separate_ones(backend: str, dtype: torch.dtype) -> None:
    if (backend, dtype) == ("cpp", torch.float64):
        pytest.skip("no float64 in the cpp backend")
    separate = layers(dtype)
    joint = copy.deepcopy(separate)
    with use_backend(backend):
        for seed, is_clean in enumerate((IS_CLEAN, ~IS_CLEAN, IS_CLEAN | True, IS_CLEAN & False)):
            run(separate, is_clean, seed)
            run(separate, ~is_clean, seed + 7)
            with joint_updates():
                before = copy.deepcopy(joint[0].state_dict())
                run(joint, is_clean, seed)
                assert all(torch.equal(v, before[k]) for k, v in joint[0].state_dict().items())
                run(joint, ~is_clean, seed + 7)  # the second call of a layer starts from the first's result
    for name, value in separate.state_dict().items():
        assert torch.equal(joint.state_dict()[name], value), name
    assert separate[0].num_batches_tracked.tolist() == [6, 6]


def test_a_block_that_raises_changes_no_statistics() -> None:
    norms = layers()
    before = copy.deepcopy(norms.state_dict())

    def interrupted() -> None:
        with joint_updates():
            run(norms[3:5], IS_CLEAN, 0)  # type: ignore[arg-type]
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert all(torch.equal(v, before[k]) for k, v in norms.state_dict().items())
    run(norms, IS_CLEAN, 0)  # and the next call is not affected
    assert not torch.equal(norms[0].running_mean, before["0.running_mean"])


def test_a_network_in_train_mode_has_the_statistics_of_its_layers_called_one_by_one() -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", num_classes=4, in_channels=2).train()
    other = copy.deepcopy(model)
    x = torch.rand(3, 2, 6, 6)
    model(x, is_clean=IS_CLEAN)
    routing = other.router(x)  # neither the router nor features() makes a block
    other.dynamic.features(x, routing.filter_scales, None, IS_CLEAN)
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert other.dynamic.stem.bn.num_batches_tracked.tolist() == [1, 1]


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def updates(model: nn.Module, x: torch.Tensor, is_clean: torch.Tensor | None) -> int:
    """The number of operations of a training forward that compute and write, convolutions etc. aside."""
    names = ("mul", "add", "add_", "sub", "div", "where", "copy_", "cat", "any", "gt", "clamp", "stack")
    with Operations() as operations:
        if is_clean is None:
            model(x)
        else:
            model(x, is_clean=is_clean)
    return sum(operations.counts[name] for name in (*names, "_foreach_copy_", "_foreach_add_"))


@pytest.mark.parametrize("bn", ["mix", "dual", "one"])
def test_the_number_of_update_operations_does_not_depend_on_the_number_of_layers(bn: Any) -> None:
    x = torch.rand(3, 2, 4, 4)
    counts = [
        updates(
            Backbone("basic", [blocks], [4], in_channels=2, dynamic=False, bn=bn).train(),
            x,
            None if bn == "one" else IS_CLEAN,
        )
        for blocks in (1, 4)
    ]
    assert counts[0] == counts[1] <= 30


def test_compiled_code_updates_the_statistics_as_uncompiled_code_does() -> None:
    model = AWConv2d(2, 3, 1, dynamic=False).train()
    other = copy.deepcopy(model)
    x = torch.rand(3, 2, 4, 4)
    with joint_updates():
        torch.compile(model, backend="eager", fullgraph=True)(x, is_clean=IS_CLEAN)
    other(x, is_clean=IS_CLEAN)
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert other.bn.num_batches_tracked.tolist() == [1, 1]

"""CUDA graphs of functions that are called again and again on tensors of one shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from awnet.graphs import Recorded, capture
from awnet.nn import frozen_copy, not_supported


class Graphed:
    """``function(*tensors)`` → one tensor, as one graph for each shape of its arguments.

    The first call of a shape runs plainly, which warms up libraries and compiles kernels; the second is
    captured. Where capture is impossible the function stays plain, with a warning that says why.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._graphs: dict[Hashable, Recorded | None] = {}
        self._plain = False

    def __call__(self, *tensors: Tensor, key: Hashable = None) -> Tensor:
        """``key``: of what else a graph depends on, beside the shapes."""
        whole = (key, *((tuple(t.shape), t.stride(), t.dtype) for t in tensors))
        if self._plain or whole not in self._graphs:
            self._graphs[whole] = None
            return self.function(*tensors)
        found = self._graphs[whole]
        if found is None:
            try:
                found = self._graphs[whole] = Recorded(self.function, tensors, capture)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph, so slower: {error}", stacklevel=2)
                self._plain = True
                return self.function(*tensors)
        return found(*tensors)


class Inference(nn.Module):
    """A model in test mode, without autograd, in a given precision; on CUDA as a graph.

    Its frozen copy runs where one can replace it, with the weights that it now has; else the model itself,
    for the ``reason`` given.

    Args:
        model: images [B, C, H, W] to logits [B, K]; it is changed: in eval mode, without gradients, laid out
            as requested, and where it has no frozen copy, in bfloat16 with the weights of torch's plain
            convolutions and linear layers in that dtype (its batch norms stay as they are).
        autocast: makes the context of a call.
        low: whether that is bfloat16.
        memory_format: of images and weights.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: Callable[[], Any],
        low: bool,
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__()
        self.autocast, self.memory_format = autocast, memory_format
        model.eval().requires_grad_(False).to(memory_format=memory_format)  # type: ignore[call-overload]
        self.reason = not_supported(model)
        self.frozen = frozen_copy(model, torch.bfloat16 if low else None)
        if self.frozen is not None:
            model = self.frozen
        elif low:
            for module in model.modules():
                if type(module) in (nn.Conv2d, nn.Linear) and not module._forward_pre_hooks:
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(torch.bfloat16)
        self.model = model
        self._graphed = Graphed(self._logits)

    def _logits(self, x: Tensor) -> Tensor:
        if self.frozen is not None:
            self.frozen.forget()  # what it keeps from call to call a graph must make anew, in its own memory
        with torch.no_grad(), self.autocast():
            logits: Tensor = self.model(x.contiguous(memory_format=self.memory_format))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, K], float32 at least."""
        if x.is_cuda and not torch.cuda.is_current_stream_capturing():
            return self._graphed(x)
        return self._logits(x)

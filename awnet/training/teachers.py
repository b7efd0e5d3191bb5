"""Teachers: the models that a student is distilled from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from awnet.cuda_graphs import Graphed
from awnet.nn import inference_copy, not_supported


class TeacherModel(nn.Module):
    """A teacher in eval mode, without autograd, in a given precision; on CUDA as a CUDA graph.

    The teacher's inference copy runs if there is one, with the weights that the teacher has now. Otherwise
    the teacher itself runs, for the ``reason`` given.

    Args:
        model: images [B, C, H, W] to logits [B, K]. It is changed: it is put in eval mode, without gradients
            and in ``memory_format``, and if it has no inference copy and ``low`` is set, the weights of its
            plain convolutions and linear layers become bfloat16 (its batch norms stay as they are).
        autocast: makes the context of a call.
        low: whether that context is bfloat16.
        memory_format: memory format of images and weights.
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
        self.copy = inference_copy(model, torch.bfloat16 if low else None)
        if self.copy is not None:
            model = self.copy
        elif low:
            for module in model.modules():
                if type(module) in (nn.Conv2d, nn.Linear) and not module._forward_pre_hooks:
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(torch.bfloat16)
        self.model = model
        self.graphed = Graphed(self._logits)

    def _logits(self, x: Tensor) -> Tensor:
        if self.copy is not None:
            self.copy.clear_cache()  # a graph must compute cached tensors again, in its own memory
        with torch.no_grad(), self.autocast():
            logits: Tensor = self.model(x.contiguous(memory_format=self.memory_format))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, K], float32 or wider."""
        if x.is_cuda and not torch.cuda.is_current_stream_capturing():
            return self.graphed(x)
        return self._logits(x)

"""Exports a model with ``torch.export``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from awnet.files import written_atomically
from awnet.ops import use_backend


def export_program(
    model: nn.Module, x: Tensor, path: Path, *, standalone: bool = False, name: str = "the model"
) -> None:
    """Writes ``model`` in eval mode to ``path`` as a program for any batch size, atomically.

    Args:
        model: images ``[B, C, H, W]`` → logits ``[B, K]``; it is switched to eval mode.
        x: an example of at least two images, on the model's device.
        path: the ``.pt2`` file; :func:`torch.export.load` reads it.
        standalone: use only torch's own operators (the ``reference`` backend): slower, but the program runs
            without awnet. Otherwise ``import awnet.ops`` is needed before the program is loaded.
        name: of the model, for error messages.

    Raises:
        ValueError: torch.export cannot export the model for any batch size.
    """
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with use_backend("reference") if standalone else nullcontext():
        try:
            program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
        except Exception as error:  # torch.export raises errors of many types
            reason = " ".join(str(error).partition("\n\n")[0].split())[:300]
            raise ValueError(
                f"torch.export cannot export {name} for any batch size ({reason}): in the model's forward, "
                "use x.shape[0] instead of len(x), and no Python number that is computed from x"
            ) from error
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)

"""Exports a model with ``torch.export``, as a program of torch or as an ONNX file."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awnet.files import written_atomically
from awnet.ops import use_backend
from awnet.ops.backends.eager import decompositions

MOST_IMAGES = 2**16  # in a batch


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
    program = _exported(model, x, "reference" if standalone else None, name)
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)


def export_onnx(model: nn.Module, x: Tensor, path: Path, *, name: str = "the model") -> None:
    """Writes ``model`` in eval mode to ``path`` as an ONNX file for any batch size, atomically.

    The input is ``images`` ``[batch, C, H, W]`` in [0, 1], the output ``logits`` ``[batch, K]``; only
    standard operators of ONNX are used.

    Args:
        model, x, name: as for :func:`export_program`.
        path: the ``.onnx`` file.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model cannot be exported for any batch size, or has an operator that ONNX lacks.
    """
    missing = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"ONNX needs {' and '.join(missing)}: pip install 'awnet[onnx]'")
    program = _exported(model, x, "eager", name)
    try:
        with _quiet():
            program = program.run_decompositions(decompositions())
            exported: Any = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
            )
    except Exception as error:  # torch.onnx raises errors of many types
        raise ValueError(f"ONNX cannot hold {name}: {_reason(error)}") from error
    with written_atomically(path) as temporary:
        exported.save(temporary)


def _exported(model: nn.Module, x: Tensor, backend: str | None, name: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    with nullcontext() if backend is None else use_backend(backend):
        try:
            return torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
        except Exception as error:  # torch.export raises errors of many types
            raise ValueError(
                f"torch.export cannot export {name} for any batch size ({_reason(error)}): in the model's "
                "forward, use x.shape[0] instead of len(x), and no Python number that is computed from x"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's warnings on its own versions and on operators it replaces."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    return " ".join(str(error).partition("\n\n")[0].split())[:300]

"""Teachers: the models that a student is distilled from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awnet.cuda_graphs import Graphed
from awnet.files import expanded
from awnet.models.files import weights_fingerprint
from awnet.models.registry import name_of
from awnet.models.sources import load_model, source_kind
from awnet.nn import inference_copy, not_supported
from awnet.nn.copies import copied
from awnet.precision import at_least_float32
from awnet.run_config import read_config
from awnet.training import checkpoint
from awnet.training.forward import Teachers
from awnet.training.recipes import Recipe

TeacherSource = nn.Module | str | Path


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
        self, model: nn.Module, autocast: Callable[[], Any], low: bool, memory_format: torch.memory_format
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

    def close(self) -> None:
        """Drops the CUDA graphs."""
        self.graphed.close()

    def _logits(self, x: Tensor) -> Tensor:
        if self.copy is not None:
            self.copy.clear_cache()  # a graph must compute cached tensors again, in its own memory
        with torch.no_grad(), self.autocast():
            logits: Tensor = self.model(x.contiguous(memory_format=self.memory_format))
        return at_least_float32(logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, K], float32 or wider."""
        if x.is_cuda and not torch.cuda.is_current_stream_capturing():
            return self.graphed(x)
        return self._logits(x)


def load_teachers(teachers: Sequence[TeacherSource], recipe: Recipe, device: torch.device) -> Teachers:
    """Loads ``teachers``; ValueError unless there is one for each of ``recipe.teachers``."""
    if isinstance(teachers, str | Path) or len(teachers) != len(recipe.teachers):
        raise ValueError(
            f"teachers of {recipe.name} must be {len(recipe.teachers)}, ({', '.join(recipe.teachers)}): "
            "modules, run folders, .safetensors files or other sources of load_model"
        )
    return Teachers(*(load_teacher(teacher, device) for teacher in teachers))


def load_teacher(teacher: TeacherSource, device: torch.device) -> nn.Module:
    """A copy of a module, or the model of a source, in eval mode and without gradients."""
    if isinstance(teacher, nn.Module):
        model = copied(teacher)
    elif isinstance(teacher, str | Path):
        model = load_model(teacher)
    else:
        raise TypeError(f"a teacher must be a module or a source, got {type(teacher).__name__}")
    return model.to(device).eval().requires_grad_(False)


def default_teacher(student: nn.Module) -> str:
    """The name of the model that is trained as a teacher of ``student`` if none is given."""
    return "resnet_tiny" if "tiny" in name_of(student) else "resnet18"


def describe_teachers(
    recipe: Recipe, model: nn.Module, given: Teachers | None
) -> dict[str, dict[str, Any]] | None:
    """The teachers for config.json: fingerprints of given weights, or how this run trains them.

    Fingerprints stay the same wherever the files are stored.
    """
    if given is not None:
        return {kind: {"weights": weights_fingerprint(getattr(given, kind))} for kind in recipe.teachers}
    if not recipe.teachers:
        return None
    return {
        kind: {"model": default_teacher(model), "recipe": recipe.teacher_recipe(kind).to_dict()}
        for kind in recipe.teachers
    }


def describe_sources(sources: Mapping[str, TeacherSource], given: Teachers, folder: Path) -> dict[str, Any]:
    """For each kind of teacher its absolute path, its path relative to ``folder``, and its SHA-256.

    Both paths are None for a module, and for a source that is no path; the latter has an entry ``source``.
    """
    described: dict[str, Any] = {}
    for kind, source in sources.items():
        described[kind] = {
            "path": None,
            "from_run": None,
            "weights": weights_fingerprint(getattr(given, kind)),
        }
        if isinstance(source, nn.Module):
            continue
        if source_kind(source) == "file":
            path = expanded(source).resolve()
            described[kind] |= {"path": str(path), "from_run": _relative(folder.resolve(), path)}
        else:
            described[kind]["source"] = str(source)
    return described


def _relative(folder: Path, path: Path) -> str | None:
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # on another drive of Windows
        return None


def record_trained_teachers(folder: Path, recipe: Recipe, teachers: Teachers) -> None:
    """Adds the teachers that the run in ``folder`` trained to its current session in config.json."""
    sources: dict[str, TeacherSource] = {kind: folder / "teachers" / kind for kind in recipe.teachers}
    config = read_config(folder)
    config["sessions"][-1]["teachers"] = describe_sources(sources, teachers, folder)
    checkpoint.write_config(folder, config)

"""Models of any origin: runs, files, programs, timm, the Hub, RobustBench and the user's own code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from awnet.defaults import standard_defaults
from awnet.files import expanded, read_json
from awnet.models.common import optional_module
from awnet.models.files import load_model_file
from awnet.models.registry import SOURCE, class_of
from awnet.models.user_code import build_model
from awnet.models.zoo import zoo_folder
from awnet.scalars import check_integer

Source = str | Path
"""A path, or a string of one of the forms of :func:`load_model`."""

_PREFIXES = ("zoo", "timm", "hub", "robustbench")
_NESTED = ("state_dict", "model_state_dict", "model", "net")  # where training scripts store weights
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def source_kind(source: Source) -> str:
    """``"file"`` (a run folder or ``.safetensors``), ``"program"`` (``.pt2``), ``"zoo"``, ``"timm"``,
    ``"hub"``, ``"robustbench"`` or ``"code"``."""
    text = str(source)
    if text.endswith(".pt2"):
        return "program"
    prefix, colon, _ = text.partition(":")
    if isinstance(source, Path) or not colon or expanded(text).exists():
        return "file"
    if prefix in _PREFIXES:
        return prefix
    is_drive = len(prefix) == 1 and text[2:3] in ("\\", "/")
    return "file" if is_drive or text.endswith(".safetensors") else "code"


def expanded_source(source: Source) -> Source:
    """``source`` with ``~`` expanded if it is a path."""
    return expanded(source) if source_kind(source) == "file" else source


def source_name(source: Source) -> str:
    """A name for files and tables: ``timm:resnet18`` → ``timm-resnet18``."""
    return re.sub(r"[^\w.]+", "-", str(source)).strip("-.") or "model"


@standard_defaults()
def load_model(
    source: Source,
    device: torch.device | str = "cpu",
    *,
    model: nn.Module | None = None,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """A model in eval mode, from a run, a file, a library or the caller's code.

    Args:
        source: one of

            - a run folder or a ``.safetensors`` file of :func:`save_model`;
            - ``"zoo:NAME"``: a trained model of this package (:func:`awnet.models.zoo_models`);
            - ``"timm:NAME"``: a model of timm, pretrained unless ``weights`` is given. A pretrained model
              normalizes images by its own mean and std unless ``mean`` and ``std`` are given;
            - ``"FILE.py:FUNCTION"`` or ``"MODULE:FUNCTION"``: the module that the function returns;
            - a ``.pt2`` file of ``torch.export.save``;
            - ``"hub:USER/REPO"``: a model of this package on the Hugging Face Hub (safetensors only);
            - ``"robustbench:[DATASET/[NORM/]]NAME"``, by default of cifar10 and Linf.
        device: device of the model.
        model: the model that receives a file's weights, in place and in their dtype. It is needed if the
            file does not describe how to build the model. It must have the structure of the saved model.
            Wrappers of ``torch.compile`` and data parallelism are ignored, in the file and in the model.
        weights: a state dict to load into a model of timm or of a function: ``.safetensors``, or a file of
            ``torch.save``, which is read with ``weights_only=True``.
        mean, std: per-channel normalization that the model expects: it then gets (x - mean) / std.
        image_size: side of the square images that the model expects: images are resized, by antialiased
            bilinear interpolation, within the model, so an attack changes the pixels before resizing.
        num_classes: number of classes of a timm model.

    Returns:
        A module that maps images [B, C, H, W] in [0, 1] to logits, wrapped in :class:`Adapted` if it
        normalizes or resizes.

    Raises:
        FileNotFoundError: a file does not exist.
        ImportError: a library is not installed, or the code cannot be imported.
        ValueError: a file is damaged or does not fit the model, or an argument does not fit ``source``.
    """
    kind = source_kind(source)
    name = str(source).partition(":")[2]
    if kind == "zoo":
        kind, source = "file", zoo_folder(name)
    if kind != "file" and model is not None:
        raise ValueError(f"model= is for the weights of a file, but {source} is not a file: use weights=")
    if weights is not None and kind not in ("timm", "code"):
        raise ValueError(f"weights is for timm models and functions: {source} has weights")
    if num_classes is not None and kind != "timm":
        raise ValueError(f"num_classes is for timm models: {source} has its number of classes")
    if kind == "file":
        loaded = load_model_file(source, device, model=model)
        if model is None and (mean, std, image_size) != (None, None, None):
            raise ValueError(
                "mean, std and image_size are for models that awnet did not create: a run's model takes "
                "images in [0, 1] of its data set's size"
            )
    elif kind == "program":
        loaded = _program(expanded(source))
    elif kind == "timm":
        loaded, normalization = _timm(name, pretrained=weights is None, num_classes=num_classes)
        if mean is None and std is None and weights is None:
            mean, std = normalization
    elif kind == "hub":
        loaded = _from_hub(name)
    elif kind == "robustbench":
        loaded = _robustbench(name)
    else:
        loaded = build_model(str(source))
    if weights is not None:
        load_weights(loaded, weights)
    if (mean, std, image_size) != (None, None, None):
        loaded = Adapted(loaded, mean, std, image_size)
    if kind != "file":
        vars(loaded)[SOURCE] = str(source)
    return loaded.to(device).eval()


class Adapted(nn.Module):
    """Resizes and normalizes images [B, C, H, W] in [0, 1] before a network: network((x - mean) / std).

    Args:
        network: maps normalized images to logits.
        mean, std: one value for each channel, or one for all; None is 0 and 1.
        image_size: height and width after resizing; None does not resize.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        values = {}
        for name, given, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            value = torch.tensor([default] if given is None else list(given), dtype=torch.float32)
            if value.numel() == 0 or not value.isfinite().all() or (name == "std" and (value <= 0).any()):
                what = "positive numbers" if name == "std" else "finite numbers"
                raise ValueError(f"{name} must hold {what}, one for each channel, got {given}")
            values[name] = value.view(1, -1, 1, 1)
        self.network = network
        self.register_buffer("mean", values["mean"])
        self.register_buffer("std", values["std"])
        self.image_size = None if image_size is None else check_integer("image_size", image_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.shape[1] not in (1, x.shape[1]):
                raise ValueError(
                    f"{name} has {value.shape[1]} values, but the images have {x.shape[1]} "
                    f"channel{'s' * (x.shape[1] > 1)}: give one value for each channel, or one for all"
                )
        if self.image_size is not None and x.shape[2:] != (self.image_size, self.image_size):
            x = F.interpolate(
                x, (self.image_size, self.image_size), mode="bilinear", antialias=True, align_corners=False
            )
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits


class Program(nn.Module):
    """An exported program as a module: it stays in the mode that it was exported in."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.network = program.module()

    def train(self, mode: bool = True) -> Program:
        self.training = False
        return self

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


def _program(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file of torch.export.save")
    try:
        return Program(torch.export.load(path))
    except Exception as error:  # torch raises many kinds of errors for damaged archives
        raise ValueError(
            f"{path} is not an exported program that this torch can load: {_line(error)}"
        ) from error


def _timm(
    name: str, *, pretrained: bool, num_classes: int | None
) -> tuple[nn.Module, tuple[Sequence[float] | None, Sequence[float] | None]]:
    """A timm model, and the mean and std of its pretrained weights."""
    timm = optional_module("timm", '"awnet[timm]"', f"timm:{name}")
    if pretrained and num_classes is not None:
        raise ValueError(
            "num_classes would replace the pretrained classifier by a random one: leave it out, or give the "
            "trained weights (weights=, --weights)"
        )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # unknown names, options and failed downloads
        advice = "; give weights from a file (--weights) if they cannot be downloaded" if pretrained else ""
        raise ValueError(f"timm cannot create {name!r}: {_line(error)}{advice}") from error
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return model, (config.get("mean"), config.get("std"))


def _from_hub(name: str) -> nn.Module:
    """A model of the package from ``USER/REPO``, ``USER/REPO@REVISION`` or a folder in that form."""
    repo, _, revision = name.partition("@")
    folder = expanded(repo)
    try:
        if folder.is_dir():
            file, repo = folder / CONFIG_NAME, str(folder)
        else:
            file = Path(hf_hub_download(repo, CONFIG_NAME, revision=revision or None))
        config = read_json(file)
        kind: Any = class_of(config.get("name", "")) if isinstance(config, dict) else None
        if kind is None:
            raise ValueError(
                "its config.json does not name a model of awnet; for timm's models use timm:hf-hub:USER/REPO"
            )
        loaded: nn.Module = kind.from_pretrained(repo, revision=revision or None)
    except (OSError, ValueError) as error:  # of huggingface_hub too, without a network for example
        raise ValueError(f"hub:{name} cannot be loaded: {_line(error)}") from error
    return loaded


def _robustbench(name: str) -> nn.Module:
    package = "git+https://github.com/RobustBench/robustbench"  # the release on PyPI does not import
    load = optional_module("robustbench.utils", package, f"robustbench:{name}").load_model
    *prefix, model = name.split("/")
    if len(prefix) > 2 or not model:
        raise ValueError(f"expected robustbench:[DATASET/[NORM/]]NAME, got 'robustbench:{name}'")
    dataset, norm = [*prefix, *("cifar10", "Linf")[len(prefix) :]]
    try:
        loaded = load(model_name=model, dataset=dataset, threat_model=norm)
    except Exception as error:  # unknown names and failed downloads
        raise ValueError(
            f"RobustBench cannot load {model!r} for {dataset} and {norm}: {_line(error)}"
        ) from error
    if not isinstance(loaded, nn.Module):
        raise TypeError(f"RobustBench must return an nn.Module, got {type(loaded).__name__}")
    return loaded


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict of any training script into ``model``, in place; every name and shape must fit.

    A dict with the weights under ``state_dict``, ``model_state_dict``, ``model`` or ``net`` is unpacked, and
    the prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``) are removed if the model lacks them.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a .safetensors file, or one of torch.save")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects, which could run code when they are loaded, or is damaged: save "
            "model.state_dict() instead"
        ) from error
    except Exception as error:  # torch.load raises errors of many types for files of other kinds
        raise ValueError(f"{path} is damaged or not a file of weights: {_line(error)}") from error
    while isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not contain a state dict: save model.state_dict()")
    expected = model.state_dict().keys()
    while prefix := next((p for p in _WRAPPERS if all(str(key).startswith(p) for key in state)), None):
        if any(key.startswith(prefix) for key in expected):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    missing, extra = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or extra:
        parts = [
            f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("it lacks", missing), ("the model lacks", extra))
            if names
        ]
        raise ValueError(f"{path} does not fit the {type(model).__name__}: {'; '.join(parts)}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        wrong = [
            f"{name} is {list(state[name].shape)} and not {list(value.shape)}"
            for name, value in model.state_dict().items()
            if isinstance(state[name], Tensor) and not is_lazy(value) and state[name].shape != value.shape
        ]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        reason = ", ".join(wrong[:3]) + more if wrong else _line(error)
        raise ValueError(f"{path} does not fit the {type(model).__name__}: {reason}") from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

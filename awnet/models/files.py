"""A model in one file: safetensors, with what rebuilds it as JSON in the file's metadata."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from awnet._version import __version__
from awnet.defaults import standard_defaults
from awnet.files import expanded, written_atomically
from awnet.models.registry import create_model, model_shapes

_KEY = "awnet"  # in the safetensors metadata
_EXTRA_KEY = "awnet.extra_state"
_FORMAT = 1


@standard_defaults()
def save_model(model: nn.Module, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes weights, buffers and configuration to one ``.safetensors`` file, whole or not at all.

    Args:
        model: made by :func:`create_model`; a compiled or data-parallel wrapper around it is looked through.
        path: ends in ``.safetensors``; an existing file is replaced.
        weights: a state dict of ``model`` to write instead of its present one.

    Raises:
        ValueError: ``path`` ends otherwise, or ``model`` has no ``config``, so nothing could rebuild it.
        OSError: the file cannot be written.
    """
    path = expanded(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    model = _unwrapped(model)
    config = getattr(model, "config", None)
    if not isinstance(config, dict):
        raise ValueError(
            f"{type(model).__name__} has no config to be rebuilt from: only models from awnet.create_model "
            "have (converted networks do not); save model.state_dict() instead, and load that into a model "
            "built in the same way"
        )
    weights = model.state_dict() if weights is None else weights
    about = {"format": _FORMAT, "version": __version__, "config": config}
    write_tensors(weights, path, {"format": "pt", _KEY: json.dumps(about)})


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's values as they lie in memory, row by row, wherever they are."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's names, shapes, weights and buffers, in hex."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            digest.update(f"{name} {packed_extra_state(name, value)}".encode())
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all.

    Values that are no tensors, of a module's ``get_extra_state``, are written into the metadata.

    Raises:
        ValueError: such a value cannot be stored.
        OSError: the file cannot be written.
    """
    extra = {key: packed_extra_state(key, v) for key, v in tensors.items() if not isinstance(v, Tensor)}
    tensors = _unshared({name: value for name, value in tensors.items() if isinstance(value, Tensor)})
    if extra:
        metadata = {**(metadata or {}), _EXTRA_KEY: json.dumps(extra)}
    with written_atomically(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its reason is the system's
            raise OSError(f"{path} could not be written: {error}") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory: safetensors refuses tied weights otherwise."""
    found, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        storage = (value.device, value.untyped_storage().data_ptr()) if value.numel() else None
        found[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return found


def packed_extra_state(name: str, value: Any) -> str:
    """The value that a module's ``get_extra_state`` returned, as text.

    Raises:
        ValueError: it holds what cannot be loaded without running code from the file.
    """
    try:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # of the value's own pickling
        raise ValueError(
            f"{name}, from get_extra_state, is a {type(value).__name__} that no checkpoint can hold: return "
            "numbers, text, tensors, and lists and dicts of them"
        ) from error
    return base64.b64encode(buffer.getvalue()).decode()


def _unpacked_extra_state(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Raises an exception of torch's or json's where the text is damaged."""
    packed: dict[str, str] = json.loads(metadata.get(_EXTRA_KEY, "{}"))
    return {
        name: torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
        for name, text in packed.items()
    }


@standard_defaults()
def load_model(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a file of :func:`save_model`, or in a run folder's ``best.safetensors``, in eval mode.

    Raises:
        FileNotFoundError: nothing there, or a folder without ``best.safetensors``.
        ValueError: a file that is damaged, from elsewhere, or does not fit this version of the package.
    """
    path = expanded(path)
    file = path / "best.safetensors" if path.is_dir() else path
    if not file.is_file():
        what = f"no best.safetensors in the folder {path}" if path.is_dir() else f"no file {path}"
        others = sorted(p.name for p in path.glob("*.safetensors")) if path.is_dir() else []
        hint = (
            f"it has {', '.join(others)}: pass one of them"
            if others
            else "pass a run folder or a .safetensors file"
        )
        raise FileNotFoundError(f"{what}; {hint}")
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            metadata = opened.metadata() or {}
            about = _about(file, metadata)
            names = list(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            _check_fit(file, about, shapes)  # before anything is allocated
            tensors = {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or no safetensors file ({error}); copy or download it again, or use another "
            "checkpoint of the run, such as last.safetensors"
        ) from error
    config = about["config"]
    try:
        model = create_model(
            config["name"],
            num_classes=config["num_classes"],
            in_channels=config["in_channels"],
            **config["options"],
        )
        model.load_state_dict(tensors | _unpacked_extra_state(metadata))
    except (ValueError, TypeError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _misfit(file, about, error) from error
    return model.to(device).eval()


def _check_fit(file: Path, about: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless ``shapes``, of the file's tensors, are those of the model that it describes.

    The file's size bounds its tensors, but not the sizes that its description states.
    """
    config = about["config"]
    try:
        lacking = [key for key in ("name", "num_classes", "in_channels", "options") if key not in config]
        if lacking or not isinstance(config["options"], dict):
            raise ValueError(f"its description lacks {', '.join(lacking) or 'a dict of options'}")
        expected = model_shapes(config)
        if expected is None:  # a registered function builds it
            most = sum(map(math.prod, shapes.values()))
            if max(config["num_classes"], config["in_channels"]) > most:
                raise ValueError(f"the description states more classes or channels than its {most} weights")
            return
        _check_names(expected, shapes)
    except (ValueError, TypeError, KeyError) as error:
        raise _misfit(file, about, error) from error


def _check_names(expected: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> None:
    missing, unexpected = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    for what, keys in (("Missing keys", missing), ("Unexpected keys", unexpected)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{what}: {', '.join(keys[:3])}{more}")
    for key, shape in shapes.items():
        if shape != expected[key]:
            raise ValueError(f"{key} has shape {list(shape)}, the model's has {list(expected[key])}")


def _misfit(file: Path, about: dict[str, Any], error: Exception) -> ValueError:
    version = str(about.get("version"))[:40]
    return ValueError(f"{file}, written by awnet {version}, does not fit awnet {__version__}: {error}")


def _about(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise ValueError(
            f"{file} was not written by awnet.save_model: its metadata names no model. For weights from "
            "elsewhere, create the model and call load_state_dict(safetensors.torch.load_file(...))"
        )
    try:
        about = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: its metadata {_KEY!r} is no JSON ({error}); copy the file again"
        ) from error
    if (
        not isinstance(about, dict)
        or about.get("format") != _FORMAT
        or not isinstance(about.get("config"), dict)
    ):
        raise ValueError(
            f"{file}: its metadata {_KEY!r} is not in the format {_FORMAT} that awnet {__version__} reads; "
            "load it with the version that wrote it"
        )
    return about


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)  # torch.compile's wrapper
    return _unwrapped(compiled) if isinstance(compiled, nn.Module) else model

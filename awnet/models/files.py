"""Model files: safetensors with a description that rebuilds the model, as JSON in the metadata."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from awnet._version import __version__
from awnet.defaults import standard_defaults
from awnet.devices import check_has_values
from awnet.files import expanded, written_atomically
from awnet.models.registry import class_of, config_of, create_model, is_ours, list_models, meta_model_of
from awnet.models.sizes import check_lists, check_state, elements
from awnet.nn import unwrapped
from awnet.nn.structure import apply_settings, compare, describe
from awnet.nn.wrappers import with_wrapper_names, without_wrapper_names

_KEY = "awnet"  # in the safetensors metadata
_STORAGE = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_STORAGE_MIN_VALUES = 4096
_EXTRA_KEY = "awnet.extra_state"
_FORMAT = 1
# what building a model and loading weights may raise if a file does not fit the model
_LOAD_ERRORS = (
    *(ValueError, TypeError, KeyError, RuntimeError, AttributeError),
    *(EOFError, pickle.UnpicklingError),
)


@standard_defaults()
def save_model(
    model: nn.Module,
    path: str | Path,
    weights: Mapping[str, Tensor] | None = None,
    *,
    storage: torch.dtype | None = None,
) -> None:
    """Writes weights, buffers and a description of the model to one ``.safetensors`` file, atomically.

    ``awnet.load_model`` restores the same model: the dtype of its weights, the current settings of its router
    and layers, and its class (a user's subclass must be defined in that process). Any other module (a
    converted network, one of timm, the user's own) is stored with the structure of its modules:
    ``load_model(path, model=…)`` loads it into a module that is built in the same way, and refuses others. A
    model of :func:`create_model` that was changed so that it could not be restored is refused.

    Args:
        model: any module. Wrappers of ``torch.compile`` and data parallelism around it, or in it, are
            ignored.
        path: ends in ``.safetensors``; an existing file is replaced.
        weights: a state dict of ``model`` to write instead of its current one.
        storage: ``torch.bfloat16`` or ``torch.float16`` rounds float32 parameters of at least 4,096 values to
            it, which halves the file. ``load_model`` returns them as float32, with the rounded values.

    Raises:
        ValueError: ``path`` has another suffix, ``storage`` is another dtype or the model is not in float32,
            or a model of :func:`create_model` was changed in ways that a file cannot store (hooks, replaced
            layers, parametrized weights), which the message names.
        OSError: the file cannot be written.
    """
    path = expanded(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    check_has_values(model)
    weights, description = model.state_dict() if weights is None else weights, description_of(model)
    if storage is not None:
        if storage not in _STORAGE.values():
            raise ValueError(f"storage must be torch.bfloat16 or torch.float16, got {storage}")
        others = {value.dtype for value in model.parameters()} - {torch.float32}
        if others:
            raise ValueError(f"storage is for models in float32: this one has parameters in {others.pop()}")
        weights = _rounded(model, weights, storage)
        description["storage"] = str(storage).removeprefix("torch.")
    write_model(model, path, weights, description)


@standard_defaults()
def description_of(model: nn.Module) -> dict[str, Any]:
    """The description of ``model`` in its file.

    It rebuilds a model of :func:`create_model`. For any other model it holds the class and structure, with
    which :func:`load_model_file` compares the model that it is given.

    Raises:
        ValueError: ``model`` has a ``config`` but differs from what that builds in ways that a file cannot
            store.
    """
    model = unwrapped(model)
    config = config_of(model)
    shared = {"format": _FORMAT, "version": __version__}
    if config is None:
        return shared | {"config": None, "class": _class_name(type(model)), "structure": describe(model)}
    description: dict[str, Any] = shared | {"config": config}
    problems: list[str] = []
    try:
        built = _built(description, on_meta=True)
        if type(model) is not type(built) and isinstance(model, type(built)):
            description |= _of_subclass(model, config)
            built = _built(description)
        settings, problems = compare(model, built)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        problems = [str(error)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"this {type(model).__qualname__} is not what its config, {config['name']!r}, builds, and a file "
            f"cannot store it: {'; '.join(problems[:5])}{more}. Undo that, or register a function that "
            "builds the model as it is (awnet.models.register_model) and create it by that name; or set "
            "model.config = None: a run then stores its weights for awnet.load_model(RUN, model=...)"
        )
    return description | ({"settings": settings} if settings else {})


_CLASSES: WeakValueDictionary[str, type[nn.Module]] = WeakValueDictionary()
"""Subclasses that were saved in this process, by name."""


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _of_subclass(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """How a user's subclass is built: with the arguments of its base class, or without arguments."""
    kind = type(model)
    _CLASSES[_class_name(kind)] = kind
    errors = []
    for call in ("config", "nothing"):
        description = {"class": _class_name(kind), "call": call}
        try:
            built = _built({"config": config} | description)
        except Exception as error:  # any error of a constructor
            errors.append(str(error))
            continue
        if config_of(built) == config or call == "config":
            return description
    raise ValueError(
        f"its class {kind.__qualname__} cannot be created again by {kind.__name__}(name, num_classes, "
        f"in_channels, **options) or {kind.__name__}() ({errors[0] if errors else 'its config changes'})"
    )


def _built(description: Mapping[str, Any], *, on_meta: bool = False) -> nn.Module:
    """A new model as ``about`` describes it; with ``on_meta`` on the meta device if possible."""
    config = description["config"]
    arguments = {"num_classes": config["num_classes"], "in_channels": config["in_channels"]}
    arguments |= config["options"]
    if "class" not in description:
        if on_meta and is_ours(config["name"]):
            with suppress(RuntimeError, NotImplementedError), torch.device("meta"):
                return create_model(config["name"], **arguments)
        with torch.random.fork_rng([]):
            return create_model(config["name"], **arguments)
    kind = _known_class(description["class"])
    base = class_of(config["name"])
    if base is None or not issubclass(kind, base):
        raise ValueError(f"its class {kind.__qualname__} is not a subclass of {config['name']!r}'s")
    with torch.random.fork_rng([]):
        return kind() if description.get("call") == "nothing" else kind(config["name"], **arguments)


def _known_class(name: str) -> type[nn.Module]:
    """The class of that name among those that this process has defined; nothing is imported."""
    kind: Any = _CLASSES.get(name)
    if kind is None:
        module, _, path = name.partition(":")
        kind = sys.modules.get(module)
        for part in path.split("."):
            kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        module, _, path = name.partition(":")
        raise ValueError(
            f"it is a {path} of the module {module}, which is not imported here: import it first, or build "
            "the model and pass it: awnet.load_model(..., model=my_model). On the command line: --import "
            "FILE.py, or --model FILE.py:FUNCTION"
        )
    return kind


def write_model(
    model: nn.Module, path: str | Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Writes ``weights``, a state dict of ``model``, with its :func:`description_of`; may raise OSError."""
    # one key only: safetensors writes several in random order, and the bytes would differ between saves
    write_tensors(without_wrapper_names(model, weights), path, {_KEY: json.dumps(description)})


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's names, shapes, weights and buffers, in hex."""
    digest = hashlib.sha256()
    for name, value in without_wrapper_names(model, model.state_dict()).items():
        if not isinstance(value, Tensor):
            digest.update(f"{name} {packed_extra_state(name, value)}".encode())
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically.

    Values of ``get_extra_state`` that are not tensors are written to the metadata.

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
        except SafetensorError as error:  # the cause is an error of the operating system
            raise OSError(f"{path} could not be written: {error}") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors without shared memory, since safetensors refuses tied weights."""
    unshared, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        storage = (value.device, value.untyped_storage().data_ptr()) if value.numel() else None
        unshared[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return unshared


def packed_extra_state(name: str, value: Any) -> str:
    """The value of a module's ``get_extra_state`` as text.

    Raises:
        ValueError: it cannot be loaded without running code from the file.
    """
    try:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # any error of pickling the value
        raise ValueError(
            f"{name}, from get_extra_state, is a {type(value).__name__}, which a checkpoint cannot store: "
            "return numbers, text, tensors, and lists and dicts of them"
        ) from error
    return base64.b64encode(buffer.getvalue()).decode()


def _unpacked_extra_state(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Raises what torch or json raise if the text is damaged."""
    packed: dict[str, str] = json.loads(metadata.get(_EXTRA_KEY, "{}"))
    return {
        name: torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
        for name, text in packed.items()
    }


@standard_defaults()
def load_model_file(
    path: str | Path, device: torch.device | str = "cpu", *, model: nn.Module | None = None
) -> nn.Module:
    """The model in a file of :func:`save_model`, or in a run folder's ``best.safetensors``, in eval mode.

    Args:
        path: a run folder or a ``.safetensors`` file; a string is always a path here.
        device: device of the model.
        model: the model that receives the weights, in place and in their dtype. It is needed if the file does
            not describe how to build the model: a run of a module that ``create_model`` did not make, or
            foreign weights. It must have the structure of the saved model. Wrappers of ``torch.compile`` and
            data parallelism are ignored, in the file and in the model.

    Raises:
        FileNotFoundError: there is no such file, or no ``best.safetensors`` in the folder.
        ValueError: the file is damaged, does not fit this version of the package or ``model``, or does not
            describe how to build its model.
    """
    path = expanded(path)
    file = path / "best.safetensors" if path.is_dir() else path
    if not file.is_file():
        problem = f"no best.safetensors in the folder {path}" if path.is_dir() else f"no file {path}"
        others = sorted(p.name for p in path.glob("*.safetensors")) if path.is_dir() else []
        hint = (
            f"it has {', '.join(others)}: pass one of them"
            if others
            else "pass a run folder or a .safetensors file"
        )
        raise FileNotFoundError(f"{problem}; {hint}")
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            metadata = opened.metadata() or {}
            description = _read_description(file, metadata, model)
            names = list(opened.keys())
            if model is None:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
                _check_fit(file, description, shapes)  # before anything is allocated
            tensors = _stored_as_float32(description, {name: opened.get_tensor(name) for name in names})
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file ({error}); copy or download it again, or use "
            "another checkpoint of the run, such as last.safetensors"
        ) from error
    model_was_passed = model is not None
    try:
        if model is None:
            model = _built(description)
        else:
            check_has_values(model)
            if description.get("structure") is not None:
                _check_structure(model, description["structure"])
        _load(model, tensors | _unpacked_extra_state(metadata))
        apply_settings(unwrapped(model), description.get("settings", {}))
    except _LOAD_ERRORS as error:
        if model_was_passed:
            raise ValueError(f"{file} does not fit the model that was passed: {error}") from error
        raise _load_error(file, description, error) from error
    return model.to(device).eval()


def _rounded(model: nn.Module, weights: Mapping[str, Any], storage: torch.dtype) -> dict[str, Any]:
    """``weights`` with the large float32 parameters of ``model`` in the dtype ``storage``."""
    large = {
        name
        for name, value in model.named_parameters(remove_duplicate=False)
        if value.dtype == torch.float32 and value.numel() >= _STORAGE_MIN_VALUES
    }
    return {name: value.to(storage) if name in large else value for name, value in weights.items()}


def _stored_as_float32(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with those in the storage dtype of ``about``, the file's description, as float32."""
    storage = _STORAGE.get(description.get("storage", ""))
    return {name: value.float() if value.dtype == storage else value for name, value in tensors.items()}


@torch.no_grad()
def _load(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Loads ``tensors`` into ``model``, in their dtypes; RuntimeError if names or shapes differ."""
    expected = without_wrapper_names(model, model.state_dict()).keys()
    if not expected & tensors.keys():  # a wrapped model's state dict, saved by a user's code
        tensors = {key.removeprefix("module.").removeprefix("_orig_mod."): v for key, v in tensors.items()}
    tensors = with_wrapper_names(model, tensors)
    for table in (dict(model.named_parameters()), dict(model.named_buffers())):
        for name, target in table.items():
            if name in tensors and tensors[name].is_floating_point() and target.is_floating_point():
                target.data = target.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)


def _check_structure(model: nn.Module, stored: Any) -> None:
    """Raises ValueError if ``model`` has other modules or hooks than the saved model."""
    structure = describe(model)
    if not isinstance(stored, dict) or structure == stored:
        return
    differences = [
        f"{path or 'the model'} is {structure.get(path, 'missing')}, and was {stored.get(path, 'missing')}"
        for path in sorted({*structure, *stored})
        if structure.get(path) != stored.get(path)
    ]
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise ValueError(f"it is not built as the one that was saved: {'; '.join(differences[:3])}{more}")


def _check_fit(file: Path, description: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless ``shapes``, of the file's tensors, are those of the model that it describes.

    The file's size bounds its tensors, but not the sizes that its description states.
    """
    config = description["config"]
    try:
        if isinstance(config.get("name"), str) and config["name"] not in list_models():
            raise ValueError(
                f"unknown model {config['name']!r}. If your code registers it, import the module that calls "
                f"awnet.models.register_model({config['name']!r}, ...) first (command line: --import "
                f"FILE.py); or build the model and pass it: awnet.load_model({str(file)!r}, model=my_model) "
                "(command line: --model FILE.py:FUNCTION)"
            )
        missing = [key for key in ("name", "num_classes", "in_channels", "options") if key not in config]
        if missing or not isinstance(config["options"], dict):
            raise ValueError(f"its description lacks {', '.join(missing) or 'a dict of options'}")
        check_lists(config["options"], len(shapes))
        expected = None if "class" in description else meta_model_of(config)
        if expected is None:  # a registered function or the user's class builds it
            most = elements(shapes)
            if max(config["num_classes"], config["in_channels"]) > most:
                raise ValueError(f"the description states more classes or channels than its {most} weights")
            return
        check_state(expected, shapes)
    except (ValueError, TypeError, KeyError) as error:
        raise _load_error(file, description, error) from error


def _load_error(file: Path, description: dict[str, Any], error: Exception) -> ValueError:
    version = str(description.get("version"))[:40]
    if version == __version__:
        return ValueError(f"{file} cannot be loaded: {error}")
    return ValueError(f"{file}, written by awnet {version}, does not fit awnet {__version__}: {error}")


def _read_description(file: Path, metadata: dict[str, str], model: nn.Module | None) -> dict[str, Any]:
    if _KEY not in metadata:
        if model is not None:
            return {}
        raise ValueError(
            f"{file} was not written by awnet.save_model: its metadata names no model. For weights from "
            f"elsewhere, build the model and pass it: awnet.load_model({str(file)!r}, model=my_model), on "
            "the command line --model FILE.py:FUNCTION"
        )
    try:
        description = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: its metadata {_KEY!r} is not JSON ({error}); copy the file again"
        ) from error
    if (
        not isinstance(description, dict)
        or description.get("format") != _FORMAT
        or not isinstance(description.get("config", 0), dict | None)
    ):
        raise ValueError(
            f"{file}: its metadata {_KEY!r} is not in the format {_FORMAT} that awnet {__version__} reads; "
            "load it with the version that wrote it"
        )
    if description["config"] is None and model is None:
        raise ValueError(
            f"{file} has the weights of a {description.get('class')}, which awnet cannot build: build it in "
            f"the same way and pass it: awnet.load_model({str(file)!r}, model=my_model), on the command line "
            "--model FILE.py:FUNCTION"
        )
    return description

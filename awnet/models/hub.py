"""Saving to and loading from the Hugging Face Hub, or a folder in its form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open
from torch import nn

from awnet.defaults import standard_defaults
from awnet.devices import check_has_values
from awnet.models.sizes import build_on_meta, check_lists, check_memory, check_state
from awnet.nn.structure import compare


class OnHub(
    PyTorchModelHubMixin,
    library_name="awnet",
    license="mit",
    pipeline_tag="image-classification",
    tags=["adversarial-robustness"],
    paper_url="https://arxiv.org/abs/2306.03430",
):
    """``save_pretrained``, ``from_pretrained``, ``push_to_hub``; config.json: the constructor's arguments."""

    @standard_defaults()
    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> Any:
        """Writes weights and config.json, as huggingface_hub does; ``push_to_hub`` calls this too.

        Raises ValueError if the model was changed after its creation (other settings, hooks, replaced layers,
        another dtype), since ``from_pretrained`` would not restore it. ``awnet.save_model`` stores settings
        and dtype.
        """
        network = cast("nn.Module", self)
        check_has_values(network)
        arguments_at_creation: dict[str, Any] = getattr(self, "_hub_mixin_config", None) or {}
        with torch.random.fork_rng([]):
            built = cast("nn.Module", type(self)(**arguments_at_creation))
        settings, problems = compare(network, built)
        for path, names in settings.items():
            problems += [f"{path or 'the model'} has another {name}" for name in names]
        dtypes = {str(p.dtype) for p in network.parameters()} - {str(p.dtype) for p in built.parameters()}
        problems += [f"it has weights of dtype {dtype}" for dtype in sorted(dtypes)]
        if problems:
            raise ValueError(
                f"from_pretrained would not restore this {type(self).__name__}: {'; '.join(problems[:5])}. "
                "Undo that, or save it by awnet.save_model"
            )
        return super().save_pretrained(save_directory, **arguments)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,  # weights that do not fit are an error, not a random start
        **arguments: Any,
    ) -> Self:
        file = Path(model_id) / SAFETENSORS_SINGLE_FILE
        if not Path(model_id).is_dir():
            file = Path(
                hf_hub_download(
                    repo_id=model_id,
                    filename=SAFETENSORS_SINGLE_FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        _check_fit(cls, arguments, file, model_id, strict=strict)
        with standard_defaults():
            model = cls(**arguments)
            return cls._load_as_safetensor(model, str(file), map_location, strict)


def _check_fit(
    model_class: type, arguments: dict[str, Any], file: Path, model_id: str, *, strict: bool
) -> None:
    """Raises ValueError if config.json states other sizes than ``file`` has; allocates nothing."""
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file ({error}); download it again"
        ) from error
    try:
        check_lists(arguments, len(shapes))
        model = build_on_meta(lambda: model_class(**arguments), model_class.__name__)
        check_state(model, shapes, strict=strict)
        if not strict:
            check_memory(model, model_class.__name__)
    except (ValueError, TypeError, MemoryError) as error:
        raise ValueError(f"config.json of {model_id} does not fit its weights: {error}") from error

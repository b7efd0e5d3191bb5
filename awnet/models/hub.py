"""Saving to and loading from the Hugging Face Hub, or a folder in its form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

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

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> Any:
        """Writes weights and config.json, as huggingface_hub does; ``push_to_hub`` does so too.

        Raises ValueError for a model that was changed since it was made (other settings, hooks, replaced
        layers, another dtype), which ``from_pretrained`` would not give back: ``awnet.save_model`` stores
        settings and dtype.
        """
        network = cast("nn.Module", self)
        made_with: dict[str, Any] = getattr(self, "_hub_mixin_config", None) or {}
        with torch.random.fork_rng([]):
            built = cast("nn.Module", type(self)(**made_with))
        settings, problems = compare(network, built)
        for path, names in settings.items():
            problems += [f"{path or 'the model'} has another {name}" for name in names]
        dtypes = {str(p.dtype) for p in network.parameters()} - {str(p.dtype) for p in built.parameters()}
        problems += [f"it has weights of dtype {dtype}" for dtype in sorted(dtypes)]
        if problems:
            raise ValueError(
                f"from_pretrained would not give this {type(self).__name__} back: {'; '.join(problems[:5])}. "
                "Undo that, or save it by awnet.save_model"
            )
        return super().save_pretrained(save_directory, **arguments)

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Self:
        kwargs.setdefault("strict", True)  # weights that do not fit are an error, not a random start
        return super()._from_pretrained(**kwargs)

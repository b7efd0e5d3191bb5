"""Saving to and loading from the Hugging Face Hub, or a folder in its form."""

from __future__ import annotations

from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin


class OnHub(
    PyTorchModelHubMixin,
    library_name="awnet",
    license="mit",
    pipeline_tag="image-classification",
    tags=["adversarial-robustness"],
    paper_url="https://arxiv.org/abs/2306.03430",
):
    """``save_pretrained``, ``from_pretrained``, ``push_to_hub``; config.json: the constructor's arguments."""

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Self:
        kwargs.setdefault("strict", True)  # weights that do not fit are an error, not a random start
        return super()._from_pretrained(**kwargs)

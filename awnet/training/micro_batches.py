"""Whether a recipe can train a network on the smallest micro-batch of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awnet.data import Dataset
from awnet.data.dataset import Batch
from awnet.nn.copies import copied
from awnet.training.forward import Teachers
from awnet.training.losses import MTARDWeights
from awnet.training.recipes import MTARD, Recipe


def smallest_micro_batch(images: int, batch_size: int, accumulate: int, ranks: int) -> int:
    """The number of images in the smallest micro-batch of a rank in an epoch of ``images``; at least 1."""
    sizes = [images % batch_size or batch_size, min(batch_size, images)]
    shares = [max(1, size // ranks) for size in sizes]
    return min(share // min(accumulate, share) for share in shares)


def check_smallest_micro_batch(recipe: Recipe, model: nn.Module, data: Dataset, ranks: int) -> None:
    """Checks that no batch norm of ``model`` sees one value per channel in a micro-batch of one image.

    This happens if feature maps have shrunk to one pixel, and in a batch norm of vectors. Training would fail
    at that step, often the last one of every epoch. The losses are run on a copy of ``model`` with one image,
    without an attack. If several ranks share batch statistics, all of them have to call this.

    Raises:
        ValueError: a batch norm does; the message gives the next larger batch size that works.
    """
    images = len(data)
    if smallest_micro_batch(images, recipe.batch_size, recipe.accumulate, ranks) > 1:
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        trained = copied(model).train()
    except Exception:  # a model that cannot be copied cannot be checked
        return
    x = torch.zeros(1, data.in_channels, *data.image_size, device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)

    class Teacher(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), data.num_classes)

    teachers = Teachers(Teacher(), Teacher())
    weights = MTARDWeights(device) if isinstance(recipe, MTARD) else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for phase in recipe.phases():
            try:
                phase.result(trained, Batch(x, zero, zero), x, recipe.loss_options(), teachers, weights)
            except ValueError as error:
                if "more than 1 value per channel" in str(error):
                    raise ValueError(_refusal(recipe, images, ranks)) from error
            except Exception:  # training reports any other error
                return


def _refusal(recipe: Recipe, images: int, ranks: int) -> str:
    size, accumulate = recipe.batch_size, recipe.accumulate
    larger = range(size + 1, images + 1)
    works = next((n for n in larger if smallest_micro_batch(images, n, accumulate, ranks) > 1), None)
    remedy = "train on more images" if works is None else f"set batch_size to {works}"
    settings = [f"batch_size {size} with {images} training images"]
    settings += [f"accumulate={accumulate}"] if accumulate > 1 else []
    settings += [f"{ranks} ranks"] if ranks > 1 else []
    return (
        f"{', '.join(settings)}: an epoch has a micro-batch of one image, where a batch norm of this network "
        f"sees one value per channel and has no variance; {remedy}"
    )

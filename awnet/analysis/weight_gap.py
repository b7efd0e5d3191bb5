"""Measures Section 3.2 of the paper: how one step of adversarial training differs from standard training.

With L_adv = (1 − α) L(x) + α L(x + δ) (Eq. 1) and δ the perturbation of size ε that increases L most, Eq. 8
gives the first-order difference of the two steps from the same weights w₀, without the learning rate η:

    ∂_w L_adv − ∂_w L = α ε ∂_w ‖∂_x L(x, y)‖₁ + O(ε²)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet.precision import full_precision


@dataclass(frozen=True)
class WeightGap:
    """The gap for one ε and α. Norms are Euclidean, over all parameters.

    measured: ‖∂_w L_adv − ∂_w L‖ with δ = ε sign(∂_x L). predicted: α ε ‖∂_w ‖∂_x L‖₁‖, Eq. 8.
    relative: measured / ‖∂_w L‖. cosine: of the two vectors; 0 if either is zero.
    """

    eps: float
    adv_weight: float
    measured: float
    predicted: float
    relative: float
    cosine: float


@full_precision()
def weight_gaps(
    model: nn.Module, x: Tensor, y: Tensor, eps: Sequence[float], adv_weights: Sequence[float]
) -> list[WeightGap]:
    """The gap at the model's current weights for every ε (outer loop) and α (inner loop).

    Images are not clipped to [0, 1], as in Eq. 8. The model runs in its current mode (in eval mode samples
    are independent), and its parameters' ``grad`` does not change.

    Args:
        model: images [B, C, H, W] to logits [B, K], twice differentiable (an AW-Net: with the reference
            backend).
        x, y: images [B, C, H, W] and labels int64 [B]; the loss is the cross-entropy's mean over them.
        eps: in image units. adv_weights: α, each in [0, 1].

    Raises ValueError for a negative ε or an α outside [0, 1].
    """
    if any(value < 0 for value in eps):
        raise ValueError(f"eps must not be negative, got {list(eps)}")
    if any(not 0 <= value <= 1 for value in adv_weights):
        raise ValueError(f"adv_weights must be in [0, 1], got {list(adv_weights)}")
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def of_weights(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        pairs = zip(grads, weights, strict=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])

    images = x.detach().requires_grad_()
    losses = F.cross_entropy(model(images), y, reduction="sum")
    (by_image,) = torch.autograd.grad(losses, images, create_graph=True)
    slope = of_weights(by_image.abs().sum() / len(x))  # ∂_w ‖∂_x L‖₁, mean over the images
    plain = of_weights(F.cross_entropy(model(x), y))
    direction = by_image.detach().sign()
    rows = []
    for size in eps:
        difference = of_weights(F.cross_entropy(model(x + size * direction), y)) - plain
        for alpha in adv_weights:
            measured, predicted = alpha * difference, alpha * size * slope
            rows.append(
                WeightGap(
                    eps=size,
                    adv_weight=alpha,
                    measured=float(measured.norm()),
                    predicted=float(predicted.norm()),
                    relative=float(measured.norm() / plain.norm()),
                    cosine=float(F.cosine_similarity(measured, predicted, dim=0)),
                )
            )
    return rows

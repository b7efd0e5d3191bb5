"""NNIF (Cohen, Sapiro and Giryes, CVPR 2020): influence functions and nearest neighbors.

For a clean image, the training images that most helped its prediction are near it in every layer; for an
adversarial image they are not. The features of an image are, for each layer, the mean rank and the mean
distance of its M most helpful and of its M most harmful training images among its nearest neighbors; a
logistic regression on these features separates the two kinds.

The influence is computed for the last linear layer only, with the other layers fixed, which keeps it
tractable. M, the layers and the damping are our choice; the paper tunes them for each attack.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet.data.checks import check_labels
from awnet.detectors.base import Detector, Embedding
from awnet.scalars import check_integer, check_number


class LastLayer:
    """Influence functions (Koh and Liang, ICML 2017) of a softmax regression on fixed features.

    With θ the last layer's weights (bias included), H the Hessian of the mean training cross-entropy plus
    ``damping`` / 2 ‖θ‖², removing training image i changes the loss of image t by about

        g_tᵀ H⁻¹ g_i / N,   g = ∂_θ cross-entropy

    so a positive g_tᵀ H⁻¹ g_i means that the training image helps.

    Args:
        features: features of the training images, float64 [N, d]. logits: [N, K]. y: int64 [N].
        damping: λ > 0.
    """

    def __init__(self, features: Tensor, logits: Tensor, y: Tensor, damping: float = 1e-3) -> None:
        damping = check_number("damping", damping, above=0)
        self.features = _with_bias(features)  # [N, d + 1]
        self.p = logits.softmax(1)
        self.error = self.p - F.one_hot(y, logits.shape[1])  # [N, K]: the gradient is error ⊗ features
        self.damping = damping

    def helpfulness(self, features: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """g_tᵀ H⁻¹ g_i [T, N] for images t with ``features`` [T, d], ``logits`` [T, K] and labels [T]."""
        error = logits.softmax(1) - F.one_hot(y, logits.shape[1])
        gradient = error[:, :, None] * _with_bias(features)[:, None, :]  # [T, K, d + 1]
        solved = self.solve(gradient)
        return torch.einsum("tkd,nd,nk->tn", solved, self.features, self.error)

    def _times_hessian(self, v: Tensor) -> Tensor:
        along = torch.einsum("tkd,nd->tnk", v, self.features)
        weighted = self.p * (along - (self.p * along).sum(2, keepdim=True))
        return torch.einsum("tnk,nd->tkd", weighted, self.features) / len(self.features) + self.damping * v

    def solve(self, b: Tensor, tolerance: float = 1e-6, most: int = 500) -> Tensor:
        """H⁻¹ b for every b [T, K, d], by at most ``most`` steps of conjugate gradients."""
        x = torch.zeros_like(b)
        residual, direction = b.clone(), b.clone()
        size = (residual * residual).sum((1, 2), keepdim=True)
        threshold = tolerance**2 * size
        for _ in range(most):
            if bool((size <= threshold).all()):
                break
            product = self._times_hessian(direction)
            step = size / (direction * product).sum((1, 2), keepdim=True).clamp(min=1e-300)
            x += step * direction
            residual -= step * product
            new_size = (residual * residual).sum((1, 2), keepdim=True)
            direction = residual + new_size / size.clamp(min=1e-300) * direction
            size = new_size
        return x


def _with_bias(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


class NNIF(Detector):
    """NNIF, see the module's docstring.

    Args:
        neighbours: M, the number of helpful and of harmful training images.
        damping: λ of :class:`LastLayer`.
        most_train: maximum number of training images, evenly spaced; memory is [batch_size, most_train].
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        neighbours: int = 50,
        damping: float = 1e-3,
        most_train: int = 10_000,
        batch_size: int = 256,
    ) -> None:
        super().__init__(model, batch_size=batch_size)
        self.neighbours = check_integer("neighbours", neighbours, 1)
        self.damping = check_number("damping", damping, above=0)
        self.most_train = check_integer("most_train", most_train, 1)

    def _fit(self, x_train: Tensor, y_train: Tensor, clean: Tensor, adversarial: Tensor) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        stride = -(-len(x_train) // self.most_train)
        x_train, y_train = x_train[::stride], y_train[::stride]
        least = 2 * self.neighbours
        if len(x_train) < least:
            raise ValueError(
                f"x_train must hold 2 · neighbours = {least} images, got {len(x_train)} of at most "
                f"most_train = {self.most_train}"
            )
        self.embedding = Embedding(self.model, x_train[:1])
        self.train_layers, features, logits = self.embedding(x_train, self.batch_size)
        check_labels(y_train, logits.shape[1], "y_train")
        self.last = LastLayer(features, logits, y_train, self.damping)
        table = np.concatenate([self._features(clean), self._features(adversarial)])
        labels = np.repeat([0, 1], [len(clean), len(adversarial)])
        self.regression: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        self.regression.fit(table, labels)

    def _score(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.regression.decision_function(self._features(x)))

    def _features(self, x: Tensor) -> np.ndarray[Any, Any]:
        """[N, 4 · layers]: mean rank and distance of the helpful, then of the harmful, for each layer."""
        return np.concatenate([self._batch_features(part) for part in x.split(self.batch_size)])

    def _batch_features(self, x: Tensor) -> np.ndarray[Any, Any]:
        layers, features, logits = self.embedding(x, self.batch_size)
        helpfulness = self.last.helpfulness(features, logits, logits.argmax(1))  # [B, N]
        helpful = helpfulness.topk(self.neighbours, dim=1).indices
        harmful = helpfulness.topk(self.neighbours, dim=1, largest=False).indices
        columns = []
        for layer, train in zip(layers, self.train_layers, strict=True):
            distance = torch.cdist(layer, train)  # [B, N]
            rank = distance.argsort(1).argsort(1).double()
            for indices in (helpful, harmful):
                columns += [rank.gather(1, indices).mean(1), distance.gather(1, indices).mean(1)]
        return np.asarray(torch.stack(columns, dim=1).cpu().numpy())

"""LNG (Abusnaina et al., ICCV 2021): a graph of an image's neighbors in latent space.

The image's embedding and its nearest clean and adversarial reference embeddings form a graph whose edges are
a learned function of distance; graph attention classifies it. There is no public code: the numbers of
neighbors, heads and layers, and the readout are our interpretation of the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.detectors.base import Detector, Embedding
from awnet.scalars import check_integer, check_number


class _Attention(nn.Module):
    """Graph attention (Veličković et al., 2018) with the log of the edge strength added to the logits."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(size, size)
        self.source = nn.Parameter(torch.randn(heads, size // heads) * 0.1)
        self.target = nn.Parameter(torch.randn(heads, size // heads) * 0.1)

    def forward(self, nodes: Tensor, log_edges: Tensor) -> Tensor:
        """nodes [B, V, size], log_edges [B, V, V] → [B, V, size]."""
        b, v, size = nodes.shape
        h = self.project(nodes).view(b, v, self.heads, -1)
        logits = (h * self.target).sum(3)[:, :, None, :] + (h * self.source).sum(3)[:, None, :, :]
        attention = (F.leaky_relu(logits, 0.2) + log_edges[..., None]).softmax(2)  # [B, V, V, heads]
        return F.elu(torch.einsum("bvwh,bwhd->bvhd", attention, h).reshape(b, v, size)) + nodes


class _Graph(nn.Module):
    def __init__(self, features: int, size: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features + 3, size)
        self.edge = nn.Parameter(torch.tensor([1.0, 0.0]))  # threshold, and steepness before softplus
        self.layers = nn.ModuleList(_Attention(size, heads) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(2 * size, size), nn.ReLU(), nn.Linear(size, 1))

    def forward(self, nodes: Tensor, kinds: Tensor) -> Tensor:
        """Embeddings [B, V, d], the image itself first, and their kinds [V, 3] → logit [B]."""
        distance = torch.cdist(nodes, nodes)
        scale = distance.mean((1, 2), keepdim=True).clamp(min=1e-12)
        log_edges = F.logsigmoid(self.edge[0] - F.softplus(self.edge[1]) * distance / scale)
        h = self.embed(torch.cat([nodes, kinds.expand(len(nodes), -1, -1)], dim=2))
        for layer in self.layers:
            h = layer(h, log_edges)
        return self.head(torch.cat([h[:, 0], h.mean(1)], dim=1))[:, 0]


class LNG(Detector):
    """LNG, see the module's docstring. The latent space is the input of the classifier's last layer.

    Args:
        neighbours: number of reference images of each kind in a graph.
        size, heads: width and number of heads of the attention.
        epochs, lr: epochs and learning rate of the training with Adam.
        seed: seed of the weights and of the order of the images.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        neighbours: int = 10,
        size: int = 64,
        heads: int = 4,
        epochs: int = 60,
        lr: float = 3e-3,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        super().__init__(model, batch_size=batch_size)
        self.neighbours = check_integer("neighbours", neighbours, 1)
        self.epochs = check_integer("epochs", epochs, 0)
        self.size, self.heads = check_integer("size", size, 1), check_integer("heads", heads, 1)
        self.lr, self.seed = check_number("lr", lr, above=0), check_integer("seed", seed)
        if self.size % self.heads:
            raise ValueError(f"size must be a multiple of heads, got {size} and {heads}")

    def _fit(self, x_train: Tensor, y_train: Tensor, clean: Tensor, adversarial: Tensor) -> None:
        if min(len(clean), len(adversarial)) < self.neighbours + 1:
            raise ValueError(
                f"clean and adversarial must each hold more than neighbours = {self.neighbours} images, got "
                f"{len(clean)} and {len(adversarial)}"
            )
        self.embedding = Embedding(self.model, x_train[:1])
        features = self._features(x_train)
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)
        self.references = [self._latent(clean), self._latent(adversarial)]
        queries = torch.cat(self.references)
        labels = torch.cat([torch.zeros(len(clean)), torch.ones(len(adversarial))]).to(queries)
        # an image is no neighbor of itself
        nodes = torch.cat([self._nodes(x, exclude=kind) for kind, x in enumerate(self.references)])
        with torch.random.fork_rng([]), torch.enable_grad():
            torch.manual_seed(rng.torch_seed(self.seed, "LNG"))
            self.graph = _Graph(queries.shape[1], self.size, self.heads).to(queries)
            optimizer = torch.optim.Adam(self.graph.parameters(), self.lr)
            for _ in range(self.epochs):
                for rows in torch.randperm(len(nodes)).to(nodes.device).split(64):
                    loss = F.binary_cross_entropy_with_logits(
                        self.graph(nodes[rows], self._kinds(nodes)), labels[rows]
                    )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

    def _score(self, x: Tensor) -> Tensor:
        nodes = self._nodes(self._latent(x))
        return torch.cat([self.graph(part, self._kinds(nodes)) for part in nodes.split(self.batch_size)])

    def _features(self, x: Tensor) -> Tensor:
        return self.embedding(x, self.batch_size)[1]

    def _latent(self, x: Tensor) -> Tensor:
        return ((self._features(x) - self.mean) / self.std).float()

    def _nodes(self, queries: Tensor, exclude: int | None = None) -> Tensor:
        """[N, 1 + 2 · neighbours, d]: each query, its nearest clean, its nearest adversarial references.

        ``exclude``: the kind of reference, 0 (clean) or 1, that the queries themselves are.
        """
        parts = [queries[:, None]]
        for kind, reference in enumerate(self.references):
            distance = torch.cdist(queries, reference)
            if kind == exclude:
                distance.fill_diagonal_(torch.inf)
            nearest = distance.topk(self.neighbours, dim=1, largest=False).indices
            parts.append(reference[nearest])
        return torch.cat(parts, dim=1)

    def _kinds(self, like: Tensor) -> Tensor:
        """[V, 3]: one-hot of query, clean, adversarial."""
        kinds = torch.tensor([0] + [1] * self.neighbours + [2] * self.neighbours, device=like.device)
        return F.one_hot(kinds, 3).to(like)

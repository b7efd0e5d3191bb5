"""Detectors: influence against retraining, areas under the curve on digits, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from awnet.attacks import FGSM
from awnet.data import Splits, load_dataset
from awnet.detectors import LNG, NNIF, Detector, LastLayer, RouterDetector
from awnet.detectors.base import Embedding
from awnet.evaluation import auc
from awnet.models import create_model


def test_influence_agrees_with_leave_one_out_retraining_of_a_logistic_regression() -> None:
    generator = np.random.default_rng(0)
    n, d, damping = 60, 4, 0.02
    x = generator.normal(size=(n, d))
    y = (x @ generator.normal(size=d) + generator.normal(size=n) > 0).astype(int)
    x_test, y_test = generator.normal(size=(3, d)), np.array([0, 1, 1])
    # the bias is a feature here, so that it is regularised as the other weights are
    augmented, augmented_test = np.c_[x, np.ones(n)], np.c_[x_test, np.ones(3)]

    def fit(keep: np.ndarray) -> np.ndarray:
        # scikit-learn minimises ½‖w‖² + C Σ loss; two softmax rows share the weight as ±w/2 each
        model = LogisticRegression(C=2 / (damping * n), fit_intercept=False, tol=1e-12, max_iter=10_000)
        return model.fit(augmented[keep], y[keep]).coef_[0]

    def losses(w: np.ndarray) -> np.ndarray:
        margin = (2 * y_test - 1) * (augmented_test @ w)
        return np.log1p(np.exp(-margin))

    everyone = np.arange(n)
    w = fit(everyone)
    left_out = np.stack([losses(fit(np.delete(everyone, i))) for i in range(n)], axis=1) - losses(w)[:, None]

    def logits(points: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([-points @ w / 2, points @ w / 2], axis=1))

    last = LastLayer(torch.from_numpy(x), logits(augmented), torch.from_numpy(y), damping)
    predicted = (
        last.helpfulness(torch.from_numpy(x_test), logits(augmented_test), torch.from_numpy(y_test)).numpy()
        / n
    )
    for image in range(3):
        assert spearmanr(predicted[image], left_out[image]).statistic > 0.9
        # first order in 1/n: the slope is 1 up to that
        slope = (predicted[image] @ left_out[image]) / (left_out[image] @ left_out[image])
        assert 0.8 < slope < 1.2


def test_conjugate_gradients_solve_the_hessian() -> None:
    generator = torch.Generator().manual_seed(0)
    features, logits = (torch.randn(40, k, generator=generator, dtype=torch.float64) for k in (3, 5))
    last = LastLayer(features, logits, logits.argmax(1), 1e-2)
    p, h = logits.softmax(1), torch.cat([features, torch.ones(40, 1, dtype=torch.float64)], 1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("nkl,nd,ne->kdle", middle, h, h).reshape(20, 20) / 40 + 1e-2 * torch.eye(20)
    b = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    want = torch.linalg.solve(hessian, b.reshape(2, 20).T).T.reshape(2, 5, 4)
    torch.testing.assert_close(last.solve(b), want, rtol=1e-4, atol=1e-6)  # the solver stops at 1e-6


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Splits, dict[str, Tensor]]:
    """A plain network on digits, and images of both kinds from the held-out and from the test part."""
    splits = load_dataset("digits")
    torch.manual_seed(0)
    model = create_model("resnet_tiny", in_channels=1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for epoch in range(3):
        for batch in splits.train.batches(64, shuffle=True, epoch=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.x), batch.y).backward()
            optimizer.step()
    model.eval()
    train = next(splits.train.subset(400).batches(400))
    images = {"x_train": train.x, "y_train": train.y}
    for name, part in (("held_out", splits.validation.subset(120)), ("test", splits.test.subset(120))):
        batch = next(part.batches(len(part)))
        images[name] = batch.x
        images[f"{name}_adversarial"] = FGSM(model, eps=part.threat_model.eps)(batch.x, batch.y)
    return model, splits, images


@pytest.mark.parametrize("kind", [NNIF, LNG])
def test_a_plain_networks_fgsm_images_are_detected(
    kind: type[Detector], digits: tuple[nn.Module, Splits, dict[str, Tensor]]
) -> None:
    model, _, images = digits
    detector = kind(model).fit(
        images["x_train"], images["y_train"], images["held_out"], images["held_out_adversarial"]
    )
    adversarial, clean = detector.score(images["test_adversarial"]), detector.score(images["test"])
    assert adversarial.dtype == torch.float64
    assert auc(adversarial.numpy(), clean.numpy()) > 0.9
    assert detector.score(images["test"][:0]).shape == (0,)
    # an image's score does not depend on its batch
    torch.testing.assert_close(detector.score(images["test"][:7]), clean[:7], rtol=1e-3, atol=1e-3)


def test_the_router_scores_by_the_difference_of_its_logits() -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", in_channels=1)
    x = torch.rand(5, 1, 8, 8)
    detector = RouterDetector(model, batch_size=2)
    with pytest.raises(RuntimeError, match="call fit first"):
        detector.score(x)
    detector.fit(x, torch.zeros(5, dtype=torch.int64), x, x)
    model.eval()
    logits = model.route(x).type_logits
    torch.testing.assert_close(
        detector.score(x), (logits[:, 0] - logits[:, 1]).double().detach(), rtol=1e-4, atol=1e-6
    )
    model.train()
    detector.score(x)
    assert model.training


def test_an_embedding_leaves_the_router_out_and_names_unknown_layers() -> None:
    model = create_model("awnet_tiny", in_channels=1).eval()
    x = torch.rand(3, 1, 8, 8)
    embedding = Embedding(model, x[:1])
    assert 1 <= len(embedding.layers) <= 5
    assert all(name.startswith("dynamic.") for name in embedding.layers)
    layers, features, logits = embedding(x, batch_size=2)
    assert [layer.shape[0] for layer in layers] == [3] * len(layers)
    assert features.shape == (3, 64)
    assert logits.shape == (3, 10)
    with pytest.raises(ValueError, match="the model's convolutions are"):
        Embedding(model, x[:1], layers=["nothing"])


def test_detectors_refuse_images_and_models_that_do_not_fit() -> None:
    plain = create_model("resnet_tiny", in_channels=1)
    x, y = torch.rand(12, 1, 8, 8), torch.zeros(12, dtype=torch.int64)
    with pytest.raises(ValueError, match="no router"):
        RouterDetector(plain)
    with pytest.raises(ValueError, match="no type head"):
        RouterDetector(create_model("awnet_tiny", in_channels=1, type_head=False)).fit(x, y, x, x)
    with pytest.raises(ValueError, match="x_train must hold"):
        NNIF(plain, neighbours=10).fit(x, y, x, x)
    with pytest.raises(ValueError, match="got 6 of at most most_train = 6"):
        NNIF(plain, neighbours=5, most_train=6).fit(x, y, x, x)
    with pytest.raises(ValueError, match=r"y_train must be in \[0, 10\), got labels from 11 to 11"):
        NNIF(plain, neighbours=2).fit(x, y + 11, x, x)
    with pytest.raises(TypeError, match="y_train must be int64"):
        LNG(plain).fit(x, y.int(), x, x)
    with pytest.raises(ValueError, match="more than neighbours"):
        LNG(plain, neighbours=12).fit(x, y, x, x)
    with pytest.raises(ValueError, match="12 labels"):
        NNIF(plain, neighbours=2).fit(x, y[:3], x, x)
    with pytest.raises(ValueError, match="clean is empty"):
        LNG(plain).fit(x, y, x[:0], x)
    with pytest.raises(ValueError, match="damping"):
        LastLayer(torch.rand(3, 2), torch.rand(3, 2), y[:3], damping=0)
    with pytest.raises(ValueError, match="end in a linear layer"):
        Embedding(nn.Conv2d(1, 2, 3), x[:1])

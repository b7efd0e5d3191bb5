"""Eq. 8 holds to first order on smooth networks, and exactly for ε = 0 and α = 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from awnet import use_backend
from awnet.analysis import weight_gaps
from awnet.models import create_model


def smooth_network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    return model, torch.rand(16, 2, 3, 3, dtype=torch.float64), torch.randint(4, (16,))


def test_the_gap_tends_to_the_prediction_as_eps_tends_to_zero() -> None:
    model, x, y = smooth_network()
    gaps = weight_gaps(model, x, y, eps=(1e-6, 1e-3, 1e-2, 0.3), adv_weights=(0.5,))
    errors = [abs(gap.measured / gap.predicted - 1) for gap in gaps]
    # the remainder is of order eps: what is left at 1e-6 is that and rounding (1e-16 / 1e-6)
    assert errors[0] < 1e-5
    assert 3 < errors[2] / errors[1] < 30
    assert gaps[0].cosine == pytest.approx(1, abs=1e-9)
    assert gaps[3].cosine < gaps[2].cosine < gaps[1].cosine


def test_without_perturbation_or_weight_there_is_no_gap_and_alpha_scales_it() -> None:
    model, x, y = smooth_network()
    gaps = {
        (g.eps, g.adv_weight): g
        for g in weight_gaps(model, x, y, eps=(0.0, 0.1), adv_weights=(0.0, 0.25, 1.0))
    }
    for alpha in (0.0, 0.25, 1.0):
        assert gaps[0.0, alpha].measured == gaps[0.0, alpha].predicted == 0
    assert gaps[0.1, 0.0].measured == 0
    assert gaps[0.1, 1.0].measured == pytest.approx(4 * gaps[0.1, 0.25].measured, rel=1e-12)
    assert gaps[0.1, 1.0].relative > 0


def test_an_aw_net_is_measured_by_the_reference_and_left_as_it_was() -> None:
    torch.manual_seed(1)
    model = create_model("awnet_tiny", in_channels=1).double().eval()
    x, y = torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.randint(10, (4,))
    with use_backend("reference"):
        (gap,) = weight_gaps(model, x, y, eps=(1e-6,), adv_weights=(1.0,))
    assert gap.measured == pytest.approx(gap.predicted, rel=1e-2)  # a ReLU may switch within 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("eps", "alphas", "message"),
    [((-0.1,), (0.5,), "eps must not be negative"), ((0.1,), (1.5,), "adv_weights must be in")],
)
def test_bad_values_are_refused(eps: tuple[float, ...], alphas: tuple[float, ...], message: str) -> None:
    model, x, y = smooth_network()
    with pytest.raises(ValueError, match=message):
        weight_gaps(model, x, y, eps=eps, adv_weights=alphas)

"""The threat model: a norm, and how far an attack may change an image in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from awnet.scalars import check_number, is_number

Norm = Literal["Linf", "L2", "L1"]
NORMS: tuple[Norm, ...] = get_args(Norm)

_USUAL = {
    "Linf": "8/255 on CIFAR-10, 0.3 on MNIST",
    "L2": "0.5 on CIFAR-10, 3 on ImageNet",
    "L1": "12 on CIFAR-10, 60 on ImageNet",
}
_SMALL = {"Linf": 0.0, "L2": 0.1, "L1": 1.0}  # smaller values are probably meant for another norm


def check_norm(norm: Any) -> Norm:
    """``norm`` in its usual spelling, ``Linf``, ``L2`` or ``L1``; the case of the letters does not matter."""
    for known in NORMS:
        if isinstance(norm, str) and norm.lower() == known.lower():
            return known
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


def norm_text(norm: str) -> str:
    """The norm for readers: ``L-infinity``, ``L2`` or ``L1``."""
    return "L-infinity" if norm == "Linf" else norm


def eps_text(eps: float) -> str:
    """ε as text: ``8/255`` if it is a whole number of 8-bit levels, else a decimal number."""
    decimal, levels = f"{eps:.4g}", eps * 255
    return f"{levels:.0f}/255" if len(decimal) > 4 and abs(levels - round(levels)) < 1e-4 else decimal


@dataclass(frozen=True)
class ThreatModel:
    """An attack may change an image by at most ``eps`` in ``norm``, within [0, 1].

    eps: radius of the ball in image units, above 0. In L-infinity, the largest change of a pixel, at most 1.
        In L2 the Euclidean norm, in L1 the sum of absolute values, of the change of the whole image.
    norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    The step sizes are fractions of eps, the same in every norm. In L-infinity they are the paper's for
    eps = 8/255.
    """

    eps: float
    norm: Norm = "Linf"

    def __post_init__(self) -> None:
        norm = check_norm(self.norm)
        if norm == "Linf" and is_number(self.eps) and 1 < self.eps <= 255:
            raise ValueError(
                f"eps must be in (0, 1], got {self.eps:g}: images are in [0, 1], so write "
                f"{self.eps:g}/255 if you count in 8-bit levels"
            )
        eps = check_number("eps", self.eps, above=0, **({"most": 1.0} if norm == "Linf" else {}))
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "eps", eps)

    def __str__(self) -> str:
        """For readers: ``L-infinity eps 8/255``, ``L2 eps 0.5``."""
        return f"{self.norm_text} eps {eps_text(self.eps)}"

    @property
    def norm_text(self) -> str:
        """The norm for readers: ``L-infinity``, ``L2`` or ``L1``."""
        return norm_text(self.norm)

    @property
    def train_step_size(self) -> float:
        """Step of the inner maximization in training, of pgd_sat and of CW: eps/4 (2/255 at 8/255)."""
        return self.eps / 4

    pgd_sat_step_size = cw_step_size = train_step_size

    @property
    def trades_train_step_size(self) -> float:
        """Step of TRADES' inner maximization: 0.007 at 8/255."""
        return self.eps * 0.007 / (8 / 255)

    @property
    def pgd_trades_step_size(self) -> float:
        """0.003 at 8/255."""
        return self.eps * 0.003 / (8 / 255)

    def implausible(self, pixels: int) -> str | None:
        """Why eps is probably a mistake for images of ``pixels`` values; None if it is plausible."""
        power = {"Linf": 0.0, "L2": 0.5, "L1": 1.0}[self.norm]
        if self.eps >= 0.5 * pixels**power:
            reason = "is so large that every image can become uniformly gray"
        elif self.eps < _SMALL[self.norm]:
            reason = "is so small that it may be meant for another norm"
        else:
            return None
        return f"eps {eps_text(self.eps)} in {self.norm_text} {reason}: usual values are {_USUAL[self.norm]}"

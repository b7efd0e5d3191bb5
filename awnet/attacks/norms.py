"""The geometry of the threat models: projections, steps, starts and sizes in L-infinity, L2 and L1.

Every attack and the training attack use one of these classes; see ``docs/equations.md`` for the projections.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from awnet import ops, rng
from awnet.data.threat_model import Norm, check_norm

Size = float | Tensor
"""One number for all images, or one per image ``[B]``."""

_TIE = 1e-12  # relative: sums in float64 that differ by less are equal


class Geometry(ABC):
    """Distances between images ``[B, C, H, W]`` in one norm, and the ball around an image.

    The ball is the set of images within ``eps`` of ``x`` whose values are in [0, 1]. Images are float32 or
    float64. No method waits for the device.
    """

    name: ClassVar[Norm]

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """The norm of each perturbation, float64 ``[B]``."""

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor, eps: Size) -> Tensor:
        """The point of the ball that is nearest to ``x_adv`` in the Euclidean distance.

        It is computed in float64 and rounded toward ``x``, so the result is in the ball, not only up to
        rounding. A point of the ball is returned unchanged.
        """

    def step(
        self,
        x_adv: Tensor,
        gradient: Tensor,
        x: Tensor,
        step_size: Size,
        eps: Size,
        *,
        cast: Tensor | None = None,
    ) -> Tensor:
        """A step of steepest ascent, of length ``step_size``, then the projection.

        Args:
            gradient: of any floating dtype. An image whose gradient is 0 does not move.
            cast: a tensor of another dtype that receives a copy of the result.
        """
        result = self.project(self._moved(x_adv, gradient, x, step_size), x, eps)
        if cast is not None:
            cast.copy_(result)
        return result

    @abstractmethod
    def _moved(self, x_adv: Tensor, gradient: Tensor, x: Tensor, step_size: Size) -> Tensor:
        """:meth:`step` without the projection."""

    @abstractmethod
    def uniform(self, key: int | Tensor, x: Tensor, index: Tensor, eps: float) -> Tensor:
        """x plus noise that is uniform in the norm's ball of radius ``eps``; not yet clipped to [0, 1]."""

    @abstractmethod
    def signs(self, signs: Tensor, eps: float) -> Tensor:
        """A perturbation of size ``eps`` that is equally large in every pixel, with the given signs."""

    def start(self, key: int | Tensor, x: Tensor, index: Tensor, eps: float) -> Tensor:
        """A random start: :meth:`uniform`, projected. ``key`` and ``index`` ``[B]`` determine the noise."""
        return self.project(self.uniform(key, x, index, eps), x, eps)

    def slack(self, x: Tensor) -> float:
        """The largest increase of a perturbation's size that rounding each pixel once can cause."""
        pixels = x[0].numel() if len(x) else 0
        return float(self.size(torch.full((1, pixels), 2.0**-24, dtype=torch.float64))[0]) if pixels else 0.0

    def inside(self, x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
        """Whether each image is in the ball up to rounding, bool ``[B]``; False where it holds a NaN."""
        in_box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        return in_box & (self.size(x_adv.double() - x.double()) <= eps * (1 + 1e-6) + self.slack(x))

    def confine(self, x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
        """Projects the images that are not :meth:`inside`; the others are returned with the same bits."""
        return torch.where(per_image(self.inside(x_adv, x, eps)), x_adv, self.project(x_adv, x, eps))


class Linf(Geometry):
    """The largest change of a pixel. The ball is a box; steps move every pixel by ± the step size."""

    name = "Linf"

    def size(self, delta: Tensor) -> Tensor:
        return delta.double().flatten(1).abs().amax(1)

    def project(self, x_adv: Tensor, x: Tensor, eps: Size) -> Tensor:
        radius = _spread(eps)
        low, high = (x - radius).clamp_(min=0), (x + radius).clamp_(max=1)
        return torch.maximum(torch.minimum(x_adv, high), low)

    def step(
        self,
        x_adv: Tensor,
        gradient: Tensor,
        x: Tensor,
        step_size: Size,
        eps: Size,
        *,
        cast: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(step_size, Tensor) and not isinstance(eps, Tensor):
            return ops.sign_step(x_adv, gradient, x, step_size, eps, cast=cast)
        return super().step(x_adv, gradient, x, step_size, eps, cast=cast)

    def _moved(self, x_adv: Tensor, gradient: Tensor, x: Tensor, step_size: Size) -> Tensor:
        return x_adv + _spread(step_size) * gradient.sign().to(x.dtype)

    def uniform(self, key: int | Tensor, x: Tensor, index: Tensor, eps: float) -> Tensor:
        noise = rng.uniform(key, index, x.shape[1:]).mul_(2).sub_(1)
        return torch.add(x, noise.to(x.dtype), alpha=eps)

    def signs(self, signs: Tensor, eps: float) -> Tensor:
        return signs * eps

    def inside(self, x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
        # each bound is rounded once
        slack = 2.0**-23
        low, high = (x - eps - slack).clamp(min=0), (x + eps + slack).clamp(max=1)
        return ((x_adv >= low) & (x_adv <= high)).flatten(1).all(1)

    def confine(self, x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
        return self.project(x_adv, x, eps)


class L2(Geometry):
    """The Euclidean norm of the change. Steps follow the gradient, scaled to the step size."""

    name = "L2"

    def size(self, delta: Tensor) -> Tensor:
        return delta.double().flatten(1).norm(dim=1)

    def project(self, x_adv: Tensor, x: Tensor, eps: Size) -> Tensor:
        """The change min(t·|δ|, room) in each pixel, with the largest t ≤ 1 of norm at most eps.

        ``room`` is how far the pixel can move within [0, 1].
        """
        delta, length, room = _offsets(x_adv, x)
        room = torch.minimum(room, length)
        ratio = torch.where(length > 0, room / length, 1.0)  # the factor t at which the pixel meets the box
        ratio, order = ratio.sort(1)
        bound = room.square().gather(1, order).cumsum(1)  # of the pixels at their bound
        free = length.square().gather(1, order).flip(1).cumsum(1).flip(1)  # of the pixel and the later ones
        free = torch.cat([free, torch.zeros_like(free[:, :1])], 1)
        square = _column(eps, length).square()
        # at the factor at which pixel k meets the box the size is sqrt(bound_k + ratio_k² free_k+1)
        count = (bound + ratio.square() * free[:, 1:] <= square).sum(1, keepdim=True)
        bound = torch.cat([torch.zeros_like(bound[:, :1]), bound], 1).gather(1, count)
        scale = ((square - bound).clamp(min=0) / free.gather(1, count)).sqrt()
        in_ball = room.square().sum(1, keepdim=True) <= square * (1 + _TIE)
        moved = torch.minimum(length * torch.where(in_ball, 1.0, scale.clamp(max=1)), room)
        return _rounded(x, delta.sign() * moved)

    def _moved(self, x_adv: Tensor, gradient: Tensor, x: Tensor, step_size: Size) -> Tensor:
        return x_adv + _spread(step_size) * self.unit(gradient, x)

    def unit(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient scaled to length 1, in x's dtype; 0 where it is 0."""
        flat = gradient.double().flatten(1)
        length = flat.norm(dim=1, keepdim=True)
        return torch.where(length > 0, flat / length, flat).to(x.dtype).view_as(x)

    def uniform(self, key: int | Tensor, x: Tensor, index: Tensor, eps: float) -> Tensor:
        # the first d coordinates of a uniform point on the sphere in d + 2 dimensions
        pixels = x[0].numel()
        noise = rng.normal(key, index, (pixels + 2,)).double()
        noise = noise[:, :pixels] / noise.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return x + (eps * noise).to(x.dtype).view_as(x)

    def signs(self, signs: Tensor, eps: float) -> Tensor:
        return signs * (eps / signs[0].numel() ** 0.5)


class L1(Geometry):
    """The sum of the absolute changes. Steps move the pixels of largest gradient to the bound of the box.

    Within the box the steepest ascent of length ``step_size`` fills the pixels in the order of their
    gradients' magnitude (Croce and Hein 2021, Proposition 3.2).
    """

    name = "L1"

    def size(self, delta: Tensor) -> Tensor:
        return delta.double().flatten(1).abs().sum(1)

    def project(self, x_adv: Tensor, x: Tensor, eps: Size) -> Tensor:
        """The change min(max(|δ| - λ, 0), room) in each pixel, with the smallest λ ≥ 0 of norm at most eps.

        ``room`` is how far the pixel can move within [0, 1]. See Croce and Hein 2021, Proposition 3.1.
        """
        delta, length, room = _offsets(x_adv, x)
        radius = _column(eps, length)
        # the size, as a function of λ, changes its slope at |δ| and at |δ| - room
        points, order = torch.cat([length, (length - room).clamp(min=0)], 1).sort(1, descending=True)
        weight = torch.where(order < length.shape[1], 1.0, -1.0).to(torch.float64)
        slope, offset = weight.cumsum(1), (weight * points).cumsum(1)
        count = (offset - points * slope <= radius).sum(1, keepdim=True)  # at λ = points
        last = (count - 1).clamp(min=0)
        threshold = (offset.gather(1, last) - radius) / slope.gather(1, last).clamp(min=1)
        in_ball = torch.minimum(length, room).sum(1, keepdim=True) <= radius * (1 + _TIE)
        threshold = torch.where(in_ball, 0.0, threshold.clamp(min=0))
        return _rounded(x, delta.sign() * torch.minimum((length - threshold).clamp(min=0), room))

    def _moved(self, x_adv: Tensor, gradient: Tensor, x: Tensor, step_size: Size) -> Tensor:
        flat, point = gradient.flatten(1).double(), x_adv.flatten(1).double()
        room = torch.where(flat > 0, 1 - point, point).clamp(min=0) * (flat != 0)
        order = flat.abs().argsort(dim=1, descending=True, stable=True)
        ordered = room.gather(1, order)
        left = _column(step_size, room) - (ordered.cumsum(1) - ordered)
        filled = torch.minimum(left.clamp(min=0), ordered)
        change = torch.zeros_like(room).scatter(1, order, filled) * flat.sign()
        return x_adv + change.to(x.dtype).view_as(x)

    def sparse_step(
        self, x_adv: Tensor, gradient: Tensor, x: Tensor, step_size: Tensor, eps: Size, share: Tensor
    ) -> Tensor:
        """A step of equal size in a ``share`` ``[B]`` of the pixels, those of largest gradient; for APGD."""
        flat = gradient.flatten(1)
        pixels = flat.shape[1]
        first = ((1 - share) * pixels).long().clamp(0, pixels - 1)
        threshold = flat.abs().sort(1).values.gather(1, first[:, None])
        signs = flat.sign() * (flat.abs() >= threshold)
        change = step_size[:, None] * signs / signs.abs().sum(1, keepdim=True).clamp(min=1)
        return self.project(x_adv + change.to(x.dtype).view_as(x), x, eps)

    def uniform(self, key: int | Tensor, x: Tensor, index: Tensor, eps: float) -> Tensor:
        # exponential magnitudes divided by their sum and one more, with random signs
        pixels = x[0].numel()
        noise = rng.uniform(key, index, (pixels + 1,)).double().mul_(2).sub_(1)
        magnitude = -torch.log1p(-noise.abs().clamp(max=1 - 2.0**-24))
        noise = noise.sign() * magnitude / magnitude.sum(1, keepdim=True).clamp(min=1e-30)
        return x + (eps * noise[:, :pixels]).to(x.dtype).view_as(x)

    def signs(self, signs: Tensor, eps: float) -> Tensor:
        return signs * (eps / signs[0].numel())


_GEOMETRIES: dict[Norm, Geometry] = {each.name: each for each in (Linf(), L2(), L1())}


def geometry(norm: str) -> Geometry:
    """The geometry of a norm: ``"Linf"``, ``"L2"`` or ``"L1"``."""
    return _GEOMETRIES[check_norm(norm)]


def per_image(values: Tensor) -> Tensor:
    """One value per image ``[B]`` as ``[B, 1, 1, 1]``."""
    return values[:, None, None, None]


def _spread(values: Size) -> Size:
    return per_image(values) if isinstance(values, Tensor) else values


def _column(values: Size, like: Tensor) -> Tensor:
    """``[B, 1]``, or 0-d for a number, in the dtype of ``like``; a number is not copied from the host."""
    if isinstance(values, Tensor):
        return values[:, None].to(like.dtype)
    return torch.full((), values, dtype=like.dtype, device=like.device)


def _offsets(x_adv: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """δ = x_adv - x, |δ|, and how far each pixel of x may move in δ's direction; float64 ``[B, pixels]``."""
    origin = x.flatten(1).double()
    delta = x_adv.flatten(1).double() - origin
    return delta, delta.abs(), torch.where(delta > 0, 1 - origin, origin)


def _rounded(x: Tensor, moved: Tensor) -> Tensor:
    """x + moved (float64 ``[B, pixels]``) in x's dtype, rounded toward x, in [0, 1]."""
    origin = x.flatten(1)
    result = (origin.double() + moved).to(x.dtype)
    too_far = (result.double() - origin.double()).abs() > moved.abs()
    result = torch.where(too_far, torch.nextafter(result, origin), result)
    # copied into x's strides, which choose a convolution's algorithm and so its rounding
    return torch.empty_like(x).copy_(result.clamp(0, 1).view(x.shape))

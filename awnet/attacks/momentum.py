"""Iterative attacks whose images transfer to other models: momentum, input diversity, smoothed gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.attacks.base import Target, check_count, check_size
from awnet.attacks.norms import per_image
from awnet.attacks.pgd import PGD
from awnet.data.threat_model import Norm
from awnet.scalars import check_flag, check_number


class MIFGSM(PGD):
    """MI-FGSM (Dong et al. 2018), with DI, TI, SI and NI as options, for transfer attacks.

    g ← decay·g + ∇/mean|∇|, then a step of steepest ascent for the gradient g. ∇ is the gradient of the
    cross-entropy at x_adv; the search starts at x. The images are meant for other models than ``model``: see
    :class:`awnet.attacks.TransferAttack`.

    Args:
        step_size: length of a step; eps/steps if None.
        decay: of the accumulated gradient; 0 for I-FGSM.
        diversity: DI (Xie et al. 2019): the probability that an image is shrunk to a random size, at least
            ``shrink`` of the image, and placed at a random position on black, before each gradient.
        shrink: the smallest relative size, above 0.
        kernel: TI (Dong et al. 2019): the gradient is smoothed by a Gaussian kernel of this odd width in
            pixels, with a standard deviation of a sixth of it. 1: no smoothing. None: the published 15 pixels
            at 299 × 299, scaled to the images, so 3 at 32 × 32 to 79 × 79, and 1 below 20 × 20.
        scales: SI (Lin et al. 2020): the gradient is the mean over x_adv / 2^i, i < scales.
        nesterov: NI (Lin et al. 2020): the gradient is taken at x_adv + decay·step_size·g, in L2 and L1 with
            g scaled to size 1.
        seed: keys the sizes and positions of DI, together with each sample's index.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        step_size: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        diversity: float = 0.0,
        shrink: float = 0.9,
        kernel: int | None = 1,
        scales: int = 1,
        nesterov: bool = False,
        seed: int = 0,
        target: Target | None = None,
    ) -> None:
        steps = check_count("steps", steps)
        super().__init__(
            model,
            eps=eps,
            norm=norm,
            step_size=eps / max(steps, 1) if step_size is None else step_size,
            steps=steps,
            random_start=None,
            seed=seed,
            target=target,
        )
        self.decay, self.diversity = check_size("decay", decay), check_number("diversity", diversity, 0, 1)
        self.shrink = check_number("shrink", shrink, most=1, above=0)
        self.kernel = None if kernel is None else check_count("kernel", kernel)
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.scales, self.nesterov = check_count("scales", scales), check_flag("nesterov", nesterov)
        if self.scales == 0:
            raise ValueError("scales must be at least 1, got 0")

    @property
    def settings(self) -> dict[str, Any]:
        diversity = {"diversity": self.diversity, "shrink": self.shrink} if self.diversity else {}
        return (
            super().settings
            | diversity
            | {"decay": self.decay, "kernel": self.kernel, "scales": self.scales, "nesterov": self.nesterov}
        )

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        goal = y if self.target is None else self.goal(x, y, index, largest_label)
        objective = self._objective(x, goal, largest_label)
        kernel = gaussian(self.kernel_width(x), x)
        x_adv, momentum = x, torch.zeros_like(x)
        for step in range(self.steps):
            point = self.lookahead(x_adv, momentum) if self.nesterov else x_adv
            gradient = torch.zeros_like(x)
            for scale in range(self.scales):

                def loss(images: Tensor, scale: int = scale, step: int = step) -> Tensor:
                    return objective(self.diverse(images * 0.5**scale, index, step))

                gradient = gradient + self.gradient(loss, point)
            gradient = smoothed(gradient, kernel)
            size = gradient.abs().flatten(1).mean(1).clamp(min=1e-30)
            momentum = self.decay * momentum + gradient / per_image(size)
            moved = self.geometry.step(x_adv, momentum, x, self.step_size, self.eps)
            # a step follows sign(NaN) = 0, so a NaN gradient would look like a robust model
            x_adv = torch.where(momentum.isfinite(), moved, torch.nan)
        return torch.where(per_image(goal == y), x, x_adv) if self.target is not None else x_adv

    def lookahead(self, x_adv: Tensor, momentum: Tensor) -> Tensor:
        """The point x_adv + decay·step_size·g of NI, at which the gradient is taken."""
        if self.norm != "Linf":
            momentum = momentum / per_image(self.geometry.size(momentum).clamp(min=1e-30).to(momentum.dtype))
        return x_adv + self.decay * self.step_size * momentum

    def diverse(self, x: Tensor, index: Tensor, step: int) -> Tensor:
        """Each image, with probability ``diversity``, shrunk and placed at random on black (bilinear)."""
        if self.diversity == 0:
            return x
        u = rng.uniform(rng.key("input diversity", self.seed, step), index, (4,)).to(x.dtype)
        size = self.shrink + (1 - self.shrink) * u[:, 0]
        size = torch.where(u[:, 3] < self.diversity, size, 1.0)
        offset = (2 * u[:, 1:3] - 1) * (1 - size)[:, None]  # of the center, in units of half an image
        theta = x.new_zeros(len(x), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
        theta[:, :, 2] = -offset / size[:, None]
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def kernel_width(self, x: Tensor) -> int:
        """Width of the kernel in pixels, at most that of the images."""
        side = min(x.shape[2:])
        width = 2 * round(side * 7 / 299) + 1 if self.kernel is None else self.kernel
        return min(width, side - (side + 1) % 2)


def gaussian(width: int, like: Tensor) -> Tensor:
    """A Gaussian kernel ``[width, width]`` of sum 1, with a standard deviation of width/6."""
    position = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    profile = torch.exp(-0.5 * (6 * position / width) ** 2)
    profile = profile / profile.sum()
    return torch.outer(profile, profile).to(like)


def smoothed(gradient: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of ``gradient`` [B, C, H, W] convolved with ``kernel``, with zeros around the image."""
    if kernel.numel() == 1:
        return gradient
    channels = gradient.shape[1]
    weight = kernel.expand(channels, 1, *kernel.shape)
    return F.conv2d(gradient, weight, padding=kernel.shape[0] // 2, groups=channels)

"""The fused layer inside a module of your own: forward, gradient check, torch.compile, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import awnet


class GatedConv(nn.Module):
    """A 3×3 convolution whose filters a tiny gate rescales for each image, then batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_channels, out_channels)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3) / (3 * in_channels**0.5))
        self.norm_weight = nn.Parameter(torch.ones(1, out_channels))  # [1, C]: one plain batch norm
        self.norm_bias = nn.Parameter(torch.zeros(1, out_channels))
        self.register_buffer("mean", torch.zeros(1, out_channels))
        self.register_buffer("var", torch.ones(1, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = 2 * self.gate(x.mean((2, 3))).sigmoid()  # [B, C_out], one factor per image and filter
        return awnet.functional.aw_conv2d(
            x, self.weight, scale, self.norm_weight, self.norm_bias, self.mean, self.var,
            training=self.training, padding=1,
        )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    layer, x = GatedConv(3, 8), torch.rand(4, 3, 16, 16)
    print("output:", list(layer(x).shape))

    # The gradients are written by hand. Check them against finite differences, in float64.
    wide = GatedConv(2, 3).double().eval()
    image = torch.rand(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    print("gradcheck:", torch.autograd.gradcheck(wide, (image,)))

    # One graph, no breaks. The default backend of torch.compile, inductor, needs a C++ compiler.
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    print("compiled differs by:", (compiled(x) - layer(x)).abs().max().item())

    # Which implementation runs, and why each other one does not.
    scale = torch.ones(4, 8)
    arguments = (x, layer.weight, scale, layer.norm_weight, layer.norm_bias, layer.mean, layer.var)
    print(awnet.explain(awnet.functional.aw_conv2d, *arguments, padding=1))
    with awnet.use_backend("reference"):
        print("the paper's equations differ by:", (layer(x) - compiled(x)).abs().max().item())


if __name__ == "__main__":
    main()

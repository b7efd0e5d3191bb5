"""Arguments that the public functions refuse, with the reason."""

from __future__ import annotations

import pytest
import torch

from awnet import ops

# --- bad input

X, W = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)


SCALE = torch.ones(2, 8)


TABLES = {n: torch.ones(2, 8) for n in ("bn_weight", "bn_bias", "running_mean", "running_var")}


GOOD = {"input": X, "weight": W, "filter_scale": SCALE, **TABLES, "p_clean": torch.ones(2), "padding": 1}


META = torch.device("meta")


BAD = {
    "input not a tensor": ({"input": [1.0]}, TypeError, "input must be a torch.Tensor, got list"),
    "input of three dimensions": ({"input": X[0]}, ValueError, r"input must have 4 dimensions, got shape \[4, 6, 6\]"),
    "input of integers": ({"input": X.long()}, TypeError, "input must be float32.*got torch.int64"),
    "input complex": ({"input": X.cfloat()}, TypeError, "got torch.complex64"),
    "input sparse": ({"input": X.to_sparse()}, TypeError, "dense"),
    "weight of other dtype": ({"weight": W.double()}, TypeError, "weight has dtype torch.float64, input torch.float32"),
    "weight on another device": ({"weight": W.to(META)}, ValueError, "weight is on meta, input on cpu"),
    "weight of three dimensions": ({"weight": W[0]}, ValueError, "weight must have 4 dimensions"),
    "weight for other channels": ({"weight": W[:, :3]}, ValueError, r"input must have 3 channels .*, got 4"),
    "weight empty": ({"weight": W[:0]}, ValueError, "weight must not be empty"),
    "kernel larger than the input": ({"input": X[:, :, :1], "padding": 0}, ValueError, "too small"),
    "groups that do not divide": ({"groups": 3}, ValueError, "groups must be at least 1 and divide"),
    "groups zero": ({"groups": 0}, ValueError, "groups must be at least 1"),
    "groups not an int": ({"groups": 1.0}, TypeError, "groups must be an int, got float"),
    "stride zero": ({"stride": 0}, ValueError, "stride must be at least 1"),
    "stride of three": ({"stride": (1, 1, 1)}, TypeError, "stride must be an int or a pair"),
    "padding negative": ({"padding": -1}, ValueError, "padding must be at least 0"),
    "padding by name": ({"padding": "same"}, TypeError, "padding must be an int or a pair of ints, got 'same'"),
    "dilation zero": ({"dilation": (1, 0)}, ValueError, "dilation must be at least 1"),
    "scale for other filters": ({"filter_scale": SCALE[:, :7]}, ValueError, r"filter_scale must have shape \[B, C_out\] = \[2, 8\], got \[2, 7\]"),
    "scale for another batch": ({"filter_scale": SCALE[:1]}, ValueError, r"filter_scale .* got \[1, 8\]"),
    "scale of integers": ({"filter_scale": SCALE.int()}, TypeError, "filter_scale must be a floating-point tensor"),
    "scale not a tensor": ({"filter_scale": 1.0}, TypeError, r"filter_scale must be a torch.Tensor \[B, C_out\], got float"),
    "scale on another device": ({"filter_scale": SCALE.to(META)}, ValueError, "filter_scale is on meta"),
    "batch norm of three rows": ({"bn_weight": torch.ones(3, 8)}, ValueError, "bn_weight must have 1 or 2 rows"),
    "batch norm of one dimension": ({"bn_weight": torch.ones(8)}, ValueError, r"bn_weight must have shape \[2, C\] or \[1, C\] = \[1 or 2, 8\], got \[8\]"),
    "batch norm for other channels": ({"running_mean": torch.ones(2, 7)}, ValueError, "running_mean must have shape"),
    "bias unlike weight": ({"bn_bias": torch.ones(1, 8)}, ValueError, "bn_weight and bn_bias must have one shape"),
    "variance unlike mean": ({"running_var": torch.ones(1, 8)}, ValueError, "running_mean and running_var must have one shape"),
    "p missing": ({"p_clean": None}, ValueError, "p_clean is missing"),
    "p of another batch": ({"p_clean": torch.ones(3)}, ValueError, r"p_clean must have shape \[B\] = \[2\], got \[3\]"),
    "p of booleans": ({"p_clean": torch.ones(2).bool()}, TypeError, "p_clean must be a floating-point tensor"),
    "kind in testing": ({"is_clean": torch.ones(2).bool()}, ValueError, "is_clean is for train mode only"),
    "kind missing in training": ({"training": True, "p_clean": None}, ValueError, "is_clean is missing"),
    "p in training": ({"training": True, "is_clean": torch.ones(2).bool()}, ValueError, "p_clean is for eval mode only"),
    "kind of floats": ({"training": True, "p_clean": None, "is_clean": torch.ones(2)}, TypeError, "is_clean must be bool"),
    "training not a bool": ({"training": 1}, TypeError, "training must be a bool, got int"),
    "eps zero": ({"eps": 0.0}, ValueError, "eps must be a positive number, got 0.0"),
    "momentum out of range": ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
    "momentum None": ({"momentum": None}, TypeError, "momentum must be a number or a tensor"),
    "momentum of other rows": ({"momentum": torch.ones(3)}, ValueError, "momentum must be a number or have one value per row"),
    "residual of another shape": ({"residual": X}, ValueError, r"residual must have the output's shape \[2, 8, 6, 6\]"),
    "residual of another dtype": ({"residual": torch.ones(2, 8, 6, 6).double()}, TypeError, "residual has dtype torch.float64"),
    "activation unknown": ({"activation": "tanh"}, ValueError, 'must be "relu", "silu", "gelu", "leaky_relu" or None, got \'tanh\''),
    "backend unknown": ({"backend": "fastest"}, ValueError, "backend: unknown backend 'fastest'; available are cuda, triton"),
    "backend not a name": ({"backend": 3}, TypeError, "backend must be a backend's name or None, got int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_aw_conv2d_refuses_bad_arguments_with_the_reason(case: str) -> None:
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        ops.aw_conv2d(**(GOOD | change))


def test_other_functions_refuse_bad_arguments_with_the_reason() -> None:
    tables = [torch.ones(2, 4)] * 4
    with pytest.raises(ValueError, match="p_clean is missing"):
        ops.mix_batch_norm(X, *tables)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.mix_batch_norm(X, torch.ones(2, 5), *tables[1:], p_clean=torch.ones(2))
    with pytest.raises(ValueError, match="at least one pixel"):
        ops.mix_batch_norm(X[:, :, :0], *tables, p_clean=torch.ones(2))
    with pytest.raises(ValueError, match="filter_scale must have shape"):
        ops.filter_scaled_conv2d(X, W, torch.ones(3, 8))
    ops.aw_conv2d(**GOOD)  # the good call that every bad one changes

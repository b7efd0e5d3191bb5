"""Conversion of timm's networks: the table in docs/models.md.

``python tests/nn/test_convert_timm.py`` converts each of them and writes the table.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.extras import optional
from torch import nn

from awnet.nn import AWConv2d, AWNet, FilterScaledConv2d, convert

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- timm: begin -->\n", "<!-- timm: end -->\n"

NAMES = """
resnet18 resnet26d resnet50 resnext50_32x4d wide_resnet50_2 seresnet18 legacy_seresnet18 skresnet18
res2net50_26w_4s ecaresnet26t resnetv2_50 resnetblur18 vgg11_bn vgg11 efficientnet_b0 tf_efficientnet_b0
mobilenetv2_050 mnasnet_small lcnet_050 regnetx_002 repvgg_a0 mobileone_s0 convnext_atto darknet53 dla34
hrnet_w18_small xception41 selecsls42b mixnet_s inception_v3 nfnet_f0 hardcorenas_a fbnetc_100 levit_128s
resnest14d edgenext_xx_small vit_tiny_patch16_224
densenet121 ghostnet_100 tinynet_e rexnet_100 cspresnet50 cspdarknet53 darknetaa53 cs3darknet_s
ese_vovnet19b_dw semnasnet_075 spnasnet_100 efficientnetv2_rw_t tf_mobilenetv3_small_075 mobilenetv3_rw
mobilenetv4_conv_small gernet_s dpn48b inception_v4 convmixer_768_32 regnety_002
repghostnet_050 fasternet_t0 visformer_tiny repvit_m0_9 fastvit_t8 mobilevit_xxs starnet_s1
hgnetv2_b0 efficientvit_b0 efficientvit_m0
""".split()  # noqa: SIM905 (a literal list would be 70 lines)
OPTIONS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 4},
    "visformer_tiny": {"img_size": 64},
}
SIDES = {
    "vit_tiny_patch16_224": 32,
    **dict.fromkeys(("inception_v3", "inception_v4"), 96),
    "levit_128s": 224,
}
REFUSED = {  # with the reason in the table
    **dict.fromkeys(("vgg11", "convnext_atto", "nfnet_f0", "edgenext_xx_small"), "has no nn.BatchNorm2d"),
    "vit_tiny_patch16_224": "has no nn.BatchNorm2d",
    "efficientvit_b0": "torch.autocast",
}


def side_of(name: str) -> int:
    return SIDES.get(name, 64)


def original_of(name: str) -> nn.Module:
    """timm's network for 10 classes, in eval mode, with random batch norms."""
    torch.manual_seed(0)
    options = {"num_classes": 10, **OPTIONS.get(name, {})}
    module: nn.Module = optional("timm").create_model(name, **options)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.2)
            nn.init.normal_(norm.bias, 0, 0.1)
    return module.eval()


def converted(name: str) -> tuple[AWNet, float]:
    """The converted network, and its logits' largest difference from the original's, over the largest logit."""
    original = original_of(name)
    network = convert(
        original, image_size=side_of(name), router_widths=(4, 8)
    ).eval()  # small: it is as exact
    x = torch.rand(3, 3, side_of(name), side_of(name))
    with torch.no_grad():
        expected = original(x)
        return network, float((network(x) - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_timm_converts_and_trains(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
            convert(original_of(name), image_size=side_of(name))
        return
    network, difference = converted(name)
    # float32: sums in another order and folded batch norms
    assert difference < 1e-4
    x, is_clean = torch.rand(4, 3, side_of(name), side_of(name)), torch.arange(4) < 2
    network.train()
    routing = network.route(x)
    loss = F.cross_entropy(network(x, is_clean=is_clean, routing=routing), torch.arange(4))
    assert routing.type_logits is not None
    (loss + F.cross_entropy(routing.type_logits, is_clean.long())).backward()
    for parameter in network.dynamic.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert sum(p.grad is not None for p in network.dynamic.parameters()) > 0.9 * len(
        list(network.dynamic.parameters())
    )


def test_the_table_in_the_documentation_has_these_networks() -> None:
    rows = re.findall(r"^\| `(\w+)` .*", DOCUMENT.read_text().split(BEGIN)[1].split(END)[0], re.MULTILINE)
    assert rows == sorted(set(NAMES) - set(REFUSED)) + sorted(REFUSED)


def row(name: str) -> str:
    """One line of the table."""
    if name in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
            convert(original_of(name), image_size=side_of(name))
        reason = "has no batch norm" if "BatchNorm2d" in REFUSED[name] else f"runs under `{REFUSED[name]}`"
        return f"| `{name}` | {side_of(name)} | refused: {reason} | | | |\n"
    network, difference = converted(name)
    layers = list(network.dynamic.modules())
    fused = sum(isinstance(layer, AWConv2d) for layer in layers)
    dynamic = sum(
        layer.dynamic if isinstance(layer, AWConv2d) else isinstance(layer, FilterScaledConv2d)
        for layer in layers
    )
    size = sum(p.numel() for p in network.dynamic.parameters()) / 1e6
    return f"| `{name}` | {side_of(name)} | {difference:.0e} | {dynamic} | {fused} | {size:.1f} M |\n"


def write(rows: list[str]) -> None:
    """Replaces the table in the documentation."""
    head = "| name | side | difference | dynamic | fused | parameters |\n|---|---|---|---|---|---|\n"
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + head + "".join(rows) + END + rest.split(END)[1])


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in [*sorted(set(NAMES) - set(REFUSED)), *sorted(REFUSED)]:
        rows.append(row(name))
        print(rows[-1], end="", flush=True)
        gc.collect()
    write(rows)


if __name__ == "__main__":
    main()

"""A timm ResNet becomes an AW-Net with the same logits, which is then trained and stored."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

import awnet


def main(
    out: str | Path = "runs/converted", name: str = "resnet18", epochs: int = 4, images: int = 512
) -> None:
    torch.manual_seed(0)
    # One input channel, for gray images. pretrained=True works as well.
    resnet = timm.create_model(name, num_classes=10, in_chans=1, pretrained=False)
    model = awnet.convert(resnet, router_widths=(16, 32, 64), image_size=32)

    x = torch.rand(2, 1, 32, 32)
    difference = (model.eval()(x) - resnet.eval()(x)).abs().max().item()
    print(f"{name}: {sum(p.numel() for p in resnet.parameters()):,} parameters")
    print(f"its AW-Net: {sum(p.numel() for p in model.parameters()):,}, logits differ by {difference:.1e}")

    # Any module that maps images in [0, 1] to logits can be trained.
    splits = awnet.load_dataset("digits")
    splits = splits._replace(train=splits.train.subset(images), validation=splits.validation.subset(64))
    recipe = awnet.training.recipe_for("pgd_at", "digits", epochs=epochs, attack_steps=2)
    result = awnet.train(recipe, model, splits, out, overwrite=True)
    print(result)

    # A converted network has no name in the registry: store its weights, and convert again to load them.
    torch.save(result.model.state_dict(), Path(out) / "converted.pt")
    again = awnet.convert(resnet, router_widths=(16, 32, 64), image_size=32)
    again.load_state_dict(torch.load(Path(out) / "converted.pt"))
    print(awnet.evaluate(again, splits.test, attacks=["fgsm"], limit=100))


if __name__ == "__main__":
    main()

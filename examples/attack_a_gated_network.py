"""Attack a network with a router: the standard attacks, those that aim at the router, and their union."""

from __future__ import annotations

from pathlib import Path

import torch

import awnet
from awnet.attacks import CW, PGD, Suite, named_attack


def main(out: str | Path = "runs/gated", epochs: int = 4, images: int = 128, budget: str = "smoke") -> None:
    splits = awnet.load_dataset("digits")
    recipe = awnet.training.recipe_for("pgd_at", "digits", epochs=epochs)
    model = awnet.train(recipe, "awnet_tiny", splits, out, overwrite=True).model
    x, y, index = next(splits.test.batches(images))
    threat = splits.test.threat_model

    # Attacks are objects. index keys the random start of each image, whatever batch it is in.
    attacks = {
        "PGD-20": PGD(model, eps=threat.eps, step_size=threat.eps / 4, steps=20),
        "CW": CW(model, eps=threat.eps, step_size=threat.eps / 4),
    }

    # By name, with step sizes from the threat model. These know of the router:
    #   joint      cross-entropy plus a multiple of the router's margin
    #   two_phase  first fool the router, then the classifier
    #   forced     attack with the router's decision fixed, evaluate with the router free
    #   softened   attack through a router of higher temperature
    suite = Suite(classes=10, budget=budget)
    for name in ("joint", "two_phase", "forced", "softened"):
        attacks[name] = named_attack(name, model, threat, suite=suite)

    def report(name: str, images: torch.Tensor) -> None:
        with torch.no_grad():
            right, p_clean = model(images).argmax(1) == y, model.route(images).p_clean
        print(f"{name:10} {100 * right.float().mean():5.1f} % right, router: p_clean {p_clean.mean():.2f}")

    report("clean", x)
    for name, attack in attacks.items():
        report(name, attack(x, y, index=index))

    # The number to quote is the worst case over all of them, image by image.
    worst = awnet.evaluate(model, splits.test, attacks=["union"], budget=budget, limit=images).union
    assert worst is not None
    print(f"union      {100 * worst.robust_accuracy:5.1f} % right; broken first by {worst.broken_first_by}")


if __name__ == "__main__":
    main()

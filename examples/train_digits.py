"""Adversarial training from Python: a recipe, a run folder, resuming, and a comparison of two networks."""

from __future__ import annotations

from pathlib import Path

import awnet
from awnet.training import read_log, recipe_for


def main(out: str | Path = "runs/train-digits", epochs: int = 12, limit: int | None = None) -> None:
    out = Path(out)
    splits = awnet.load_dataset("digits", seed=0)
    print(f"{len(splits.train)} training images, L-infinity, eps {splits.train.threat_model.eps}")

    # A recipe holds every setting. list_recipes() names them; unknown settings are errors.
    recipe = recipe_for("pgd_at", "digits", epochs=epochs, attack_steps=5)

    results = {}
    for name in ("awnet_tiny", "resnet_tiny"):
        # resume=True continues a run that was stopped, by Ctrl-C or kill -9, and loads a finished one.
        results[name] = awnet.train(recipe, name, splits, out / name, seed=0, resume=True)
        print(results[name])

    # The log is one JSON object per line.
    for record in read_log(out / "awnet_tiny", "epoch"):
        print(
            f"epoch {record['epoch']}: loss {record['total']:.3f}, {record['images_per_second']:.0f} images/s"
        )

    # Both networks on the same test images; differences are paired by image.
    attacks = ["fgsm", "pgd_sat", "cw"]
    static = awnet.evaluate(results["resnet_tiny"].model, splits.test, attacks, limit=limit)
    report = awnet.evaluate(
        results["awnet_tiny"].model,
        splits.test,
        attacks,
        limit=limit,
        out=out / "awnet_tiny",  # writes evaluations/default/report.html there
        compared_with={"resnet_tiny": static},
    )
    print(report)
    for name, difference in report.compared_with["resnet_tiny"].attacks.items():
        low, high = difference.interval_95
        print(f"{name}: {100 * difference.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")


if __name__ == "__main__":
    main()

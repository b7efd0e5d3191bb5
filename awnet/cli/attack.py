"""``awnet attack``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from awnet.cli.options import Maybe, check_free, print_text
from awnet.cli.run_options import RunOptions

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(kw_only=True)
class Attack(RunOptions):
    """Generate adversarial images against a model and save them."""

    attack: str = "pgd_sat"
    """Name of the attack, see `awnet info`; targeted ones as for `awnet evaluate`: cw-random, pgd_sat-3."""
    eot: Maybe[int] = None
    """Forward passes over which the attack averages the gradient of a stochastic model. Default: 20 if two
    forward passes of the same images differ."""
    out: Path
    """The .npz file to write: x_adv (float32 [N, C, H, W] in [0, 1]), y, index (each image's position in the
    published order), prediction, and provenance (JSON text)."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self, console: Console) -> None:
        from awnet.attacks import Suite, named_attack
        from awnet.attacks.npz import attack_dataset, save_npz
        from awnet.attacks.probe import first_logits
        from awnet.devices import resolve_device
        from awnet.evaluation.randomness import IMAGES, examine
        from awnet.scalars import check_integer

        check_free(self.out, overwrite=self.overwrite)
        model, dataset = self.load(console)
        if self.limit is not None:
            dataset = dataset.subset(self.limit)
        dataset = dataset.to(resolve_device(self.device))
        if self.eot is not None:
            check_integer("eot", self.eot, 1)
        x = next(dataset.batches(min(self.batch_size, IMAGES))).x
        first_logits(model, x[:1], dataset.num_classes, dataset.name)
        examined = examine(model, x, eot=self.eot, budget="standard", seed=self.seed)
        for flag in examined.flags:
            print_text(console, f"note: {flag}")
        suite = Suite(classes=dataset.num_classes)
        attack = named_attack(self.attack, examined.module, dataset.threat_model, seed=self.seed, suite=suite)
        images = attack_dataset(attack, dataset, self.batch_size)
        save_npz(self.out, images, {"model": self.source, "attack": self.attack, "seed": self.seed})
        print_text(
            console,
            f"{len(images.labels)} images of {dataset.name} {dataset.split}, {self.attack}, "
            f"{dataset.threat_model}: {100 * images.accuracy:.1f} % still classified correctly",
        )
        print_text(console, f"written to {self.out}")

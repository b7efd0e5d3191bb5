"""``awnet reproduce``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from awnet.cli.options import Maybe, Several

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(kw_only=True)
class Reproduce:
    """Run a whole experiment: train, attack, compare, print the table."""

    what: Positional[str]
    """digits: AW-Net and two static baselines on scikit-learn's digits, a few minutes on two CPU cores.
    table1 … table11, fig1, fig3, fig4, fig5: the paper's, next to its published results. weight_gap: its
    Section 3.2. systems: small dynamic networks of several kinds at equal training cost. gated: gated
    defenses on digits, their papers' attacks against the union. recipes: ingredients of training recipes, one
    at a time, on small images. presets: AW-Net and its static twins under each preset."""
    data: Maybe[str] = None
    """For table3 only: digits runs the ablation on digits instead of CIFAR-10."""
    budget: Literal["smoke", "cpu", "gpu-30min", "paper"] = "smoke"
    """Compute budget of a table or figure. smoke takes a minute and shows that the command works, on
    generated images if the data set is missing; cpu takes hours; gpu-30min takes half an hour per network;
    paper uses the paper's settings."""
    out: Maybe[Path] = None
    """Output folder. Default: runs/digits; runs/paper for tables and figures, which share networks."""
    data_dir: Maybe[Path] = None
    """For tables and figures: folder of the data sets. Default: `data`."""
    resume: bool = False
    """Resume the experiment in the output folder, if there is one; Ctrl-C saves a checkpoint. Tables and
    figures always resume."""
    overwrite: bool = False
    """Replace the experiment in the output folder (digits only)."""
    seed: int = 0
    """Seed of weights, order of images, augmentation, attacks and choice of held-out images. Not for recipes
    and presets, which take --seeds."""
    seeds: Several[int] = ()
    """Run digits, recipes or presets with each of these seeds instead of --seed, and compare over the
    trainings. Default: 0 1 2 for recipes and presets. Default output folder for digits: runs/digits-seeds."""
    networks: Annotated[tuple[str, ...], arg(metavar="LABEL=RUN [LABEL=RUN ...]", help_behavior_hint="")] = ()
    """Fill a table or figure from finished run folders, each as LABEL=RUN with the table's name of the
    system, for example AW-Net=runs/a. Other systems are left out. In place of the budget's recipe, the table
    lists how these were trained; the budget's number of test images and attack budget apply."""
    test_limit: Maybe[int] = None
    """For tables: number of test images, instead of the budget's."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …. Default: the GPU if there is one."""

    def run(self, console: Console) -> None:
        from awnet.reproduce import reproduce, run_digits, run_digits_seeds

        if self.data is not None and (self.what != "table3" or self.data != "digits"):
            raise ValueError(f"data is an option of table3, and must be digits; got {self.what!r} with it")
        networks = dict(_label_and_run(text) for text in self.networks)
        if self.what == "digits":
            if networks or self.test_limit is not None:
                raise ValueError("networks and test-limit are options of tables and figures, not of digits")
            flags: Any = {"resume": self.resume, "overwrite": self.overwrite, "device": self.device}
            if self.seeds:
                run_digits_seeds(self.out or Path("runs/digits-seeds"), self.seeds, **flags)
            else:
                run_digits(self.out or Path("runs/digits"), seed=self.seed, **flags)
            return
        if self.overwrite:
            raise ValueError("overwrite is an option of digits; tables share networks, so choose another out")
        reproduce(
            self.what if self.data is None else f"{self.what}-{self.data}",
            self.budget,
            out=self.out or Path("runs/paper"),
            data_dir=self.data_dir,
            seed=self.seed,
            seeds=self.seeds,
            networks=networks,
            test_limit=self.test_limit,
            device=self.device,
        )


def _label_and_run(text: str) -> tuple[str, str]:
    label, equals, run = text.partition("=")
    if not (label and equals and run):
        raise ValueError(f"networks must be given as LABEL=RUN, for example AW-Net=runs/a, got {text!r}")
    return label, run

"""``awnet evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from awnet.cli.options import Maybe, Several, print_text
from awnet.cli.run_options import RunOptions

if TYPE_CHECKING:
    from rich.console import Console

    from awnet.distributed import Ranks
    from awnet.evaluation import Report


@dataclass(kw_only=True)
class Evaluate(RunOptions):
    """Evaluate a trained model on clean and adversarial images: table, report and figures.

    With several norms, such as `--norm Linf L2 L1 --eps 8/255 0.5 12`, each is evaluated, and the worst case
    of each image over the norms.

    On several GPUs or machines: `torchrun --nproc_per_node 8 -m awnet evaluate …`. Each rank takes whole
    batches, so the results equal those of one GPU."""

    several_norms: ClassVar[bool] = True

    attacks: tuple[str, ...] = ("fgsm", "pgd_sat", "pgd_trades", "cw")
    """Names of attacks, see `awnet info`. aa is AutoAttack; union is the worst case over all of them and
    more. Targeted: fgsm, pgd_sat, pgd_trades, cw, apgd_ce or apgd_t, followed by -random, -least_likely or
    the number of a class: cw-random, pgd_sat-3. transfer-NAME replays the images that attack NAME makes on
    --surrogates."""
    budget: Literal["smoke", "short", "standard"] = "standard"
    """Budget of the attacks beyond the first four. smoke takes seconds and only shows that they run. short is
    for small networks on a CPU; the standard budget may break images that it leaves robust."""
    queries: Maybe[int] = None
    """Queries of Square, within aa and union. Default: the budget's, 5000 for standard."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 may be faster and is for experiments: its report has no headline accuracy."""
    filter: Maybe[Literal["bfloat16"]] = None
    """bfloat16 runs each attack in bfloat16 first, and in float32 on the images that survive. All images are
    classified in float32. It saves time if bfloat16 is fast and the robust accuracy is low."""
    capture: Literal["auto", "true", "false"] = "false"
    """Replay the steps of pgd_sat, pgd_trades and cw as CUDA graphs; the images are the same. It may be
    faster with small networks, small batches or bfloat16. auto: on CUDA, if the model can be copied."""
    eot: Maybe[int] = None
    """Forward passes over which attacks average the gradient of a stochastic model (expectation over
    transformation). Default: the budget's, 20 for standard. A model is stochastic if two forward passes of
    the same images differ; more than 1 treats any model as stochastic."""
    parts: Literal["auto", "yes", "no"] = "auto"
    """Measure a network with a router in parts: p forced to 0 and 1, the filter scales frozen, the router
    attacked alone, the branches of MixBN swapped. It takes about 240 forward and 220 backward passes of at
    most 200 images at the standard budget. auto: for a network with a router, with the attack union."""
    name: str = "default"
    """Name of the evaluation; it is written to RUN/evaluations/NAME."""
    out: Maybe[Path] = None
    """Folder in which evaluations/NAME is written. Default: the run folder; runs/MODEL for a model from
    another source."""
    compare_with: Several[Path] = ()
    """Other runs, evaluated under the same name, to add paired differences with."""
    teachers: Maybe[tuple[str, ...]] = None
    """The teachers that the run was trained with, in the order clean, robust, given like MODEL. Default: the
    paths in the run's record; a teacher that was not a path must be given again. Their weights must match
    the record."""
    surrogates: Several[str] = ()
    """Other models, given like MODEL, whose adversarial images the union and transfer-NAME replay."""
    allow_missing: bool = False
    """Leave out attacks that need a missing teacher, and mark the report's headline as incomplete."""

    def run(self, console: Console) -> None:
        from awnet.devices import resolve_device
        from awnet.distributed import joined

        # a rank that has finished its batches waits for the others, which may take hours
        with joined(resolve_device(self.device), timeout=timedelta(days=30)) as ranks:
            console.quiet = console.quiet or ranks.rank > 0
            self._evaluate(console, ranks)

    def _evaluate(self, console: Console, ranks: Ranks) -> None:
        from awnet.attacks.probe import first_logits
        from awnet.attacks.registry import check_attack_name
        from awnet.evaluation import Report, comparison_table, evaluate, evaluate_norms
        from awnet.files import make_folder
        from awnet.models.sources import load_model, source_name
        from awnet.run_folder import RunFolder

        for attack in self.attacks:
            check_attack_name(attack)
        for run in self.compare_with:
            if not run.is_dir():
                raise FileNotFoundError(f"compare-with takes run folders; {run} is not a folder")
        others = {str(run): Report.load(run / "evaluations" / self.name) for run in self.compare_with}
        model, dataset = self.load(console, ranks.device)
        x = next(dataset.batches(1, device=ranks.device)).x
        first_logits(model, x, dataset.num_classes, dataset.name)
        last = self.path == self.folder and self.checkpoint == "last"
        out = make_folder(self.out or self.results_folder)
        surrogates = {source_name(one): load_model(one, ranks.device) for one in self.surrogates}
        names = "name batch_size seed limit budget queries precision filter eot teachers allow_missing"
        options: dict[str, Any] = {option: getattr(self, option) for option in names.split()}
        options |= {
            "capture": {"auto": "auto", "true": True, "false": False}[self.capture],
            "surrogates": surrogates,
            "parts": {"auto": None, "yes": True, "no": False}[self.parts],
            "progress": not console.quiet,
            "run": self.folder if self.is_run else None,
            "out": out,
            "compared_with": others,
            "selected_on": "nothing: the last checkpoint" if last else None,
            "ranks": ranks,
        }
        with RunFolder(out, lambda text: None, "evaluation") as run_folder:  # evaluate warns
            if len(self.threat_models) == 1:
                report = evaluate(model, dataset, self.attacks, **options)
                _print_report(console, report)
            else:
                report, parts = evaluate_norms(model, dataset, self.threat_models, self.attacks, **options)
                for part in parts.values():
                    _print_report(console, part)
                console.print(report.table())
            folder = run_folder.path
        if others:
            console.print(comparison_table(report))
        for flag in report.flags:
            print_text(console, f"note: {flag}")
        print_text(console, f"written to {folder / 'evaluations' / self.name}")


def _print_report(console: Console, report: Report) -> None:
    """Prints the table of one norm and its further results, without the warnings."""
    from awnet.data.threat_model import norm_text
    from awnet.evaluation import parts_table

    console.print(report.table())
    if report.parts:
        console.print(parts_table(report))
    for kind, use in report.exits.items():
        share = use["mean_flops"] / use["full_flops"]
        print_text(
            console,
            f"{kind}: mean exit {use['mean_exit']:.2f}, {100 * share:.0f} % of the full network's FLOPs",
        )
    for name, result in report.attacks.items():
        success = result.target_success
        if success.get("n"):
            low, high = (100 * end for end in success["interval"])
            print_text(
                console,
                f"{name}: the target is reached for {100 * success['rate']:.1f} % "
                f"[{low:.1f}, {high:.1f}] of {success['n']} images",
            )
    for name, curve in report.accuracy_by_eps.items():
        median = "none" if curve["median"] is None else f"{curve['median']:.4g}"
        text = f"{name}: median of the smallest perturbations in {norm_text(curve['norm'])}: {median}"
        print_text(console, f"{text}; report.json has the accuracy at every eps")
    for line in report.sanity:
        print_text(console, f"{line['result']}: {line['check']} ({line['evidence']})")
    if report.router_auc:
        values = ", ".join(f"{kind} {auc:.3f}" for kind, auc in report.router_auc.items())
        print_text(console, f"router's AUC, clean images against: {values}")

"""The results of an evaluation as dataclasses, without files or rendering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awnet.data.threat_model import Norm, ThreatModel
from awnet.evaluation.statistics import Interval, bootstrap_interval, w_robust_accuracy, wilson_interval

Array = NDArray[Any]
POINTS = 64  # of a curve of accuracy against eps


@dataclass
class AttackResult:
    """Accuracy under one attack, as fractions; intervals are 95 %."""

    robust_accuracy: float
    """A_adv: accuracy on x_adv over all images, including those that are wrong without an attack."""
    w_robust_accuracy: float
    """A_w = ½A_nat + ½A_adv (Eq. 23)."""
    interval_95: Interval
    """Wilson's interval of ``robust_accuracy``."""
    w_interval_95: Interval
    """Bootstrap interval of ``w_robust_accuracy`` over images, clean and adversarial outcome paired."""
    settings: dict[str, Any]
    broken_first_by: dict[str, int] = field(default_factory=dict)
    """For an attack that consists of several: the number of images that each of them broke first."""
    warnings: dict[str, int] = field(default_factory=dict)
    """Warnings of AutoAttack's own checks, counted (see :class:`awnet.attacks.AutoAttack`)."""
    target_success: dict[str, Any] = field(default_factory=dict)
    """For a targeted attack: the ``rate`` of its images that are classified as their target, Wilson's
    ``interval`` of it, and ``n``, the number of images whose target is not their label."""


@dataclass
class AttackDifference:
    """Another model under one attack, and this model minus that one, on the same images."""

    robust_accuracy: float
    """Of the other model, as the next two."""
    w_robust_accuracy: float
    w_interval_95: Interval
    difference: float
    """Difference of A_w: positive if this model is better."""
    interval_95: Interval
    """Paired bootstrap interval of ``difference``."""
    mcnemar_p: float
    """Exact p for equal accuracy on x_adv."""


@dataclass
class Comparison:
    """This model compared with another one."""

    model: str
    clean_accuracy: float
    clean_difference: float
    clean_interval_95: Interval
    clean_mcnemar_p: float
    attacks: dict[str, AttackDifference]


@dataclass(eq=False, repr=False, kw_only=True)
class Results:
    """The content of a :class:`~awnet.evaluation.Report`. Accuracies are fractions."""

    model: str
    dataset: str
    split: str
    n: int
    eps: float
    norm: Norm = "Linf"
    """Norm of the threat model; ``"Linf"`` for reports of earlier versions, which have none."""
    norms: dict[str, float] = field(default_factory=dict)
    """For a report over several norms: norm → eps. Its attacks are the worst cases in each norm, its union is
    the worst case over the norms, and ``norm`` and ``eps`` are the first."""
    clean_accuracy: float
    clean_interval_95: Interval
    attacks: dict[str, AttackResult]
    router_auc: dict[str, float] = field(default_factory=dict)
    """AUC of the type logits, clean images against each attack, and against noise as a control."""
    flags: list[str]
    """What a reader should know before trusting the numbers."""
    settings: dict[str, Any]
    environment: dict[str, Any]
    exits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For a network with side exits, for each kind of image: ``mean_exit`` (the first is 1), each exit's
    ``shares``, ``mean_flops`` of an image that leaves there, and ``full_flops`` of one that uses no side
    exit."""
    selected_on: str | None = None
    """The split whose images selected the checkpoint; None if that is not known."""
    union: AttackResult | None = None
    """The worst case per image over all attacks: the headline if it was measured."""
    detection: dict[str, Any] = field(default_factory=dict)
    """``router_auc`` with intervals, over broken images and with controls, see :func:`detection`."""
    sanity: list[dict[str, str]] = field(default_factory=list)
    """Rows of the sanity table: ``check``, ``result`` (pass or suspicious), ``evidence``."""
    curves: dict[str, Any] = field(default_factory=dict)
    """The curves that the sanity table is based on, see :func:`sanity_table`."""
    parts: dict[str, Any] = field(default_factory=dict)
    """For a network with a router: accuracy with one part fixed, swapped or attacked alone, see
    :func:`gated_parts`."""
    accuracy_by_eps: dict[str, Any] = field(default_factory=dict)
    """For each minimum-norm attack, the robust accuracy at every eps, see :func:`accuracy_curve`."""
    compared_with: dict[str, Comparison] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Attacks of the union that could not run, and why: its robust accuracy may be too high."""
    per_sample: dict[str, Array] = field(default_factory=dict, repr=False)
    """``index``, ``label``, and for each kind of image ``<kind>_correct`` and the like, all ``[n]``."""
    examples: dict[str, Array] = field(default_factory=dict, repr=False)
    """Some broken images: ``clean``, ``adversarial`` [k, C, H, W], ``label``, ``before``, ``after`` [k]."""
    filter_means: dict[str, Array] = field(default_factory=dict, repr=False)
    """``<kind>/<layer>`` → ``[C_out]``: mean of each filter's weights, see :func:`filter_means`."""

    def __repr__(self) -> str:
        """The accuracies in percent, on one line."""
        results = ", ".join(f"{name} {100 * r.robust_accuracy:.1f}" for name, r in self.results().items())
        count = len(self.flags)
        warnings = f"; {count} warning{'s' * (count != 1)}, see .flags" if count else ""
        return (
            f"Report({self.model} on {self.n} {self.split} images of {self.dataset}, {self.threat_text}: "
            f"clean {100 * self.clean_accuracy:.1f} %{', robust ' * bool(results)}{results}{warnings})"
        )

    @property
    def threat_models(self) -> list[ThreatModel]:
        """The threat models that the model was attacked in: one, or one for each of ``norms``."""
        norms: dict[Any, float] = self.norms or {self.norm: self.eps}
        return [ThreatModel(eps, norm) for norm, eps in norms.items()]

    @property
    def threat_text(self) -> str:
        """The threat models for readers: ``L-infinity eps 8/255``, ``L2 eps 0.5 and L1 eps 12``."""
        *rest, last = map(str, self.threat_models)
        return f"{', '.join(rest)} and {last}" if rest else last

    @property
    def approximate(self) -> bool:
        """Whether the precision was lower than float32: then the report has no headline."""
        return not str(self.settings.get("precision", "float32")).startswith(("float32", "float64"))

    def headline(self) -> tuple[str, AttackResult] | None:
        """The name and result of the attack that determines the robust accuracy; None without attacks.

        The union if it was measured, else the strongest attack. Raises ValueError if the precision was lower
        than float32.
        """
        if self.approximate:
            raise ValueError(
                f"accuracies measured in {self.settings['precision']} are no headline: evaluate in float32"
            )
        if self.union is not None:
            return "union", self.union
        return min(self.attacks.items(), key=lambda item: item[1].robust_accuracy, default=None)

    def results(self) -> dict[str, AttackResult]:
        """The results of all attacks, the union last."""
        return self.attacks | ({} if self.union is None else {"union": self.union})

    def w_values(self, attack: str) -> Array:
        """½(clean correct) + ½(adversarial correct) of each image, ``[n]``: their mean is A_w."""
        clean, adversarial = self.per_sample["clean_correct"], self.per_sample[f"{attack}_correct"]
        return 0.5 * clean.astype(np.float64) + 0.5 * adversarial.astype(np.float64)


def target_success(target: Array, prediction: Array, label: Array) -> dict[str, Any]:
    """``AttackResult.target_success`` from classes ``[n]``."""
    rows = target != label
    n, reached = int(rows.sum()), int((prediction == target)[rows].sum())
    if n == 0:
        return {"rate": None, "interval": None, "n": 0}
    return {"rate": reached / n, "interval": list(wilson_interval(reached, n)), "n": n}


def attack_result(
    clean_correct: Array, correct: Array, settings: dict[str, Any], seed: int = 0
) -> AttackResult:
    """Accuracies and intervals from bool ``[n]`` outcomes on clean and adversarial images."""
    n, right = len(correct), int(correct.sum())
    values = 0.5 * clean_correct.astype(np.float64) + 0.5 * correct.astype(np.float64)
    return AttackResult(
        robust_accuracy=right / n,
        w_robust_accuracy=w_robust_accuracy(int(clean_correct.sum()) / n, right / n),
        interval_95=wilson_interval(right, n),
        w_interval_95=bootstrap_interval(values, seed=seed),
        settings=settings,
    )


def accuracy_curve(distances: Array, eps: float, norm: str) -> dict[str, Any]:
    """The robust accuracy as a function of eps, JSON-ready.

    An image counts as robust at eps if its smallest perturbation is larger. Like the robust accuracy under
    any attack, this is an upper bound on the true one.

    Args:
        distances: size of each image's smallest perturbation ``[n]``; 0 for an image that is misclassified
            without one, infinity where none was found.
        eps: the threat model's, which is one of the points.

    Returns:
        ``norm``; ``eps``, ``accuracy``, ``low`` and ``high`` (Wilson's 95 % interval), each of about 64
        points from 0 to twice ``eps`` or beyond the 99 % quantile; ``median``: the median distance of the
        images that are classified correctly without an attack, None if it is infinite or there are none; and
        ``not_found``: the number of images for which no perturbation was found.
    """
    values = np.sort(np.asarray(distances, np.float64))
    n, finite, attacked = len(values), values[np.isfinite(values)], values[values > 0]
    end = max(2 * eps, 1.05 * float(np.quantile(finite, 0.99)) if len(finite) else 0.0)
    sizes = np.union1d(np.linspace(0.0, end, POINTS), [eps])
    counts = n - np.searchsorted(values, sizes, side="right")
    intervals = [wilson_interval(int(count), n) for count in counts]
    median = float(np.median(attacked)) if len(attacked) else np.inf
    return {
        "norm": norm,
        "eps": sizes.tolist(),
        "accuracy": (counts / n).tolist(),
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
        "median": median if np.isfinite(median) else None,
        "not_found": int(np.isinf(values).sum()),
    }

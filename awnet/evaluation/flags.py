"""Warnings that a report shows before its numbers."""

from __future__ import annotations

from awnet.evaluation.detection import detection_flags
from awnet.evaluation.results import AttackResult, Results


def flags(report: Results) -> list[str]:
    """Reasons in the results to doubt them, one sentence each."""
    reasons = []
    if report.approximate:
        reasons.append(
            f"measured in {report.settings['precision']}, whose rounding may change outcomes: the report has "
            "no headline; evaluate in float32 for one"
        )
    if report.missing:
        causes = "; ".join(dict.fromkeys(report.missing.values()))
        reasons.append(
            f"incomplete: {', '.join(report.missing)} could not run ({causes}), so the robust accuracy may "
            "be too high"
        )
    if report.selected_on == "test":
        reasons.append(
            "the checkpoint was selected on test images, as in the paper, which flatters the result"
        )
    classes = report.settings.get("classes")
    if classes and report.clean_interval_95[0] <= 1 / classes:
        reasons.append(
            f"clean accuracy, {100 * report.clean_accuracy:.1f} %, is not above chance "
            f"({100 / classes:.3g} %), so the robust accuracy says nothing: the network has learned nothing, "
            "or it expects normalized images (--mean, --std) or classes in another order (--classes)"
        )
    one_step = report.attacks.get("fgsm")
    if one_step is not None:
        weaker = [
            name
            for name in ("pgd_sat", "pgd_trades", "cw")
            if name in report.attacks and report.attacks[name].robust_accuracy > one_step.robust_accuracy
        ]
        if weaker:
            reasons.append(
                f"{', '.join(weaker)} breaks fewer images than a single step: gradients may be masked"
            )
    for name, result in report.attacks.items():
        reasons += _autoattack_warnings(name, result, report.n)
    if report.union is not None and "aa" in report.attacks:
        gap = report.attacks["aa"].robust_accuracy - report.union.robust_accuracy
        if gap > 0.02:
            reasons.append(
                f"other attacks break {100 * gap:.1f} % of the images beyond AutoAttack: gradients may be "
                "masked"
            )
    reasons += detection_flags(report.detection)
    suspicious = [row["check"] for row in report.sanity if row["result"] == "suspicious"]
    if suspicious:
        reasons.append(f"suspicious in the sanity table: {'; '.join(suspicious)}")
    if report.settings.get("budget") == "smoke" and (report.union is not None or "aa" in report.attacks):
        reasons.append("the attacks ran at the smoke budget, which only shows that they run")
    return reasons


def _autoattack_warnings(name: str, result: AttackResult, n: int) -> list[str]:
    """AutoAttack's own warnings, as sentences."""
    sentences = {
        "randomized": "gave different logits for the same image: its defense is random",
        "probabilities": "returns probabilities, not logits, on which cross-entropy is flat",
        "dynamic": "computes gradients in its forward pass",
        "zero_gradients": "has no gradient at {} points: gradients may be masked",
    }
    warnings = [
        f"{name}: the model {sentences[key].format(count)}"
        for key, count in result.warnings.items()
        if key in sentences
    ]
    gain = result.broken_first_by.get("square", 0) / n
    if (
        "square" in result.settings.get("members", {})
        and len(result.settings["members"]) > 1
        and gain > 0.002
    ):
        warnings.append(
            f"{name}: Square broke {100 * gain:.1f} % of the images after the white-box attacks failed: "
            "gradients may be masked"
        )
    return warnings

"""Exports a model for RobustBench: checks its rules, writes weights, model_info and a zoo entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet.attacks import frozen
from awnet.data.dataset import Dataset
from awnet.evaluation.report import Report, check_name
from awnet.files import expanded, make_folder, write_json, write_text, written_atomically
from awnet.models.files import description_of
from awnet.models.registry import config_of
from awnet.precision import full_precision

LEADERBOARDS = ("cifar10", "cifar100")  # data sets with one in L-infinity; RobustBench calls them the same
_NOT_BY_NAME = ("settings", "class")  # parts of a model's description that create_model does not restore


@dataclass(frozen=True)
class Entry:
    """The entry of a model in RobustBench's table, without its accuracies."""

    name: str
    """Name of the files and key in the zoo, in RobustBench's style: Wei2024Revisiting."""
    title: str = "Revisiting the Trade-off between Accuracy and Robustness via Weight Distribution of Filters"
    authors: str = "Xingxing Wei, Shiji Zhao, Bo Li"
    link: str = "https://arxiv.org/abs/2306.03430"
    venue: str = "arXiv, Jun 2023"
    additional_data: bool = False
    footnote: str | None = None


@full_precision()
def violations(model: nn.Module, x: Tensor, num_classes: int) -> list[str]:
    """The rules of RobustBench that ``model`` breaks on images ``x`` [B, C, H, W] in [0, 1], B ≥ 2.

    The rules, for eval mode: finite logits [B, K] for images in [0, 1], deterministic, independent for each
    image, with nonzero gradients, and no change of the model by a forward pass.
    """
    broken = []
    with frozen(model), torch.no_grad():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        logits = model(x)
        if not isinstance(logits, Tensor) or logits.shape != (len(x), num_classes):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            return [f"it must give logits [{len(x)}, {num_classes}], got {got}"]
        if not bool(logits.isfinite().all()):
            return ["its logits are NaN or infinite"]
        if not torch.equal(logits, model(x)):
            broken.append(
                "two forward passes of the same images give different logits: it must be deterministic"
            )
        alone = torch.cat([model(image[None]) for image in x[:4]])
        # a convolution of another batch size may round differently
        if not torch.allclose(alone, logits[:4], rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
            broken.append("an image's logits depend on the others in its batch")
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
        if changed:
            broken.append(f"a forward pass changes {', '.join(changed[:3])}")
    with frozen(model), torch.enable_grad():
        images = x.detach().clone().requires_grad_()
        loss = F.cross_entropy(model(images), logits.argmax(1), reduction="sum")
        gradient = torch.autograd.grad(loss, images, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is None or not bool(gradient.flatten(1).abs().amax(1).gt(0).all()):
            broken.append("the gradient of the loss with respect to some image is zero")
    return broken


def export_robustbench(
    model: nn.Module, dataset: Dataset, report: Report | None, out: str | Path, entry: Entry
) -> list[Path]:
    """Writes ``models/…/Linf/<name>.pt``, ``model_info/…/Linf/<name>.json`` and ``<name>_zoo.py`` to ``out``.

    The accuracies are those of ``report`` (in percent, as RobustBench writes them): ``clean_acc``, and
    ``autoattack_acc`` if AutoAttack was run. Values that were not measured are null.

    Raises:
        ValueError: the model breaks rules (the message lists them), RobustBench does not have the data set,
            the precision was lower than float32, or :func:`awnet.models.create_model` cannot rebuild the
            model.
    """
    check_name(entry.name)
    if dataset.name not in LEADERBOARDS:
        names = ", ".join(LEADERBOARDS)
        raise ValueError(f"RobustBench has leaderboards for {names} under L-infinity, not for {dataset.name}")
    norms = {dataset.threat_model.norm} | ({report.norm} if report is not None else set())
    if norms != {"Linf"}:
        raise ValueError(
            "the export is for RobustBench's L-infinity leaderboards, not for "
            f"{', '.join(sorted(norms - {'Linf'}))}"
        )
    if report is not None and report.approximate:
        raise ValueError(
            f"the report was measured in {report.settings['precision']}: evaluate in float32, "
            "as the leaderboard does"
        )
    config = config_of(model)
    if config is None:
        raise ValueError("the model has no config to rebuild it from: create it with awnet.create_model")
    x = next(dataset.batches(8)).x
    broken = violations(model, x, dataset.num_classes)
    if broken:
        raise ValueError(f"the model breaks RobustBench's rules: {'; '.join(broken)}")
    changed = [f"{key} {value}" for key, value in description_of(model).items() if key in _NOT_BY_NAME]
    changed += [f"dtype {p.dtype}" for p in model.parameters() if p.dtype != torch.float32][:1]
    if changed:
        raise ValueError(
            f"the zoo entry creates the model with awnet.create_model, which would not restore its "
            f"{', '.join(changed)}"
        )
    folder, out = dataset.name, expanded(out)
    weights = out / "models" / folder / "Linf" / f"{entry.name}.pt"
    info = out / "model_info" / folder / "Linf" / f"{entry.name}.json"
    zoo = out / f"{entry.name}_zoo.py"
    for path in (weights, info):
        make_folder(path.parent)
    with written_atomically(weights) as temporary:
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, temporary)
    aa = None if report is None else report.attacks.get("aa")
    write_json(
        info,
        {
            "link": entry.link,
            "name": entry.title,
            "authors": entry.authors,
            "additional_data": entry.additional_data,
            "number_forward_passes": 1,
            "dataset": folder,
            "venue": entry.venue,
            "architecture": config["name"],
            "eps": f"{round(dataset.threat_model.eps * 255, 4):g}/255",
            "clean_acc": None if report is None else f"{100 * report.clean_accuracy:.2f}",
            "reported": None,
            "autoattack_acc": None if aa is None else f"{100 * aa.robust_accuracy:.2f}",
            "footnote": entry.footnote,
            "unreliable": False,
        },
    )
    arguments = {name: config[name] for name in ("num_classes", "in_channels")} | config["options"]
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    write_text(
        zoo,
        f'''"""RobustBench's zoo entry: load_model("{entry.name}", model_dir="models", …) works after

    import {entry.name}_zoo

with the weights in models/{folder}/Linf/. The package awnet must be installed.
"""

import awnet
from robustbench.model_zoo import model_dicts
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

model_dicts[BenchmarkDataset({folder!r})][ThreatModel.Linf][{entry.name!r}] = {{
    "model": lambda: awnet.create_model({config["name"]!r}, {call}),
    "gdrive_id": "",  # the weights are stored locally; nothing is downloaded
}}
''',
    )
    return [weights, info, zoo]

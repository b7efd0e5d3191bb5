"""awnet: fast AW-Nets, networks whose filters are re-weighted per image; training, attacks and evaluation.

>>> model = awnet.create_model("awnet_resnet18", num_classes=10)
>>> x_adv = awnet.attacks.PGD(model, eps=8/255, step_size=2/255, steps=20)(x, y)
>>> report = awnet.evaluate(model, dataset, attacks=["fgsm", "pgd_sat", "pgd_trades", "cw"])
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awnet._version import __version__

if TYPE_CHECKING:
    from awnet import analysis, attacks, data, evaluation, models, nn, ops, reference, training
    from awnet.data import load_dataset
    from awnet.evaluation.evaluate import evaluate
    from awnet.models import create_model, list_models, load_model, save_model
    from awnet.nn import convert
    from awnet.ops import explain, functional, use_backend
    from awnet.training.train import train

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "kernels" / "__init__.py").is_file() and (_ROOT / "setup.py").is_file():
    # run from the repository: awnet.kernels and awnet.benchmarks are next to this folder
    __path__.append(str(_ROOT))

# public name → the module that holds it; imported at first use, which keeps `import awnet` fast
_NAMES = {
    "convert": "awnet.nn",
    "create_model": "awnet.models",
    "evaluate": "awnet.evaluation",
    "explain": "awnet.ops",
    "functional": "awnet.ops",
    "list_models": "awnet.models",
    "load_dataset": "awnet.data",
    "load_model": "awnet.models",
    "save_model": "awnet.models",
    "train": "awnet.training",
    "use_backend": "awnet.ops",
}

__all__ = [
    "__version__",
    "analysis",
    "attacks",
    "convert",
    "create_model",
    "data",
    "evaluate",
    "evaluation",
    "explain",
    "functional",
    "list_models",
    "load_dataset",
    "load_model",
    "models",
    "nn",
    "ops",
    "reference",
    "save_model",
    "train",
    "training",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in __all__:  # a module
        return importlib.import_module(f"awnet.{name}")
    raise AttributeError(f"module 'awnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

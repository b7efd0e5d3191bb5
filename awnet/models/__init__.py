"""Models by name, and their files."""

from awnet.models.awnet import AWResNet
from awnet.models.files import save_model
from awnet.models.registry import create_model, list_models, register_model
from awnet.models.resnet import ResNet, parameter_count
from awnet.models.sources import load_model
from awnet.models.zoo import zoo_models

__all__ = [
    "AWResNet",
    "ResNet",
    "create_model",
    "list_models",
    "load_model",
    "parameter_count",
    "register_model",
    "save_model",
    "zoo_models",
]

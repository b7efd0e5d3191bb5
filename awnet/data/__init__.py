"""Data sets as uint8 tensors: splits, threat models, batches on the device, downloads with checksums."""

from awnet.data.checks import check_images, check_labels
from awnet.data.dataset import Augmentation, Batch, Dataset, Memory, Splits, from_arrays, with_extra
from awnet.data.downloads import download
from awnet.data.registry import list_datasets, load_dataset
from awnet.data.threat_model import NORMS, Norm, ThreatModel, check_norm

__all__ = [
    "NORMS",
    "Augmentation",
    "Batch",
    "Dataset",
    "Memory",
    "Norm",
    "Splits",
    "ThreatModel",
    "check_images",
    "check_labels",
    "check_norm",
    "download",
    "from_arrays",
    "list_datasets",
    "load_dataset",
    "with_extra",
]

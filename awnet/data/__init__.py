"""Data sets as uint8 tensors: splits, threat models, batches on the device, downloads with checksums."""

from awnet.data.checks import check_images, check_labels
from awnet.data.dataset import Augmentation, Batch, Dataset, Memory, Splits, ThreatModel, from_arrays
from awnet.data.downloads import download
from awnet.data.registry import list_datasets, load_dataset

__all__ = [
    "Augmentation",
    "Batch",
    "Dataset",
    "Memory",
    "Splits",
    "ThreatModel",
    "check_images",
    "check_labels",
    "download",
    "from_arrays",
    "list_datasets",
    "load_dataset",
]

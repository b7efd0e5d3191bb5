"""A linear network in a Python file and images in an ``.npz`` file, for tests of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
"""


def write_user_network(file: str) -> tuple[nn.Module, np.ndarray, Tensor, Tensor]:
    """Writes ``file`` with a function ``net``, and ``test.npz``, in the current folder.

    Returns the network, and 30 images uint8 [30, 4, 4] and in [0, 1] [30, 1, 4, 4] with labels, of which the
    first three are wrong for the network.
    """
    Path(file).write_text(CODE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4)).astype(np.uint8)
    x = torch.from_numpy(pixels)[:, None].float() / 255
    labels = model(x).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    np.savez("test.npz", images=pixels, labels=labels.numpy())
    return model, pixels, x, labels

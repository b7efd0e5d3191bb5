"""Adversarial images on disk: what an interrupted attack goes on from, and what a surrogate gave."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from awnet.files import expanded, written_atomically
from awnet.models.files import raw_bytes, weights_fingerprint
from awnet.models.registry import config_of
from awnet.run_folder import RunFolder


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of ``parts``: tensors (dtype, shape and values), or what JSON can write."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype}{list(part.shape)}".encode())
            found.update(raw_bytes(part))
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
        found.update(b"\0")
    return found.hexdigest()[:32]


def model_fingerprint(model: nn.Module) -> str:
    """Of a model's structure (its modules and configuration), weights and buffers, wherever they lie."""
    about = [type(model).__qualname__, repr(model), config_of(model)]
    return digest(about, weights_fingerprint(model))


def _content(tensors: Mapping[str, Tensor], note: Any) -> str:
    names = sorted(tensors)
    return digest(json.loads(json.dumps(note)), names, *(tensors[name] for name in names))


class Saved:
    """Named groups of tensors, a ``.safetensors`` file each with a checksum, under ``folder/key``.

    Args:
        folder: of the evaluation, say.
        key: what the tensors follow from; another key sees none of them.
        place: the folder that ``folder`` is relative to, which is followed when it is renamed.
    """

    def __init__(self, folder: str | Path, key: str, place: RunFolder | None = None) -> None:
        self._folder, self._place = expanded(folder) / key, place

    @property
    def folder(self) -> Path:
        """Where the groups are now."""
        return self._folder if self._place is None else self._place.path / self._folder

    def load(self, name: str, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and what was noted beside them; None where there are none.

        Raises:
            ValueError: the file is damaged, or its content is not what :meth:`save` wrote.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                metadata = opened.metadata() or {}
                # a copy lies on an aligned address, as tensors that were never saved do: in a file's memory
                # kernels take other paths, which round otherwise
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
            note = json.loads(metadata.get("note", "null"))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete {self.folder} and start again") from error
        if metadata.get("digest") != _content(tensors, note):
            raise ValueError(
                f"{path} is damaged or was changed, its checksum is not that of its content: delete "
                f"{self.folder} and start again"
            )
        return {key: tensor.to(device) for key, tensor in tensors.items()}, note

    def save(self, name: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Writes them whole or not at all; ``note`` is what JSON can write."""
        plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        metadata = {"format": "pt", "note": json.dumps(note), "digest": _content(plain, note)}

        def write() -> None:
            with written_atomically(self.path(name)) as temporary:
                save_file(plain, temporary, metadata=metadata)

        if self._place is None:
            write()
        else:
            self._place.during(write)

    def path(self, name: str) -> Path:
        """The file of the group ``name``."""
        return self.folder / f"{name}.safetensors"

    def remove(self) -> None:
        """Deletes the group's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

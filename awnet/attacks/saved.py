"""Adversarial images on disk, with checksums: to resume an interrupted attack, and to replay images."""

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
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype}{list(part.shape)}".encode())
            sha.update(raw_bytes(part))
        else:
            sha.update(json.dumps(part, sort_keys=True).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:32]


def model_fingerprint(model: nn.Module) -> str:
    """A digest of a model's structure (modules and configuration), weights and buffers, on any device."""
    about = [type(model).__qualname__, repr(model), config_of(model)]
    return digest(about, weights_fingerprint(model))


def _content(tensors: Mapping[str, Tensor], note: Any) -> str:
    names = sorted(tensors)
    return digest(json.loads(json.dumps(note)), names, *(tensors[name] for name in names))


class Saved:
    """Named groups of tensors, one ``.safetensors`` file with a checksum each, in ``folder/key``.

    Args:
        folder: the folder to write to, for example an evaluation's.
        key: a digest of everything that determines the tensors; groups with another key are not visible.
        place: the run folder that ``folder`` is relative to; it is followed if it is renamed.
    """

    def __init__(self, folder: str | Path, key: str, place: RunFolder | None = None) -> None:
        self._folder, self._place = expanded(folder) / key, place

    @property
    def folder(self) -> Path:
        """The current folder of the groups."""
        return self._folder if self._place is None else self._place.path / self._folder

    def load(self, name: str, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Any] | None:
        """The tensors of a group and their note; None if the group does not exist.

        Raises:
            ValueError: the file is damaged, or its content is not what :meth:`save` wrote.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                metadata = opened.metadata() or {}
                # copied to an aligned address, like tensors that were never saved: for memory of the file
                # kernels use other code paths, which round differently
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
            note = json.loads(metadata.get("note", "null"))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete {self.folder} and start again") from error
        if metadata.get("digest") != _content(tensors, note):
            raise ValueError(
                f"{path} is damaged or was changed, its checksum does not match its content: delete "
                f"{self.folder} and start again"
            )
        return {key: tensor.to(device) for key, tensor in tensors.items()}, note

    def save(self, name: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Writes a group atomically; ``note`` is any JSON value."""
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
        """Deletes the folder with all groups."""
        shutil.rmtree(self.folder, ignore_errors=True)

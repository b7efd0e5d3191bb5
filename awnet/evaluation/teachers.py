"""Finds the teachers that a run was trained with, for the attacks that use them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awnet.files import expanded
from awnet.models.files import weights_fingerprint
from awnet.models.sources import load_model, source_kind
from awnet.run_config import is_run, read_config

KINDS = ("clean", "robust")
Source = nn.Module | str | Path


@dataclass
class Teachers:
    """The teachers of a run.

    models: by kind, ``"clean"`` and ``"robust"``.
    missing: why a teacher that the run was trained with is not among them, by kind.
    recorded: whether there is a training record, which lists the teachers.
    """

    models: dict[str, nn.Module] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    recorded: bool = False


def find_teachers(
    run: str | Path | None,
    device: torch.device | str = "cpu",
    given: Sequence[Source] | Mapping[str, Source] | None = None,
    robust: nn.Module | None = None,
) -> Teachers:
    """The teachers that ``config.json`` in the folder ``run`` names, or those in ``run/teachers``.

    A teacher is accepted only if its weights have the recorded SHA-256, if one is recorded. A relative path,
    in the record of an earlier version, is looked up in the run's folder and in its parents.

    Args:
        run: a run folder; None, or a folder without ``config.json``, has no record.
        given: the teachers, in the order (clean, robust) or by kind: modules, or sources of
            :func:`awnet.load_model`.
        robust: the robust teacher, used if the run has one and ``given`` does not name it.

    Raises:
        ValueError: ``given`` does not fit the record, or ``config.json`` is damaged.
    """
    run = None if run is None else expanded(run)
    record = _Record(run)
    teachers = Teachers(recorded=record.exists)
    kinds = record.kinds or tuple(kind for kind in KINDS if run is not None and record.inside(kind).exists())
    if given is not None and not isinstance(given, Mapping):
        order = kinds or KINDS
        if isinstance(given, str | Path) or len(given) != len(order):
            raise ValueError(f"teachers must be {len(order)}, in this order: {', '.join(order)}")
        given = dict(zip(order, given, strict=True))
    given = dict(given or {})
    if robust is not None and "robust" in kinds:
        given.setdefault("robust", robust)
    unknown = [kind for kind in given if kind not in (kinds if record.exists else KINDS)]
    if unknown:
        raise ValueError(
            f"the run was trained without a {unknown[0]} teacher: it has "
            + (f"{' and '.join(kinds)} ones" if kinds else "none")
        )
    for kind in dict.fromkeys((*kinds, *given)):
        places = [given[kind]] if kind in given else list(record.places(kind))
        try:
            teachers.models[kind] = _first(places, record.weights(kind), device, record.source(kind))
        except (OSError, ValueError, TypeError, ImportError) as error:
            teachers.missing[kind] = " ".join(str(error).split())
    return teachers


def _first(
    places: Sequence[Source], weights: str | None, device: torch.device | str, source: str | None = None
) -> nn.Module:
    """The first model among ``places`` with the SHA-256 ``weights``; else a ValueError that lists the others.

    ``source`` is the recorded source if it was no path. It may be code, so it is loaded only if it is given.
    """
    others = []
    for place in places:
        if isinstance(place, nn.Module):
            model, name = place, f"the given {type(place).__name__}"
        elif source_kind(place) != "file" or expanded(place).exists():
            model, name = load_model(place, device), str(place)
        else:
            continue
        fingerprint = weights_fingerprint(model)
        if weights in (None, fingerprint):
            return model
        others.append(
            f"{name} has other weights (SHA-256 {fingerprint[:12]}…, recorded: {str(weights)[:12]}…)"
        )
    if not places and source is not None:
        raise ValueError(f"it was {source}, which may be code, so it must be given again")
    if not places:
        raise ValueError("it was passed to train as a module, so it has no file")
    more = f" (nor do the {len(places) - 1} other paths that were tried)" if len(places) > 1 else ""
    raise ValueError("; ".join(others) or f"{places[0]} does not exist{more}")


class _Record:
    """The record of the teachers in ``config.json``."""

    def __init__(self, run: Path | None) -> None:
        self.run = run
        self.exists = run is not None and is_run(run)
        self._described: dict[str, Any] = {}
        self._sources: dict[str, dict[str, Any]] = {}
        if run is not None and self.exists:
            config = read_config(run, whole=True)
            self._described = config["teachers"] or {}
            recorded = (one["teachers"] for one in reversed(config["sessions"]) if one.get("teachers"))
            sources: Any = next(recorded, {})
            if isinstance(sources, list):  # an earlier version: paths in order
                sources = {kind: {"path": path} for kind, path in zip(self._described, sources, strict=False)}
            self._sources = sources
        self.kinds = tuple(self._described)

    def inside(self, kind: str) -> Path:
        assert self.run is not None
        return self.run / "teachers" / kind

    def weights(self, kind: str) -> str | None:
        for about in (self._described.get(kind), self._sources.get(kind)):
            if isinstance(about, dict) and isinstance(about.get("weights"), str):
                return about["weights"]
        return None

    def source(self, kind: str) -> str | None:
        """The source that the teacher was given as, if it was no path."""
        text = self._sources.get(kind, {}).get("source")
        return text if isinstance(text, str) else None

    def places(self, kind: str) -> Iterator[Path]:
        """Where the teacher may be, the most likely place first."""
        if self.run is None:
            return
        source = self._sources.get(kind)
        if source is None:
            yield self.inside(kind)
            return
        run = self.run.resolve()
        path, relative = source.get("path"), source.get("from_run")
        inside = relative is not None and not relative.startswith("..")
        if relative is not None and inside:  # the run may have moved
            yield run / relative
        if path is not None and Path(path).is_absolute():
            yield Path(path)
        elif path is not None:
            yield from (folder / path for folder in (Path.cwd(), run, *run.parents))
        if relative is not None and not inside:
            yield run / relative

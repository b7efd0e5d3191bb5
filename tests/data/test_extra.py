"""Extra training images: which are drawn, what the file may be, and runs with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from awnet.cli import main
from awnet.data import Dataset, Splits, from_arrays, with_extra
from awnet.data.extra import FIRST_INDEX
from awnet.training import PGDAT, checkpoint, train

N, M, K = 20, 31, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def dataset(n: int = N) -> Dataset:
    """Every pixel of image i is i."""
    x = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 4, 4).contiguous()
    return from_arrays(x, torch.arange(n) % K, classes=list("abc"), name="own", flip=True)


def arrays(m: int = M, first: int = 100) -> dict[str, Any]:
    """Every pixel of extra image i is first + i."""
    x = np.broadcast_to((first + np.arange(m, dtype=np.uint8))[:, None, None, None], (m, 4, 4, 2))
    return {"image": np.ascontiguousarray(x), "label": np.arange(m) % K}


def write(path: Path, **changes: Any) -> Path:
    np.savez(path, **(arrays() | changes))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "extra.npz")


def epoch_of(data: Dataset, size: int = 5, **settings: Any) -> list[Any]:
    options = {"shuffle": True, "augment": True, "seed": 3, "epoch": 1}
    return list(data.batches(size, **(options | settings)))


def levels(batches: list[Any]) -> torch.Tensor:
    return torch.cat([(batch.x[:, 0, 0, 0] * 255).round().long() for batch in batches])


@pytest.mark.parametrize(("fraction", "number"), [(0.7, 14), (0.25, 5), (1.0, 20), (0.01, 0)])
def test_a_share_of_each_batch_comes_from_the_file_without_replacement(
    file: Path, fraction: float, number: int
) -> None:
    data = with_extra(dataset(), file, fraction)
    batches = epoch_of(data)
    assert [len(batch.y) for batch in batches] == [5] * 4
    values = levels(batches)
    assert len(values.unique()) == N  # none twice
    is_extra = values >= 100
    assert is_extra.sum() == number
    for part in is_extra.view(4, 5):
        assert abs(part.sum() - 5 * fraction) <= 1
    index, y = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("index", "y"))
    assert torch.equal(index, torch.where(is_extra, FIRST_INDEX + values - 100, values))
    assert torch.equal(y, torch.where(is_extra, values - 100, values) % K)
    for batch in batches:
        assert (batch.x == batch.x[:, :1, :1, :1]).all()  # the pixels of one image
    other = levels(epoch_of(data, epoch=2))
    assert set(other[other >= 100].tolist()) != set(values[is_extra].tolist()) or number in (0, N)


def test_evaluation_and_a_data_set_without_a_file_have_their_own_images(file: Path) -> None:
    plain = dataset()
    data = with_extra(plain, file)
    assert torch.equal(levels(list(data.batches(5))), torch.arange(N))
    assert len(data) == N
    assert data.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("augment", [(), ("cutout", "cutmix")])
def test_batches_are_the_same_on_any_number_of_ranks_from_any_start_and_memory(
    file: Path, augment: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_extra(dataset(), file)
    data = replace(data, augmentation=replace(data.augmentation, operations=augment))
    whole = epoch_of(data)
    parts = [epoch_of(data, part=(rank, 2)) for rank in range(2)]
    for number, batch in enumerate(whole):
        order = torch.cat([part[number].index for part in parts]).argsort()
        for name in ("index", "x", "y"):
            joined = torch.cat([getattr(part[number], name) for part in parts])[order]
            assert torch.equal(joined, getattr(batch, name)[batch.index.argsort()])
    resumed = epoch_of(data, start=2)
    assert all(torch.equal(one.x, other.x) for one, other in zip(resumed, whole[2:], strict=True))
    monkeypatch.setattr("awnet.data.dataset.is_resident", lambda images, device: False)
    host = epoch_of(data)
    assert all(torch.equal(one.x, other.x) for one, other in zip(host, whole, strict=True))


def test_images_may_be_channels_first_and_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "nchw.npz"
    np.savez(path, x=np.moveaxis(arrays()["image"], -1, 1), y=arrays()["label"].astype(np.uint8))
    same = with_extra(dataset(), write(tmp_path / "nhwc.npz"))
    pairs = zip(epoch_of(with_extra(dataset(), path)), epoch_of(same), strict=True)
    assert all(torch.equal(one.x, other.x) and torch.equal(one.y, other.y) for one, other in pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((M, 4, 5, 2), np.uint8)}, r"images must be uint8 \[M, 4, 4, 2\]"),
        ({"image": np.zeros((M, 4, 4, 2), np.float32)}, r"images must be uint8 .*float32"),
        ({"label": np.arange(M)}, r"labels must be in \[0, 3\)"),
        ({"label": np.arange(M) % K - 1}, r"labels must be in \[0, 3\)"),
        ({"label": np.zeros(M - 1, int)}, rf"labels must be integers \[{M}\]"),
        ({"label": np.zeros(M)}, rf"labels must be integers \[{M}\], got float64"),
        (arrays(5), "has 5 images, fewer than the 14 that an epoch takes: lower extra_fraction, 0.7"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "wrong.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        with_extra(dataset(), path)
    assert "wrong.npz" in str(error.value)


def test_files_of_other_kinds_are_named(tmp_path: Path, file: Path) -> None:
    np.savez_compressed(tmp_path / "small.npz", **arrays())
    with pytest.raises(ValueError, match=r"small\.npz is compressed and cannot be mapped.*numpy\.savez"):
        with_extra(dataset(), tmp_path / "small.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"has the arrays a; expected image and label"):
        with_extra(dataset(), tmp_path / "other.npz")
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut\.npz cannot be read"):
        with_extra(dataset(), tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
        with_extra(dataset(), tmp_path / "none.npz")
    for fraction in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match="extra_fraction must be a number above 0 and at most 1"):
            with_extra(dataset(), file, fraction)  # type: ignore[arg-type]
    few = replace(dataset(), max_value=50)
    with pytest.raises(ValueError, match=r"has pixels up to 130, those of own go up to 50"):
        with_extra(few, file)


RECIPE = PGDAT(epochs=2, batch_size=5, attack_steps=1, milestones=(), lr=0.05, augment=("cutmix",))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, K))


def go(folder: Path, extra: Path, **options: Any) -> Any:
    splits = Splits(with_extra(dataset(), extra), dataset(6), dataset(6))
    return train(RECIPE, net(), splits, folder, quiet=True, tensorboard=False, **options)


def test_a_run_that_is_stopped_within_an_epoch_ends_the_same(file: Path, tmp_path: Path) -> None:
    whole, folder = go(tmp_path / "whole", file), tmp_path / "run"
    assert whole.finished
    assert not go(folder, file, max_minutes=1e-9).finished
    assert go(folder, file, resume=True).finished
    one, other = (checkpoint.load_state(run)["model"] for run in (whole.folder, folder))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    config = json.loads((folder / "config.json").read_text())
    described = config["dataset"]["extra"]
    assert (described["images"], described["fraction"]) == (M, 0.7)


def test_another_file_is_not_resumed(file: Path, tmp_path: Path) -> None:
    go(tmp_path / "run", file, max_minutes=1e-9)
    other = write(tmp_path / "other.npz", image=arrays(first=101)["image"])
    with pytest.raises(ValueError, match=r"dataset\.extra\.fingerprint was"):
        go(tmp_path / "run", other, resume=True)
    moved = tmp_path / "moved.npz"
    moved.write_bytes(file.read_bytes())
    assert go(tmp_path / "run", moved, resume=True).finished


def test_a_share_without_a_file_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "pgd_at", "--extra-fraction", "0.5"]) == 2
    assert "--extra-fraction needs --extra-data" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_trains_with_extra_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.zeros((200, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "digits.npz", image=x, label=np.arange(200) % 10)
    words = ["train", "--recipe", "pgd_at", "--model", "resnet_tiny", "--limit", "30", "--epochs", "1"]
    words += ["--recipe-options", "validate_limit=10", "attack_steps=1", "--out", str(tmp_path / "run")]
    assert main([*words, "--extra-data", str(tmp_path / "digits.npz"), "--extra-fraction", "1/2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "30 training images of digits, 50 % of each batch from 200 images of" in said

"""Images crafted on one model and replayed on another, and what is kept of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.broken_defenses import EPS, Gated, Honest, Masked, images

from awnet.attacks import CW, PGD, named_attack
from awnet.attacks.craft import craft
from awnet.attacks.transfer import Crafted, TransferAttack, replay
from awnet.models import create_model, save_model


def cw(model: torch.nn.Module) -> CW:
    return CW(model, eps=EPS, step_size=EPS / 4, steps=10)


def test_replayed_images_are_those_of_the_surrogate() -> None:
    data = images()
    surrogate, target = Masked(), Gated()
    crafted = craft(surrogate, data, cw, batch_size=7)
    x, y, index = next(data.batches(24))
    assert torch.equal(crafted.x_adv, cw(surrogate)(x, y, index=index))
    order = torch.tensor([5, 0, 23, 11])
    attack = replay(target, crafted)
    assert torch.equal(attack(x[order], y[order], index=index[order]), crafted.x_adv[order])
    live = TransferAttack(target, cw(surrogate))
    assert torch.equal(live(x[order], y[order], index=index[order]), crafted.x_adv[order])
    with torch.no_grad():
        assert not (surrogate(crafted.x_adv).argmax(1) == y).any()
        assert (Honest()(attack(x, y, index=index)).argmax(1) == y).all()
    assert attack.eps == live.eps == EPS
    for settings in (attack.settings, live.settings):
        assert settings["surrogate"] == crafted.provenance["surrogate"]
        assert settings["settings"]["loss"] == "margin"


def test_a_second_crafting_call_reads_the_images_of_the_first(tmp_path: Path) -> None:
    data, calls = images(), []

    def counted(model: torch.nn.Module) -> PGD:
        attack = PGD(model, eps=EPS, step_size=EPS / 4, steps=3)
        perturb = attack.perturb

        def watched(*args):  # type: ignore[no-untyped-def]
            calls.append(len(args[0]))
            return perturb(*args)

        attack.perturb = watched
        return attack

    first = craft(Honest(), data, counted, folder=tmp_path, batch_size=10)
    assert calls == [10, 10, 4]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    second = craft(Honest(), data, counted, folder=tmp_path, batch_size=10)
    assert calls == [10, 10, 4]
    assert torch.equal(first.x_adv, second.x_adv)
    assert second.provenance == first.provenance
    actual = first.provenance
    assert actual["data"] == data.fingerprint()
    assert actual["settings"]["steps"] == 3
    assert (actual["eps"], actual["dataset"], actual["split"]) == (EPS, "striped", "test")
    for other in (images(seed=1), images(20)):
        craft(Honest(), other, counted, folder=tmp_path, batch_size=10)
    craft(Masked(), data, counted, folder=tmp_path, batch_size=10)
    assert len(list(tmp_path.iterdir())) == 8


def test_interrupted_crafting_resumes(tmp_path: Path) -> None:
    data = images()
    expected = craft(Honest(), data, "pgd_sat", batch_size=10)

    def stop(done: int, total: int) -> None:
        assert total == 24
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        craft(Honest(), data, "pgd_sat", folder=tmp_path, batch_size=10, progress=stop)
    assert not list(tmp_path.glob("*.json"))
    kept = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors"))
    assert len(kept) == 2
    again = craft(Honest(), data, "pgd_sat", folder=tmp_path, batch_size=10)
    assert torch.equal(again.x_adv, expected.x_adv)
    assert again.provenance == expected.provenance
    assert len(list(tmp_path.iterdir())) == 2  # the parts are gone


def test_a_checkpoint_is_a_surrogate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("resnet_tiny", num_classes=4, in_channels=1)
    save_model(model, tmp_path / "best.safetensors")
    data = images(6)
    actual = craft(tmp_path, data, "fgsm")
    assert torch.equal(actual.x_adv, craft(model, data, "fgsm").x_adv)
    assert actual.provenance["surrogate_config"]["name"] == "resnet_tiny"
    with pytest.raises(FileNotFoundError, match="pass a run folder"):
        craft(tmp_path / "elsewhere", data)


def test_replay_refuses_images_and_files_that_do_not_belong_together(tmp_path: Path) -> None:
    data = images()
    crafted = craft(Honest(), data, "fgsm", folder=tmp_path)
    x, y, index = next(data.batches(24))
    attack = replay(Honest(), crafted)
    with pytest.raises(ValueError, match="index has images without adversarial images"):
        attack(x, y, index=index + 5)
    with pytest.raises(ValueError, match="not the images that were attacked"):
        attack(x, y, index=index.flip(0))
    with pytest.raises(ValueError, match="not the images that were attacked"):
        attack(x, 1 - y, index=index)
    with pytest.raises(ValueError, match="not the images that were attacked"):
        attack(x[..., :4], y, index=index)
    (path,) = tmp_path.glob("*.safetensors")
    assert torch.equal(replay(Honest(), path)(x, y, index=index), crafted.x_adv)
    note = path.with_suffix(".json")
    note.write_text(note.read_text().replace('"content": "', '"content": "0'))
    with pytest.raises(ValueError, match="do not belong together"):
        Crafted.load(path)
    note.unlink()
    with pytest.raises(FileNotFoundError, match="craft the images first"):
        Crafted.load(path)
    with pytest.raises(TypeError, match="source must be an Attack or Crafted"):
        TransferAttack(Honest(), Honest())
    with pytest.raises(TypeError, match="attack must return an Attack"):
        craft(Honest(), data, lambda model: model)
    with pytest.raises(ValueError, match="unknown attack"):
        craft(Honest(), data, "pgd")


def test_union_replays_surrogates() -> None:
    from awnet.attacks.registry import Suite

    data = images(8)
    x, y, index = next(data.batches(8))
    suite = Suite(classes=4, budget="smoke", surrogates={"weak": Masked()})
    union = named_attack("union", Gated(), data.threat_model, suite=suite)
    member = union.members["transfer_weak_cw"]
    assert torch.equal(
        member(x, y, index=index), named_attack("cw", Masked(), data.threat_model)(x, y, index=index)
    )

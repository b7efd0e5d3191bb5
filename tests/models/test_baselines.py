"""Networks with a forward pass and a loss of their own: RDI-ResNet, ADVMOE, Separate-Net; and Swin."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.extras import forget, make_absent
from support.model_families import OWN_RECIPES, narrow, needs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from awnet.attacks import PGD, frozen
from awnet.cli import main
from awnet.data import Splits, load_dataset
from awnet.data.dataset import Batch
from awnet.evaluation import Report, evaluate
from awnet.models import create_model, load_model, parameter_count
from awnet.models.advmoe import ExpertConv2d
from awnet.models.rdi import choose_thresholds, entropy
from awnet.nn import FilterScaledConv2d, InferenceBackbone, Routing, convert
from awnet.nn.inference import PlainInferenceCopy
from awnet.ops import use_backend
from awnet.training import TrainingStep, recipe_for, train

DIGITS = load_dataset("digits")
THREAT = DIGITS.train.threat_model


pytestmark = pytest.mark.usefixtures("one_thread")


# --- RDI-ResNet


def rdi_images(n: int = 6) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = narrow("rdi_resnet38")
    batch = next(DIGITS.train.batches(32))
    model(batch.x)
    return model.eval(), batch.x[:n], batch.y[:n]


@torch.no_grad()
def test_rdi_takes_the_first_confident_exit() -> None:
    model, x, _ = rdi_images(32)
    logits = torch.stack(model.exits(x))  # [7, B, K]
    assert logits.shape == (7, 32, 10)
    assert (model.exit_of(x) == 6).all()
    assert torch.equal(model(x), logits[-1])
    p = logits.double().softmax(-1)
    unsure = -(p * p.log()).sum(-1) / torch.tensor(10.0).double().log()
    torch.testing.assert_close(entropy(logits).double(), unsure, rtol=1e-5, atol=1e-6)  # float32
    model.thresholds.copy_(unsure[:6].quantile(0.3, dim=1))  # each exit would take a third
    chosen = [next((e for e in range(6) if unsure[e, b] < model.thresholds[e]), 6) for b in range(32)]
    assert model.exit_of(x).tolist() == chosen
    assert len(set(chosen)) > 3
    assert torch.equal(model(x), logits[chosen, range(32)])
    assert len(model.exits(x, last=2)) == 3


def test_thresholds_are_the_highest_that_cost_no_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    logits = torch.randn(4, 60, 3, generator=generator)
    target = 6.0 * F.one_hot(y, 3)
    logits[1, :30] += target[:30]  # this exit is right, and surest, on half of the images
    logits[3, ::2] += target[::2]  # the final one on another half
    thresholds = choose_thresholds(logits, y)
    leaves = torch.cat([entropy(logits[:-1]) < thresholds[:, None], torch.ones(1, 60, dtype=torch.bool)])
    exit_of = leaves.int().argmax(0)
    right = logits[exit_of, torch.arange(60)].argmax(1) == y
    final = logits[-1].argmax(1) == y
    assert right.sum() >= final.sum()
    assert (exit_of[:30] <= 1).float().mean() > 0.9
    for e in range(3):  # of those that leave there, none the less right
        assert right[exit_of == e].sum() >= final[exit_of == e].sum()
    never = choose_thresholds(torch.stack([-target, target]), y)
    assert never.tolist() == [0.0]
    always = choose_thresholds(torch.stack([target, -target]), y)
    assert always.item() > entropy(target).max()


def test_the_flops_of_each_exit_equal_torchs_count() -> None:
    model = create_model("rdi_resnet38", in_channels=1, width=0.25).eval()
    ours = model.flops((9, 8))
    x = torch.rand(1, 1, 9, 8)
    for last, count in enumerate(ours):
        with FlopCounterMode(display=False) as counter, use_backend("reference"), torch.no_grad():
            model.exits(x, last)
        assert counter.get_total_flops() == count
    assert ours == sorted(ours)


def test_the_max_average_attack_takes_the_most_harmful_of_one_attack_an_exit() -> None:
    model, x, y = rdi_images()
    recipe = recipe_for("rdi", "digits", attack_steps=3)
    index = torch.arange(len(y))
    x_adv = recipe.attack(model, THREAT, 10, seed=3)(x, y, index=index)

    def harm(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.cross_entropy(one, y, reduction="none") for one in model.exits(images)]).sum(0)

    def loss_at(exit: int) -> Any:
        return lambda net, x_adv, x, y: F.cross_entropy(net.exits(x_adv)[exit], y, reduction="none")

    candidates = [
        PGD(
            model,
            eps=THREAT.eps,
            step_size=THREAT.train_step_size,
            steps=3,
            random_start="normal",
            seed=3,
            loss=loss_at(exit),
        )(x, y, index=index)
        for exit in range(7)
    ]
    most = torch.stack([harm(one) for one in candidates]).amax(0)
    torch.testing.assert_close(harm(x_adv), most)
    assert not any(torch.equal(x_adv, one) for one in candidates)  # they differ by the image
    assert (x_adv - x).abs().max() <= THREAT.eps + 1e-6


def test_the_loss_of_rdi_is_its_equation() -> None:
    model, x, y = rdi_images()
    recipe = recipe_for("rdi", "digits", adv_weight=0.25)
    x_adv = (x + 0.1).clamp(max=1)
    model.train()
    (phase,) = recipe.phases()
    result = phase.result(model, Batch(x, y, torch.arange(len(y))), x_adv, recipe.loss_options())
    nat = adv = torch.zeros(())
    for exit in model.exits(torch.cat([x, x_adv])):
        nat = nat + F.cross_entropy(exit[: len(y)], y)
        adv = adv + F.cross_entropy(exit[len(y) :], y)
    torch.testing.assert_close(result.total, 0.75 * nat + 0.25 * adv)
    torch.testing.assert_close(result.terms["adv"], adv.detach())
    with pytest.raises(TypeError, match="recipe 'rdi' trains a RDIResNet, got a ResNet"):
        recipe.attack(narrow("resnet18"), THREAT, 10, 0)


def test_thresholds_are_chosen_before_each_validation(tmp_path: Path) -> None:
    recipe = recipe_for("rdi", "digits", epochs=2, batch_size=32, attack_steps=1, validate_every=2)
    splits = Splits(DIGITS.train.subset(64), DIGITS.validation.subset(20), DIGITS.test.subset(20))
    result = train(recipe, narrow("rdi_resnet38"), splits, tmp_path / "run", quiet=True, tensorboard=False)
    again = narrow("rdi_resnet38")
    again.load_state_dict(result.model.state_dict())
    again.thresholds.zero_()
    recipe.calibrate(again, splits.validation)
    assert torch.equal(again.thresholds, result.model.thresholds)
    assert torch.equal(load_model(tmp_path / "run").thresholds, again.thresholds)
    none = dataclasses.replace(
        DIGITS.test,
        images=DIGITS.test.images[:0],
        labels=DIGITS.test.labels[:0],
        index=DIGITS.test.index[:0],
    )
    with pytest.raises(ValueError, match=r"splits\.validation is empty"):
        recipe.calibrate(again, none)


# --- ADVMOE


def test_an_expert_convolution_is_the_chosen_experts() -> None:
    torch.manual_seed(0)
    layer = ExpertConv2d(3, 4, 2, experts=3).double()
    x = torch.randn(5, 3, 7, 6, dtype=torch.float64)
    chosen = torch.tensor([2, 0, 1, 2, 2])
    gate = F.one_hot(chosen, 3).double().requires_grad_(True)
    filters = layer.convolution.weight.view(3, 4, 3, 3, 3)
    by_expert = torch.stack(
        [F.conv2d(x, weights, stride=2, padding=1) for weights in filters]
    )  # [3, B, 4, H, W]
    output = layer(x, gate)
    torch.testing.assert_close(output, by_expert[chosen, torch.arange(5)], rtol=1e-12, atol=1e-12)
    g = torch.randn_like(output)
    (slope,) = torch.autograd.grad(output, gate, g)
    expected = (by_expert * g).sum((2, 3, 4)).T  # what each expert would have given
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


def test_the_router_picks_one_expert_and_its_gradient_passes_through() -> None:
    model = narrow("advmoe_resnet18").eval()
    x = torch.rand(16, 1, 8, 8)
    scores, gate = model.router(x), model.gate(x)
    assert torch.equal(gate, F.one_hot(scores.argmax(1), 3).float())
    slopes = torch.randn(16, 3)
    weight = model.router.classifier.weight
    one, other = (torch.autograd.grad(value, weight, slopes)[0] for value in (gate, scores))
    torch.testing.assert_close(one, other)
    one, two, three = (
        parameter_count(create_model("advmoe_resnet18", width=0.1, experts=n)) for n in (1, 2, 3)
    )
    assert three - two == two - one
    with pytest.raises(ValueError, match="experts must be an integer of at least 1, got 0"):
        create_model("advmoe_resnet18", experts=0)


def test_advmoe_alternates_between_experts_and_router() -> None:
    model = narrow("advmoe_resnet18")
    recipe = recipe_for("advmoe", "digits", batch_size=16, schedule="step", weight_decay=0.1)
    step = TrainingStep(recipe, model, torch.device("cpu"), 10)
    assert [group["lr"] for group in step.optimizer.param_groups] == [0.1, 0.1]
    step.start_epoch(0)
    batch = next(DIGITS.train.batches(16))
    seen: list[dict[str, torch.Tensor]] = []
    images: list[torch.Tensor] = []
    attack_now = recipe.attack(model, THREAT, 10, 0)

    def attack(x: torch.Tensor, y: torch.Tensor, *, index: torch.Tensor) -> torch.Tensor:
        seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
        images.append(attack_now(x, y, index=index))
        return images[-1]

    terms = step(batch, attack)
    seen.append(dict(model.named_parameters()))
    assert len(seen) == 3  # before the experts' update, between the two, after the router's
    routers = [name for name in seen[0] if name.startswith("router.")]
    experts = [name for name in seen[0] if not name.startswith("router.")]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in routers)
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in experts)
    assert not any(torch.equal(seen[0][name], seen[1][name]) for name in experts if "weight" in name)
    assert not torch.equal(seen[1]["router.classifier.weight"], seen[2]["router.classifier.weight"])
    assert not torch.equal(images[0], images[1])  # the second attack sees the new experts
    assert {"total", "nat", "adv", "router_nat", "router_adv", "grad_norm", "skipped"} == set(terms)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TypeError, match="trains a ADVMOE, got a ResNet"):
        TrainingStep(recipe, narrow("resnet18"), torch.device("cpu"), 10)(batch, attack)
    with pytest.raises(ValueError, match="router_weight must be a number of at least 0, got -1"):
        recipe_for("advmoe", "digits", router_weight=-1)


# --- Separate-Net


def test_separate_net_takes_the_member_that_the_detector_names() -> None:
    model = narrow("separate_net")
    with torch.no_grad():
        model.router.type_head.weight.normal_(std=3.0)
    model(torch.rand(32, 1, 8, 8), is_clean=torch.arange(32) < 16)
    model.eval()
    x = torch.rand(40, 1, 8, 8)
    model.router.type_head.bias.data -= model.route(x).type_logits.detach().median(0).values  # half of each
    standard, robust, p = model.standard(x), model.robust(x), model.route(x).p_clean
    assert 0 < (p > 0.5).sum() < 40
    assert torch.equal(model(x), torch.where(p[:, None] > 0.5, standard, robust))
    assert torch.equal(model.with_gate("standard")(x), standard)
    assert torch.equal(model.with_gate("robust")(x), robust)
    soft = model.with_gate("soft")
    torch.testing.assert_close(soft(x), p[:, None] * standard + (1 - p[:, None]) * robust)
    assert torch.equal(model(x, routing=Routing(None, torch.ones(40), [])), standard)
    assert model.gate == "hard"
    head = model.router.type_head.weight
    assert torch.autograd.grad(model(x).sum(), head, allow_unused=True) == (None,)
    assert torch.autograd.grad(soft(x).sum(), head)[0].any()  # a way for an attacker through the detector
    with pytest.raises(ValueError, match=r"gate must be one of \['hard', 'soft', .*\], got 'no'"):
        model.with_gate("no")
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        create_model("separate_net", width=0.1, threshold=2)
    options = model.config["options"] | {"threshold": 1.0}
    careful = create_model("separate_net", in_channels=1, **options).eval()
    careful.load_state_dict(model.state_dict())
    assert torch.equal(careful(x), robust)


def test_output_mixing_mixes_probabilities_with_a_gradient_for_the_detector() -> None:
    torch.manual_seed(0)
    model = create_model("mixed_net", in_channels=1, width=0.1, router_widths=(8, 16)).eval().double()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    p = model.route(x).p_clean[:, None]
    standard, robust = (member(x).softmax(1) for member in (model.standard, model.robust))
    torch.testing.assert_close(model(x).softmax(1), p * standard + (1 - p) * robust)
    for end, member in ((0.0, model.robust), (1.0, model.standard)):
        routing = dataclasses.replace(model.route(x), p_clean=torch.full((3,), end, dtype=torch.float64))
        torch.testing.assert_close(
            model(x, routing=routing).softmax(1), member(x).softmax(1), atol=1e-5, rtol=0
        )
    (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), model.router.type_head.weight)
    assert gradient.abs().sum() > 0
    assert torch.equal(model.with_gate("robust")(x), model.robust(x))


def test_separate_net_trains_each_member_on_its_kind() -> None:
    model = narrow("separate_net")
    x = torch.rand(10, 1, 8, 8)
    is_clean = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 1, 1]).bool()
    twin = copy.deepcopy(model)
    logits = model(x, is_clean=is_clean)
    assert torch.equal(logits[is_clean], twin.standard(x[is_clean]))
    assert torch.equal(logits[~is_clean], twin.robust(x[~is_clean]))
    assert torch.equal(model(x, is_clean=torch.ones(10).bool()), twin.standard(x))
    with pytest.raises(ValueError, match="is_clean is missing"):
        model(x)
    with pytest.raises(ValueError, match="is_clean is for train mode"):
        model.eval()(x, is_clean=is_clean)


def test_separate_net_trains_its_parts_independently() -> None:
    model = narrow("separate_net")
    recipe = recipe_for("separate", "digits", attack_steps=2, type_weight=0.5)
    batch = next(DIGITS.train.batches(12))
    x, y = batch.x, batch.y
    x_robust, x_standard = recipe.attack(model, THREAT, 10, seed=1)(x, y, index=batch.index).split(12)
    assert not torch.equal(x_robust, x_standard)
    twin = copy.deepcopy(model)
    both = torch.cat([x_robust, x_standard])
    (phase,) = recipe.phases()
    phase.result(model, batch, both, recipe.loss_options()).total.backward()

    F.cross_entropy(twin.standard(x), y).backward()
    clean, adversarial = twin.robust(torch.cat([x, x_robust])).split(12)
    p, q = clean.log_softmax(1), adversarial.log_softmax(1)
    (F.cross_entropy(clean, y) + 6 * (p.exp() * (p - q)).sum(1).mean()).backward()
    kind = torch.tensor([1] * 12 + [0] * 24)
    each = F.cross_entropy(twin.route(torch.cat([x, both])).type_logits, kind, reduction="none")
    (0.5 * (each[:12].sum() / 24 + each[12:].sum() / 48)).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        # the same sums of float32 in another order
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    slow = recipe.build_optimizer(model).param_groups[1]
    assert slow["lr"] == 0.01
    assert len(slow["params"]) == len(list(model.router.parameters()))
    with frozen(model), pytest.raises(TypeError, match="recipe 'separate' trains a SeparateNet"):
        recipe.attack(model.robust, THREAT, 10, seed=1)


# --- Swin


def test_swin_without_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    make_absent(monkeypatch, "timm")
    with pytest.raises(ImportError, match=r'swin_t needs timm, which is not.*: pip install "awnet\[timm\]"'):
        create_model("swin_t")


def test_swin_reports_that_torchvision_does_not_fit_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget(monkeypatch, "timm")
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"torchvision::nms does not exist.*pip install torchvision"):
        create_model("swin_t")
    assert main(["train", "--model", "swin_t", "--device", "cpu", "--out", str(tmp_path / "run")]) != 0
    assert "pip install torchvision" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "count"), [("swin_t", 27_505_108), ("swin_s", 48_805_732)])
def test_swin_has_the_parameters_of_the_paper(name: str, count: int) -> None:
    needs(name)
    with torch.device("meta"):
        assert parameter_count(create_model(name)) == count
    model = narrow("swin_t").eval()
    with pytest.raises(ValueError, match="x must be 8×8 images, got 32×32"):
        model(torch.rand(1, 1, 32, 32))


# --- all of them


@pytest.mark.parametrize("name", ["advmoe_resnet18", "separate_net", "separate_net_l", "rdi_resnet38"])
def test_convolutions_and_batch_norms_of_baselines_are_the_packages(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, width=0.1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert isinstance(module, FilterScaledConv2d)
        assert not isinstance(module, nn.BatchNorm2d)


def test_members_of_separate_net_are_attacked_on_their_fast_copies() -> None:
    model, batch = narrow("separate_net"), next(DIGITS.train.batches(8))
    attack = recipe_for("separate", "digits", attack_steps=1).attack(model, THREAT, 10, seed=1)
    attack(batch.x, batch.y, index=batch.index)
    assert isinstance(attack.attacks[0].pgd.model, InferenceBackbone)
    assert isinstance(attack.attacks[1].pgd.model, PlainInferenceCopy)


@pytest.mark.parametrize("name", [name for _, name in OWN_RECIPES])
def test_baselines_are_evaluated_like_any_network(name: str) -> None:
    report = evaluate(narrow(name).eval(), DIGITS.test, ["fgsm"], limit=20, batch_size=20)
    assert 0 <= report.attacks["fgsm"].robust_accuracy <= 1
    assert ("fgsm" in report.router_auc) == (name == "separate_net")
    assert bool(report.exits) == (name == "rdi_resnet38")


def test_the_report_tells_which_exits_were_taken(tmp_path: Path) -> None:
    model, x, _ = rdi_images(32)
    with torch.no_grad():
        model.thresholds.copy_(entropy(torch.stack(model.exits(x)))[:6].quantile(0.3, dim=1))
    report = evaluate(model, DIGITS.test, ["fgsm"], limit=20, batch_size=20, out=tmp_path)
    again = Report.load(tmp_path / "evaluations" / "default")
    cost = model.flops((8, 8))
    for kind in ("clean", "fgsm"):
        use = report.exits[kind]
        assert again.exits[kind] == use
        taken = report.per_sample[f"{kind}_exit"]
        assert use["mean_exit"] == pytest.approx(taken.mean() + 1)
        assert use["mean_flops"] == pytest.approx(sum(cost[e] for e in taken) / 20)
        assert use["shares"] == pytest.approx([(taken == e).mean() for e in range(7)])
        assert use["mean_flops"] < use["full_flops"] == cost[6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("advmoe_resnet18", r"cannot convert 'blocks\.0\.conv1\.convolution' \(FilterScaledConv2d\)"),
        ("separate_net", "SeparateNet already has a router"),
        ("swin_t", "Swin has no nn.BatchNorm2d"),
    ],
)
def test_baselines_that_cannot_be_converted_are_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(narrow(name), router_widths=(4,), image_size=8)

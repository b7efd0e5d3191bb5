"""The training attack as one recorded program: the same bits as without, and never with yesterday's weights.

Off a GPU a stand-in records and replays the program, which shows what is recorded, when, and from which memory
it reads; the tests marked gpu do the same with CUDA graphs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.recorder import Recorder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import awnet
from awnet.attacks import PGD, GraphedPGD
from awnet.data import load_dataset
from awnet.models import create_model
from awnet.nn import InferenceAWNet, MixBatchNorm2d, inference_copy, not_supported
from awnet.nn.inference import Watch, register_layers
from awnet.ops import use_backend

SIZE: dict[str, Any] = {"eps": 0.1, "step_size": 0.025, "steps": 4, "random_start": "normal"}


def net(name: str = "awnet_tiny", seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(name, num_classes=4, in_channels=2, **options)
    if name.startswith("awnet"):
        with torch.no_grad():
            model.router.signal_heads.weight.normal_(std=0.1)
    return model


def batch(n: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 6, 5, generator=generator)
    return {"x": x, "y": torch.randint(4, (n,), generator=generator), "index": torch.arange(n) + 3}


def engine(model: nn.Module, record: Any = None, **changes: Any) -> GraphedPGD:
    return GraphedPGD(model, num_classes=4, record=record, **(SIZE | changes))


def move(model: nn.Module, seed: int = 2) -> None:
    """Changes every weight in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=generator).to(value))


@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
def test_recorded_and_plain_attacks_give_the_same_bits(name: str, loss: str) -> None:
    model, recorder = net(name), Recorder()
    recorded, plain = engine(model, recorder, loss=loss), engine(model, loss=loss)
    images = batch()
    for seed in (0, 7):
        recorded.seed = plain.seed = seed
        x_adv = recorded(**images)
        assert torch.equal(x_adv, plain(**images))
        images["x"] = images["x"].flip(0).contiguous()
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    assert x_adv.dtype == torch.float32
    assert (x_adv - images["x"].flip(0)).abs().max() <= 0.1 + 2.0**-24
    # and the same as PGD itself on the frozen module
    assert torch.equal(
        x_adv,
        PGD(model.inference_copy(), **(SIZE | {"loss": loss, "seed": 7}))(
            **images | {"x": images["x"].flip(0)}
        ),
    )


def test_a_recorded_attack_follows_the_weights() -> None:
    model, recorder, images = net(), Recorder(), batch()
    attack = engine(model, recorder)
    before = attack(**images)
    move(model)
    after = attack(**images)
    assert recorder.recorded == 1
    assert torch.equal(after, engine(model)(**images))
    assert not torch.equal(after, before)
    # weights put in other memory (a checkpoint assigned, a module moved) are not in the recorded program
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 0.9
    assert torch.equal(attack(**images), engine(model)(**images))
    assert recorder.recorded == 2


def test_a_recorded_attack_without_refresh_uses_stale_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = net(), batch()
    attack = engine(model, Recorder())
    attack(**images)
    monkeypatch.setattr(InferenceAWNet, "refresh", lambda self: None)
    move(model)
    stale = attack(**images)
    monkeypatch.undo()
    assert not torch.equal(stale, engine(model)(**images))


def test_an_attack_is_recorded_again_when_a_setting_changes() -> None:
    model, recorder, images = net(), Recorder(), batch()
    attack = engine(model, recorder)
    small = {k: v[:2] for k, v in images.items()}
    for n, given in enumerate((images, small, images, small)):  # the last batch of an epoch has its own
        assert torch.equal(attack(**given), engine(model)(**given))
        assert recorder.recorded == min(n + 1, 2)
    for name, value in (("eps", 0.05), ("step_size", 0.01), ("steps", 2), ("loss", "kl")):
        setattr(attack.pgd, name, value)
        expected = engine(model, **{k: getattr(attack.pgd, k) for k in ("eps", "step_size", "steps", "loss")})
        assert torch.equal(attack(**images), expected(**images))
    assert recorder.recorded == 6
    with use_backend("eager"):
        attack(**images)
    assert recorder.recorded == 7
    model.router.p_scale = 0.5  # an option that the program holds fast
    attack(**images)
    assert recorder.recorded == 8
    attack({**images}["x"].double(), images["y"], index=images["index"])
    assert recorder.recorded == 9


def test_the_number_of_recorded_attacks_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    model, recorder, images = net("resnet_tiny"), Recorder(), batch(5)
    attack = engine(model, recorder, max_graphs=2, steps=1)
    with caplog.at_level(logging.INFO, "awnet"):
        for n in (1, 2, 3) * 12:
            part = {k: v[:n] for k, v in images.items()}
            assert torch.equal(attack(**part), engine(model, steps=1)(**part))
    assert len(attack.graphs) <= 2
    assert recorder.recorded == 32  # then the plain loop
    assert sum("yet another batch shape" in r.message for r in caplog.records) == 1


def test_the_next_call_does_not_overwrite_the_returned_images() -> None:
    model, images = net(), batch()
    attack = engine(model, Recorder())
    first = attack(**images)
    kept = first.clone()
    attack.seed = 1
    attack(**images)
    assert torch.equal(first, kept)
    first.zero_()
    attack.seed = 0
    assert torch.equal(attack(**images), kept)


def test_the_reason_for_the_plain_loop_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model, images = net(), batch()

    def failing(program: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    def custom(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x_adv), y, reduction="none")

    expected = engine(model)(**images)
    for changes, reason in (
        ({}, "CUDA graphs need a CUDA device, and the images are on cpu"),
        ({"record": failing}, "could not be captured (operation not permitted"),
        ({"record": Recorder(), "loss": custom}, "the loss or the model may wait for the device"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "awnet"):
            attack = engine(model, **changes)
            for _ in range(3):
                assert torch.equal(attack(**images), expected)
        assert [reason in r.message for r in caplog.records] == [True]
        assert (caplog.records[0].levelno == logging.WARNING) == ("could not be captured" in reason)
    # who knows that a loss waits for nothing says so
    recorder = Recorder()
    assert torch.equal(engine(model, recorder, loss=custom, capture=True)(**images), expected)
    assert recorder.recorded == 1


def test_a_model_without_frozen_is_frozen_in_place() -> None:
    images = batch()
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    model = nn.Sequential(*layers).train()
    actual = engine(model, Recorder())(**images)
    assert torch.equal(actual, PGD(model, **SIZE)(**images))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    converted = awnet.convert(create_model("resnet_tiny", num_classes=4, in_channels=2))
    assert torch.equal(engine(converted)(**images), PGD(converted, **SIZE)(**images))


def test_a_graphed_attack_leaves_the_model_in_train_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = net().train(), batch()
    images["x"].requires_grad_()
    state = copy.deepcopy(model.state_dict())
    calls: list[bool] = []
    forward = MixBatchNorm2d.arguments  # which every layer of the live model calls
    monkeypatch.setattr(
        MixBatchNorm2d,
        "arguments",
        lambda *a: calls.append(True) or forward(*a),  # type: ignore[func-returns-value]
    )
    register_layers(MixBatchNorm2d)  # as patched
    with torch.no_grad():
        x_adv = engine(model, Recorder())(**images)
    assert not x_adv.requires_grad
    assert images["x"].grad is None
    assert not calls  # the attack never ran the live model
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    monkeypatch.undo()
    register_layers(MixBatchNorm2d)


def test_nan_gradients_give_nan_images_in_a_graphed_attack() -> None:
    model, images = net("resnet_tiny"), batch()
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    assert engine(model)(**images).isnan().any(dim=(1, 2, 3)).all()
    assert engine(model, Recorder())(**images).isnan().any(dim=(1, 2, 3)).all()


def test_a_graphed_attack_returns_an_empty_batch_for_an_empty_batch() -> None:
    assert engine(net(), Recorder())(**{k: v[:0] for k, v in batch().items()}).shape == (0, 2, 6, 5)


class Reads(TorchDispatchMode):
    """Counts values that are read back to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_graphed_attack_does_not_synchronize_with_the_device(loss: str) -> None:
    attack, images = engine(net(), Recorder(), loss=loss), batch()
    with Reads() as reads:
        for _ in range(2):
            attack(**images)
    assert reads.count == 0
    with Reads() as reads:
        images["y"].sum().item()
    assert reads.count == 1


def test_robust_accuracy_is_that_of_the_unfolded_model() -> None:
    splits = load_dataset("digits")
    train, test = splits.train.subset(1024), splits.test.subset(200)
    images, labels = train.images.float() / train.max_value, train.labels
    torch.manual_seed(0)
    model = create_model("awnet_tiny", num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in zip(images.split(64), labels.split(64), strict=True):
        noisy = (x + 0.2 * torch.randn(x.shape).sign()).clamp(0, 1)
        both = torch.cat([x, noisy])
        loss = F.cross_entropy(model(both, is_clean=torch.arange(128) < 64), torch.cat([y, y]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    x, y = test.images.float() / test.max_value, test.labels
    size = {"eps": 0.08, "step_size": 0.02, "steps": 10, "random_start": "normal"}
    index = torch.arange(len(x))

    def robust(x_adv: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x_adv).argmax(1) == y

    expected = PGD(model, **size)(x, y, index=index)
    share = robust(expected).float().mean()
    assert 0.05 < share < 0.95  # an attack that neither fails nor is trivial
    actual = {
        dtype: GraphedPGD(model, num_classes=10, dtype=dtype, **size)(x, y, index=index)
        for dtype in (None, torch.bfloat16)
    }
    assert (actual[None] == expected).float().mean() > 0.98  # a sign turns where a gradient is nearly 0
    spread = (share * (1 - share) / len(x)) ** 0.5  # of an accuracy over this many images
    for x_adv in actual.values():
        assert (robust(x_adv).float().mean() - share).abs() <= 2 * spread


@pytest.mark.parametrize(
    "settings",
    [
        SIZE,
        SIZE | {"loss": "kl", "seed": 3},
        SIZE | {"random_start": "uniform", "loss": "margin", "kappa": 0.1},
    ],
)
def test_the_graphed_form_of_an_attack_gives_the_same_images(settings: dict[str, Any]) -> None:
    model, images, recorder = net().eval(), batch(), Recorder()
    attack = PGD(model, **settings)
    graphed = GraphedPGD.of(attack, num_classes=4, record=recorder)
    assert graphed.pgd.settings == attack.settings
    assert torch.equal(graphed(**images), PGD(model.inference_copy(), **settings)(**images))
    assert recorder.recorded == 1


# --- host time


def patched(model: nn.Module) -> Callable[[], None]:
    forward = MixBatchNorm2d.forward
    MixBatchNorm2d.forward = lambda self, *a, **o: forward(self, *a, **o)  # type: ignore[method-assign]
    return lambda: setattr(MixBatchNorm2d, "forward", forward)


def replaced_data(model: nn.Module) -> None:
    model.router.type_head.bias.data = model.router.type_head.bias.data.clone()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "an option": lambda m: setattr(m.router, "beta", 2.0),
    "the stride of a layer": lambda m: setattr(m.dynamic.stem, "stride", (2, 2)),
    "the mode": lambda m: m.eval(),
    "the memory of a weight": replaced_data,
    "a parameter": lambda m: setattr(m.dynamic.stem, "weight", nn.Parameter(m.dynamic.stem.weight + 1)),
    "a buffer": lambda m: setattr(m.dynamic.stem.bn, "running_var", torch.ones(2, 16)),
    "a submodule": lambda m: setattr(m.dynamic, "classifier", copy.deepcopy(m.dynamic.classifier)),
    "another submodule": lambda m: m.dynamic.add_module("more", nn.Identity()),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.dynamic.classifier),
    "a hook": lambda m: m.dynamic.stages[0][0].register_forward_hook(lambda *a: None).remove,
    "a second hook of the kind": lambda m: m.router.register_full_backward_hook(lambda *a: None).remove,
    "a method": lambda m: setattr(m.dynamic, "forward", m.dynamic.forward),
    "a method of a class": patched,
    "a global hook": lambda m: torch.nn.modules.module.register_module_forward_hook(lambda *a: None).remove,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_watch_detects_every_change_except_of_values(change: str) -> None:
    model = net().train()
    model.router.register_forward_hook(lambda *a: None)
    watch = Watch(model)
    move(model)
    assert watch.unchanged()
    undo = CHANGES[change](model)
    try:
        assert not watch.unchanged()
    finally:
        if callable(undo) and not isinstance(undo, nn.Module):
            undo()


def test_an_unchanged_model_is_examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, calls = net().train(), batch(), [0]

    def counted(model: nn.Module) -> str | None:
        calls[0] += 1
        return not_supported(model)

    monkeypatch.setattr("awnet.attacks.graphed.not_supported", counted)
    attack = engine(model, Recorder())
    for seed in range(3):
        attack.seed = seed
        attack(**images)
        move(model, seed)
    assert calls == [1]
    model.eval()
    attack(**images)
    assert calls == [2]


class Copies(TorchDispatchMode):
    """The dtypes of the lists of tensors that are copied at once."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[set[torch.dtype], ...]] = []
        self.other: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        if name == "aten::_foreach_copy_":
            self.dtypes.append(tuple({x.dtype for x in tensors} for tensors in args[:2]))
        elif "copy" in name:
            self.other.append(name)
        return func(*args, **(kwargs or {}))


def test_all_weights_are_copied_in_one_call_for_each_dtype() -> None:
    inference = inference_copy(net().train(), torch.bfloat16)
    assert inference is not None
    with Copies() as copies:
        inference.refresh()
    float32, bfloat16 = {torch.float32}, {torch.bfloat16}
    assert sorted(copies.dtypes, key=str) == [(bfloat16, float32), (float32, float32)]
    assert copies.other == []


# --- with CUDA graphs


@pytest.fixture
def deterministic() -> Any:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # two runs of the plain loop give the same bits then
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_cuda_graph_gives_the_same_bits_and_follows_the_weights(
    dtype: torch.dtype, loss: str, deterministic: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = net().cuda().to(memory_format=torch.channels_last).train()
    images = {k: v.cuda() for k, v in batch(32).items()}
    graphed = GraphedPGD(model, num_classes=4, dtype=dtype, loss=loss, **SIZE)
    plain = GraphedPGD(model, num_classes=4, dtype=dtype, loss=loss, capture=False, **SIZE)
    seen = []
    with caplog.at_level(logging.INFO, "awnet"):
        for seed in range(3):
            graphed.seed = plain.seed = seed
            seen.append(graphed(**images))
            assert torch.equal(seen[-1], plain(**images))
            move(model, seed)
        last = {k: v[:7] for k, v in images.items()}
        assert torch.equal(graphed(**last), plain(**last))
    assert len(graphed.graphs) == 2
    assert "could not be captured" not in caplog.text
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.gpu
def test_a_cuda_graph_runs_beside_training_steps(deterministic: None) -> None:
    actual = []
    for capture in (True, False):
        model = net().cuda().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        images = {k: v.cuda() for k, v in batch(16).items()}
        attack = GraphedPGD(model, num_classes=4, capture=capture, **SIZE)
        for _ in range(3):
            x_adv = attack(**images)
            both, kind = torch.cat([images["x"], x_adv]), torch.arange(32, device="cuda") < 16
            loss = F.cross_entropy(model(both, is_clean=kind), images["y"].repeat(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        actual.append(attack(**images))
    # the training passes sum in an order of their own, so steps agree but for signs of tiny gradients
    assert (actual[0] == actual[1]).float().mean() > 0.9


@pytest.mark.gpu
def test_a_model_that_waits_for_the_host_falls_back(
    deterministic: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = net().cuda()
    images = {k: v.cuda() for k, v in batch().items()}

    def waits(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x_adv), y, reduction="none") * float(x_adv.sum() > -1)

    attack = GraphedPGD(model, num_classes=4, loss=waits, capture=True, **SIZE)
    with caplog.at_level(logging.INFO, "awnet"):
        x_adv = attack(**images)
    assert "could not be captured" in caplog.text
    assert torch.equal(x_adv, GraphedPGD(model, num_classes=4, loss=waits, **SIZE)(**images))

"""Attacks against closed forms and a slow rewrite, what they leave behind, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from awnet import rng
from awnet.attacks import CW, FGSM, PGD, frozen, list_attacks, named_attack
from awnet.data.threat_model import ThreatModel
from awnet.models import create_model
from awnet.ops import use_backend


def small_cnn(classes: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(classes),
    ).to(dtype)
    model(torch.rand(3, 2, 6, 5, dtype=dtype))  # shapes the last layer, moves the running statistics
    return model.eval()


def batch(n: int = 3, classes: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 6, 5, generator=generator).to(dtype)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.0, 1.0
    return x, torch.randint(classes, (n,), generator=generator)


class Ops(TorchDispatchMode):
    """Counts the ops that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[str(func)] = self.count.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def convolution_backwards(run: Callable[[], object]) -> tuple[int, int]:
    """How many convolutions ``run`` goes back through, and how many of them make a weight gradient.

    The profiler sees them at any depth, also inside an op of our own.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    masks = [e.concrete_inputs[-1] for e in profiler.events() if e.name == "aten::convolution_backward"]
    return len(masks), sum(mask[1] for mask in masks)


# ---- the right answer


class Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("name", ["fgsm", "pgd", "cw"])
def test_linear_model_reaches_the_closed_form_optimum(name: str) -> None:
    # with two classes every loss grows with (w_other - w_y)·x, so the best pixel is the bound on that side
    torch.manual_seed(0)
    model, x, y = Linear(torch.randn(2, 60)), *batch(8, 2)
    eps = 0.1
    attack = {
        "fgsm": FGSM(model, eps=eps),
        "pgd": PGD(model, eps=eps, step_size=0.02, steps=10),
        "cw": CW(model, eps=eps, step_size=0.02, steps=10, kappa=1e6),
    }[name]
    direction = (model.weight[1 - y] - model.weight[y]).detach().reshape_as(x)
    optimum = torch.where(direction > 0, (x + eps).clamp(max=1), (x - eps).clamp(min=0))
    assert torch.equal(attack(x, y), optimum)


def slow_pgd(model, x, y, *, eps, step_size, steps, loss, start, kappa):  # type: ignore[no-untyped-def]
    """One image, one pixel and one class at a time, with the losses written out."""

    def value(logits: Tensor, clean: Tensor, label: int) -> Tensor:
        p, q = logits.exp() / logits.exp().sum(), clean.exp() / clean.exp().sum()
        if loss == "ce":
            return -p[label].log()
        if loss == "kl":
            return sum((q[k] * (q[k] / p[k]).log() for k in range(len(q))), torch.zeros(()))
        best = max((logits[k] for k in range(len(q)) if k != label), key=Tensor.item)
        gap = logits[label] - best
        return -gap if gap.item() > -kappa else torch.full_like(gap, kappa) + 0 * gap

    out = torch.empty_like(x)
    for i in range(len(x)):
        low = [max(float(v) - eps, 0.0) for v in x[i].flatten()]
        high = [min(float(v) + eps, 1.0) for v in x[i].flatten()]
        point = [min(max(float(v), a), b) for v, a, b in zip(start[i].flatten(), low, high, strict=True)]
        clean = model(x[i : i + 1])[0].detach()
        for _ in range(steps):
            image = torch.tensor(point, dtype=x.dtype).reshape_as(x[i]).requires_grad_()
            value(model(image[None])[0], clean, int(y[i])).backward()
            for j, slope in enumerate(image.grad.flatten().tolist()):
                moved = point[j] + step_size * ((slope > 0) - (slope < 0))
                point[j] = min(max(moved, low[j]), high[j])
        out[i] = torch.tensor(point, dtype=x.dtype).reshape_as(x[i])
    return out


@pytest.mark.parametrize(
    ("loss", "start"),
    [*((loss, start) for loss in ("ce", "margin", "kl") for start in ("uniform", "normal")), ("ce", None)],
)
def test_pgd_equals_a_slow_rewrite_in_float64(loss: str, start: str | None) -> None:
    model = small_cnn(dtype=torch.float64)
    x, y = batch(dtype=torch.float64)
    index = torch.tensor([7, 0, 1234567])
    key = rng.key("attack start", 5)
    begin = {
        "uniform": x + 0.2 * (2 * rng.uniform(key, index, x.shape[1:]).double() - 1),
        "normal": x + 0.05 * rng.normal(key, index, x.shape[1:]).double(),
        None: x,
    }[start]
    # kappa is small enough that the margin loss stops pushing on the way
    size = {"eps": 0.2, "step_size": 0.03, "steps": 6, "kappa": 0.1}
    ours = PGD(model, loss=loss, random_start=start, noise_std=0.05, seed=5, **size)(x, y, index=index)
    theirs = slow_pgd(model, x, y, loss=loss, start=begin, **size)
    assert ours.dtype == torch.float64
    assert (ours - theirs).abs().max() < 1e-12  # the same steps but for rounding
    if loss == "margin":  # kappa did matter
        unbounded = PGD(model, loss=loss, random_start=start, noise_std=0.05, seed=5, **size | {"kappa": 1e6})
        assert not torch.equal(unbounded(x, y, index=index), ours)


def test_a_loss_function_receives_model_and_images() -> None:
    model, (x, y) = small_cnn(), batch()

    def ours(net: nn.Module, x_adv: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
        assert net is model
        assert torch.equal(clean, x)
        return F.cross_entropy(net(x_adv), labels, reduction="none")

    size = {"eps": 0.1, "step_size": 0.02, "steps": 4}
    assert torch.equal(PGD(model, loss=ours, **size)(x, y), PGD(model, loss="ce", **size)(x, y))
    assert PGD(model, loss=ours, **size).settings["loss"].endswith("ours")


def test_pixels_with_zero_gradient_do_not_change() -> None:
    model = Linear(torch.randn(2, 60))
    with torch.no_grad():
        model.weight[:, ::2] = 0
    x, y = batch(4, 2)
    moved = PGD(model, eps=0.1, step_size=0.05, steps=5, random_start=None)(x, y) != x
    assert not moved.flatten(1)[:, ::2].any()
    assert moved.flatten(1)[:, 1::2].float().mean() > 0.9


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([0.0, 1e-8, 1 / 255, 8 / 255, 0.3, 1.0]),
    st.floats(0, 2),
    st.integers(0, 4),
    st.sampled_from([("ce", "uniform"), ("ce", None), ("margin", "uniform"), ("kl", "normal")]),
    st.integers(0, 2**31),
)
def test_attacks_stay_in_the_ball_and_in_the_image_range(shape, eps, step_size, steps, kind, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    x = torch.rand(shape).mul(1.4).sub(0.2).clamp(0, 1)  # some pixels exactly 0 and 1
    model, y = Linear(torch.randn(3, math.prod(shape[1:]))), torch.randint(3, shape[:1])
    before = x.clone()
    loss, start = kind
    attack = PGD(model, eps=eps, step_size=step_size, steps=steps, loss=loss, random_start=start, seed=seed)
    x_adv = attack(x, y)
    assert torch.equal(x, before)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert x_adv.data_ptr() != x.data_ptr()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    # x ± eps is rounded once: half a float32 step below 1
    assert (x_adv.double() - x.double()).abs().max() <= eps + 2.0**-24
    if eps == 0:
        assert torch.equal(x_adv, x)


# ---- noise


def test_random_start_is_keyed_by_seed_and_index() -> None:
    model, (x, y) = small_cnn(), batch(6)
    index = torch.tensor([3, 1, 4, 15, 9, 26])

    def start(seed: int, rows: list[int]) -> Tensor:
        attack = PGD(model, eps=0.3, step_size=0.1, steps=0, seed=seed)
        return attack(x[rows], y[rows], index=index[rows])

    order = [5, 2, 0, 1, 4, 3]
    assert torch.equal(start(0, order), start(0, list(range(6)))[order])
    assert torch.equal(start(0, [2]), start(0, list(range(6)))[2:3])
    assert not torch.equal(start(0, order), start(1, order))
    assert torch.equal(
        PGD(model, eps=0.3, step_size=0.1, steps=2)(x, y),
        PGD(model, eps=0.3, step_size=0.1, steps=2)(x, y, index=torch.arange(6)),
    )


def test_uniform_start_fills_the_ball_and_normal_start_is_small() -> None:
    x, y = torch.full((50, 2, 6, 5), 0.5), torch.zeros(50, dtype=torch.int64)
    uniform = PGD(small_cnn(), eps=0.2, step_size=0, steps=3)(x, y) - x
    assert uniform.min() < -0.199
    assert uniform.max() > 0.199
    assert uniform.mean().abs() < 0.01
    assert abs(uniform.std().item() - 0.2 / math.sqrt(3)) < 0.005
    normal = PGD(small_cnn(), eps=0.2, step_size=0, steps=0, random_start="normal")(x, y) - x
    assert abs(normal.std().item() - 0.001) < 5e-5


def test_same_call_gives_the_same_bits() -> None:
    model, (x, y) = small_cnn(), batch()
    attack = PGD(model, eps=0.1, step_size=0.02, steps=8)
    assert torch.equal(attack(x, y), attack(x, y))


# ---- what an attack leaves behind


def nested_model() -> nn.Module:
    """Submodules in different modes, a parameter that is frozen already, gradients on some."""
    model = small_cnn()
    model.train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def state(model: nn.Module) -> list[object]:
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        [tensor.tolist() for tensor in model.state_dict().values()],
    ]


@pytest.mark.parametrize(
    "attack",
    [
        lambda model: FGSM(model, eps=0.1),
        lambda model: PGD(model, eps=0.1, step_size=0.02, steps=3, loss="kl"),
        lambda model: CW(model, eps=0.1, step_size=0.02, steps=3),
    ],
    ids=["fgsm", "pgd", "cw"],
)
def test_model_is_left_as_it_was(attack) -> None:  # type: ignore[no-untyped-def]
    model, (x, y) = nested_model(), batch()
    before = state(model)
    x.requires_grad_()
    x_adv = attack(model)(x, y)
    assert state(model) == before
    assert x.requires_grad
    assert x.grad is None
    assert torch.equal(x_adv, attack(model.eval())(x, y))  # it ran in eval mode


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_it_was_when_an_exception_passes_through(kind: type[BaseException]) -> None:
    class Fails(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise kind("third step")
            return x

    model, (x, y) = nested_model(), batch()
    model.append(Fails())
    before = state(model)
    with pytest.raises(kind, match="third step"):
        PGD(model, eps=0.1, step_size=0.02, steps=5)(x, y)
    assert state(model) == before


def test_attacks_freeze_the_model_inside_and_outside_frozen_blocks() -> None:
    model = nested_model()
    before = state(model)
    with frozen(model) as same:
        assert same is model
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with frozen(model):
            pass
        assert not any(module.training for module in model.modules())
    assert state(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_run_within_no_grad(context) -> None:  # type: ignore[no-untyped-def]
    model, (x, y) = small_cnn(), batch()
    attack = PGD(model, eps=0.1, step_size=0.02, steps=3, loss="kl", random_start="normal")
    expected = attack(x, y)
    with context():
        assert torch.equal(attack(x.clone(), y.clone()), expected)


def test_autocast_keeps_images_in_float32() -> None:
    model, (x, y) = small_cnn(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = PGD(model, eps=0.1, step_size=0.02, steps=3)(x, y)
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() > 0.05


def test_attacks_return_an_empty_batch_for_an_empty_batch() -> None:
    x, y = torch.rand(0, 2, 6, 5), torch.zeros(0, dtype=torch.int64)
    assert PGD(small_cnn(), eps=0.1, step_size=0.02, steps=3)(x, y).shape == x.shape


# ---- cost


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
def test_attacks_compute_no_weight_gradient_and_one_pass_per_step(loss: str) -> None:
    model, (x, y) = small_cnn().train(), batch()
    attack = PGD(model, eps=0.1, step_size=0.02, steps=5, loss=loss)
    assert convolution_backwards(lambda: attack(x, y)) == (2 * 5, 0)
    with Ops() as ops:
        attack(x, y)
    assert ops.count["aten.convolution.default"] == 2 * (5 + (loss == "kl"))  # kl: the clean logits, once
    # the counter does see weight gradients
    assert convolution_backwards(lambda: F.cross_entropy(model(x), y).backward()) == (2, 2)


def awnet_tiny() -> nn.Module:
    """With filter scales and branches that differ, as after training."""
    torch.manual_seed(0)
    model = create_model("awnet_tiny", num_classes=4, in_channels=2)
    x = torch.rand(8, 2, 6, 5)
    with torch.no_grad():
        model.router.signal_heads.weight.normal_(std=0.1)
        for kind in range(6):
            model((x + 0.1 * kind).clamp(0, 1), is_clean=torch.arange(8) % 2 == 0)
    return model


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_attacks_on_an_aw_net_compute_no_weight_gradient(
    backend: str | None, layout: torch.memory_format
) -> None:
    model, (x, y) = awnet_tiny(), batch()
    x = x.contiguous(memory_format=layout)
    before = state(model)
    attack = PGD(model, eps=0.1, step_size=0.02, steps=2)
    with use_backend(backend):
        passed, weights = convolution_backwards(lambda: attack(x, y))
    assert weights == 0
    # 9 convolutions in the dynamic network and 9 in the router, each once a step; those of NCHW images may be
    # the native backend's own, which has no weight gradient
    if backend == "eager" or layout == torch.channels_last:
        assert passed == 18 * 2
    assert state(model) == before


def test_the_counter_of_weight_gradients_counts_them() -> None:
    # the control: an operator in Python cannot see that only the gradient of x is needed, so unfrozen weights do cost
    model, (x, y) = awnet_tiny().eval(), batch()
    image = x.clone().requires_grad_()
    with use_backend("eager"):
        unfrozen = F.cross_entropy(model(image), y)
        assert convolution_backwards(lambda: torch.autograd.grad(unfrozen, image)) == (18, 18)


def test_attack_on_an_aw_net_goes_through_router_and_network() -> None:
    model, (x, y) = awnet_tiny().eval(), batch()

    def frozen_router(net: nn.Module, x_adv: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            routing = net.route(x_adv)
        return F.cross_entropy(net(x_adv, routing=routing), labels, reduction="none")

    size = {"eps": 0.1, "step_size": 0.02, "steps": 10, "random_start": None}
    before = F.cross_entropy(model(x), y, reduction="none")
    x_adv = PGD(model, **size)(x, y)
    assert (F.cross_entropy(model(x_adv), y, reduction="none") > before).all()
    assert not torch.equal(x_adv, PGD(model, loss=frozen_router, **size)(x, y))
    assert (x_adv - x).abs().max() <= 0.1 + 2.0**-24


def test_attack_steps_do_not_synchronize_with_the_device() -> None:
    # a value read back to the host dispatches _local_scalar_dense (item, bool, int)
    model, (x, y) = awnet_tiny(), batch()

    def reads(steps: int) -> int:
        attack = PGD(model, eps=0.1, step_size=0.02, steps=steps)
        with frozen(model), torch.enable_grad(), Ops() as ops:
            attack.perturb(x, y, torch.arange(len(x)), 3)
        return ops.count.get("aten._local_scalar_dense.default", 0)

    assert reads(1) == reads(9) == 0
    with Ops() as ops:
        x.sum().item()
    assert ops.count["aten._local_scalar_dense.default"] == 1


# ---- the paper's attacks by name


def test_named_attacks_have_the_papers_sizes() -> None:
    model, threat = small_cnn(), ThreatModel(8 / 255)
    assert list_attacks()[:4] == ("fgsm", "pgd_sat", "pgd_trades", "cw")
    actual = {name: named_attack(name, model, threat, seed=3).settings for name in list_attacks()[:4]}
    expected = {
        "fgsm": (8 / 255, 1, "ce", None),
        "pgd_sat": (2 / 255, 20, "ce", "uniform"),
        "pgd_trades": (0.003, 20, "ce", "uniform"),
        "cw": (2 / 255, 30, "margin", "uniform"),
    }
    for name, (step_size, steps, loss, start) in expected.items():
        assert actual[name]["eps"] == 8 / 255
        assert actual[name]["step_size"] == pytest.approx(step_size, rel=1e-12)
        assert (actual[name]["steps"], actual[name]["loss"], actual[name]["random_start"]) == (
            steps,
            loss,
            start,
        )
        assert actual[name]["seed"] == 3
    assert actual["cw"]["kappa"] == 50.0
    scaled = named_attack("pgd_trades", model, ThreatModel(0.15)).settings
    assert scaled["step_size"] == pytest.approx(0.0956 * 0.15, rel=1e-3)


# ---- what is refused


def bad(**change: object) -> dict[str, object]:
    return change


BAD_OPTIONS = [
    (bad(eps=-0.1), ValueError, "eps must be finite and at least 0"),
    (bad(eps=math.nan), ValueError, "eps must be finite"),
    (bad(eps=math.inf), ValueError, "eps must be finite"),
    (bad(eps=8), ValueError, "8/255"),
    (bad(eps="8/255"), TypeError, "eps must be a number"),
    (bad(step_size=-0.01), ValueError, "step_size must be finite and at least 0"),
    (bad(step_size=None), TypeError, "step_size must be a number"),
    (bad(steps=-1), ValueError, "steps must be an integer of at least 0"),
    (bad(steps=2.5), TypeError, "steps must be an integer"),
    (bad(steps=True), TypeError, "steps must be an integer"),
    (bad(loss="dlr"), ValueError, "loss must be one of ce, margin, kl"),
    (bad(random_start="gauss"), ValueError, "random_start must be"),
    (bad(random_start=True), ValueError, "random_start must be"),
    (bad(loss="kl", random_start=None), ValueError, "its gradient is 0 at x"),
    (bad(noise_std=-1.0), ValueError, "noise_std must be"),
    (bad(kappa=-1.0), ValueError, "kappa must be"),
    (bad(seed=0.5), TypeError, "seed must be an integer"),
    (bad(model=torch.relu), TypeError, "model must be a torch.nn.Module"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_attacks_refuse_bad_options(change, error, message) -> None:  # type: ignore[no-untyped-def]
    options = {"model": small_cnn(), "eps": 0.1, "step_size": 0.02, "steps": 3} | change
    with pytest.raises(error, match=message):
        PGD(options.pop("model"), **options)


X, Y = batch()
WITH_NAN, WITH_INF = X.clone(), X.clone()
WITH_NAN[1, 0, 2, 2], WITH_INF[1, 0, 2, 2] = math.nan, math.inf
BAD_CALLS = [
    ((WITH_NAN, Y), {}, ValueError, "NaN"),
    ((WITH_INF, Y), {}, ValueError, "infinite"),
    ((X * 255, Y), {}, ValueError, r"in \[0, 1\]"),
    ((X - 0.5, Y), {}, ValueError, r"in \[0, 1\]"),
    ((X[0], Y), {}, ValueError, r"\[B, C, H, W\]"),
    ((X.numpy(), Y), {}, TypeError, "Tensor"),
    (((X * 255).byte(), Y), {}, TypeError, "uint8"),
    ((X.half(), Y), {}, TypeError, "autocast"),
    ((X.bfloat16(), Y), {}, TypeError, "autocast"),
    ((X, Y - 10), {}, ValueError, "y must hold class numbers of at least 0"),
    ((X, Y * 0 + 4), {}, ValueError, "below the model's 4 classes, got 4"),
    ((X, Y.int()), {}, TypeError, "int64"),
    ((X, F.one_hot(Y, 4)), {}, ValueError, r"\[B\]"),
    ((X, Y.tolist()), {}, TypeError, "Tensor"),
    ((X, Y[:2]), {}, ValueError, "one label for each of the 3 images, got 2"),
    ((X, Y), {"index": [0, 1, 2]}, TypeError, r"index must be a torch.Tensor, int64 \[3\]"),
    ((X, Y), {"index": torch.arange(2)}, ValueError, r"index must be int64 \[3\]"),
    ((X, Y), {"index": torch.arange(3.0)}, ValueError, r"index must be int64 \[3\]"),
    ((X, Y.to("meta")), {}, ValueError, "y must be on x's device"),
    ((X, Y), {"index": torch.arange(3, device="meta")}, ValueError, "index must be on x's device"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS, ids=lambda v: None)
def test_attacks_refuse_bad_images_and_labels(args, kwargs, error, message) -> None:  # type: ignore[no-untyped-def]
    model = nested_model()
    before = state(model)
    for loss in ("ce", "margin", "kl"):
        with pytest.raises(error, match=message):
            PGD(model, eps=0.1, step_size=0.02, steps=2, loss=loss)(*args, **kwargs)
    assert state(model) == before


def test_attacks_refuse_a_model_on_another_device() -> None:
    with pytest.raises(ValueError, match="the model must be on x's device, cpu, got meta"):
        FGSM(small_cnn().to("meta"), eps=0.1)(X, Y)


class Broken(nn.Module):
    """Wrong in the ways a user's model may be wrong."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = small_cnn(), how

    def forward(self, x: Tensor) -> object:
        if self.how == "detached":
            return self.inner(x.detach())
        logits = self.inner(x)
        if self.how == "feature maps":
            return logits[:, :, None]
        if self.how == "tuple":
            return logits, x
        if self.how == "nan in one image":
            return logits + torch.tensor([0, math.nan, 0])[:, None]
        if self.how == "sqrt at zero":  # finite logits whose gradient is not
            return logits + (x - x.detach()).sqrt().sum((1, 2, 3))[:, None] * logits
        raise AssertionError(self.how)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("detached", ValueError, "does the model detach it"),
        ("feature maps", ValueError, r"model must return logits \[B, K\]"),
        ("tuple", ValueError, r"model must return logits \[B, K\] for 3 images, got tuple"),
        ("nan in one image", FloatingPointError, "not finite for 1 of 3 images"),
        ("sqrt at zero", FloatingPointError, "not finite for 3 of 3 images"),
    ],
)
def test_attacks_refuse_models_whose_logits_are_wrong(how: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(Broken(how), eps=0.1, step_size=0.02, steps=2)(X, Y)


def test_attacks_refuse_a_loss_of_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"loss must return one value per image, \[3\], got \[\]"):
        PGD(
            small_cnn(),
            eps=0.1,
            step_size=0.02,
            steps=2,
            loss=lambda model, x_adv, x, y: F.cross_entropy(model(x_adv), y),
        )(X, Y)


def test_an_unknown_attack_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match="unknown attack 'pgd': choose from fgsm, pgd_sat, pgd_trades, cw"):
        named_attack("pgd", small_cnn(), ThreatModel(0.1))

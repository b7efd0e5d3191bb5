"""The steps of an evaluation's attacks as CUDA graphs: the same images as without graphs, or no graph.

Off a GPU a stand-in records and replays the steps; the test marked gpu does the same with CUDA graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fake_cuda import Recorder
from torch import Tensor, nn

from awnet.attacks import CW, FGSM, MIFGSM, PGD, Attack, AutoAttack, FilteredAttack
from awnet.attacks.adaptive import Joint
from awnet.attacks.graphed_steps import captures_attacks, graphed_steps
from awnet.models import create_model
from awnet.nn import InferenceCopy, inference_copy

K = 4
SIZE: dict[str, Any] = {"eps": 0.1, "step_size": 0.025}
ATTACKS: dict[str, Callable[[nn.Module], PGD]] = {
    "uniform start": lambda model: PGD(model, steps=3, seed=5, **SIZE),
    "normal start, kl": lambda model: PGD(model, steps=2, loss="kl", random_start="normal", **SIZE),
    "cw in L2": lambda model: CW(model, steps=3, norm="L2", **SIZE),
    "targeted": lambda model: PGD(model, steps=3, target="random", **SIZE),
}


def copied(name: str = "awnet_tiny", dtype: torch.dtype = torch.float32) -> InferenceCopy:
    torch.manual_seed(0)
    model = create_model(name, num_classes=K, in_channels=2)
    if name.startswith("awnet"):
        with torch.no_grad():
            model.router.signal_heads.weight.normal_(std=0.1)
    copy = inference_copy(model, dtype)
    assert copy is not None
    return copy


def batches(*sizes: int, device: str = "cpu") -> list[dict[str, Tensor]]:
    generator, found, first = torch.Generator().manual_seed(1), [], 0
    for n in sizes:
        index = torch.arange(first, first + n)
        labels = torch.randint(K, (n,), generator=generator)
        found.append({"x": torch.rand(n, 2, 6, 5, generator=generator), "y": labels, "index": index})
        first += n
    return [{name: value.to(device) for name, value in one.items()} for one in found]


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "resnet_tiny") for kind in ATTACKS), ("normal start, kl", "awnet_tiny")],
)
def test_a_replayed_attack_gives_the_same_images_from_the_third_full_batch_on(kind: str, name: str) -> None:
    model, recorder = copied(name), Recorder()
    attack, images = ATTACKS[kind](model), batches(3, 3, 3, 3, 2)
    expected = [attack(**one) for one in images]
    with graphed_steps([attack], K, recorder):
        found = [attack(**one) for one in images]
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[2], images[2]["x"])
    assert len(recorder.recorded) == 1
    assert attack.graphed is None


class Replays:
    """Records by running the program; replays are counted, and their images changed by ``change``."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x_adv: x_adv) -> None:
        self.change, self.replayed = change, 0

    def __call__(self, program: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        output = program().clone()

        def replay() -> None:
            self.replayed += 1
            output.copy_(self.change(program()))

        return output, replay


def test_batches_are_replayed_after_a_graph_was_checked() -> None:
    attack, record = ATTACKS["uniform start"](copied("resnet_tiny")), Replays()
    with graphed_steps([attack], K, record):
        counts = [(attack(**one), record.replayed)[1] for one in batches(3, 3, 3, 2, 3)]
    assert counts == [0, 1, 2, 2, 3]


def flipped(x_adv: Tensor) -> Tensor:
    """The smallest change of one pixel."""
    x_adv[-1, -1, -1, -1] = x_adv[-1, -1, -1, -1].nextafter(torch.tensor(0.5))
    return x_adv


def refuse(program: Callable[[], Tensor]) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Replays(flipped), "it gives other images than the steps one by one"),
        (refuse, "could not be captured .operation not permitted"),
    ],
    ids=["one bit differs", "capture fails"],
)
def test_a_graph_that_fails_or_differs_in_one_bit_is_not_used(record: Any, reason: str) -> None:
    attack, images = ATTACKS["uniform start"](copied("resnet_tiny")), batches(3, 3, 3, 3)
    expected = [attack(**one) for one in images]
    with graphed_steps([attack], K, record):
        found = [attack(**images[0])]
        with pytest.warns(UserWarning, match=f"no CUDA graph, so slower: .*{reason}"):
            found.append(attack(**images[1]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found += [attack(**one) for one in images[2:]]
    assert all(map(torch.equal, found, expected))


def test_calls_between_replays_do_not_read_the_memory_of_the_graph() -> None:
    """A network without branches caches its coefficients, which a graph computes in its own memory."""
    model, (one, two, three) = copied("resnet_tiny"), batches(3, 3, 3)
    attack = ATTACKS["uniform start"](model)

    def record(program: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        output = program()
        values = [*model.parameters(), *model.buffers()]
        before = [value.clone() for value in values]
        torch._foreach_zero_(values)
        program()  # a capture does not run the program, so what it caches has other values
        torch._foreach_copy_(values, before)
        return output, lambda: None

    with torch.no_grad():
        expected = model(three["x"])
        with graphed_steps([attack], K, record):
            attack(**one), attack(**two)
            assert torch.equal(model(three["x"]), expected)


def test_a_label_that_the_model_lacks_is_an_error_in_every_batch() -> None:
    attack, images = ATTACKS["uniform start"](copied("resnet_tiny")), batches(3, 3, 3)
    with graphed_steps([attack], K, Recorder()):
        for one in images:
            attack(**one)
            with pytest.raises(ValueError, match="labels below the model's 4 classes, got 4"):
                attack(**one | {"y": torch.full((3,), K)})


def test_gradients_that_are_not_finite_are_an_error_in_a_graph_too() -> None:
    model, images = copied("resnet_tiny"), batches(3, 3, 3)
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    attack, record = ATTACKS["uniform start"](model), Replays()
    with warnings.catch_warnings(), graphed_steps([attack], K, record):
        warnings.simplefilter("error")
        for one in images:
            with pytest.raises(FloatingPointError, match="not finite for 3 of 3 images"):
                attack(**one)
    assert record.replayed == 2


def test_a_filters_first_attack_is_captured_and_its_second_is_not() -> None:
    full, low = copied("resnet_tiny"), copied("resnet_tiny", torch.bfloat16)
    recorder = Recorder()
    make = ATTACKS["uniform start"]
    plain, attack = (FilteredAttack(make(full), make(low)) for _ in range(2))
    images = batches(3, 3, 3)
    with graphed_steps([attack], K, recorder):
        assert isinstance(attack.attack, PGD)
        assert attack.attack.graphed is None
        found = [attack(**one) for one in images]
    assert all(map(torch.equal, found, [plain(**one) for one in images]))
    assert len(recorder.recorded) == 1


def one_loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return model(x_adv)[:, 0]


def test_attacks_that_cannot_be_captured_run_as_before() -> None:
    model = copied()
    live = create_model("resnet_tiny", num_classes=K, in_channels=2)
    attacks: list[Attack] = [
        FGSM(model, eps=0.1),  # one step
        PGD(model, steps=2, loss=one_loss, **SIZE),
        PGD(live, steps=2, **SIZE),
        MIFGSM(model, eps=0.1, steps=2),
        Joint(model, eps=0.1, steps=2),
        AutoAttack(model, eps=0.1, classes=K),
    ]
    with graphed_steps(attacks, K, refuse):
        assert all(getattr(attack, "graphed", None) is None for attack in attacks)
        for attack in attacks[:5]:
            for one in batches(2, 2):
                attack(**one)


def test_graphs_are_dropped_at_the_end_also_after_an_error() -> None:
    attack = ATTACKS["uniform start"](copied("resnet_tiny"))
    with pytest.raises(KeyError), graphed_steps([attack], K, Recorder()):
        raise KeyError
    assert attack.graphed is None


def test_captures_need_a_cuda_device_and_an_inference_copy() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    model, live = copied("resnet_tiny"), create_model("resnet_tiny", num_classes=K, in_channels=2)
    assert [captures_attacks(c, cuda, model) for c in (False, "auto", True)] == [False, True, True]
    assert not captures_attacks("auto", cpu, model)
    assert not captures_attacks("auto", cuda, live)
    with pytest.raises(ValueError, match="capture needs a CUDA device, got cpu: leave it out"):
        captures_attacks(True, cpu, model)
    with pytest.raises(ValueError, match="capture needs an inference copy of the model, but a ResNet"):
        captures_attacks(True, cuda, live)
    with pytest.raises(ValueError, match="capture must be True, False or 'auto', got 'yes'"):
        captures_attacks("yes", cuda, model)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ATTACKS)
def test_cuda_graphs_give_the_images_of_the_steps_one_by_one(kind: str, dtype: torch.dtype) -> None:
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # two runs without graphs give the same bits then
    try:
        model = copied(dtype=dtype).cuda()
        attack, images = ATTACKS[kind](model), batches(32, 32, 32, 32, 7, device="cuda")
        expected = [attack(**one) for one in images]
        with warnings.catch_warnings(), graphed_steps([attack], K):
            warnings.filterwarnings("error", message="no CUDA graph")
            found = []
            for one in images:
                found.append(attack(**one))
                with torch.no_grad():
                    assert model(one["x"]).isfinite().all()
    finally:
        torch.backends.cudnn.deterministic = deterministic
    assert all(map(torch.equal, found, expected))

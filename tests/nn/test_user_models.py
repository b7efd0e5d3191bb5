"""Models that users bring: what their modules may hold, and what is said of those that cannot be trained."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import awnet
from awnet import attacks
from awnet.data import Splits, load_dataset
from awnet.models.files import packed_extra_state, weights_fingerprint
from awnet.nn.copies import copied, unshare_memory
from awnet.training import recipe_for, train

_DIGITS = load_dataset("digits")
DATA = Splits(*(part.subset(48) for part in _DIGITS))


class Head(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(x.flatten(1))


class ExtraState(Head):
    """Counts its training passes where only get_extra_state sees them."""

    def __init__(self, kind=dict) -> None:
        super().__init__()
        self.kind, self.seen = kind, 0

    def forward(self, x):
        self.seen += self.training
        return super().forward(x)

    def get_extra_state(self):
        if self.kind is torch.Tensor:
            return torch.tensor([self.seen])
        return (
            {"seen": self.seen, "names": ("a", 1.5), "t": torch.ones(2)} if self.kind is dict else self.seen
        )

    def set_extra_state(self, state):
        self.seen = int(state["seen"] if self.kind is dict else state)


class ExpandedBuffers(Head):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5]).view(1, 1, 1, 1).expand(1, 3, 1, 1))
        self.register_buffer("windows", torch.arange(5.0).unfold(0, 3, 1))
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, x):
        return super().forward(x - self.mean[:, :1])


class ExpandedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 1).expand(10, 64))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


class KeepsActivations(Head):
    def forward(self, x):
        self.logits = super().forward(x)
        self.kept = {"all": [self.logits * 2]}
        return self.logits


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu())


def weight_normed():
    return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(64, 10)))


def pruned():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    prune.l1_unstructured(model[1], "weight", 0.5)
    return model


MODELS = {
    "extra state, a dict": ExtraState,
    "extra state, a number": lambda: ExtraState(int),
    "extra state, a tensor": lambda: ExtraState(torch.Tensor),
    "expanded buffers": ExpandedBuffers,
    "an expanded weight": ExpandedWeight,
    "kept activations": KeepsActivations,
    "tied weights": TiedWeights,
    "weight_norm": weight_normed,
    "pruned": pruned,
}


def quick(**options):
    return recipe_for("standard", "digits", epochs=2, batch_size=24, **options)


def trained(model, folder, **options):
    recipe = options.pop("recipe", quick())
    return train(recipe, model, DATA, folder, quiet=True, tensorboard=False, **options)


QUICK = ("extra state, a dict", "expanded buffers", "kept activations", "weight_norm")
RUNS = [(case, 0.0) for case in MODELS] + [("extra state, a dict", 0.9), ("expanded buffers", 0.9)]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("case", "ema_decay"),
    [pytest.param(*run, marks=[] if run[0] in QUICK and run[1] == 0 else pytest.mark.slow) for run in RUNS],
)
def test_what_a_users_module_may_hold_is_trained_saved_and_resumed(case, ema_decay, tmp_path):
    torch.manual_seed(0)
    model = MODELS[case]()
    recipe = quick(ema_decay=ema_decay)
    result = trained(model, tmp_path / "run", recipe=recipe)
    assert result.finished
    torch.manual_seed(0)
    other = MODELS[case]()
    stopped = trained(other, tmp_path / "two", recipe=recipe, max_minutes=1e-9)
    assert not stopped.finished
    torch.manual_seed(1)  # everything comes from the state
    again = trained(MODELS[case](), tmp_path / "two", recipe=recipe, resume=True)
    assert weights_fingerprint(again.model) == weights_fingerprint(result.model)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", MODELS)
def test_what_a_users_module_may_hold_is_attacked_and_evaluated(case):
    torch.manual_seed(0)
    model = MODELS[case]()
    before = weights_fingerprint(model)
    report = awnet.evaluate(model, DATA.test, ["fgsm"], batch_size=48)
    assert 0 <= report.attacks["fgsm"].robust_accuracy <= report.clean_accuracy
    assert weights_fingerprint(model) == before


def test_extra_state_is_in_the_weights_file(tmp_path):
    result = trained(ExtraState(), tmp_path / "run")
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as opened:
        assert sorted(opened.keys()) == ["bias", "weight"]
        assert "_extra_state" in opened.metadata()["awnet.extra_state"]
    assert result.model.seen == 4  # two epochs of two batches


def test_extra_state_that_no_checkpoint_holds_is_refused_before_anything_is_written(tmp_path):
    class Opaque(ExtraState):
        def get_extra_state(self):
            return {"lock": object()}

    with pytest.raises(
        ValueError, match="_extra_state, from get_extra_state, is a dict, which a checkpoint cannot store"
    ):
        trained(Opaque(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert packed_extra_state("a", {"x": [1, "b", None, torch.ones(1)]})


def test_copies_hold_the_values_of_non_leaf_tensors_and_share_none():
    model = KeepsActivations()
    model(torch.rand(2, 1, 8, 8))
    copy = copied(model)
    assert copy.logits is not model.logits
    assert copy.logits.grad_fn is None
    assert torch.equal(copy.kept["all"][0], model.kept["all"][0])
    with torch.no_grad():
        copy.weight.zero_()
    assert model.weight.any()


def test_expanded_tensors_become_plain_ones_of_the_same_values():
    model = ExpandedBuffers()
    before = [buffer.clone() for buffer in model.buffers()]
    unshare_memory(model)
    for buffer, value in zip(model.buffers(), before, strict=True):
        assert torch.equal(buffer, value)
        buffer.copy_(value)  # raises where elements share memory


# ── models that cannot be trained ─────────────────────────────────────────────────────────────────────────


class TwoOutputs(Head):
    def forward(self, x):
        return super().forward(x), x


class DictOutput(Head):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Detaches(Head):
    def forward(self, x):
        return super().forward(x).detach()


class Whole(Head):
    def forward(self, x):
        return super().forward(x).argmax(1, keepdim=True).expand(-1, 10)


def of_inference_mode():
    with torch.inference_mode():
        return Head()


REFUSED = {
    "half": (lambda: Head().half(), r"weight is torch\.float16.*model\.float\(\)"),
    "bfloat16": (lambda: Head().bfloat16(), r"weight is torch\.bfloat16.*model\.float\(\)"),
    "double": (lambda: Head().double(), r"weight is torch\.float64.*model\.float\(\)"),
    "a tuple": (TwoOutputs, r"a tuple of Tensor, Tensor: wrap the model"),
    "a dict": (DictOutput, r"got dict: wrap the model"),
    "whole numbers": (Whole, r"in floating point, got torch\.int64"),
    "too few classes": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9)),
        r"got \[1, 9\] for one image: create it with num_classes=10",
    ),
    "another image size": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(65, 10)),
        r"failed on images \[1, 1, 8, 8\] of digits",
    ),
    "on the meta device": (lambda: Head().to("meta"), "weight is on the meta device"),
}
ONLY_TRAINING = {
    "all frozen": (lambda: Head().requires_grad_(False), r"no parameter that requires a gradient"),
    "detached logits": (Detaches, r"no gradient with respect to its parameters"),
    "made in inference mode": (of_inference_mode, r"inference_mode"),
}


@pytest.mark.parametrize("case", REFUSED | ONLY_TRAINING)
def test_a_model_that_cannot_be_trained_is_refused_with_what_to_change(case, tmp_path):
    make, message = (REFUSED | ONLY_TRAINING)[case]
    with pytest.raises(ValueError, match=message):
        trained(make(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_evaluated_is_refused_with_what_to_change(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        awnet.evaluate(make(), DATA.test, ["fgsm"])


def test_a_model_on_the_meta_device_is_not_attacked():
    with pytest.raises(ValueError, match="the model must be on x's device, cpu, got meta"):
        attacks.FGSM(Head().to("meta"), eps=0.1)(torch.zeros(1, 1, 8, 8), torch.tensor([0]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_within_no_grad_or_inference_mode_is_training(mode, tmp_path):
    torch.manual_seed(0)
    outside = trained(Head(), tmp_path / "a")
    torch.manual_seed(0)
    model = Head()
    with mode():
        inside = trained(model, tmp_path / "b")
        assert not torch.is_grad_enabled()
    assert weights_fingerprint(inside.model) == weights_fingerprint(outside.model)


@pytest.mark.parametrize("value", [1.0000012, 1 + 5e-4, -3e-7])
def test_images_that_exceed_their_range_by_rounding_are_named_with_the_cure(value):
    x = torch.full((1, 1, 8, 8), 0.5)
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"by rounding .*x\.clamp\(0, 1\)") as caught:
        attacks.FGSM(Head(), eps=0.1)(x, torch.tensor([0]))
    shown = [float(text) for text in re.findall(r"-?\d+\.\d+(?:e-\d+)?", str(caught.value))]
    assert any(abs(one - value) < 1e-7 for one in shown)

"""The adapter against pyautoattack itself, cascades, and what they keep on disk."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from awnet.attacks import CW, FGSM, PGD, Attack, named_attack
from awnet.attacks.autoattack import AutoAttack, OfficialAttack
from awnet.attacks.cascade import ROBUST, WRONG_CLEAN, Cascade
from awnet.attacks.norms import geometry
from awnet.attacks.registry import Suite
from awnet.attacks.saved import Saved, digest, model_fingerprint
from awnet.data.threat_model import Norm, ThreatModel

EPS = 0.04


def small_cnn(classes: int, scale: float = 1.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, classes)
    ).eval()
    with torch.no_grad():
        model[-1].weight *= scale
        model[-1].bias *= scale
    return model


def batch(model: nn.Module, n: int = 14) -> tuple[Tensor, Tensor]:
    """Images with the labels that the model gives them, but for the first."""
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % model(x).shape[1]
    return x, y


def official(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, classes: int, queries: int, norm: str = "Linf"
) -> Tensor:
    """pyautoattack's own standard evaluation of the batch."""
    from pyautoattack.autoattack import AutoAttack as Official

    theirs = Official(model, eps=eps, norm=norm, seed=3)
    theirs.square.n_queries = queries
    theirs.fab.n_target_classes = min(9, classes - 1)
    theirs.apgd_targeted.n_target_classes = min(theirs.apgd_targeted.n_target_classes, classes - 1)
    x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=len(x))
    return x_adv


@pytest.mark.parametrize(("classes", "eps"), [(4, 0.08), pytest.param(10, 0.03, marks=pytest.mark.slow)])
def test_autoattack_gives_the_images_of_pyautoattack(classes: int, eps: float) -> None:
    model = small_cnn(classes)
    x, y = batch(model, 10)
    ours = AutoAttack(model, eps=eps, classes=classes, queries=50, seed=3)
    x_adv, theirs = ours(x, y), official(model, x, y, eps, classes, 50)
    broken = ours.outcome.broken_by
    assert broken[0] == WRONG_CLEAN
    assert 0 < (broken >= 0).sum() < len(x) - 1
    assert torch.equal(x_adv[broken >= 0], theirs[broken >= 0])
    with torch.no_grad():
        assert torch.equal(model(theirs).argmax(1) == y, broken == ROBUST)
        assert torch.equal(model(x_adv).argmax(1) == y, broken == ROBUST)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "eps", "classes"),
    [
        ("L2", 0.7, 4),
        ("L1", 2.5, 4),
        ("L2", 0.25, 10),
        ("L1", 1.0, 10),
    ],
)
def test_same_images_as_pyautoattack_gives_in_l2_and_l1(norm: Norm, eps: float, classes: int) -> None:
    model = small_cnn(classes)
    x, y = batch(model, 6)
    ours = AutoAttack(model, eps=eps, norm=norm, classes=classes, queries=20, seed=3)
    assert ours.settings["version"] == "reduced"  # by its queries alone
    x_adv, theirs = ours(x, y), official(model, x, y, eps, classes, 20, norm)
    broken = ours.outcome.broken_by
    assert 0 < (broken >= 0).sum() < len(x) - 1
    with torch.no_grad():
        assert torch.equal(model(theirs).argmax(1) == y, broken == ROBUST)
        assert torch.equal(model(x_adv).argmax(1) == y, broken == ROBUST)
    inside = geometry(norm).inside(theirs, x, eps) & (broken >= 0)
    assert torch.equal(x_adv[inside], theirs[inside])
    # an image that the official code leaves outside by more than rounding is projected
    assert (x_adv - theirs)[broken >= 0].abs().max() < 1e-5
    assert geometry(norm).inside(x_adv, x, eps).all()


def test_the_standard_version_in_l1_has_the_official_restarts_and_targets() -> None:
    members = AutoAttack(small_cnn(10), eps=12, norm="L1", classes=10).settings["members"]
    assert members["apgd_ce"]["restarts"] == 5
    assert (members["apgd_t"]["targets"], members["fab_t"]["targets"]) == (5, 9)
    assert "restarts" not in members["apgd_t"]
    in_l2 = AutoAttack(small_cnn(10), eps=0.5, norm="L2", classes=10).settings["members"]
    assert "restarts" not in in_l2["apgd_ce"]
    assert in_l2["apgd_t"]["targets"] == 9


class Counted:
    """Counts the images that pass forward and backward through a model."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = self.backward = 0
        self.handles = [
            model.register_forward_hook(self._forward),
            model.register_full_backward_hook(self._backward),
        ]

    def _forward(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.forward += len(args[0])

    def _backward(self, module: nn.Module, grad_input: tuple[Tensor], grad_output: tuple[Tensor]) -> None:
        self.backward += len(grad_output[0])

    def taken(self) -> tuple[int, int]:
        """The numbers since the last call."""
        counts = self.forward, self.backward
        self.forward = self.backward = 0
        return counts


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_an_evaluation_costs_at_most_five_percent_more_passes_than_pyautoattack(norm: Norm) -> None:
    """The standard version but for 500 of 5,000 queries: fewer queries make an overhead weigh more."""
    from awnet.data import from_arrays
    from awnet.evaluation import evaluate

    eps = {"Linf": 0.03, "L2": 0.25, "L1": 1.0}[norm]
    model = small_cnn(10)
    x, y = batch(model)
    pixels = (255 * x).round().to(torch.uint8)
    data = from_arrays(pixels, y, eps=eps, norm=norm, classes=[str(k) for k in range(10)])
    x = next(data.batches(len(y))).x
    counted = Counted(model)
    official(model, x, y, eps, 10, 500, norm)
    theirs = counted.taken()
    report = evaluate(model, data, ["aa"], queries=500, batch_size=len(y), sanity=False, seed=3)
    ours = counted.taken()
    assert 0 < report.attacks["aa"].robust_accuracy < 1
    for mine, bare in zip(ours, theirs, strict=True):
        assert bare < mine + 1  # the evaluation does not skip a part of the attack
        assert mine <= 1.05 * bare, (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_union_costs_what_its_members_cost_on_the_images_that_are_left(norm: Norm) -> None:
    model = small_cnn(4)
    x, y = batch(model)
    threat = ThreatModel({"Linf": 0.08, "L2": 0.7}[norm], norm)
    union = named_attack("union", model, threat, suite=Suite(classes=4, budget="smoke", queries=50))
    counted, index = Counted(model), torch.arange(len(x))
    union(x, y)
    together = counted.taken()
    left = model(x).argmax(1) == y
    assert (union.outcome.broken_by >= 0).any()
    assert (union.outcome.broken_by == ROBUST).any()
    for member in union.members.values():
        if not left.any():
            break
        rows = left.nonzero()[:, 0]
        images = member(x[rows], y[rows], index=index[rows])
        left[rows] = model(images).argmax(1) == y[rows]
    alone = counted.taken()
    assert together[1] == alone[1]
    assert together[0] <= alone[0]


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (2, ["apgd_ce", "fab_t", "square"]),
        (3, ["apgd_ce", "apgd_dlr", "fab_t", "square"]),
        (4, ["apgd_ce", "apgd_t", "fab_t", "square"]),
    ],
)
def test_autoattack_with_few_classes_runs_a_reduced_version(classes: int, names: list[str]) -> None:
    model = small_cnn(classes)
    x, y = batch(model)
    attack = AutoAttack(model, eps=0.15, classes=classes, steps=10, queries=20)
    assert list(attack.members) == names
    x_adv = attack(x, y)
    assert (attack.outcome.broken_by >= 0).any()
    assert (x_adv.double() - x.double()).abs().max() <= 0.15 + 2.0**-24  # rounded once
    assert attack.settings["version"] == "reduced"
    for name, member in attack.settings["members"].items():
        assert member.get("targets", classes - 1) == classes - 1, name
    assert AutoAttack(model, eps=0.1, classes=classes).settings["version"] == "standard"


def test_targeted_ratio_needs_four_classes() -> None:
    model = small_cnn(3)
    with pytest.raises(ValueError, match="apgd_t needs a model with at least 4 classes, got 3"):
        OfficialAttack(model, "apgd_t", eps=0.1)(*batch(model))
    with pytest.raises(ValueError, match="name must be one of apgd_ce"):
        OfficialAttack(model, "apgd", eps=0.1)
    with pytest.raises(ValueError, match="classes must be an integer of at least 2"):
        AutoAttack(model, eps=0.1, classes=1)


def test_named_attacks_take_their_sizes_from_the_budget() -> None:
    model, threat = small_cnn(4), ThreatModel(0.1)
    assert named_attack("aa", model, threat).settings["version"] == "standard"
    assert named_attack("square", model, threat).settings["queries"] == 5000
    smoke = named_attack("aa", model, threat, suite=Suite(classes=4, budget="smoke")).settings
    assert smoke["version"] == "reduced"
    assert smoke["members"]["square"]["queries"] == 200
    own = named_attack("aa", model, threat, suite=Suite(queries=77)).settings
    assert own["members"]["square"]["queries"] == 77
    with pytest.raises(ValueError, match="budget must be one of smoke, short, standard"):
        named_attack("aa", model, threat, suite=Suite(budget="huge"))


def test_autoattack_leaves_torchs_generator_and_tracing_alone() -> None:
    import sys

    model = small_cnn(4)
    x, y = batch(model)
    state, python = torch.get_rng_state(), random.getstate()

    def tracer(frame, event, arg):  # type: ignore[no-untyped-def]
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        AutoAttack(model, eps=EPS, classes=4, steps=3, queries=5)(x, y)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


class Suspect(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = small_cnn(4), how

    def grad(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        if self.how == "randomized":
            return logits + 0.1 * torch.randn_like(logits)
        if self.how == "probabilities":
            return logits.softmax(1)
        if self.how == "dynamic":
            return self.grad(logits)
        if self.how == "zero_gradients":
            return (100 * logits).round() / 100 + 0 * logits
        return logits


@pytest.mark.parametrize("how", ["none", "randomized", "probabilities", "dynamic", "zero_gradients"])
def test_warnings_of_the_official_code_are_counted(how: str) -> None:
    model = Suspect(how)
    x, y = batch(model.inner)
    attack = AutoAttack(model, eps=0.001, classes=4, steps=3, queries=5)
    attack(x, y)
    assert set(attack.outcome.notes) == ({how} - {"none"})
    if how == "zero_gradients":
        assert attack.outcome.notes[how] >= 13  # each image that is still robust, at least once


# ---- cascades


class Fixed(Attack):
    """Moves all pixels by a fixed distance and counts the images it was given."""

    def __init__(self, model: nn.Module, by: float) -> None:
        super().__init__(model, eps=abs(by))
        self.by = by
        self.seen: list[int] = []

    @property
    def settings(self) -> dict[str, object]:
        return super().settings | {"by": self.by}

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        self.seen += index.tolist()
        return (x + self.by).clamp(0, 1)


class Brightness(nn.Module):
    """Class 1 above one half, else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        score = 10 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


def levels() -> tuple[Tensor, Tensor]:
    x = torch.tensor([0.3, 0.45, 0.48, 0.56, 0.6, 0.9])[:, None, None, None].expand(6, 1, 2, 2).contiguous()
    return x, torch.tensor([0, 0, 0, 1, 0, 1])


def test_cascade_keeps_the_image_of_the_first_successful_attack() -> None:
    model = Brightness()
    members = {"up": Fixed(model, 0.03), "more": Fixed(model, 0.07), "down": Fixed(model, -0.08)}
    cascade = Cascade(model, members, eps=0.08)
    announced: list[str] = []
    cascade.announce = announced.append
    x, y = levels()
    x_adv = cascade(x, y)
    #                                     0.3     0.45 more 0.48 up 0.56 down 0.6 wrong  0.9
    assert cascade.outcome.broken_by.tolist() == [ROBUST, 1, 0, 2, WRONG_CLEAN, ROBUST]
    assert [member.seen for member in members.values()] == [[0, 1, 2, 3, 5], [0, 1, 3, 5], [0, 3, 5]]
    # of a robust image the closest call, of a misclassified one the image itself
    expected = x[:, 0, 0, 0] + torch.tensor([0.07, 0.07, 0.03, -0.08, 0.0, -0.08])
    assert torch.allclose(x_adv[:, 0, 0, 0], expected)
    assert announced == ["up", "more", "down"]
    assert list(cascade.settings["members"]) == ["up", "more", "down"]


def test_cascade_holds_members_to_its_ball() -> None:
    model = Brightness()
    x, y = levels()
    x_adv = Cascade(model, {"far": Fixed(model, 0.5)}, eps=0.08)(x, y)
    assert (x_adv.double() - x.double()).abs().max() <= 0.08 + 2.0**-24  # rounded once


def test_cascade_refuses_bad_members() -> None:
    model = Brightness()
    with pytest.raises(ValueError, match="members is empty"):
        Cascade(model, {}, eps=0.1)
    with pytest.raises(TypeError, match=r"members\['a'\] must be an Attack"):
        Cascade(model, {"a": model}, eps=0.1)

    class Breaks(Fixed):
        def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
            return x * torch.nan

    with pytest.raises(FloatingPointError, match="sick computed a gradient that is not finite"):
        Cascade(model, {"sick": Breaks(model, 0.1)}, eps=0.1)(*levels())


class Interrupted(Exception):
    pass


def test_interrupted_cascade_resumes_where_it_stopped(tmp_path: Path) -> None:
    model = small_cnn(4)
    x, y = batch(model)
    x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # strides that choose another convolution

    def made() -> Cascade:
        members = {
            "fgsm": FGSM(model, eps=0.01),
            "pgd": PGD(model, eps=EPS, step_size=0.01, steps=5),
            "aa": AutoAttack(model, eps=EPS, classes=4, steps=10, queries=10),
            "cw": CW(model, eps=EPS, step_size=0.01, steps=5),
        }
        return Cascade(model, members, eps=EPS)

    whole = made()
    expected = whole(x, y)
    names = [*whole.members, *whole.members["aa"].members]
    for stop in names:
        cascade, ran = made(), list[str]()

        def announce(name: str, stop: str = stop, ran: list[str] = ran) -> None:
            if name == stop:
                raise Interrupted
            ran.append(name)

        cascade.announce = cascade.members["aa"].announce = announce
        cascade.keep_in(Saved(tmp_path / stop, "key"))
        with pytest.raises(Interrupted):
            cascade(x, y)
        again, rest = made(), list[str]()
        again.announce = again.members["aa"].announce = rest.append
        again.keep_in(Saved(tmp_path / stop, "key"))
        x_adv = again(x, y)
        assert torch.equal(x_adv, expected)
        assert x_adv.stride() == expected.stride()
        assert torch.equal(again.outcome.broken_by, whole.outcome.broken_by)
        assert not {name for name in ran if name != "aa"} & set(rest)  # nothing twice
        assert stop in rest
    other = made()
    other.keep_in(Saved(tmp_path / names[-1], "key"))
    assert not torch.equal(other(1 - x, y), expected)  # other images, other state


# ---- what is kept


def test_saved_tensors_load_with_the_same_values(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "one")
    assert saved.load("a") is None
    tensors = {"x": torch.rand(3, 2), "n": torch.arange(4)}
    saved.save("a", tensors, {"done": 2, "notes": Counter(zero_gradients=3)})
    actual, note = saved.load("a")
    assert all(torch.equal(actual[name], value) for name, value in tensors.items())
    assert note == {"done": 2, "notes": {"zero_gradients": 3}}
    assert Saved(tmp_path, "other").load("a") is None
    (saved.folder / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged"):
        saved.load("a")
    saved.remove()
    assert not saved.folder.exists()


def test_fingerprints_of_different_contents_differ() -> None:
    x = torch.arange(6.0)
    different = [digest(x), digest(x.view(2, 3)), digest(x.double()), digest(x + 1), digest(1), digest("1")]
    assert len(set(different)) == len(different)
    assert digest(x, {"a": 1, "b": 2}) == digest(x.clone(), {"b": 2, "a": 1})
    model = small_cnn(4)
    assert model_fingerprint(model) == model_fingerprint(small_cnn(4))
    assert model_fingerprint(model) != model_fingerprint(small_cnn(4, seed=1))
    before = model_fingerprint(model)
    model[-1].bias.data[0] += 1
    assert model_fingerprint(model) != before

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import awnet
from awnet import attacks, ops
from awnet.data import Augmentation, ThreatModel, from_arrays
from awnet.scalars import check_flag, check_integer, check_integers, check_number, plain
from awnet.training import recipe_for

SCALARS = {
    "numpy scalar": lambda value: np.asarray(value)[()],
    "narrow numpy scalar": lambda value: np.float32(value) if isinstance(value, float) else np.int16(value),
    "0-d array": np.asarray,
    "0-d tensor": torch.tensor,
}


@pytest.fixture(params=SCALARS.values(), ids=SCALARS)
def scalar(request):
    return request.param


def test_a_scalar_of_any_library_counts_as_the_number_that_it_holds(scalar):
    for value in (3, -1, 0.25):
        assert plain(scalar(value)) == value
        assert type(plain(scalar(value))) is type(value)
        assert plain([scalar(value), (scalar(value),)]) == [value, (value,)]
    assert check_integer("n", scalar(3), 1) == 3
    assert check_integers("n", [scalar(3), 4]) == [3, 4]
    assert check_number("x", scalar(0.25), 0, 1) == 0.25
    assert plain(np.bool_(True)) is plain(torch.tensor(True)) is True


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), "3", None, [3], np.zeros(1), 1j, Fraction(1)]
)
def test_what_is_no_number_is_refused_by_name(value):
    for check in (check_integer, check_number):
        with pytest.raises(TypeError, match=r"^steps must be"):
            check("steps", value)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), np.float32("nan")])
def test_what_no_machine_number_holds_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^lr must be finite, got .{1,60}$"):
        check_number("lr", value)
    with pytest.raises((TypeError, ValueError), match=r"^steps must be an integer"):
        check_integer("steps", value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_integer("n", 0, 1), "n must be an integer of at least 1, got 0"),
        (
            lambda: check_integer("n", 2**63),
            "n must be an integer that int64 holds, got an integer of 64 bits",
        ),
        (
            lambda: check_integer("n", 2**70, 1),
            "n must be an integer that int64 holds, got an integer of 71 bits",
        ),
        (lambda: check_integer("n", 9, 1, 8), r"n must be in \[1, 8\], got 9"),
        (lambda: check_number("x", 2, 0, 1), r"x must be in \[0, 1\], got 2"),
        (lambda: check_number("x", 0, most=1, above=0), r"x must be in \(0, 1\], got 0"),
        (lambda: check_number("x", -1, 0), "x must be finite and at least 0, got -1"),
        (lambda: check_number("x", 0, above=0), "x must be finite and above 0, got 0"),
        (lambda: check_flag("f", "no"), "f must be True or False, got 'no'"),
        (lambda: check_integers("w", 3), "w must be a list of integers, got 3"),
        (lambda: check_integers("w", "34"), "w must be a list of integers, got '34'"),
        (lambda: check_integers("w", [4, 0], 1), r"w\[1\] must be an integer of at least 1, got 0"),
    ],
)
def test_the_message_names_option_range_and_value(call, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        call()


def test_recipes_take_scalars_of_any_library(scalar):
    given = {"epochs": 4, "lr": 0.5, "clip_norm": 2.0, "validate_limit": 8, "temperature": 2.0}
    recipe = recipe_for("mtard", "digits", **{name: scalar(value) for name, value in given.items()})
    assert recipe == recipe_for("mtard", "digits", **given)
    json.dumps(recipe.to_dict())
    assert recipe_for("trades", "digits", milestones=[scalar(2), 3]).milestones == (2, 3)
    assert recipe_for("trades", "digits", milestones=np.array([2, 3])).milestones == (2, 3)


@pytest.mark.parametrize("milestones", [3, "3,4", [2, 2], [3, 2], [0], [1.5], [True], None, [[1]]])
def test_milestones_that_are_no_increasing_numbers_are_refused_by_name(milestones):
    with pytest.raises(ValueError, match=r"^milestones must be increasing .* one alone is written \(75,\)"):
        recipe_for("trades", "digits", milestones=milestones)


def test_data_sets_take_scalars_of_any_library(scalar):
    images, labels = np.arange(6 * 16, dtype=np.uint8).reshape(6, 1, 4, 4), [0, 1] * 3
    plainly = from_arrays(images, labels, max_value=200, eps=0.25, shift=1, flip=True)
    made = from_arrays(
        images, labels, max_value=scalar(200), eps=scalar(0.25), shift=scalar(1), flip=np.True_
    )
    assert (made.threat_model, made.augmentation) == (ThreatModel(0.25), Augmentation(1, True))
    assert made.fingerprint() == plainly.fingerprint()
    assert len(made.subset(scalar(2))) == 2
    options = {"shuffle": True, "augment": True, "seed": 5, "epoch": 2, "start": 1}
    for one, other in zip(
        made.batches(scalar(2), **{k: v if v is True else scalar(v) for k, v in options.items()}),
        plainly.batches(2, **options),
        strict=True,
    ):
        assert torch.equal(one.x, other.x)
    assert len(list(made.batches(2**62))) == 1


def test_models_take_scalars_of_any_library_and_store_plain_ones(scalar):
    model = awnet.create_model(
        "awnet_tiny", num_classes=scalar(3), in_channels=scalar(1), beta=scalar(2.0), width=scalar(0.25),
        router_widths=[scalar(4), 8], type_head=np.True_,
    )  # fmt: skip
    assert json.loads(json.dumps(model.config))["options"]["router_widths"] == [4, 8]
    assert model.config["num_classes"] == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("awnet_tiny", {"filter_scaling": "no"}, "filter_scaling must be True or False"),
        ("awnet_tiny", {"router_widths": 8}, "router_widths must be a list of integers"),
        ("awnet_tiny", {"router_widths": "8"}, "router_widths must be a list of integers"),
        ("awnet_tiny", {"beta": "3"}, "beta must be a number"),
        ("repvgg_a2", {"fused": 1}, "fused must be True or False"),
        ("separate_net", {"threshold": None}, "threshold must be a number"),
        ("resnet_tiny", {"width": 10**400}, "width must be finite and above 0"),
        (["resnet_tiny"], {}, "unknown model"),
        (3, {}, "unknown model"),
    ],
)
def test_model_options_of_another_type_are_refused_by_name(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        awnet.create_model(name, **options)


def test_attacks_and_evaluation_take_scalars_of_any_library(scalar):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    data = from_arrays(np.zeros((6, 1, 4, 4), np.uint8), [0, 1, 2, 3, 0, 1], eps=0.25)
    x, y = next(data.batches(6))[:2]
    plainly = attacks.PGD(model, eps=0.25, step_size=0.125, steps=2, seed=3)
    attack = attacks.PGD(model, eps=scalar(0.25), step_size=scalar(0.125), steps=scalar(2), seed=scalar(3))
    assert attack.settings == plainly.settings
    json.dumps(attack.settings)
    assert torch.equal(attack(x, y), plainly(x, y))
    json.dumps(attacks.FGSM(model, eps=scalar(0.25)).settings)
    json.dumps(attacks.AutoAttack(model, eps=scalar(0.25), classes=scalar(4), queries=scalar(5)).settings)
    sizes = {"batch_size": 3, "seed": 1, "limit": 4}
    report = awnet.evaluate(model, data, ["fgsm"], **{name: scalar(value) for name, value in sizes.items()})
    assert report.to_dict() == awnet.evaluate(model, data, ["fgsm"], **sizes).to_dict()


def test_layers_take_scalars_of_any_library(scalar):
    x, weight, table = torch.randn(2, 4, 5, 5), torch.randn(4, 2, 3, 3), torch.ones(1, 4)
    options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    plainly = ops.filter_scaled_conv2d(x, weight, None, **options)
    given = {name: scalar(value) for name, value in options.items()}
    assert torch.equal(ops.filter_scaled_conv2d(x, weight, None, **given), plainly)
    normed = ops.mix_batch_norm(
        x, table, table, table.clone(), table.clone(), training=True, eps=scalar(0.5), momentum=scalar(0.25)
    )
    expected = ops.mix_batch_norm(
        x, table, table, table.clone(), table.clone(), training=True, eps=0.5, momentum=0.25
    )
    assert torch.equal(normed, expected)

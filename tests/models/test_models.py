"""Models by name: parameter counts, flags, files."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from awnet.models import (
    AWResNet,
    ResNet,
    create_model,
    list_models,
    load_model,
    parameter_count,
    register_model,
    save_model,
)
from awnet.models import registry as registry_module
from awnet.models.advmoe import ADVMOE
from awnet.models.sizes import check_state
from awnet.nn import FixedRouter, MixBatchNorm2d

COUNTS = {
    ("awnet_resnet18", 10): 26_290_444,
    ("awnet_resnet18", 100): 26_336_614,
    ("awnet_resnet18", 200): 26_387_914,
    ("awnet_resnet34", 10): 40_210_828,
    # resnet50 23,520,842 + second batch norms 53,120 + router 11,168,832 + heads (2 + 3,776) · 1025
    ("awnet_resnet50", 10): 38_615_244,
    ("awnet_tiny", 10): 185_260,
    ("resnet18", 10): 11_173_962,
    ("resnet34", 10): 21_282_122,
    ("resnet50", 10): 23_520_842,
    ("resnet_tiny", 10): 78_042,
    ("wrn34_8", 10): 29_551_578,
    ("wrn34_10", 10): 46_160_474,
    ("wrn70_16", 10): 266_796_506,
    ("vgg16_bn", 10): 33_646_666,
    ("repvgg_a2", 10): 26_815_690,
    ("mobilenet_v2", 10): 2_236_682,
    ("rdi_resnet38", 10): 692_310,
    # resnet18 11,173,962 + a second set of block filters 10,985,472 + router 271,954
    ("advmoe_resnet18", 10): 22_431_388,
    # mobilenet_v2 2,236,682 + resnet18 11,173,962 (resnet34 21,282,122) + router 11,168,832 + head 2 · 1025
    ("separate_net", 10): 24_581_526,
    ("separate_net_l", 10): 34_689_686,
    ("mixed_net", 10): 24_581_526,  # the parts of separate_net
    # wrn34_10 46,160,474 + second batch norms 22,432 + router 11,168,832 + heads (2 + 11,200) · 1025
    ("awnet_wrn34_10", 10): 68_833_788,
    # mobilenet_v2 2,236,682 + second batch norms 34,112 + router 11,168,832 + heads (2 + 7,136) · 1025
    ("awnet_mobilenet_v2", 10): 20_756_076,
}


def warmed(model: nn.Module, steps: int = 2) -> nn.Module:
    """``model`` with running statistics and signal heads that differ from the start."""
    generator = torch.Generator().manual_seed(0)
    in_channels = model.config["in_channels"]
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.02 * noise)
    for _ in range(steps):
        x = torch.rand(6, in_channels, 8, 8, generator=generator)
        model(x, **({"is_clean": torch.arange(6) < 3} if hasattr(model, "route") else {}))
    return model.eval()


# --- names and counts


@pytest.mark.parametrize(("name", "num_classes"), COUNTS)
def test_parameter_counts_equal_the_documented_numbers(name, num_classes):
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes)
    assert parameter_count(model) == COUNTS[name, num_classes]


@pytest.mark.parametrize("num_classes", [2, 10, 100, 200, 1000])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_wide_twin_has_the_parameters_of_awnet_tiny(num_classes, in_channels):
    shape = {"num_classes": num_classes, "in_channels": in_channels}
    wide, tiny = (parameter_count(create_model(name, **shape)) for name in ("resnet_tiny_wide", "awnet_tiny"))
    assert abs(wide / tiny - 1) < 0.01


def test_counting_draws_no_random_numbers():
    torch.manual_seed(3)
    first = create_model("resnet_tiny_wide").stem.weight
    torch.manual_seed(3)
    stem = nn.Conv2d(3, 25, 3, bias=False).weight
    assert torch.equal(first, stem)


def test_list_models_filters_by_pattern():
    assert list_models("awnet_resnet*") == ["awnet_resnet18", "awnet_resnet34", "awnet_resnet50"]
    assert list_models("resnet_tiny*") == ["resnet_tiny", "resnet_tiny_wide"]
    assert {name for name, _ in COUNTS} <= set(list_models())
    assert list_models("alexnet*") == []


def test_one_seed_starts_an_awnet_and_its_static_twin_alike():
    torch.manual_seed(5)
    dynamic = create_model("awnet_tiny").dynamic.state_dict()
    torch.manual_seed(5)
    static = create_model("resnet_tiny").state_dict()
    assert all(
        torch.equal(dynamic[name], value)
        for name, value in static.items()
        if ".bn." not in name and "weight" in name
    )


@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny", "resnet_tiny_wide"])
@pytest.mark.parametrize(("in_channels", "size"), [(1, (8, 8)), (3, (1, 1)), (4, (33, 20))])
def test_models_take_any_channels_classes_and_image_size(name, in_channels, size):
    model = create_model(name, num_classes=7, in_channels=in_channels).eval()
    assert model(torch.rand(2, in_channels, *size)).shape == (2, 7)
    assert hasattr(model, "route") == name.startswith("awnet")


@pytest.mark.parametrize("name", ["awnet_resnet18", "awnet_resnet50", "resnet50"])
def test_large_models_run_forward(name):
    model = create_model(name, num_classes=3).eval()
    x = torch.rand(2, 3, 8, 8)
    assert model(x).shape == (2, 3)
    if name.startswith("awnet"):
        widths = [scale.shape[1] for scale in model.route(x).filter_scales]
        assert widths == model.dynamic.signal_widths
        assert len(widths) == 16  # two in each of 8 basic blocks, one in each of 16 bottlenecks


@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
def test_wrong_images_are_named(name):
    model = create_model(name).eval()
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\], got \[2, 1, 8, 8\]"):
        model(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"got \[3, 8, 8\]; add the batch axis"):
        model(torch.rand(3, 8, 8))
    with pytest.raises(TypeError, match="uint8"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


# --- options


OPTIONS = [
    {"beta": 0.0},
    {"beta": 0.5},
    {"bn": "dual"},
    {"bn": "one"},
    {"bn": "one", "type_head": False},
    {"filter_scaling": False},
    {"filter_scaling": False, "type_head": False, "test_bn": "mix"},
    {"dynamic_shortcut": True},
    {"type_head": False, "test_bn": "adv"},
    {"type_head": False, "test_bn": "clean"},
    {"type_head": False, "test_bn": "mix"},
    {"p_temperature": 2.0},
    {"p_scale": 0.5},
    {"router_widths": (4, 8)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_tests_and_is_rebuilt_from_the_file(options, tmp_path):
    model = create_model("awnet_tiny", num_classes=4, in_channels=1, **options)
    x, mask = torch.rand(6, 1, 8, 8), torch.arange(6) < 3
    routing = model.route(x)
    model(x, is_clean=mask, routing=routing).sum().backward()
    assert model.dynamic.stem.weight.grad.isfinite().all()
    warmed(model)
    assert (model.route(x).type_logits is not None) == options.get("type_head", True)
    scaled = options.get("filter_scaling", True)
    assert len(model.route(x).filter_scales) == (
        6 + 2 * options.get("dynamic_shortcut", False) if scaled else 0
    )
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    assert torch.equal(again(x), model(x))
    assert again.config == model.config


def test_fixed_test_branch_is_that_branch():
    torch.manual_seed(0)
    model = warmed(create_model("awnet_tiny", type_head=False, test_bn="clean"))
    x = torch.rand(3, 3, 8, 8)
    routing = model.route(x)
    assert routing.p_clean.tolist() == [1.0] * 3
    for norm in model.modules():
        if isinstance(norm, MixBatchNorm2d) and norm.branches == "mix":
            norm.weight.data[0] += 1  # the adversarial branch must not count
    assert torch.equal(model(x, routing=routing), model(x))
    without = create_model("awnet_tiny", filter_scaling=False, type_head=False)
    assert isinstance(without.router, FixedRouter)
    assert parameter_count(without) == 78_042 + 2 * (16 + 32 + 96 + 192)  # the second batch norms


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("awnet_resnet19", {}, ValueError, r"unknown model 'awnet_resnet19'; did you mean awnet_resnet18"),
        ("zzz", {}, ValueError, r"unknown model 'zzz'; available: .*awnet_resnet18, .*list_models"),
        (None, {}, ValueError, "unknown model None"),
        ("resnet18", {"beta": 3}, TypeError, "resnet18 has no option beta; it has activation, width"),
        (
            "awnet_tiny",
            {"betta": 3},
            TypeError,
            "awnet_tiny has no option betta; it has activation, beta, bn, ",
        ),
        ("awnet_tiny", {"beta": -1}, ValueError, "beta must be finite and at least 0"),
        ("awnet_tiny", {"bn": "two"}, ValueError, "bn must be one of"),
        ("awnet_tiny", {"test_bn": "adv"}, ValueError, "type_head=False"),
        (
            "awnet_tiny",
            {"filter_scaling": False, "type_head": False, "test_bn": "x"},
            ValueError,
            "test_bn must",
        ),
        ("awnet_tiny", {"width": 0}, ValueError, "width must be finite and above 0"),
        ("resnet18", {"width": "half"}, TypeError, "width must be a number"),
        ("awnet_mobilenet_v2", {"dynamic_shortcut": True}, ValueError, "no shortcut convolutions"),
        ("awnet_tiny", {"router_widths": []}, ValueError, "widths and blocks"),
        ("awnet_tiny", {"num_classes": 0}, ValueError, "num_classes must be at least 1|at least 1"),
        ("resnet_tiny", {"in_channels": 0}, ValueError, "at least 1"),
        ("resnet_tiny_wide", {"in_channels": -1}, ValueError, "at least 1"),
        ("resnet_tiny", {"num_classes": 2.5}, TypeError, "num_classes must be an integer, got 2.5"),
        ("resnet_tiny", {"in_channels": "3"}, TypeError, "in_channels must be an integer, got '3'"),
    ],
)
def test_create_model_refuses_bad_options(name, arguments, error, message):
    with pytest.raises(error, match=message):
        create_model(name, **arguments)


def test_classes_refuse_unknown_names():
    with pytest.raises(ValueError, match="name must be one of"):
        ResNet("vgg")
    with pytest.raises(ValueError, match="name must be one of"):
        AWResNet("resnet18")


def test_a_registered_model_of_the_user_is_created_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))

    def build(num_classes, in_channels, width=4):
        return nn.Sequential(nn.Conv2d(in_channels, width, 1), nn.Flatten(), nn.LazyLinear(num_classes))

    register_model("mine", build)
    with pytest.raises(ValueError, match="'mine' is taken"):
        register_model("mine", build)
    with pytest.raises(TypeError, match="mine has no option depth; it has width"):
        create_model("mine", depth=2)
    model = create_model("mine", num_classes=np.int64(3), width=5)
    assert model.config == {"name": "mine", "num_classes": 3, "in_channels": 3, "options": {"width": 5}}
    assert json.dumps(model.config)


# --- files


@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny", "resnet_tiny_wide"])
def test_a_saved_model_loads_bit_for_bit(name, tmp_path):
    model = warmed(create_model(name, num_classes=5, in_channels=1)).to(memory_format=torch.channels_last)
    save_model(model, tmp_path / "run" / "best.safetensors")
    again = load_model(tmp_path / "run")  # a run folder
    assert not again.training
    assert again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)  # the memory format may differ
    assert os.listdir(tmp_path / "run") == ["best.safetensors"]


def test_wrappers_are_looked_through(tmp_path):
    model = create_model("resnet_tiny")
    parallel = nn.DataParallel(model)
    for number, wrapper in enumerate((parallel, torch.compile(model), torch.compile(parallel))):
        path = tmp_path / f"{number}.safetensors"
        save_model(wrapper, path)
        assert load_file(path).keys() == model.state_dict().keys()


def test_save_refuses_what_could_not_be_rebuilt(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*a\.pt"):
        save_model(create_model("resnet_tiny"), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model = create_model("resnet_tiny")
    save_model(model, path)
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("awnet.models.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_load_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.safetensors; pass a run folder"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no best\.safetensors in the folder .*; pass a run folder"):
        load_model(tmp_path)
    save_model(create_model("resnet_tiny"), tmp_path / "last.safetensors")
    with pytest.raises(FileNotFoundError, match=r"it has last\.safetensors: pass one of them"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    path = tmp_path / "a.safetensors"
    save_model(create_model("resnet_tiny"), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or not a safetensors file.*another"):
        load_model(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    torch.save({"weight": torch.ones(2)}, path)  # a pickle under another name: never unpickled
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_model(path)
    tensors = {"weight": torch.ones(2)}
    good = {"name": "resnet_tiny", "num_classes": 10, "in_channels": 3, "options": {}}
    cases = [
        (None, "was not written by awnet.save_model"),
        ("{", "is not JSON"),
        ("[" * 10**5, "is not JSON"),
        ("1" * 5000, "is not JSON"),
        ("[1]", "not in the format"),
        (json.dumps({"format": 99, "config": good}), "not in the format"),
        (json.dumps({"format": 1, "config": {**good, "name": "resnet19"}}), "unknown model 'resnet19'"),
        (json.dumps({"format": 1, "config": {**good, "options": {"beta": 1}}}), "no option beta"),
        (json.dumps({"format": 1, "config": {"name": "resnet_tiny"}}), "num_classes"),
        (json.dumps({"format": 1, "config": good}), "Missing keys: "),
    ]
    for about, message in cases:
        save_file(tensors, path, metadata=None if about is None else {"awnet": about})
        with pytest.raises(ValueError, match=message) as caught:
            load_model(path)
        assert "a.safetensors" in str(caught.value)


DECLARED_SIZES = {
    "classes": {"num_classes": 10**7},
    "classes beyond int64": {"num_classes": 10**30},
    "channels": {"in_channels": 10**7},
    "width": {"options": {"width": 1e4}},
    "width beyond torch": {"options": {"width": 1e12}},
    "width beyond float": {"options": {"width": 10**400}},
    "router widths": {"name": "awnet_tiny", "options": {"router_widths": [10**5, 10**5]}},
    "experts": {"name": "advmoe_resnet18", "options": {"experts": 10**5}},
    "no options": {"options": None},
    "a list of options": {"options": [1]},
    "more sizes than tensors": {"name": "awnet_tiny", "options": {"router_widths": [4] * 10**4}},
    "text for classes": {"num_classes": "10"},
    "a list for a name": {"name": ["resnet_tiny"]},
    "a registered model's classes": {"name": "registered for its size", "num_classes": 10**9},
}


@pytest.mark.parametrize("case", DECLARED_SIZES)
def test_sizes_that_a_file_states_are_compared_with_its_tensors_before_anything_is_allocated(
    case, tmp_path, monkeypatch
):
    build = lambda num_classes, in_channels: nn.Linear(4, num_classes)  # noqa: E731
    monkeypatch.setitem(registry_module._REGISTRY, "registered for its size", build)
    path = tmp_path / "a.safetensors"
    good = {"name": "resnet_tiny", "num_classes": 10, "in_channels": 3, "options": {}}
    about = {"format": 1, "config": good | DECLARED_SIZES[case]}
    save_file({"weight": torch.ones(2)}, path, metadata={"awnet": json.dumps(about)})
    assert path.stat().st_size < 10**5
    # nothing may be built for real: not even the layers that would fit
    monkeypatch.setattr("awnet.models.files.create_model", None)
    with pytest.raises(ValueError, match=r"a\.safetensors, written by awnet .* does not fit") as caught:
        load_model(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"width": 1e9}),
        ("resnet18", {"width": 3e3}),
        ("resnet_tiny_wide", {"width": 1e9}),
        ("awnet_tiny", {"router_widths": [10**6, 10**6]}),
        ("mobilenet_v2", {"num_classes": 10**12}),
        ("vgg16_bn", {"in_channels": 10**12}),
        ("advmoe_resnet18", {"experts": 10**9}),
    ],
)
def test_a_model_larger_than_the_machines_memory_is_refused_before_it_is_built(name, options):
    with pytest.raises((MemoryError, ValueError), match=rf"{name} with .*(would take|larger than torch)"):
        create_model(name, **options)


def test_the_check_of_a_models_size_leaves_its_weights_as_they_were():
    torch.manual_seed(0)
    expected = create_model("awnet_tiny", router_widths=(4, 8)).state_dict()  # not large: unchecked
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awnet.models.registry._USUAL_SIZE", 0)
        actual = create_model("awnet_tiny", router_widths=(4, 8)).state_dict()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


# --- the Hub's form, in a folder


@pytest.mark.parametrize(
    ("name", "options"), [("awnet_tiny", {"beta": 2.0, "router_widths": (4, 8)}), ("resnet_tiny_wide", {})]
)
def test_a_hub_folder_is_written_and_loaded(name, options, tmp_path):
    model = warmed(create_model(name, num_classes=4, in_channels=1, **options))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["name"] == name
    again = type(model).from_pretrained(tmp_path, local_files_only=True)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(x), model(x))
    assert again.config == model.config
    config["num_classes"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json of .* does not fit its weights: .*classifier"):
        type(model).from_pretrained(tmp_path, local_files_only=True)


@pytest.fixture(scope="module")
def on_hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    create_model("awnet_tiny", router_widths=(4, 8)).save_pretrained(folder)
    create_model("advmoe_resnet18", width=0.05).save_pretrained(folder / "advmoe")
    return folder


@pytest.mark.parametrize(
    "declared",
    [
        {"width": 1e9},
        {"width": 1e300},
        {"width": float("nan")},
        {"width": "wide"},
        {"num_classes": 10**9},
        {"num_classes": 10**30},
        {"in_channels": -3},
        {"router_widths": [10**9, 10**9]},
        {"router_widths": [4] * 10**4},
        {"router_widths": {"a": 1}},
        {"name": "awnet_resnet50"},
        {"experts": 10**9},
    ],
    ids=lambda declared: str(declared)[:40],
)
@pytest.mark.parametrize("strict", [True, False])
def test_sizes_that_a_hub_config_states_are_compared_with_the_weights_before_anything_is_allocated(
    declared, strict, on_hub, tmp_path, monkeypatch
):
    kind, folder = (ADVMOE, on_hub / "advmoe") if "experts" in declared else (AWResNet, on_hub)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | declared
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(kind, "_load_as_safetensor", None)  # follows the construction of the model
    with pytest.raises(ValueError, match=r"config\.json of .* does not fit its weights") as caught:
        kind.from_pretrained(tmp_path, strict=strict)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_buffers_that_no_file_holds_are_bounded_by_the_file_too():
    module = nn.Linear(2, 2, device="meta")
    module.register_buffer("mask", torch.ones(10**6, 10**6, device="meta"), persistent=False)
    with pytest.raises(ValueError, match="buffers of 1,000,000,000,000 elements for weights of 6"):
        check_state(module, {"weight": (2, 2), "bias": (2,)})
    module.mask = module.mask[:2, :2]
    check_state(module, {"weight": (2, 2), "bias": (2,)})


def test_hub_folders_without_whole_weights_are_refused_by_name(on_hub, tmp_path):
    (tmp_path / "config.json").write_text((on_hub / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        AWResNet.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((on_hub / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        AWResNet.from_pretrained(tmp_path)


def test_a_deep_copy_shares_nothing_with_the_model():
    model = warmed(create_model("awnet_tiny"))
    twin = copy.deepcopy(model)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(twin(x), model(x))
    assert twin.config == model.config
    assert twin.config is not model.config

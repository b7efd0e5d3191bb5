"""Forward-mode differentiation, torch.func and second derivatives: right, or an error that names what works."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.random_layers import DIFFERENTIABLE, build
from torch import Tensor
from torch.autograd import forward_ad

from awnet import ops
from awnet.models import create_model
from awnet.ops.backends import native

pytestmark = pytest.mark.usefixtures("one_thread")

NAMED = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(native.load() is not None, reason=str(native.load()))),
]


def layer(training: bool = False) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """``aw_conv2d`` of everything that has a derivative, away from the ReLU's kink, and float64 arguments."""
    case = build(
        torch.Generator().manual_seed(0), training, batch=4, c_in=2, c_out=3, groups=1, kernel=(3, 2), stride=2,
        size=(5, 4),
    )  # fmt: skip
    names = [name for name in DIFFERENTIABLE if name in case.tensors]
    fixed = {name: x for name, x in case.tensors.items() if name not in names}

    def function(*arguments: Tensor, backend: str | None = None) -> Tensor:
        # the running statistics are this call's own
        copies = {name: x.clone() for name, x in fixed.items()}
        given = dict(zip(names, arguments, strict=True))
        return ops.aw_conv2d(**given, **copies, **case.options, backend=backend)

    return function, tuple(case.tensors[name] for name in names)


def norm() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    tensors = [torch.randn(3, 2, 2, 2), torch.rand(2, 2), torch.randn(2, 2), torch.tensor([0.2, 0.5, 1.0])]
    mean, var = torch.zeros(2, 2).double(), torch.ones(2, 2).double()

    def function(x: Tensor, weight: Tensor, bias: Tensor, p: Tensor, backend: str | None = None) -> Tensor:
        return ops.mix_batch_norm(x, weight, bias, mean, var, p_clean=p, backend=backend)

    return function, tuple(x.double() for x in tensors)


def scaled() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    tensors = (torch.randn(2, 2, 4, 4), torch.randn(4, 1, 3, 3), torch.rand(2, 4))

    def function(x: Tensor, weight: Tensor, scale: Tensor, backend: str | None = None) -> Tensor:
        return ops.filter_scaled_conv2d(x, weight, scale, groups=2, backend=backend)

    return function, tuple(x.double() for x in tensors)


def affine() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    tensors = (torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.rand(2, 3), torch.rand(2, 3))

    def function(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, backend: str | None = None) -> Tensor:
        return ops.affine_conv2d(x, w, scale, shift, activation=None, backend=backend)

    return function, tuple(x.double() for x in tensors)


FUNCTIONS = {
    "aw_conv2d": layer,
    "aw_conv2d in training": lambda: layer(training=True),
    "mix_batch_norm": norm,
    "filter_scaled_conv2d": scaled,
    "affine_conv2d": affine,
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_derivatives_are_right(name: str) -> None:
    function, arguments = FUNCTIONS[name]()
    leaves = [x.clone().requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    tangents = tuple(torch.randn_like(x) for x in arguments)
    _, along = torch.func.jvp(function, arguments, tangents)
    step = 1e-6
    moved = [
        function(*(x + sign * step * t for x, t in zip(arguments, tangents, strict=True))) for sign in (1, -1)
    ]
    # central differences in float64: the error is step² and 1e-16 / step
    torch.testing.assert_close(along, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_backend_without_a_forward_mode_derivative_names_the_reference(name: str, backend: str) -> None:
    function, arguments = FUNCTIONS[name]()
    if backend == "cpp":
        arguments = tuple(x.float() for x in arguments)
    for place, x in enumerate(arguments):  # a tangent of any argument
        with forward_ad.dual_level():
            given: list[Any] = list(arguments)
            given[place] = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(ValueError, match=r"forward-mode derivative; 'reference' can run it"):
                function(*given, backend=backend)
            # without a tangent the call is an ordinary one
            function(*arguments, backend=backend)


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev", "hessian"])
def test_torch_func_on_a_named_backend_names_the_reference(transform: str, backend: str) -> None:
    weight, x = torch.randn(3, 2, 3, 3), torch.randn(2, 2, 4, 4)

    def function(x: Tensor) -> Tensor:
        return ops.filter_scaled_conv2d(x, weight, None, backend=backend).sum()

    calls: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(function)(x),
        "vmap": lambda: torch.func.vmap(lambda image: function(image[None]))(x),
        "jvp": lambda: torch.func.jvp(function, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(function)(x),
        "hessian": lambda: torch.func.hessian(function)(x),
    }
    with pytest.raises(ValueError, match=r"torch.func \(grad, .*; 'reference' can run it"):
        calls[transform]()


def test_explain_reports_why_a_transformed_call_runs_on_the_reference() -> None:
    weight, x = torch.randn(3, 2, 3, 3), torch.randn(2, 2, 4, 4)
    explanations = []

    def function(x: Tensor) -> Tensor:
        explanations.append(ops.explain(ops.filter_scaled_conv2d, x, weight, None))
        return x.sum()

    torch.func.grad(function)(x)
    assert explanations[0].backend == "reference"
    assert "torch.func" in explanations[0].others["eager"]


# --- models


@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
@pytest.mark.parametrize("frozen", [False, True], ids=["model", "frozen"])
def test_torch_func_of_a_model_agrees_with_autograd(name: str, frozen: bool) -> None:
    model = create_model(name, num_classes=3, in_channels=1).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    network: Any = model.inference_copy(torch.float32) if frozen else model  # type: ignore[operator]
    x, v = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    images = x.clone().requires_grad_()
    logits = network(images)
    jacobian = torch.stack(
        [torch.autograd.grad(logits[:, k].sum(), images, retain_graph=True)[0] for k in range(3)]
    )
    grad = torch.autograd.grad(logits.square().sum(), images)[0]

    def loss(x: Tensor) -> Tensor:
        return network(x).square().sum()

    func = torch.func
    results = {
        "grad": (func.grad(loss)(x), grad),
        "jvp": (func.jvp(network, (x,), (v,))[1], (jacobian * v).sum((2, 3, 4)).T),
        "vmap": (func.vmap(lambda image: network(image[None])[0])(x), logits.detach()),
        "gradients of each image": (func.vmap(func.grad(lambda image: loss(image[None])))(x), grad),
        "jacrev": (func.jacrev(network)(x[:1])[0, :, 0], jacobian[:, 0]),
    }
    for transform, (got, expected) in results.items():
        # float32 on two backends, whose sums run in other orders
        error = (got - expected).norm() / expected.norm()
        assert error < 1e-4, (transform, float(error))


def test_a_second_derivative_of_a_frozen_network_names_the_reference_and_works_there() -> None:
    model = create_model("awnet_tiny", num_classes=3, in_channels=1).eval().requires_grad_(False)
    frozen: Any = model.inference_copy(torch.float32)  # type: ignore[operator]
    x, v = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)

    def curvature() -> Tensor:
        images = x.clone().requires_grad_()
        grad = torch.autograd.grad(frozen(images).square().sum(), images, create_graph=True)[0]
        return torch.autograd.grad((grad * v).sum(), images)[0]

    for backend in (None, "eager"):
        with ops.use_backend(backend), pytest.raises(RuntimeError, match="reference"):
            curvature()
    with ops.use_backend("reference"):
        got = curvature()
    expected = torch.func.jvp(torch.func.grad(lambda x: frozen(x).square().sum()), (x,), (v,))[1]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_network_coefficients_have_every_derivative_or_name_the_backend_that_does(backend: str) -> None:
    tables = torch.rand(4, 2, 5, dtype=torch.float64) + 0.1
    filter_scale, p = torch.rand(3, 2, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def function(filter_scale: Tensor, p: Tensor) -> Tensor:
        pairs = ops.network_coefficients(tables, [2, 3], filter_scale, p, eps=1e-5, backend=backend)
        return torch.cat([torch.cat(pair, 1) for pair in pairs], 1)

    leaves = [filter_scale.requires_grad_(), p.requires_grad_()]
    if backend == "reference":
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, leaves)
        return
    assert torch.autograd.gradcheck(function, leaves)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(ValueError, match="'reference' can"):
        torch.func.jvp(lambda p: function(filter_scale, p), (p,), (p,))


def test_the_global_average_has_every_derivative() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.global_average, [x], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ops.global_average, [x])
    vmapped = torch.func.vmap(lambda image: ops.global_average(image[None])[0])(x)
    torch.testing.assert_close(vmapped, x.mean((2, 3)))


def test_training_under_torch_func_reports_what_running_statistics_need() -> None:
    weight = torch.ones(1, 2)
    tables = (weight, torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2))

    def function(x: Tensor) -> Tensor:
        return ops.mix_batch_norm(x, *tables, training=True).square().sum()

    with pytest.raises(RuntimeError, match=r"eval mode.*functional_call"):
        torch.func.grad(function)(torch.randn(2, 2, 3, 3))


def test_a_compiled_call_never_loses_a_tangent() -> None:
    weight, x = torch.randn(3, 2, 3, 3), torch.randn(2, 2, 4, 4)
    compiled = torch.compile(
        lambda x: ops.filter_scaled_conv2d(x, weight, None, backend="eager"), backend="aot_eager"
    )
    compiled(x)  # compiled without tangents, and then called with one
    # the operator's words up to torch 2.13; newer ones compile again, and the choice of the backend refuses
    says_why = r"forward-mode.*reference|reference.*forward-mode"
    with forward_ad.dual_level(), pytest.raises((RuntimeError, ValueError), match=says_why):
        compiled(forward_ad.make_dual(x, x))

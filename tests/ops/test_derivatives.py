"""Derivatives beyond a gradient: forward mode, second order, and the transforms of torch.func."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from anymamba import ops
from anymamba.errors import BackendError
from tests.support.operators import scan_inputs
from tests.support.tolerance import assert_each, assert_gradient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("automatic_choice")]

Operator = Callable[..., tuple[Tensor, ...]]
b, l, e, n, k = 2, 5, 3, 2, 3
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scan(x: Tensor, delta: Tensor, A: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, ...]:
    B, C, D, z, bias, state = rest
    options |= {"initial_state": state, "return_last_state": True}
    return tuple(ops.selective_scan(x, delta, A, B, C, D, z, bias, True, **options))


def packed_scan(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return scan(*tensors, seq_idx=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]]), **options)


def conv(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, **options: Any) -> Any:
    options |= {"initial_window": window, "return_final_window": True}
    return ops.causal_conv1d(x, weight, bias, "silu", **options)


def norm(x: Tensor, weight: Tensor, residual: Tensor, **options: Any) -> Any:
    return ops.rms_norm(x, weight, 1e-2, residual=residual, return_sum=True, **options)


def gated_norm(x: Tensor, weight: Tensor, gate: Tensor, **options: Any) -> tuple[Any, ...]:
    return (ops.rms_norm(x, weight, 1e-2, gate=gate, **options),)


def linear(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return (ops.linear(x, weight, bias, **options),)


def ssd(x: Tensor, dt: Tensor, A: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Chunks of two steps in PyTorch, so that states pass between them."""
    B, C, D, state = rest
    options |= {"initial_state": state, "return_last_state": True, "chunk_size": 2}
    return tuple(ops.ssd(x, dt, A, B, C, D, dt_softplus=True, **options))


SCAN = scan_inputs(b, l, e, n, dtype=torch.float64)
SCAN.pop("delta_softplus")
CASES: dict[str, tuple[Operator, tuple[Tensor, ...]]] = {
    "scan": (scan, (*SCAN.values(), normal(b, e, n))),
    "packed scan": (packed_scan, (*SCAN.values(), normal(b, e, n))),
    "conv": (conv, (normal(b, l, e), normal(e, k), normal(e), normal(b, e, k))),
    "norm": (norm, (normal(b, e), normal(e), normal(b, e))),
    "gated norm": (gated_norm, (normal(b, e), normal(e), normal(b, e))),
    "linear": (linear, (normal(b, e), normal(n, e), normal(n))),
}
HEADS = (normal(b, l, 2, 3), normal(b, l, 2), -normal(2).abs())
MAPS = (normal(b, l, 1, n), normal(b, l, 1, n))
CASES["ssd"] = (ssd, (*HEADS, *MAPS, normal(2, 3), normal(b, 2, 3, n)))


def with_grad(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]


def number(function: Operator, *tensors: Tensor, **options: Any) -> Tensor:
    """One number in which every output takes part, none of them linearly."""
    return torch.stack([y.sin().square().sum() for y in function(*tensors, **options)]).sum()


@pytest.mark.parametrize("name", CASES)
def test_the_reference_against_numerical_derivatives(name: str) -> None:
    """Backward and forward mode, and second derivatives, in float64: finite differences."""
    function, tensors = CASES[name]
    inputs = with_grad(tensors, torch.float64)
    # One random direction in place of each entry of the Jacobian, for time.
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_of_the_core(name: str) -> None:
    """The gradient of a gradient that the core computed, against the reference in float64."""
    function, tensors = CASES[name]

    def twice(dtype: torch.dtype, backend: str) -> list[Tensor]:
        inputs = with_grad(tensors, dtype)
        loss = number(function, *inputs, backend=backend)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        return list(torch.autograd.grad(total, inputs))

    expected = twice(torch.float64, "reference")
    assert_each(assert_gradient, twice(torch.float32, "cpu"), expected)


@pytest.mark.parametrize("name", CASES)
def test_transforms_of_torch_func(name: str) -> None:
    """jvp, linearize, hessian and per-example gradients, chosen without a word, in float32."""
    function, tensors = CASES[name]
    inputs = tuple(tensor.float() for tensor in tensors)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)

    def loss(*inputs: Tensor) -> Tensor:
        return number(function, *inputs)

    leaves = with_grad(tensors, torch.float64)
    gradients = torch.autograd.grad(number(function, *leaves), leaves, create_graph=True)
    expected = torch.stack([(g * t).sum() for g, t in zip(gradients, tangents, strict=True)]).sum()
    tangent = torch.func.jvp(loss, inputs, tangents)[1]
    assert_gradient(tangent, expected)
    assert_gradient(torch.func.linearize(loss, *inputs)[1](*tangents), expected)
    (of_first,) = torch.autograd.grad(expected, leaves[0])
    hessian = torch.func.hessian(lambda x: loss(x, *inputs[1:]))(inputs[0])
    others = torch.func.jvp(
        lambda *rest: torch.func.grad(loss)(inputs[0], *rest), inputs[1:], tangents[1:]
    )[1]
    along = torch.tensordot(hessian, tangents[0], tangents[0].ndim) + others
    assert_gradient(along, of_first)
    two = torch.stack([inputs[0], 2 * inputs[0]])
    each = torch.vmap(lambda x: torch.func.grad(loss)(x, *inputs[1:]))(two)
    assert_gradient(each[0], gradients[0])


def test_dual_tensors_without_a_transform() -> None:
    """`torch.autograd.forward_ad`, without gradients too: updates of a state have tangents."""
    state, x = torch.zeros(b, e, n), torch.randn(b, e)
    A, B = -torch.rand(e, n), torch.randn(b, n)

    def step(x: Tensor) -> Tensor:
        now = state.clone() * x[..., None]
        window = x[..., None].repeat(1, 1, k)
        x = ops.causal_conv1d_update(x, window, torch.ones(e, k))
        return ops.selective_state_update(now, x, x, A, B, B) + now.sum(-1)

    with torch.no_grad(), forward_ad.dual_level():
        dual = step(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(dual).tangent
    step_size = 1e-3
    numerical = (step(x + step_size) - step(x - step_size)) / (2 * step_size)
    assert tangent is not None
    # float32 leaves finite differences with a step of 1e-3 three to four digits.
    torch.testing.assert_close(tangent, numerical, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_core_is_refused_by_name(name: str) -> None:
    function, tensors = CASES[name]
    inputs = tuple(tensor.float() for tensor in tensors)
    with pytest.raises(BackendError, match=r"forward-mode derivatives need the backend 'auto'"):
        torch.func.jvp(lambda *t: number(function, *t, backend="cpu"), inputs, inputs)


def test_a_quantized_product_is_linear_in_its_rows() -> None:
    """Its tangent and its gradient pass by the rounding, as documented."""
    q = torch.randint(0, 256, (3, 32), dtype=torch.uint8)
    scales = torch.rand(3, 1).bfloat16()
    x, direction = torch.randn(2, 32), torch.randn(2, 32)
    weight = scales.float() * (q.float() - 128)
    _, tangent = torch.func.jvp(lambda x: ops.quantized_linear(x, q, scales), (x,), (direction,))
    assert_gradient(tangent, direction.double() @ weight.double().T)
    gradient = torch.func.grad(lambda x: ops.quantized_linear(x, q, scales).sum())(x)
    assert_gradient(gradient, weight.double().sum(0).expand(2, 32))

"""The native operators inside PyTorch's machinery: compile, export, checkpoints, autocast."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anymamba import ops
from anymamba.ops.conv import native as conv_native
from anymamba.ops.linear import native as linear_native
from anymamba.ops.norm import native as norm_native
from anymamba.ops.scan import native as scan_native
from tests.support.tolerance import assert_contract, assert_each, assert_gradient

pytestmark = pytest.mark.slow

OPERATORS = torch.ops.anymamba
b, l, e, n, k, g = 2, 37, 6, 4, 3, 2


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def table(*segments: tuple[int, ...]) -> Tensor:
    return torch.tensor(segments, dtype=torch.int64).T.contiguous()


@dataclass(frozen=True)
class Given:
    """What the tensors of a call have in common, and whether those it can do without are there."""

    grad: bool = False
    all_given: bool = True
    dtype: torch.dtype = torch.float32

    def wide(self, *shape: int) -> Tensor:
        return random(*shape, grad=self.grad)

    def narrow(self, *shape: int) -> Tensor:
        """In the storage type."""
        return random(*shape, dtype=self.dtype, grad=self.grad)

    def maybe(self, value: Any) -> Any:
        return value if self.all_given else None


SEGMENTS = table((0, 0, 20, 0, -1), (0, 20, l, -1, 0), (1, 0, l, 1, 1))


def scan_call(given: Given) -> tuple[Any, ...]:
    wide, narrow, maybe = given.wide, given.narrow, given.maybe
    A = (-torch.rand(e, n)).requires_grad_(given.grad)
    sequences = (narrow(b, l, e), narrow(b, l, e), A, narrow(b, l, g, n), narrow(b, l, g, n))
    extras = (wide(e), narrow(b, l, e), wide(e), wide(b, e, n), SEGMENTS)
    return (*sequences, *map(maybe, extras), b, True, False, given.grad)


def conv_call(given: Given) -> tuple[Any, ...]:
    extras = (given.wide(e), given.narrow(b, e, k), SEGMENTS)
    tensors = (given.narrow(b, l, e), given.wide(e, k), *map(given.maybe, extras))
    return (*tensors, b, True, not given.all_given)


def norm_call(given: Given) -> tuple[Any, ...]:
    x, weight, residual = given.narrow(5, 7), given.wide(7), given.maybe(given.narrow(5, 7))
    return x, weight, residual, None, 1e-5, given.dtype, given.maybe(torch.float32)


def linear_call(given: Given) -> tuple[Any, ...]:
    return given.narrow(9, 7), given.narrow(5, 7), given.maybe(given.wide(5))


def ssd_call(given: Given) -> tuple[Any, ...]:
    h, p = 2, 3
    A = (-torch.rand(h)).requires_grad_(given.grad)
    sequences = (given.narrow(b, l, h * p), given.narrow(b, l, h), A)
    maps = (given.narrow(b, l, 1, n), given.narrow(b, l, 1, n))
    extras = (given.wide(h, p), given.narrow(b, l, h * p), given.wide(h), given.wide(b, h, p, n))
    options = (b, True, 0.0, math.inf)
    return (*sequences, *maps, *map(given.maybe, (*extras, SEGMENTS)), *options)


def ssd_chunked_call(given: Given) -> tuple[Any, ...]:
    h, p = 2, 3
    A = (-torch.rand(h)).requires_grad_(given.grad)
    sequences = (given.narrow(b, l, h, p), torch.rand(b, l, h).requires_grad_(given.grad), A)
    maps = (given.narrow(b, l, 1, n), given.narrow(b, l, 1, n))
    extras = (given.wide(h, p), given.wide(b, h, p, n), SEGMENTS)
    return (*sequences, *maps, *map(given.maybe, extras), b, 16)


CALLS: dict[str, Callable[[Given], tuple[Any, ...]]] = {
    "selective_scan": scan_call,
    "causal_conv1d": conv_call,
    "rms_norm": norm_call,
    "linear": linear_call,
    "ssd": ssd_call,
    "ssd_chunked": ssd_chunked_call,
}


@pytest.fixture(autouse=True)
def _natively() -> Iterator[None]:
    with ops.backend("cpu"):
        yield


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("all_given", [True, False])
@pytest.mark.parametrize("grad", [False, True])
def test_operators_keep_the_rules_of_custom_operators(
    name: str, all_given: bool, grad: bool
) -> None:
    """Schema, fake implementation, autograd registration, and tracing of both passes."""
    operator = getattr(OPERATORS, name).default
    torch.library.opcheck(operator, CALLS[name](Given(grad, all_given)))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operators_keep_the_rules_in_half_precision(name: str, dtype: torch.dtype) -> None:
    # A traced backward pass sums in another order, and rounds to 8 bits what it gets.
    tolerance = {"atol": 5e-2, "rtol": 5e-2}
    torch.library.opcheck(
        getattr(OPERATORS, name).default, CALLS[name](Given(grad=True, dtype=dtype)), **tolerance
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_updates_keep_the_rules(groups: int) -> None:
    state, A = torch.randn(b, e, n), -torch.rand(e, n)
    x, delta, B, C = random(b, e), random(b, e), random(b, groups, n), random(b, groups, n)
    extras = (random(e), random(b, e), random(e))
    torch.library.opcheck(
        OPERATORS.selective_state_update.default, (state, x, delta, A, B, C, *extras, True)
    )
    nothing = (None, None, None)
    torch.library.opcheck(
        OPERATORS.selective_state_update.default, (state, x, delta, A, B, C, *nothing, False)
    )
    window = random(b, e, k)
    torch.library.opcheck(
        OPERATORS.causal_conv1d_update.default, (x, window, random(e, k), random(e), True)
    )
    torch.library.opcheck(
        OPERATORS.causal_conv1d_update.default, (x, window, random(e, k), None, False)
    )


def test_backward_operators_keep_the_rules() -> None:
    tensors = scan_call(Given())
    _, _, kept = OPERATORS.selective_scan(*tensors[:-1], True)
    call = (*tensors[:10], kept, random(b, l, e), random(b, e, n), *tensors[10:13])
    torch.library.opcheck(OPERATORS.selective_scan_backward.default, call)
    x, weight, bias, window, *options = conv_call(Given())
    call = (x, weight, bias, window, options[0], random(b, l, e), random(b, e, k), *options[1:])
    torch.library.opcheck(OPERATORS.causal_conv1d_backward.default, call)
    for gate, dtotal in ((None, random(5, 7)), (random(5, 7), None)):
        torch.library.opcheck(
            OPERATORS.rms_norm_backward.default,
            (
                random(5, 7),
                random(7),
                gate,
                torch.rand(5),
                random(5, 7),
                dtotal,
                1e-5,
                torch.float32,
            ),
        )
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            OPERATORS.linear_backward.default, (random(9, 5), random(9, 7), random(5, 7), *needs)
        )


def block(x_bld: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """A small Mamba block that uses every operator."""
    normed = ops.rms_norm(x_bld, weights["norm"])
    assert isinstance(normed, Tensor)
    x_ble, z_ble = ops.linear(normed, weights["in_proj"], weights["in_bias"]).chunk(2, -1)
    x_ble = ops.causal_conv1d(x_ble, weights["conv"], weights["conv_bias"], "silu")
    assert isinstance(x_ble, Tensor)
    delta_ble, B_bln, C_bln = ops.linear(x_ble, weights["x_proj"]).split([e, n, n], -1)
    y_ble, last = ops.selective_scan(
        x_ble,
        delta_ble,
        -torch.exp(weights["A_log"].float()),
        B_bln,
        C_bln,
        weights["D"],
        z_ble,
        weights["bias"],
        True,
        return_last_state=True,
    )
    return x_bld + ops.linear(y_ble, weights["out_proj"]) + last.sum()


def block_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "norm": (5,),
        "in_proj": (2 * e, 5),
        "in_bias": (2 * e,),
        "conv": (e, 4),
        "conv_bias": (e,),
        "x_proj": (e + 2 * n, e),
        "A_log": (e, n),
        "D": (e,),
        "bias": (e,),
        "out_proj": (5, e),
    }
    return {
        name: (torch.randn(shape, generator=generator) * 0.5).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def loss_and_gradients(
    function: Callable[[Tensor, dict[str, Tensor]], Tensor], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    weights = block_weights()
    y = function(x, weights)
    loss = (y.float() ** 2).mean()
    return y.detach(), list(
        torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    )


def assert_same_step(function: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> None:
    x = torch.randn(b, l, 5)
    y, gradients = loss_and_gradients(function, x)
    expected_y, expected = loss_and_gradients(block, x)
    assert_contract(y, expected_y)
    assert_each(assert_gradient, gradients, expected)


def test_gradients_against_the_reference() -> None:
    x = torch.randn(b, l, 5)
    y, gradients = loss_and_gradients(block, x)
    with ops.backend("reference"):
        expected_y, expected = loss_and_gradients(block, x)
    assert_contract(y, expected_y, factor=10)
    assert_each(assert_gradient, gradients, expected)


# aot_eager traces both passes as inductor does, without a compiler for the result.
def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def test_compiled_in_one_graph() -> None:
    assert_same_step(compiled(block))


def test_compiled_once_for_all_lengths() -> None:
    fast, weights = compiled(block, dynamic=True), block_weights()
    try:
        for length in (l, 5, 70):
            x = torch.randn(b, length, 5)
            assert_contract(fast(x, weights).detach(), block(x, weights))
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


def test_compiled_updates_change_the_state() -> None:
    def step(state: Tensor, window: Tensor, x: Tensor, weight: Tensor, A: Tensor) -> Tensor:
        x = ops.causal_conv1d_update(x, window, weight, None, "silu")
        B = x[:, :n]
        return ops.selective_state_update(state, x, x, A, B, B, delta_softplus=True)

    fast = compiled(step)
    x, weight, A = random(b, e), random(e, k), -torch.rand(e, n)
    state, window = torch.zeros(b, e, n), torch.zeros(b, e, k)
    expected_state, expected_window = state.clone(), window.clone()
    for _ in range(3):
        y = fast(state, window, x, weight, A)
        assert_contract(y, step(expected_state, expected_window, x, weight, A))
        assert_contract(state, expected_state)
        assert torch.equal(window, expected_window)


def test_exported() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterDict(
                {
                    name: torch.nn.Parameter(value.detach())
                    for name, value in block_weights().items()
                }
            )

        def forward(self, x_bld: Tensor) -> Tensor:
            return block(x_bld, dict(self.weights.items()))

    model = Block().eval()
    dynamic = {"x_bld": {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=2)}}
    exported = torch.export.export(model, (torch.randn(b, l, 5),), dynamic_shapes=dynamic)
    names = {str(node.target) for node in exported.graph.nodes}
    assert "anymamba.selective_scan.default" in names
    x = torch.randn(3, 70, 5)
    assert_contract(exported.module()(x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    def recomputed(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        def plain(x: Tensor, *values: Tensor) -> Tensor:
            return block(x, dict(zip(weights, values, strict=True)))

        y = checkpoint(plain, x, *weights.values(), use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        return y

    if reentrant:  # which does not support torch.autograd.grad
        weights, expected = block_weights(), block_weights()
        x = torch.randn(b, l, 5)
        recomputed(x, weights).square().mean().backward()
        block(x, expected).square().mean().backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            assert expected[name].grad is not None
            assert torch.equal(weight.grad, expected[name].grad)
    else:
        assert_same_step(recomputed)


def test_autocast_to_bfloat16() -> None:
    """Under autocast projections run in bfloat16, and our operators take what they get."""

    def mixed(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x_ble, z_ble = F.linear(x, weights["in_proj"]).chunk(2, -1)
            assert x_ble.dtype == torch.bfloat16
            x_ble = ops.causal_conv1d(x_ble, weights["conv"], weights["conv_bias"], "silu")
            delta, B, C = F.linear(x_ble, weights["x_proj"]).split([e, n, n], -1)
            A, D, bias = -weights["A_log"].exp(), weights["D"], weights["bias"]
            y_ble = ops.selective_scan(x_ble, delta, A, B, C, D, z_ble, bias, True)
            assert y_ble.dtype == torch.bfloat16
            return F.linear(y_ble, weights["out_proj"])

    x = torch.randn(b, l, 5)
    y, gradients = loss_and_gradients(mixed, x)
    with ops.backend("reference"):
        expected_y, expected = loss_and_gradients(mixed, x)
    # Both round to bfloat16 after every operator, so bfloat16's tolerance holds throughout.
    assert_contract(y, expected_y)
    for actual, reference in zip(gradients, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_contract(actual.bfloat16(), reference)


def test_autocast_leaves_the_references_sums_alone() -> None:
    """What is float32 on purpose stays so on a GPU without kernels, also where it is recomputed."""
    source = torch.Generator().manual_seed(0)
    x, delta, B, C = (torch.randn(b, l, size, generator=source) for size in (e, e, n, n))
    A = -torch.rand(e, n, generator=source)
    q = torch.randint(0, 256, (3, 32), generator=source, dtype=torch.uint8)
    scales = torch.full((3, 1), 0.01, dtype=torch.bfloat16)
    rows = torch.randn(2, 32, generator=source)
    found = []
    for enabled in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, delta, A, B, C, rows)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), ops.backend("reference"):
            y = ops.selective_scan(*leaves[:5], delta_softplus=True)
            product = ops.quantized_linear(leaves[5], q, scales)
        (y.square().sum() + product.square().sum()).backward()
        found.append([y, product, *(leaf.grad for leaf in leaves)])
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_inference_mode() -> None:
    x = torch.randn(b, l, 5)
    expected = block(x, block_weights()).detach()
    with torch.inference_mode():
        y = block(x, block_weights())
        assert y.is_inference()
        state, window = torch.zeros(b, e, n), torch.zeros(b, e, k)
        step = random(b, e)
        ops.selective_state_update(state, step, step, -torch.rand(e, n), step[:, :n], step[:, :n])
        ops.causal_conv1d_update(step, window, random(e, k))
        assert state.any()
        assert torch.equal(window[..., -1], step)
    assert torch.equal(y.clone(), expected)


def test_a_state_changed_after_its_use_is_noticed() -> None:
    """The updates tell autograd that they have written, so that no gradient is silently wrong."""
    state = torch.ones(b, e, n)
    weight = torch.ones(b, e, n, requires_grad=True)
    product = (state * weight).sum()
    x = random(b, e)
    ops.selective_state_update(state, x, x, -torch.rand(e, n), x[:, :n], x[:, :n])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_second_derivatives_are_the_formulas() -> None:
    """Of the sum of squares of W x, whose second derivative is 2 W^T W."""
    x, weight = random(9, 7, grad=True), random(5, 7)
    y = ops.linear(x.unsqueeze(0), weight)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    expected = 2 * weight.double().T @ weight.double() @ torch.ones(7, dtype=torch.float64)
    # Sums of five and seven products in float32.
    torch.testing.assert_close(second.double(), expected.expand(9, 7), rtol=0, atol=1e-5)


def test_the_modules_hold_what_the_table_names() -> None:
    for module, names in {
        scan_native: ("selective_scan", "selective_state_update"),
        conv_native: ("causal_conv1d", "causal_conv1d_update"),
        norm_native: ("rms_norm",),
        linear_native: ("linear",),
    }.items():
        for name in names:
            assert callable(getattr(module, name))
            assert getattr(OPERATORS, name).default is not None

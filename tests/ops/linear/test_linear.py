"""The matrix product, on each backend, against float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba import ops
from anymamba.errors import InputError
from anymamba.ops.fusable import project_halves
from tests.support.operators import LINEAR, TYPES, product_inputs
from tests.support.tolerance import assert_contract, assert_each, assert_gradient

every_backend = pytest.mark.usefixtures("each_backend")
native = pytest.mark.usefixtures("each_isa")


# Around the sizes of vectors (4, 8, 16), of few rows (16), and of blocks; beyond a block; empty.
ROWS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 65, 100)
SIZES = [(m, *nk) for m in ROWS for nk in ((1, 1), (5, 3), (16, 16), (33, 17), (64, 65), (97, 130))]
SIZES += [(5, 700, 300), (130, 300, 700), (300, 70, 1100)]
SIZES += [(3, 0, 4), (3, 4, 0), (0, 0, 0), (0, 4, 5), (0, 4, 0)]


@every_backend
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_sizes(m: int, n: int, k: int) -> None:
    LINEAR.check(product_inputs(m, n, k))


@every_backend
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), (2, 0, 7), (2, 1, 3, 7)])
def test_rows_in_any_number_of_axes(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(5, 7)
    y = ops.linear(x, weight)
    assert y.shape == (*shape[:-1], 5)
    assert_contract(y, x.double() @ weight.double().T)


@every_backend
def test_bad_shapes_are_named() -> None:
    with pytest.raises(InputError, match="weight has shape"):
        ops.linear(torch.randn(2, 3), torch.randn(4, 5))
    with pytest.raises(InputError, match="bias has shape"):
        ops.linear(torch.randn(2, 3), torch.randn(4, 3), torch.randn(3))
    with pytest.raises(InputError, match="expected rows"):
        ops.linear(torch.randn(2, 3), torch.randn(3))


# The reference computes in the type of x as PyTorch does, with a rounding of its own.
@native
@settings(max_examples=80)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    types=st.tuples(*[st.sampled_from(TYPES)] * 3),
)
def test_any_mixture_of_types(m: int, n: int, k: int, types: tuple[torch.dtype, ...]) -> None:
    LINEAR.check(product_inputs(m, n, k, types))


@native
def test_what_is_not_finite_stays_in_its_row() -> None:
    inputs = product_inputs(20, 37, 45)
    clean = ops.linear(**inputs)
    inputs["x"][7, 3] = float("nan")
    y = ops.linear(**inputs)
    assert y[7].isnan().all()
    y[7] = clean[7]
    assert torch.equal(y, clean)


@every_backend
@pytest.mark.parametrize("bias", [False, True])
def test_halves_are_those_of_the_whole(bias: bool) -> None:
    layer = torch.nn.Linear(37, 2 * 23, bias=bias)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 41, 37, generator=generator, requires_grad=True)
    halves = project_halves(layer, x)
    with torch.no_grad():  # one product
        whole = project_halves(layer, x)
    for half, part in zip(halves, whole, strict=True):
        # Sums have one order; only the reference leaves the choice of one to PyTorch.
        torch.testing.assert_close(half.detach(), part, rtol=0, atol=1e-5)

    weights = [torch.randn(half.shape, generator=generator) for half in halves]
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(halves, inputs, weights)
    exact = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    product = exact(x64) * torch.cat(weights, -1).double()
    expected = torch.autograd.grad(product.sum(), [x64, *exact.parameters()])
    assert_each(assert_gradient, found, expected)


def test_a_layer_with_a_hook_is_called_once_for_both_halves() -> None:
    layer, calls = torch.nn.Linear(3, 4), []
    layer.register_forward_hook(lambda module, inputs, output: calls.append(output))
    first, second = project_halves(layer, torch.ones(2, 3))
    assert len(calls) == 1
    assert torch.equal(torch.cat([first, second], -1), calls[0])

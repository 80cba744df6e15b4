"""The Triton norm against the reference in float64, beside the contract of all kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import ops
from anymamba.errors import BackendError
from anymamba.layers import gated_norm
from tests.support.operators import NORM, TYPES, gradients, leaves, norm_inputs
from tests.support.tolerance import assert_contract

triton = pytest.importorskip("tests.support.triton", reason="needs Triton: pip install triton")


@pytest.fixture(scope="module", autouse=True)
def _with_triton() -> Iterator[None]:
    with triton.with_triton():
        yield


# More rows than a program takes, rows of one and of many axes, and rows longer than a small tile.
@pytest.mark.parametrize(
    "shape", [(0, 4), (2, 0, 4), (5,), (1, 1), (2, 3, 4, 5), (700, 19), (9, 1001), (3, 4100)]
)
def test_shapes(shape: tuple[int, ...]) -> None:
    NORM.check(norm_inputs(*shape))


@settings(max_examples=20)
@given(
    rows=st.integers(1, 70),
    d=st.integers(1, 70),
    types=st.tuples(*[st.sampled_from(TYPES)] * 3),
    in_fp32=st.booleans(),
    alone=st.booleans(),
)
def test_any_mixture_of_types(
    rows: int, d: int, types: tuple[torch.dtype, ...], in_fp32: bool, alone: bool
) -> None:
    inputs = norm_inputs(rows, d, types=types)
    if alone:
        inputs["residual"] = None
    NORM.assert_results(inputs, residual_in_fp32=in_fp32)
    # What half precision rounds of the sum is not what its gradient is of.
    wide = torch.float32 in (types[0], types[2]) or in_fp32 or alone
    if wide:
        NORM.assert_gradients(inputs, residual_in_fp32=in_fp32)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e18])
def test_eps_and_rows_of_any_size(eps: float, scale: float) -> None:
    inputs = norm_inputs(3, 19)
    inputs |= {"x": inputs["x"] * scale, "residual": inputs["residual"] * scale}
    NORM.assert_results(inputs, eps=eps)


def test_what_is_not_finite_stays_in_its_row() -> None:
    inputs = norm_inputs(3, 19)
    clean, _ = NORM.call(inputs)
    inputs["x"][1, 4] = float("nan")
    normed, _ = NORM.call(inputs)
    assert normed[1].isnan().all()
    assert torch.equal(normed[[0, 2]], clean[[0, 2]])


def test_without_a_residual_the_sum_is_the_input() -> None:
    x, weight = torch.randn(3, 19, requires_grad=True), torch.randn(19)
    _, total = ops.rms_norm(x, weight, return_sum=True)
    assert torch.equal(total, x)
    (gradient,) = torch.autograd.grad(total.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_rows_too_long_are_named() -> None:
    with pytest.raises(BackendError, match="rows of up to 16384 channels, not 16385"):
        ops.rms_norm(torch.zeros(1, 16385), torch.ones(16385))
    with pytest.raises(BackendError, match=r"do not offer torch\.float64"):
        ops.rms_norm(torch.zeros(1, 3).double(), torch.ones(3).double())


@pytest.mark.parametrize("extra", ["residual", "gate"])
def test_second_derivatives(extra: str) -> None:
    def seconds(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        given = norm_inputs(3, 7)
        given[extra] = given.pop("residual")
        ours = leaves(given, dtype)
        normed = ops.rms_norm(**ours, backend=backend)
        assert isinstance(normed, Tensor)
        first = torch.autograd.grad(normed.square().sum(), ours["x"], create_graph=True)[0]
        return gradients([first], [first.detach()], ours)

    expected = seconds(torch.float64, "reference")
    for name, gradient in seconds(torch.float32, "triton").items():
        assert_contract(gradient, expected[name], factor=10)


def test_two_runs_give_the_same_bits() -> None:
    inputs = norm_inputs(700, 33)

    def bits() -> list[Tensor]:
        ours = leaves(inputs)
        outputs = NORM.call(ours)
        found = gradients(outputs, [torch.ones_like(y) for y in outputs], ours)
        return [*outputs, *found.values()]

    assert all(map(torch.equal, bits(), bits()))


@pytest.mark.parametrize("group_size", [None, 12, 4])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_the_gated_norm_of_mamba_2(group_size: int | None, norm_before_gate: bool) -> None:
    """Over all channels or groups of them, with the gate a part of a projection."""

    def call(projected: Tensor, weight: Tensor) -> Tensor:
        x, z = projected.chunk(2, -1)
        options = {"group_size": group_size, "norm_before_gate": norm_before_gate}
        return gated_norm(x, weight, None, z, is_rms_norm=True, **options)

    inputs: dict[str, Any] = {"projected": torch.randn(2, 5, 24), "weight": torch.randn(12)}
    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    found = call(**ours)
    with ops.backend("reference"):
        expected = call(**theirs)
    assert_contract(found, expected)
    cotangent = torch.randn(found.shape)
    wanted = gradients([expected], [cotangent], theirs)
    for name, gradient in gradients([found], [cotangent], ours).items():
        assert_contract(gradient, wanted[name], factor=10)


def test_operators_keep_the_rules_of_custom_operators() -> None:
    x, weight = torch.randn(2, 5, 7), torch.randn(7)
    for residual, gate, sum_type in ((x, None, torch.float32), (None, x, None), (None, None, None)):
        leaf = [t if t is None else t.clone().requires_grad_() for t in (x, weight, residual, gate)]
        call = (*leaf, 1e-5, torch.float32, sum_type)
        torch.library.opcheck(torch.ops.anymamba.rms_norm_triton.default, call)

"""The native RMSNorm, with each instruction set, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import ops
from tests.support.operators import NORM, TYPES, norm_inputs

pytestmark = pytest.mark.usefixtures("each_isa")


@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 768, 1001])
def test_widths(d: int) -> None:
    inputs = norm_inputs(3, d)
    NORM.assert_results(inputs)
    NORM.assert_gradients(inputs)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (1, 5), (7, 3, 5), (2, 3, 4, 5), (13,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    inputs = norm_inputs(*shape)
    NORM.assert_results(inputs)
    NORM.assert_gradients(inputs)


@settings(max_examples=60)
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


def test_without_a_residual_the_sum_is_the_input() -> None:
    x, weight = torch.randn(3, 19, requires_grad=True), torch.randn(19)
    normed, total = ops.rms_norm(x, weight, return_sum=True)
    assert torch.equal(total, x)
    (gradient,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(x))
    alone = ops.rms_norm(x, weight)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, normed)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1e10, 1e18])
def test_rows_of_any_size(scale: float) -> None:
    """Also where a square is below float32's smallest number; none here is above its largest."""
    inputs = norm_inputs(3, 19)
    inputs |= {"x": inputs["x"] * scale, "residual": inputs["residual"] * scale}
    NORM.assert_results(inputs)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
def test_eps(eps: float) -> None:
    inputs = norm_inputs(3, 19)
    NORM.assert_results(inputs, eps=eps)
    NORM.assert_gradients(inputs, eps=eps)


def test_what_is_not_finite_stays_in_its_row() -> None:
    inputs = norm_inputs(3, 19)
    clean, _ = NORM.call(inputs)
    inputs["x"][1, 4] = float("nan")
    normed, _ = NORM.call(inputs)
    assert normed[1].isnan().all()
    assert torch.equal(normed[[0, 2]], clean[[0, 2]])

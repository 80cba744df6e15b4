"""RMSNorm against its formula in float64, and natively against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import ops
from anymamba.errors import InputError
from tests.support.operators import NORM, TYPES, norm_inputs
from tests.support.tolerance import assert_contract

every_backend = pytest.mark.usefixtures("each_backend")
native = pytest.mark.usefixtures("each_isa")
WIDTHS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 768, 1001)
SHAPES = [(0, 4), (2, 0, 4), (1, 5), (7, 3, 5), (2, 3, 4, 5), (13,), *((3, d) for d in WIDTHS)]


@every_backend
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 17), (0, 4), (2, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    normed, total = ops.rms_norm(
        x, weight, 1e-5, residual=residual, return_sum=True, residual_in_fp32=True
    )
    expected = x.double() + residual.double()
    assert normed.dtype == dtype
    assert total.dtype == torch.float32
    assert_contract(total, expected)
    mean_square = (expected**2).mean(-1, keepdim=True)
    assert_contract(normed, expected / torch.sqrt(mean_square + 1e-5) * weight.double())


@every_backend
def test_the_sum_has_the_wider_type_of_both() -> None:
    x, weight = torch.randn(2, 4).bfloat16(), torch.ones(4)
    _, total = ops.rms_norm(x, weight, residual=torch.randn(2, 4), return_sum=True)
    assert total.dtype == torch.float32
    _, total = ops.rms_norm(x, weight, residual=x, return_sum=True)
    assert total.dtype == torch.bfloat16


def test_gradients_are_the_numerical_derivatives() -> None:
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (5,))]
    residual = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    # Only the reference computes in float64.
    options = {"return_sum": True, "backend": "reference"}
    assert torch.autograd.gradcheck(
        lambda x, w, r: ops.rms_norm(x, w, residual=r, **options), [*tensors, residual]
    )


def gated_by_formula(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    gated = x * gate * torch.sigmoid(gate)
    return gated / torch.sqrt((gated**2).mean(-1, keepdim=True) + 1e-5) * weight


@every_backend
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 17), (2, 0, 4), (37, 64), (2, 100)])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_gate_and_its_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The gate is a part of a projection, as in Mamba-2."""
    x, both = torch.randn(shape).to(dtype), 3 * torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)
    weight = torch.randn(shape[-1])
    ours = [tensor.requires_grad_() for tensor in (x, both, weight)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    normed = ops.rms_norm(x, weight, 1e-5, gate=both.chunk(2, -1)[1])
    assert isinstance(normed, Tensor)
    expected = gated_by_formula(theirs[0], theirs[2], theirs[1].chunk(2, -1)[1])
    assert_contract(normed, expected)
    cotangent = torch.randn(shape)
    found = torch.autograd.grad(normed, ours, cotangent)
    for gradient, wanted in zip(
        found, torch.autograd.grad(expected, theirs, cotangent.double()), strict=True
    ):
        assert_contract(gradient, wanted, factor=10)


@every_backend
def test_a_gate_excludes_a_residual() -> None:
    x, weight = torch.randn(2, 4), torch.ones(4)
    with pytest.raises(InputError, match="a gate excludes a residual"):
        ops.rms_norm(x, weight, gate=x, residual=x)
    with pytest.raises(InputError, match="gate has shape"):
        ops.rms_norm(x, weight, gate=x[:1])


@every_backend
def test_bad_shapes_are_named() -> None:
    with pytest.raises(InputError, match="weight has shape"):
        ops.rms_norm(torch.randn(2, 4), torch.ones(3))
    with pytest.raises(InputError, match="residual has shape"):
        ops.rms_norm(torch.randn(2, 4), torch.ones(4), residual=torch.ones(4))


@native
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, ...]) -> None:
    NORM.check(norm_inputs(*shape))


@native
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


@native
def test_without_a_residual_the_sum_is_the_input() -> None:
    x, weight = torch.randn(3, 19, requires_grad=True), torch.randn(19)
    normed, total = ops.rms_norm(x, weight, return_sum=True)
    assert torch.equal(total, x)
    (gradient,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(x))
    alone = ops.rms_norm(x, weight)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, normed)


@native
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1e10, 1e18])
def test_rows_of_any_size(scale: float) -> None:
    """Also where a square is below float32's smallest number; none here is above its largest."""
    inputs = norm_inputs(3, 19)
    inputs |= {"x": inputs["x"] * scale, "residual": inputs["residual"] * scale}
    NORM.assert_results(inputs)


@native
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
def test_eps(eps: float) -> None:
    NORM.check(norm_inputs(3, 19), eps=eps)


@native
def test_what_is_not_finite_stays_in_its_row() -> None:
    inputs = norm_inputs(3, 19)
    clean, _ = NORM.call(inputs)
    inputs["x"][1, 4] = float("nan")
    normed, _ = NORM.call(inputs)
    assert normed[1].isnan().all()
    assert torch.equal(normed[[0, 2]], clean[[0, 2]])

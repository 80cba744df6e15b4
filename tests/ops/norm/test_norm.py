"""RMSNorm against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from anymamba import ops
from anymamba.errors import InputError
from tests.support.tolerance import assert_contract


@pytest.mark.usefixtures("each_backend")
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


@pytest.mark.usefixtures("each_backend")
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


@pytest.mark.usefixtures("each_backend")
def test_bad_shapes_are_named() -> None:
    with pytest.raises(InputError, match="weight has shape"):
        ops.rms_norm(torch.randn(2, 4), torch.ones(3))
    with pytest.raises(InputError, match="residual has shape"):
        ops.rms_norm(torch.randn(2, 4), torch.ones(4), residual=torch.ones(4))

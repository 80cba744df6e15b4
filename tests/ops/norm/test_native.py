"""The native RMSNorm, with each instruction set, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import ops
from tests.support.operators import LAYOUTS, TYPES, gradients, leaves
from tests.support.tolerance import assert_contract, assert_gradients

pytestmark = pytest.mark.usefixtures("each_isa")


def norm_inputs(*shape: int, types: tuple[torch.dtype, ...] = (torch.float32,) * 3) -> Any:
    g = torch.Generator().manual_seed(len(shape))
    return {
        "x": torch.randn(shape, generator=g).to(types[0]),
        "weight_d": torch.randn(shape[-1], generator=g).to(types[1]),
        "residual": torch.randn(shape, generator=g).to(types[2]),
    }


def norm(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    normed, total = ops.rms_norm(**inputs, **options, return_sum=True)
    return normed, total


def assert_norm(inputs: dict[str, Any], **options: Any) -> None:
    doubles = {n: None if v is None else v.double() for n, v in inputs.items()}
    expected = norm(doubles, **options, backend="reference")
    normed, total = norm(inputs, **options)
    x, residual = inputs["x"], inputs["residual"]
    assert normed.dtype == inputs["weight_d"].dtype
    wider = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    assert total.dtype == (torch.float32 if options.get("residual_in_fp32") else wider)
    assert_contract(normed, expected[0])
    assert_contract(total, expected[1])


def assert_norm_gradients(inputs: dict[str, Any], **options: Any) -> None:
    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    outputs = norm(ours, **options)
    g = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(out.shape, generator=g).to(out.dtype) for out in outputs]
    expected = gradients(norm(theirs, **options, backend="reference"), cotangents, theirs)
    actual = gradients(outputs, cotangents, ours)
    for name, gradient in actual.items():
        assert gradient.dtype == ours[name].dtype
    assert_gradients(actual, expected)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 768, 1001])
def test_widths(d: int) -> None:
    inputs = norm_inputs(3, d)
    assert_norm(inputs)
    assert_norm_gradients(inputs)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (1, 5), (7, 3, 5), (2, 3, 4, 5), (13,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    inputs = norm_inputs(*shape)
    assert_norm(inputs)
    assert_norm_gradients(inputs)


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
    assert_norm(inputs, residual_in_fp32=in_fp32)
    # What half precision rounds of the sum is not what its gradient is of.
    wide = torch.float32 in (types[0], types[2]) or in_fp32 or alone
    if wide:
        assert_norm_gradients(inputs, residual_in_fp32=in_fp32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, dtype: torch.dtype) -> None:
    for shape in ((3, 19), (2, 5, 33)):
        inputs = norm_inputs(*shape, types=(dtype, torch.float32, torch.float32))
        inputs |= {name: LAYOUTS[layout](inputs[name]) for name in ("x", "residual")}
        assert_norm(inputs)
        assert_norm_gradients(inputs)


def test_gradients_that_are_one_number_for_all() -> None:
    inputs = norm_inputs(5, 19)
    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    normed, total = norm(ours)
    actual = torch.autograd.grad(normed.sum() + total.sum(), list(ours.values()))
    normed, total = norm(theirs, backend="reference")
    expected = torch.autograd.grad(normed.sum() + total.sum(), list(theirs.values()))
    found = dict(zip(ours, actual, strict=True))
    assert_gradients(found, dict(zip(theirs, expected, strict=True)))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_gradients_where_only_one_output_counts(index: int, in_fp32: bool) -> None:
    inputs = norm_inputs(5, 19)
    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    options = {"residual_in_fp32": in_fp32}
    output = norm(ours, **options)[index]
    reference = norm(theirs, **options, backend="reference")[index]
    cotangent = [torch.randn_like(output)]
    assert_gradients(
        gradients([output], cotangent, ours), gradients([reference], cotangent, theirs)
    )


@pytest.mark.parametrize("name", ["x", "weight_d", "residual"])
def test_gradients_of_one_input_alone(name: str) -> None:
    inputs = norm_inputs(5, 19)
    ours = inputs | {name: inputs[name].clone().requires_grad_()}
    theirs = {n: v.double() for n, v in inputs.items()}
    theirs[name].requires_grad_()
    outputs = norm(ours)
    cotangents = [torch.randn_like(output) for output in outputs]
    assert_gradients(
        gradients(outputs, cotangents, ours),
        gradients(norm(theirs, backend="reference"), cotangents, theirs),
    )


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
    assert_norm(inputs)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
def test_eps(eps: float) -> None:
    inputs = norm_inputs(3, 19)
    assert_norm(inputs, eps=eps)
    assert_norm_gradients(inputs, eps=eps)


def test_what_is_not_finite_stays_in_its_row() -> None:
    inputs = norm_inputs(3, 19)
    clean, _ = norm(inputs)
    inputs["x"][1, 4] = float("nan")
    normed, _ = norm(inputs)
    assert normed[1].isnan().all()
    assert torch.equal(normed[[0, 2]], clean[[0, 2]])


def bits_with(threads: int, inputs: dict[str, Any]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYMAMBA_NUM_THREADS", str(threads))
        ours = leaves(inputs)
        outputs = norm(ours)
        cotangents = [torch.ones_like(output) for output in outputs]
        return [*outputs, *gradients(outputs, cotangents, ours).values()]


@pytest.mark.parametrize("shape", [(700, 19), (33, 1001), (5, 7, 64)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...]) -> None:
    inputs = norm_inputs(*shape)
    alone = bits_with(1, inputs)
    for threads in (2, 4):
        for actual, expected in zip(bits_with(threads, inputs), alone, strict=True):
            assert torch.equal(actual, expected)

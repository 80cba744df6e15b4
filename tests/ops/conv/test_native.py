"""The native convolution, with each instruction set, against the reference in float64."""

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


def conv_inputs(
    b: int,
    l: int,
    e: int,
    k: int,
    *,
    windows: int | None = None,
    columns: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """All tensors of `causal_conv1d`; a window for each row, or for each of `windows`."""
    g = torch.Generator().manual_seed(seed)
    n_windows, columns = b if windows is None else windows, k if columns is None else columns
    return {
        "x_ble": torch.randn(b, l, e, generator=g).to(dtype),
        "weight_ek": torch.randn(e, k, generator=g),
        "bias_e": torch.randn(e, generator=g),
        "initial_window": torch.randn(n_windows, e, columns, generator=g).to(dtype),
    }


def convolve(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    options = {"activation": "silu", "return_final_window": True} | options
    y, final = ops.causal_conv1d(**inputs, **options)
    return y, final


def exactly(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    doubles = {name: None if v is None else v.double() for name, v in inputs.items()}
    return convolve(doubles, **options, backend="reference")


def assert_convolution(inputs: dict[str, Any], **options: Any) -> None:
    y, final = convolve(inputs, **options)
    expected_y, expected_final = exactly(inputs, **options)
    assert y.dtype == final.dtype == inputs["x_ble"].dtype
    assert_contract(y, expected_y)
    # Inputs are moved, not computed with.
    assert torch.equal(final.double(), expected_final)


def assert_convolution_gradients(inputs: dict[str, Any], **options: Any) -> None:
    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    outputs = convolve(ours, **options)
    g = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(out.shape, generator=g).to(out.dtype) for out in outputs]
    expected = gradients(convolve(theirs, **options, backend="reference"), cotangents, theirs)
    actual = gradients(outputs, cotangents, ours)
    for name, gradient in actual.items():
        assert gradient.dtype == ours[name].dtype
    assert_gradients(actual, expected)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 16, 33])
@pytest.mark.parametrize("l", [0, 1, 2, 3, 9, 31, 32, 33, 64, 65, 127, 129, 300])
def test_widths_of_the_kernel_and_lengths(k: int, l: int) -> None:
    inputs = conv_inputs(2, l, 5, k)
    for reverse in (False, True):
        assert_convolution(inputs, reverse=reverse)
        assert_convolution_gradients(inputs, reverse=reverse)


@pytest.mark.parametrize("e", [1, 3, 4, 7, 8, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 257])
def test_widths(e: int) -> None:
    inputs = conv_inputs(2, 37, e, 4)
    assert_convolution(inputs)
    assert_convolution_gradients(inputs)


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_batches(batch: int) -> None:
    inputs = conv_inputs(batch, 9, 6, 4)
    assert_convolution(inputs)
    assert_convolution_gradients(inputs)


@pytest.mark.parametrize("columns", [3, 4, 5, 9, 40])
def test_windows_wider_than_needed(columns: int) -> None:
    for l in (0, 1, 5, 35):
        inputs = conv_inputs(2, l, 19, 4, columns=columns)
        assert_convolution(inputs)
        assert_convolution_gradients(inputs)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("absent", ["bias_e", "initial_window", None])
def test_each_option_may_be_absent(activation: str | None, absent: str | None) -> None:
    inputs = conv_inputs(2, 37, 19, 4)
    if absent is not None:
        inputs[absent] = None
    assert_convolution(inputs, activation=activation)
    assert_convolution_gradients(inputs, activation=activation)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_any_strides(layout: str, dtype: torch.dtype, reverse: bool) -> None:
    for k in (3, 6):
        plain = conv_inputs(2, 45, 19, k, dtype=dtype)
        inputs = {
            name: LAYOUTS[layout](value) if value.ndim > 1 else value
            for name, value in plain.items()
        }
        kept = {name: value.clone() for name, value in inputs.items()}
        assert_convolution(inputs, reverse=reverse)
        assert all(torch.equal(inputs[name], kept[name]) for name in kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_strides(layout: str, dtype: torch.dtype) -> None:
    plain = conv_inputs(2, 45, 19, 4, dtype=dtype)
    ours, theirs = leaves(plain), leaves(plain, torch.float64)
    laid_out = {
        name: LAYOUTS[layout](value) if value.ndim > 1 else value for name, value in ours.items()
    }
    outputs = convolve(laid_out)
    cotangents = [LAYOUTS[layout](torch.randn(out.shape).to(out.dtype)) for out in outputs]
    actual = gradients(outputs, cotangents, ours)
    expected = gradients(convolve(theirs, backend="reference"), cotangents, theirs)
    assert_gradients(actual, expected)


def test_gradients_that_are_one_number_for_all() -> None:
    inputs = conv_inputs(2, 45, 19, 4)
    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    y, final = convolve(ours)
    actual = torch.autograd.grad(y.sum() + final.sum(), list(ours.values()))
    y, final = convolve(theirs, backend="reference")
    expected = torch.autograd.grad(y.sum() + final.sum(), list(theirs.values()))
    found = dict(zip(ours, actual, strict=True))
    assert_gradients(found, dict(zip(theirs, expected, strict=True)))


@pytest.mark.parametrize("index", [0, 1])
def test_gradients_where_only_one_output_counts(index: int) -> None:
    inputs = conv_inputs(2, 40, 6, 4)
    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    output, reference = convolve(ours)[index], convolve(theirs, backend="reference")[index]
    cotangent = [torch.randn_like(output)]
    assert_gradients(
        gradients([output], cotangent, ours), gradients([reference], cotangent, theirs)
    )


@pytest.mark.parametrize("name", ["x_ble", "weight_ek", "bias_e", "initial_window"])
def test_gradients_of_one_input_alone(name: str) -> None:
    inputs = conv_inputs(2, 40, 6, 4)
    ours = inputs | {name: inputs[name].clone().requires_grad_()}
    theirs = {n: v.double() for n, v in inputs.items()}
    theirs[name].requires_grad_()
    outputs = convolve(ours)
    cotangents = [torch.randn_like(output) for output in outputs]
    assert_gradients(
        gradients(outputs, cotangents, ours),
        gradients(convolve(theirs, backend="reference"), cotangents, theirs),
    )


@settings(max_examples=40)
@given(
    b=st.integers(1, 3),
    l=st.integers(0, 70),
    e=st.integers(1, 35),
    k=st.integers(1, 6),
    reverse=st.booleans(),
    types=st.lists(st.sampled_from(TYPES), min_size=3, max_size=3),
)
def test_any_mixture_of_types(
    b: int, l: int, e: int, k: int, reverse: bool, types: list[torch.dtype]
) -> None:
    inputs = conv_inputs(b, l, e, k)
    names = ("x_ble", "weight_ek", "bias_e")
    inputs |= {name: inputs[name].to(t) for name, t in zip(names, types, strict=True)}
    # A window holds what once was x, so its own type matters only where it is narrower.
    inputs["initial_window"] = inputs["initial_window"].to(types[0])
    assert_convolution(inputs, reverse=reverse)
    assert_convolution_gradients(inputs, reverse=reverse)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    e=st.integers(1, 35),
    k=st.integers(1, 6),
    wider=st.integers(0, 3),
    reverse=st.booleans(),
    dtype=st.sampled_from(TYPES),
)
def test_gradients_of_packed_sequences(
    lengths: list[int], e: int, k: int, wider: int, reverse: bool, dtype: torch.dtype
) -> None:
    inputs = conv_inputs(
        1, sum(lengths), e, k, windows=len(lengths), columns=k + wider, dtype=dtype
    )
    options = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "reverse": reverse}
    assert_convolution(inputs, **options)
    assert_convolution_gradients(inputs, **options)


@settings(max_examples=30)
@given(
    marks=st.lists(st.integers(0, 1), min_size=90, max_size=90),
    reverse=st.booleans(),
    k=st.integers(1, 6),
    starts=st.booleans(),
)
def test_gradients_with_seq_idx(marks: list[int], reverse: bool, k: int, starts: bool) -> None:
    inputs = conv_inputs(2, 45, 7, k)
    if not starts:
        inputs["initial_window"] = None
    seq_idx = torch.tensor(marks).view(2, 45)
    seq_idx[1] = seq_idx[1].cumsum(0) // 16
    assert_convolution(inputs, seq_idx=seq_idx, reverse=reverse)
    assert_convolution_gradients(inputs, seq_idx=seq_idx, reverse=reverse)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(value: float) -> None:
    inputs = conv_inputs(2, 40, 19, 4)
    clean, _ = convolve(inputs)
    inputs["x_ble"][1, 7, 3] = value
    y, _ = convolve(inputs)
    assert y[1, 7:11, 3].isnan().any() or y[1, 7:11, 3].isinf().any()
    y[1, 7:11, 3] = clean[1, 7:11, 3]
    assert torch.equal(y, clean)


def bits_with(threads: int, inputs: dict[str, Any]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYMAMBA_NUM_THREADS", str(threads))
        ours = leaves(inputs)
        outputs = convolve(ours)
        cotangents = [torch.ones_like(output) for output in outputs]
        return [*outputs, *gradients(outputs, cotangents, ours).values()]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 700, 19, 4), torch.float32),
        ((5, 70, 300, 3), torch.float32),
        ((3, 165, 70, 6), torch.bfloat16),
    ],
)
def test_the_number_of_threads_changes_no_bit(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = conv_inputs(*sizes, dtype=dtype)
    alone = bits_with(1, inputs)
    for threads in (2, 4):
        for actual, expected in zip(bits_with(threads, inputs), alone, strict=True):
            assert torch.equal(actual, expected)


@settings(max_examples=60)
@given(
    b=st.integers(0, 5),
    e=st.integers(1, 70),
    k=st.integers(1, 9),
    types=st.lists(st.sampled_from(TYPES), min_size=4, max_size=4),
    layout=st.sampled_from(sorted(LAYOUTS)),
    activation=st.sampled_from([None, "silu"]),
    bias=st.booleans(),
)
def test_updates_of_any_types_and_strides(
    b: int,
    e: int,
    k: int,
    types: list[torch.dtype],
    layout: str,
    activation: str | None,
    bias: bool,
) -> None:
    inputs = conv_inputs(b, 1, e, k)
    x = LAYOUTS[layout](inputs["x_ble"][:, 0].to(types[0]))
    window = LAYOUTS[layout](inputs["initial_window"].to(types[1]))
    weight, bias_e = inputs["weight_ek"].to(types[2]), inputs["bias_e"].to(types[3])
    expected_window = torch.cat([window[..., 1:], x[..., None].to(types[1])], -1)
    # What the window holds counts at the width of x, as in the sequence.
    expected = ops.causal_conv1d(
        x[:, None].double(),
        weight.double(),
        bias_e.double() if bias else None,
        activation,
        initial_window=window.to(types[0]).double(),
        backend="reference",
    )
    address, version = window.data_ptr(), window._version
    y = ops.causal_conv1d_update(x, window, weight, bias_e if bias else None, activation)
    assert y.dtype == x.dtype
    assert_contract(y, expected[:, 0])
    assert torch.equal(window, expected_window)
    assert window.data_ptr() == address
    assert window._version > version


def test_updates_have_no_gradient() -> None:
    inputs = conv_inputs(2, 1, 6, 4)
    window = inputs["initial_window"].requires_grad_()
    x, weight = inputs["x_ble"][:, 0].requires_grad_(), inputs["weight_ek"].requires_grad_()
    y = ops.causal_conv1d_update(x, window, weight)
    assert not y.requires_grad
    assert window.grad_fn is None

"""The native convolution, with each instruction set, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba import ops
from tests.support.operators import CONVOLUTION, LAYOUTS, TYPES, conv_inputs
from tests.support.tolerance import assert_contract

pytestmark = pytest.mark.usefixtures("each_isa")
WIDTHS = (1, 3, 4, 7, 8, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 257)
SHAPES = [*((2, 37, e) for e in WIDTHS), *((b, 9, 6) for b in (0, 1, 3, 17))]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 16, 33])
@pytest.mark.parametrize("l", [0, 1, 2, 3, 9, 31, 32, 33, 64, 65, 127, 129, 300])
def test_widths_of_the_kernel_and_lengths(k: int, l: int) -> None:
    inputs = conv_inputs(2, l, 5, k)
    for reverse in (False, True):
        CONVOLUTION.check(inputs, reverse=reverse)


@pytest.mark.parametrize(("b", "l", "e"), SHAPES)
def test_shapes(b: int, l: int, e: int) -> None:
    CONVOLUTION.check(conv_inputs(b, l, e, 4))


@pytest.mark.parametrize("columns", [3, 4, 5, 9, 40])
def test_windows_wider_than_needed(columns: int) -> None:
    for l in (0, 1, 5, 35):
        CONVOLUTION.check(conv_inputs(2, l, 19, 4, columns=columns))


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("absent", ["bias_e", "initial_window", None])
def test_each_option_may_be_absent(activation: str | None, absent: str | None) -> None:
    inputs = conv_inputs(2, 37, 19, 4)
    if absent is not None:
        inputs[absent] = None
    CONVOLUTION.check(inputs, activation=activation)


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
    CONVOLUTION.check(inputs, reverse=reverse)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(value: float) -> None:
    inputs = conv_inputs(2, 40, 19, 4)
    clean, _ = CONVOLUTION.call(inputs)
    inputs["x_ble"][1, 7, 3] = value
    y, _ = CONVOLUTION.call(inputs)
    assert y[1, 7:11, 3].isnan().any() or y[1, 7:11, 3].isinf().any()
    y[1, 7:11, 3] = clean[1, 7:11, 3]
    assert torch.equal(y, clean)


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

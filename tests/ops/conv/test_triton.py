"""The Triton convolution against the reference in float64, beside the contract of all kernels."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import ops
from anymamba.errors import BackendError
from anymamba.ops import backends
from tests.ops.conv.test_conv import (
    CUTS,
    LENGTHS,
    assert_any_cut_gives_the_whole,
    assert_packed_sequences_are_what_they_are_alone,
)
from tests.support.operators import CONVOLUTION, LAYOUTS, TYPES, conv_inputs, gradients, leaves
from tests.support.tolerance import assert_contract

triton = pytest.importorskip("tests.support.triton", reason="needs Triton: pip install triton")


@pytest.fixture(scope="module", autouse=True)
def _with_triton() -> Iterator[None]:
    with triton.with_triton():
        yield


# Steps and channels on both sides of a tile's: 32 and 64 forward, 128 and 32 backward.
@pytest.mark.parametrize(("l", "e"), [(31, 63), (32, 64), (33, 65), (129, 33), (1, 129), (260, 3)])
@pytest.mark.parametrize("reverse", [False, True])
def test_sizes_around_a_tile(l: int, e: int, reverse: bool) -> None:
    CONVOLUTION.check(conv_inputs(2, l, e, 4), reverse=reverse)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 16])
def test_widths_of_the_kernel(k: int) -> None:
    for l in (1, k, 40):
        CONVOLUTION.check(conv_inputs(1, l, 5, k))


def test_a_kernel_too_wide_is_named() -> None:
    inputs = conv_inputs(1, 20, 5, 17)
    with pytest.raises(BackendError, match="kernels of up to 16 taps, not 17"):
        CONVOLUTION.call(inputs)
    with pytest.raises(BackendError, match=r"do not offer torch\.float64"):
        ops.causal_conv1d(torch.zeros(1, 2, 3).double(), torch.zeros(3, 4))


@pytest.mark.parametrize("columns", [3, 5, 9, 40])
def test_windows_wider_than_needed(columns: int) -> None:
    for l in (0, 1, 5, 35):
        CONVOLUTION.check(conv_inputs(2, l, 7, 4, columns=columns), reverse=l == 5)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("absent", ["bias_e", "initial_window", None])
def test_each_option_may_be_absent(activation: str | None, absent: str | None) -> None:
    inputs = conv_inputs(2, 37, 19, 4)
    if absent is not None:
        inputs[absent] = None
    CONVOLUTION.check(inputs, activation=activation)


def test_without_a_window_to_return() -> None:
    """The window is not computed then, and the gradients are the same."""
    ours = leaves(conv_inputs(2, 37, 19, 4))
    y = ops.causal_conv1d(**ours)
    assert isinstance(y, Tensor)
    found = gradients([y], [torch.ones_like(y)], ours)
    theirs = leaves(conv_inputs(2, 37, 19, 4), torch.float64)
    expected = ops.causal_conv1d(**theirs, backend="reference")
    assert_contract(y, expected)
    for name, gradient in gradients([expected], [torch.ones_like(expected)], theirs).items():
        assert_contract(found[name], gradient, factor=10)


@settings(max_examples=12)
@given(
    l=st.integers(0, 70),
    e=st.integers(1, 35),
    k=st.integers(1, 6),
    reverse=st.booleans(),
    types=st.lists(st.sampled_from(TYPES), min_size=3, max_size=3),
)
def test_any_mixture_of_types(
    l: int, e: int, k: int, reverse: bool, types: list[torch.dtype]
) -> None:
    inputs = conv_inputs(2, l, e, k)
    names = ("x_ble", "weight_ek", "bias_e")
    inputs |= {name: inputs[name].to(t) for name, t in zip(names, types, strict=True)}
    inputs["initial_window"] = inputs["initial_window"].to(types[0])
    CONVOLUTION.check(inputs, reverse=reverse)


@settings(max_examples=10)
@given(**CUTS)
def test_any_cut_gives_the_whole(cuts: list[int], k: int, reverse: bool) -> None:
    assert_any_cut_gives_the_whole(cuts, k, reverse)


@settings(max_examples=10)
@given(**LENGTHS)
def test_packed_sequences_are_what_they_are_alone(lengths: list[int], reverse: bool) -> None:
    assert_packed_sequences_are_what_they_are_alone(lengths, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[0, 3, 1, 0, 36, 5], [45], [0, 0, 1]])
def test_packed_sequences_and_their_gradients(lengths: list[int], reverse: bool) -> None:
    """Sequences of no step, shorter than a window, and over more than one tile."""
    inputs = conv_inputs(1, sum(lengths), 5, 4, windows=len(lengths), columns=6)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    CONVOLUTION.check(inputs, cu_seqlens=cu_seqlens, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("starts", [False, True])
def test_seq_idx_and_its_gradients(starts: bool, reverse: bool) -> None:
    inputs = conv_inputs(2, 45, 7, 4)
    if not starts:
        inputs["initial_window"] = None
    seq_idx = torch.stack([torch.arange(45) // 2, torch.arange(45) // 33])
    CONVOLUTION.check(inputs, seq_idx=seq_idx, reverse=reverse)


@pytest.mark.parametrize("silu", [False, True])
def test_second_derivatives(silu: bool) -> None:
    """Of the gradient's square, against the reference in float64."""

    def seconds(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        ours = leaves(conv_inputs(2, 9, 5, 4), dtype)
        y = ops.causal_conv1d(**ours, activation="silu" if silu else None, backend=backend)
        assert isinstance(y, Tensor)
        first = torch.autograd.grad(y.square().sum(), ours["x_ble"], create_graph=True)[0]
        return gradients([first], [first.detach()], ours)

    expected = seconds(torch.float64, "reference")
    for name, gradient in seconds(torch.float32, "triton").items():
        assert_contract(gradient, expected[name], factor=10)


def test_two_runs_give_the_same_bits() -> None:
    inputs = conv_inputs(2, 300, 19, 4)

    def bits() -> list[Tensor]:
        ours = leaves(inputs)
        outputs = CONVOLUTION.call(ours)
        found = gradients(outputs, [torch.ones_like(y) for y in outputs], ours)
        return [*outputs, *found.values()]

    assert all(map(torch.equal, bits(), bits()))


@settings(max_examples=20)
@given(
    b=st.integers(0, 3),
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
    if types[1] == torch.bfloat16 != types[0]:
        # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
        assert_contract(window, expected_window)
    else:
        assert torch.equal(window, expected_window)
    assert window.data_ptr() == address
    assert window._version > version


def test_operators_keep_the_rules_of_custom_operators() -> None:
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    window = torch.randn(2, 5, 4)
    table = torch.tensor([[0, 0, 1], [0, 4, 0], [4, 9, 9], [0, -1, 1], [-1, 0, 1]])
    for tensors, options in (
        ((x, weight, bias, window, table), (2, True, True, True)),
        ((x, weight, None, None, None), (2, False, False, False)),
    ):
        leaf = [t if t is None or t is table else t.clone().requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.anymamba.causal_conv1d_triton.default, (*leaf, *options))
    torch.library.opcheck(
        torch.ops.anymamba.causal_conv1d_update_triton.default,
        (x[:, 0], window, weight, bias, True),
    )


def test_compiled_in_one_graph_before_anything_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    place = backends.BACKENDS["triton"].operators["causal_conv1d"]
    monkeypatch.delitem(backends._loaded, place, raising=False)
    monkeypatch.setattr(backends, "_late", SimpleNamespace())
    torch._dynamo.reset()

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return CONVOLUTION.call(inputs)

    inputs = conv_inputs(2, 9, 5, 4)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(inputs), call(inputs), strict=True):
        assert torch.equal(found, expected)

"""The causal convolution against a loop over single numbers, and against itself cut up."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anymamba import ops
from anymamba.errors import InputError
from tests.support.tolerance import assert_contract


def brute_force(
    x_ble: Tensor, weight_ek: Tensor, bias_e: Tensor, activation: str | None, window: Tensor
) -> Tensor:
    """One number at a time; `window` holds the inputs before the first."""
    (b, l, e), k = x_ble.shape, weight_ek.shape[1]
    y = torch.zeros(b, l, e, dtype=torch.float64)
    for i in range(b):
        for c in range(e):
            inputs = window[i, c].tolist() + x_ble[i, :, c].tolist()
            offset = window.shape[2] - (k - 1)
            for t in range(l):
                total = float(bias_e[c])
                total += sum(float(weight_ek[c, j]) * inputs[offset + t + j] for j in range(k))
                y[i, t, c] = total / (1 + math.exp(-total)) if activation else total
    return y


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("l", [1, 2, 9])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_the_brute_force_loop(k: int, l: int, activation: str | None) -> None:
    x, weight, bias = torch.randn(2, l, 5), torch.randn(5, k), torch.randn(5)
    window = torch.randn(2, 5, k)
    y, final = ops.causal_conv1d(
        x, weight, bias, activation, initial_window=window, return_final_window=True
    )
    assert_contract(y, brute_force(x, weight, bias, activation, window))
    assert torch.equal(final, torch.cat([window, x.transpose(1, 2)], 2)[:, :, -k:])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_storage(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 9, 5).to(dtype), torch.randn(5, 4), torch.randn(5)
    y = ops.causal_conv1d(x, weight, bias, "silu")
    assert y.dtype == dtype
    assert_contract(y, brute_force(x, weight, bias, "silu", torch.zeros(2, 5, 4)))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_the_numerical_derivatives(reverse: bool) -> None:
    shapes = [(2, 6, 3), (3, 4), (3,), (2, 3, 4)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def function(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        return ops.causal_conv1d(
            x,
            weight,
            bias,
            "silu",
            initial_window=window,
            return_final_window=True,
            reverse=reverse,
            backend="reference",  # which alone computes in float64
        )

    assert torch.autograd.gradcheck(function, tensors)


CUTS = {
    "cuts": st.lists(st.integers(0, 12), max_size=5),
    "k": st.integers(1, 5),
    "reverse": st.booleans(),
}
LENGTHS = {"lengths": st.lists(st.integers(0, 7), min_size=1, max_size=6), "reverse": st.booleans()}


@pytest.mark.usefixtures("each_fast_backend")
@given(**CUTS)
def test_any_cut_gives_the_whole(cuts: list[int], k: int, reverse: bool) -> None:
    assert_any_cut_gives_the_whole(cuts, k, reverse)


def assert_any_cut_gives_the_whole(cuts: list[int], k: int, reverse: bool) -> None:
    x, weight, bias = torch.randn(2, 12, 3), torch.randn(3, k), torch.randn(3)
    whole = ops.causal_conv1d(x, weight, bias, "silu", reverse=reverse)
    borders = [0, *sorted(cuts), 12]
    pieces = list(itertools.pairwise(borders))
    window, outputs = torch.zeros(2, 3, k), {}
    for start, stop in reversed(pieces) if reverse else pieces:
        outputs[start, stop], window = ops.causal_conv1d(
            x[:, start:stop],
            weight,
            bias,
            "silu",
            initial_window=window,
            return_final_window=True,
            reverse=reverse,
        )
    assert_contract(torch.cat([outputs[piece] for piece in pieces], 1), whole)


@pytest.mark.usefixtures("each_fast_backend")
@given(**LENGTHS)
def test_packed_sequences_are_what_they_are_alone(lengths: list[int], reverse: bool) -> None:
    assert_packed_sequences_are_what_they_are_alone(lengths, reverse)


def assert_packed_sequences_are_what_they_are_alone(lengths: list[int], reverse: bool) -> None:
    x, weight, bias = torch.randn(1, sum(lengths), 3), torch.randn(3, 4), torch.randn(3)
    windows = torch.randn(len(lengths), 3, 4)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    options = {"return_final_window": True, "reverse": reverse}
    y, final = ops.causal_conv1d(
        x, weight, bias, "silu", initial_window=windows, cu_seqlens=offsets, **options
    )
    for index in range(len(lengths)):
        span = slice(int(offsets[index]), int(offsets[index + 1]))
        y_alone, final_alone = ops.causal_conv1d(
            x[:, span], weight, bias, "silu", initial_window=windows[index, None], **options
        )
        assert_contract(y[:, span], y_alone)
        assert torch.equal(final[index], final_alone[0])


@pytest.mark.usefixtures("each_backend")
def test_seq_idx_with_both_windows() -> None:
    x, weight, window = torch.randn(2, 6, 3), torch.randn(3, 4), torch.randn(2, 3, 4)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1], [3, 3, 3, 3, 3, 4]])
    y, final = ops.causal_conv1d(
        x, weight, initial_window=window, return_final_window=True, seq_idx=seq_idx
    )
    for row, border in enumerate([2, 5]):
        head = ops.causal_conv1d(x[row, None, :border], weight, initial_window=window[row, None])
        tail, last = ops.causal_conv1d(x[row, None, border:], weight, return_final_window=True)
        assert_contract(y[row], torch.cat([head, tail], 1)[0])
        assert torch.equal(final[row], last[0])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("k", [1, 2, 4])
def test_steps_equal_the_sequence(k: int) -> None:
    x, weight, bias = torch.randn(2, 6, 3), torch.randn(3, k), torch.randn(3)
    whole, final = ops.causal_conv1d(x, weight, bias, "silu", return_final_window=True)
    window = torch.zeros(2, 3, k)
    for t in range(6):
        y = ops.causal_conv1d_update(x[:, t], window, weight, bias, "silu")
        assert_contract(y, whole[:, t])
    assert torch.equal(window, final)


@pytest.mark.usefixtures("each_backend")
def test_a_window_wider_than_needed_is_kept_as_wide() -> None:
    x, window = torch.randn(1, 2, 3), torch.randn(1, 3, 9)
    _, final = ops.causal_conv1d(
        x, torch.randn(3, 2), initial_window=window, return_final_window=True
    )
    assert torch.equal(final, torch.cat([window[:, :, 2:], x.transpose(1, 2)], 2))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("b", "l"), [(0, 4), (2, 0)])
def test_empty_inputs(b: int, l: int) -> None:
    window = torch.randn(b, 3, 4)
    y, final = ops.causal_conv1d(
        torch.randn(b, l, 3), torch.randn(3, 4), initial_window=window, return_final_window=True
    )
    assert y.shape == (b, l, 3)
    assert final.shape == (b, 3, 4)
    assert l or torch.equal(final, window)


@pytest.mark.usefixtures("each_backend")
def test_bad_input_is_named() -> None:
    x, weight = torch.randn(2, 4, 3), torch.randn(3, 4)
    with pytest.raises(InputError, match="weight has shape"):
        ops.causal_conv1d(x, torch.randn(2, 4))
    with pytest.raises(InputError, match="activation is 'relu'"):
        ops.causal_conv1d(x, weight, activation="relu")
    with pytest.raises(InputError, match="initial_window has shape"):
        ops.causal_conv1d(x, weight, initial_window=torch.randn(2, 3, 2))
    with pytest.raises(InputError, match="window has shape"):
        ops.causal_conv1d_update(x[:, 0], torch.randn(2, 3, 3), weight)

"""causal_conv1d under the original's names, against a loop over single numbers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anymamba.dropin import causal_conv1d
from anymamba.dropin.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_interface,
    causal_conv1d_update,
)
from anymamba.dropin.causal_conv1d.causal_conv1d_interface import (
    CausalConv1dFn,
    causal_conv1d_ref,
    causal_conv1d_update_ref,
)
from anymamba.dropin.causal_conv1d.causal_conv1d_varlen import (
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from anymamba.errors import InputError
from tests.support.tolerance import assert_contract, assert_each, assert_gradient

LAYOUTS = {
    "time together": lambda x: x.contiguous(),
    "channels together": lambda x: x.mT.contiguous().mT,
    "half of a projection": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
}


def by_hand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and final states, one number at a time in double precision."""
    (b, d, l), width = x.shape, weight.shape[1]
    out = torch.zeros(b, d, l, dtype=torch.float64)
    final = torch.zeros(b, d, width - 1, dtype=torch.float64)
    for i in range(b):
        marks = [0] * l if seq_idx is None else seq_idx[i].tolist()
        for c in range(d):
            seen = [0.0] * (width - 1) if initial_states is None else initial_states[i, c].tolist()
            for t in range(l):
                if t and marks[t] != marks[t - 1]:
                    seen = [0.0] * (width - 1)
                seen.append(float(x[i, c, t]))
                taps = zip(weight[c].tolist(), seen[len(seen) - width :], strict=True)
                y = sum(w * v for w, v in taps) + (0.0 if bias is None else float(bias[c]))
                out[i, c, t] = y / (1 + math.exp(-y)) if activation else y
                if marks[t] < 0:
                    out[i, c, t] = 0.0
            final[i, c] = torch.tensor(seen[len(seen) - (width - 1) :] if width > 1 else [])
    return out, final


def inputs(b: int, d: int, l: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    g = torch.Generator().manual_seed(b + 10 * d + 100 * l + 1000 * width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    return normal(b, d, l), normal(d, width), normal(d), normal(b, d, width - 1)


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 5, 7, 4), (1, 3, 1, 4), (3, 17, 2, 2), (1, 4, 9, 1)])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_equals_the_loop(function: Any, layout: str, size: Any, activation: str | None) -> None:
    x, weight, bias, before = inputs(*size)
    x = LAYOUTS[layout](x)
    for initial_states in (None, before):
        options = {"initial_states": initial_states, "activation": activation}
        expected, expected_final = by_hand(x, weight, bias, **options)
        out, final = function(x, weight, bias, return_final_states=True, **options)
        assert_contract(out, expected)
        assert_contract(final, expected_final)
        assert torch.equal(function(x, weight, bias, **options), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_storage(dtype: torch.dtype) -> None:
    x, weight, bias, before = inputs(2, 6, 9, 4, dtype)
    out, final = causal_conv1d_fn(
        x, weight, bias, initial_states=before, return_final_states=True, activation="silu"
    )
    expected, expected_final = by_hand(x, weight, bias, None, before, "silu")
    assert out.dtype == final.dtype == dtype
    assert_contract(out, expected)
    assert torch.equal(final.double(), expected_final)


@given(marks=st.lists(st.integers(-1, 2), min_size=16, max_size=16))
def test_seq_idx_keeps_sequences_apart(marks: list[int]) -> None:
    x, weight, bias, before = inputs(2, 3, 8, 4)
    seq_idx = torch.tensor(marks, dtype=torch.int32).view(2, 8)
    for function in (causal_conv1d_fn, causal_conv1d_ref):
        for initial_states in (None, before):
            options = {"seq_idx": seq_idx, "initial_states": initial_states, "activation": "silu"}
            out, final = function(x, weight, bias, return_final_states=True, **options)
            expected, expected_final = by_hand(x, weight, bias, **options)
            assert_contract(out, expected)
            assert_contract(final, expected_final)


def test_final_states_go_where_they_are_wanted() -> None:
    x, weight, bias, _ = inputs(2, 5, 7, 4)
    place = torch.zeros(2, 3, 5).mT
    _, final = causal_conv1d_fn(x, weight, bias, return_final_states=True, final_states_out=place)
    assert final is place
    assert torch.equal(place, x[..., -3:])


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_are_the_numerical_derivatives(activation: str | None) -> None:
    tensors = [t.requires_grad_() for t in inputs(2, 3, 5, 3, torch.float64)]
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, -1, -1]])

    def whole(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Any:
        return causal_conv1d_fn(x, weight, bias, None, before, True, None, activation)

    def packed(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Any:
        return causal_conv1d_fn(x, weight, bias, seq_idx, before, True, None, activation)

    # float64 runs on the reference; below, the core's gradients are held to its.
    assert torch.autograd.gradcheck(whole, tensors)
    assert torch.autograd.gradcheck(packed, tensors)
    single = [t.detach().float().requires_grad_() for t in tensors]
    for function in (whole, packed):
        expected, actual = (
            torch.autograd.grad([out.sin().sum() for out in function(*leaves)], leaves)
            for leaves in (tensors, single)
        )
        assert_each(assert_gradient, actual, expected)


def test_the_autograd_functions_name_is_the_function() -> None:
    x, weight, bias, before = inputs(2, 5, 7, 4)
    arguments = (x, weight, bias, None, before, True, None, "silu")
    assert_each(torch.equal, CausalConv1dFn.apply(*arguments), causal_conv1d_fn(*arguments))


UPDATES = [causal_conv1d_update, causal_conv1d_update_ref]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("state_len", [3, 4, 6])
@pytest.mark.parametrize("steps", [None, 1, 2, 9])
@pytest.mark.parametrize("ring", [False, True])
def test_updates_continue_the_sequence(
    update: Any, state_len: int, steps: int | None, ring: bool
) -> None:
    b, d, width = 3, 5, 4
    history = torch.randn(b, d, 40)
    _, weight, bias, _ = inputs(b, d, 1, width)
    expected, _ = by_hand(history, weight, bias, activation="silu")
    seen = torch.tensor([11, 7, 12], dtype=torch.int32)
    state = torch.zeros(b, d, state_len)
    for row in range(b):
        for position in range(int(seen[row]) - state_len, int(seen[row])):
            place = position % state_len if ring else position - int(seen[row])
            state[row, :, place] = history[row, :, position]
    for _ in range(3):
        count = steps or 1
        x = torch.stack([history[r, :, seen[r] : seen[r] + count] for r in range(b)])
        x = x[..., 0] if steps is None else x
        out = update(x, state, weight, bias, "silu", cache_seqlens=seen if ring else None)
        assert out.shape == x.shape
        for row in range(b):
            here = expected[row, :, seen[row] : seen[row] + count]
            assert_contract(out[row].view(d, count), here)
        seen = seen + count
        for row in range(b):
            kept = [history[row, :, seen[row] - back] for back in range(1, state_len + 1)]
            for back, column in enumerate(kept, start=1):
                place = (int(seen[row]) - back) % state_len if ring else state_len - back
                assert torch.equal(state[row, :, place], column)


@pytest.mark.parametrize("ring", [False, True])
def test_updates_of_chosen_states_leave_the_others(ring: bool) -> None:
    x, weight, bias, _ = inputs(4, 5, 2, 3)
    states = torch.randn(7, 5, 4)
    rows = torch.tensor([5, -1, 0, 2], dtype=torch.int32)
    seen = torch.tensor([3, 9, 0, 6], dtype=torch.int32) if ring else None
    expected, used = states.clone(), [0, 2, 3]
    own = expected[[5, 0, 2]]
    alone = causal_conv1d_update_ref(
        x[used], own, weight, bias, None, None if seen is None else seen[used]
    )
    expected[[5, 0, 2]] = own
    out = causal_conv1d_update(x, states, weight, bias, None, seen, rows)
    assert torch.equal(states, expected)
    assert_contract(out[used], alone)
    assert not out[1].any()


def test_an_update_in_half_precision_keeps_types() -> None:
    x, weight, bias, state = inputs(2, 5, 1, 4, torch.bfloat16)
    expected, _ = by_hand(x, weight, bias, None, state)
    out = causal_conv1d_update(x, state, weight, bias)
    assert out.dtype == torch.bfloat16
    assert_contract(out, expected)
    assert torch.equal(state[..., -1], x[..., 0])


@given(lengths=st.lists(st.integers(0, 6), max_size=5), state_len=st.integers(1, 5))
def test_packed_sequences_leave_their_last_inputs(lengths: list[int], state_len: int) -> None:
    x = torch.randn(sum(lengths), 3)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    expected = torch.zeros(len(lengths), 3, state_len)
    for row, piece in enumerate(x.split(lengths) if lengths else []):
        for back in range(1, min(len(piece), state_len) + 1):
            expected[row, :, -back] = piece[-back]
    for function in (causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref):
        assert torch.equal(function(x, offsets, state_len), expected)


def test_an_empty_batch_is_answered() -> None:
    x, weight, bias, state = inputs(0, 5, 7, 4)
    assert causal_conv1d_fn(x, weight, bias).shape == (0, 5, 7)
    assert causal_conv1d_update(x, state, weight, bias).shape == (0, 5, 7)


X, WEIGHT = torch.ones(2, 3, 5), torch.ones(3, 4)
STATE = torch.ones(2, 3, 4)
BAD_CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "expected x of shape": (causal_conv1d_fn, (X[0], WEIGHT), {}),
    "weight of shape": (causal_conv1d_fn, (X, WEIGHT[:2]), {}),
    "bias has shape": (causal_conv1d_fn, (X, WEIGHT, torch.ones(2)), {}),
    "initial_states has shape": (causal_conv1d_fn, (X, WEIGHT), {"initial_states": STATE}),
    "seq_idx must hold": (causal_conv1d_fn, (X, WEIGHT), {"seq_idx": torch.ones(2, 5)}),
    "activation is 'relu'": (causal_conv1d_fn, (X, WEIGHT), {"activation": "relu"}),
    "conv_state has shape": (causal_conv1d_update, (X, STATE[:1], WEIGHT), {}),
    "conv_state keeps 2 inputs": (causal_conv1d_update, (X, STATE[..., :2], WEIGHT), {}),
    "cache_seqlens has shape": (
        causal_conv1d_update,
        (X, STATE, WEIGHT),
        {"cache_seqlens": torch.ones(3, dtype=torch.int32)},
    ),
    "name state 2, but there are 2": (
        causal_conv1d_update,
        (X, STATE, WEIGHT),
        {"conv_state_indices": torch.tensor([0, 2])},
    ),
    "must be 2 integers": (
        causal_conv1d_update,
        (X, STATE, WEIGHT),
        {"conv_state_indices": torch.tensor([0])},
    ),
    "batch \\+ 1 integers": (causal_conv1d_varlen_states, (X[0], torch.ones(2), 3), {}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message: str) -> None:
    function, arguments, options = BAD_CALLS[message]
    with pytest.raises(InputError, match=message):
        function(*arguments, **options)


def test_the_package_has_the_originals_names() -> None:
    assert causal_conv1d.__version__ == "1.7.0"
    assert causal_conv1d.causal_conv1d_fn is causal_conv1d_interface.causal_conv1d_fn

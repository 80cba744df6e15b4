"""The selective scan against a loop over single numbers, and against itself cut up."""

import cmath
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anymamba import ops
from anymamba.errors import InputError
from anymamba.ops.scan.arguments import ScanArguments
from anymamba.ops.scan.reference import linear_recurrence, selective_scan_sequential
from tests.support.operators import scan_inputs
from tests.support.tolerance import assert_contract, assert_each

SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 6, 4),
    (1, 70, 3, 16),
    (3, 33, 5, 7),
    (2, 129, 8, 16),
    (1, 64, 2, 64),
]


def brute_force(
    x_ble: Tensor,
    delta_ble: Tensor,
    A_en: Tensor,
    B_bln: Tensor,
    C_bln: Tensor,
    D_e: Tensor | None = None,
    z_ble: Tensor | None = None,
    delta_bias_e: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The paper's recurrence, one number at a time in Python's double precision."""
    b, l, e = x_ble.shape
    n = A_en.shape[1]
    y = torch.zeros(b, l, e, dtype=torch.float64)
    last = torch.zeros(b, e, n, dtype=torch.promote_types(A_en.dtype, torch.float64))
    pair = 2 if A_en.is_complex() else 1  # a complex state stands for itself and its conjugate
    for i in range(b):
        for c in range(e):
            h = [0.0] * n if initial_state is None else initial_state[i, c].tolist()
            for t in range(l):
                x, delta = float(x_ble[i, t, c]), float(delta_ble[i, t, c])
                delta += 0.0 if delta_bias_e is None else float(delta_bias_e[c])
                if delta_softplus:
                    delta = math.log1p(math.exp(delta))
                B, C = (M[i, t, seen_by(c, M, e)].tolist() for M in (B_bln, C_bln))
                A = A_en[c].tolist()
                h = [cmath.exp(delta * A[j]) * h[j] + delta * B[j] * x for j in range(n)]
                out = pair * sum(C[j] * h[j] for j in range(n)).real
                out += 0.0 if D_e is None else float(D_e[c]) * x
                if z_ble is not None:
                    z = float(z_ble[i, t, c])
                    out *= z / (1 + math.exp(-z))
                y[i, t, c] = out
            last[i, c] = torch.tensor(h if A_en.is_complex() else [v.real for v in h])
    return y, last


def seen_by(channel: int, B_bln: Tensor, e: int) -> int | slice:
    """Which group of B or C a channel looks at; all of it where there are no groups."""
    return slice(None) if B_bln.ndim == 3 else channel // (e // B_bln.shape[2])


def run(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    y, last = ops.selective_scan(**inputs, **options, return_last_state=True)
    return y, last


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extras", [True, False])
def test_equals_the_brute_force_loop(shape: tuple[int, ...], extras: bool) -> None:
    inputs = scan_inputs(*shape, extras=extras)
    b, _, e, n = shape
    state = torch.randn(b, e, n)
    y, last = run(inputs, initial_state=state)
    expected_y, expected_last = brute_force(**inputs, initial_state=state)
    assert_contract(y, expected_y)
    assert_contract(last, expected_last)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_of_channels_have_their_own_B_and_C(groups: int) -> None:
    inputs = scan_inputs(2, 9, 6, 4, groups=groups)
    assert_contract(run(inputs)[0], brute_force(**inputs)[0])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("of_B", "of_C"), [(None, 2), (3, None), (2, 3), (6, 1)])
def test_B_and_C_may_have_different_groups(of_B: int | None, of_C: int | None) -> None:
    inputs = scan_inputs(2, 9, 6, 4, groups=of_B)
    inputs["C_bln"] = scan_inputs(2, 9, 6, 4, groups=of_C, seed=1)["C_bln"]
    assert_contract(run(inputs)[0], brute_force(**inputs)[0])
    leaf = inputs["B_bln"].requires_grad_()
    (of_parts,) = torch.autograd.grad(run(inputs)[0].sum(), leaf)
    inputs["C_bln"] = each_channels_own(inputs["C_bln"], 6)
    whole = run(inputs | {"B_bln": each_channels_own(leaf, 6)})[0]
    assert_contract(of_parts, torch.autograd.grad(whole.sum(), leaf)[0], factor=10)


def each_channels_own(B_bln: Tensor, e: int) -> Tensor:
    return torch.stack([B_bln[:, :, seen_by(c, B_bln, e)] for c in range(e)], 2)


def complex_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs whose A, B and C are complex."""
    inputs = scan_inputs(*shape, groups=3, dtype=dtype)
    for name in ("A_en", "B_bln", "C_bln"):
        inputs[name] = torch.complex(inputs[name], torch.randn_like(inputs[name]))
    return inputs


def test_complex_A_runs_by_itself_where_it_can() -> None:
    with ops.backend("auto"):
        assert run(complex_inputs(1, 5, 3, 2))[1].is_complex()


@pytest.mark.parametrize("length", [1, 5, 70])
def test_complex_A_equals_the_brute_force_loop(length: int) -> None:
    inputs = complex_inputs(2, length, 6, 4)
    y, last = run(inputs, backend="reference")
    expected_y, expected_last = brute_force(**inputs)
    assert y.dtype == torch.float32
    assert last.dtype == torch.complex64
    assert_contract(y, expected_y)
    assert_contract(torch.view_as_real(last), torch.view_as_real(expected_last))


def test_complex_gradients_are_the_numerical_derivatives() -> None:
    inputs = complex_inputs(1, 5, 3, 2, dtype=torch.float64)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return run(inputs | dict(zip(names, values, strict=True)), backend="reference")

    tensors = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_complex_B_needs_complex_A() -> None:
    inputs = complex_inputs(1, 5, 3, 2)
    with pytest.raises(InputError, match="B is complex and A is real"):
        ops.selective_scan(**inputs | {"A_en": inputs["A_en"].real})


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_storage(dtype: torch.dtype) -> None:
    inputs = scan_inputs(2, 40, 6, 16, dtype=dtype)
    y, last = run(inputs)
    expected_y, expected_last = brute_force(**inputs)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert_contract(y, expected_y)
    # The state never was in half precision, so it is held to float32's tolerance.
    assert_contract(last, expected_last)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("b", "l", "e"), [(0, 5, 4), (2, 0, 4), (0, 0, 4)])
def test_empty_inputs(b: int, l: int, e: int) -> None:
    state = torch.randn(b, e, 3)
    y, last = run(scan_inputs(b, l, e, 3), initial_state=state)
    assert y.shape == (b, l, e)
    assert torch.equal(last, state)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_gradients_are_the_numerical_derivatives(reverse: bool, groups: int | None) -> None:
    inputs = scan_inputs(2, 7, 4, 3, groups=groups, dtype=torch.float64)
    state = torch.randn(2, 4, 3, dtype=torch.float64)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    tensors = [*(inputs[name] for name in names), state]
    for tensor in tensors:
        tensor.requires_grad_()

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        changed = inputs | dict(zip(names, values[:-1], strict=True))
        # Only the reference computes in float64.
        options = {"reverse": reverse, "backend": "reference"}
        return run(changed, initial_state=values[-1], **options)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_are_those_of_the_sequential_scan(shape: tuple[int, ...]) -> None:
    inputs = scan_inputs(*shape)
    tensors = [v.requires_grad_() for v in inputs.values() if isinstance(v, Tensor)]
    weight = torch.randn_like(inputs["x_ble"])

    def gradients(result: tuple[Tensor, Tensor]) -> list[Tensor]:
        y, last = result
        return list(torch.autograd.grad((y * weight).sum() + last.sum(), tensors))

    expected = gradients(selective_scan_sequential(ScanArguments(**inputs)))
    assert_each(assert_contract, gradients(run(inputs)), expected, factor=10)


@pytest.mark.usefixtures("each_backend")
@given(cuts=st.lists(st.integers(0, 90), max_size=4), reverse=st.booleans())
def test_any_cut_gives_the_whole(cuts: list[int], reverse: bool) -> None:
    inputs = scan_inputs(2, 90, 3, 4)
    whole, whole_last = run(inputs, reverse=reverse)
    borders = [0, *sorted(cuts), 90]
    pieces = list(itertools.pairwise(borders))
    state, outputs = torch.zeros(2, 3, 4), {}
    for start, stop in reversed(pieces) if reverse else pieces:
        piece = {
            k: v[:, start:stop] if isinstance(v, Tensor) and v.ndim > 2 else v
            for k, v in inputs.items()
        }
        outputs[start, stop], state = run(piece, initial_state=state, reverse=reverse)
    assert_contract(torch.cat([outputs[piece] for piece in pieces], 1), whole)
    assert_contract(state, whole_last)


@pytest.mark.usefixtures("each_backend")
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6), reverse=st.booleans())
def test_packed_sequences_are_what_they_are_alone(lengths: list[int], reverse: bool) -> None:
    inputs = scan_inputs(1, sum(lengths), 3, 4)
    states = torch.randn(len(lengths), 3, 4)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    y, last = run(inputs, initial_state=states, cu_seqlens=offsets, reverse=reverse)
    for index in range(len(lengths)):
        span = slice(int(offsets[index]), int(offsets[index + 1]))
        alone = {
            k: v[:, span] if isinstance(v, Tensor) and v.ndim > 2 else v for k, v in inputs.items()
        }
        y_alone, last_alone = run(alone, initial_state=states[index, None], reverse=reverse)
        assert_contract(y[:, span], y_alone)
        assert_contract(last[index], last_alone[0])


@pytest.mark.usefixtures("each_backend")
@given(marks=st.lists(st.integers(0, 2), min_size=12, max_size=12), reverse=st.booleans())
def test_seq_idx_restarts_the_state_and_keeps_the_rows_own(marks: list[int], reverse: bool) -> None:
    inputs = scan_inputs(2, 6, 3, 4)
    seq_idx = torch.tensor(marks).view(2, 6)
    state = torch.randn(2, 3, 4)
    y, last = run(inputs, initial_state=state, seq_idx=seq_idx, reverse=reverse)
    for row in range(2):
        h = state[row, None]
        walk = list(range(6))[:: -1 if reverse else 1]
        for step, t in enumerate(walk):
            if step and seq_idx[row, t] != seq_idx[row, walk[step - 1]]:
                h = torch.zeros_like(h)
            one = {
                k: v[row : row + 1, t : t + 1] if isinstance(v, Tensor) and v.ndim > 2 else v
                for k, v in inputs.items()
            }
            y_one, h = run(one, initial_state=h)
            assert_contract(y[row, t], y_one[0, 0])
        assert_contract(last[row], h[0])


@pytest.mark.usefixtures("each_backend")
def test_gradients_cross_a_cut_through_the_state() -> None:
    inputs = scan_inputs(1, 20, 3, 4)
    x = inputs["x_ble"].requires_grad_()
    (whole,) = torch.autograd.grad(run(inputs)[0].sum(), x)

    def piece(span: slice) -> dict[str, Any]:
        return {
            k: v[:, span] if isinstance(v, Tensor) and v.ndim > 2 else v for k, v in inputs.items()
        }

    first, state = run(piece(slice(0, 11)))
    second, _ = run(piece(slice(11, 20)), initial_state=state)
    (in_pieces,) = torch.autograd.grad(first.sum() + second.sum(), x)
    assert_contract(in_pieces, whole, factor=10)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("extras", [True, False])
def test_steps_equal_the_scan(groups: int | None, extras: bool) -> None:
    inputs = scan_inputs(3, 8, 6, 4, groups=groups, extras=extras)
    whole, last = run(inputs)
    state = torch.zeros(3, 6, 4)
    for t in range(8):
        y_be = ops.selective_state_update(
            state,
            inputs["x_ble"][:, t],
            inputs["delta_ble"][:, t],
            inputs["A_en"],
            inputs["B_bln"][:, t],
            inputs["C_bln"][:, t],
            inputs.get("D_e"),
            inputs["z_ble"][:, t] if extras else None,
            inputs.get("delta_bias_e"),
            extras,
        )
        assert_contract(y_be, whole[:, t])
    assert_contract(state, last)


def test_mambapy_serves_the_same_call() -> None:
    inputs = scan_inputs(2, 37, 6, 4)
    state = torch.randn(2, 6, 4)
    expected, expected_last = run(inputs, initial_state=state)
    y, last = run(inputs, initial_state=state, backend="mambapy")
    assert_contract(y, expected)
    assert_contract(last, expected_last)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("width", [(1, 1), (200, 200)])
def test_linear_recurrence_in_chunks_and_in_one(length: int, width: tuple[int, int]) -> None:
    a, b = torch.rand(1, length, *width), torch.randn(1, length, *width)
    h = torch.randn(1, *width)
    states = linear_recurrence(a, b, h)
    for t in range(length):
        h = a[:, t] * h + b[:, t]
        assert_contract(states[:, t], h)


BAD_CALLS = {
    "delta has shape": {"delta_ble": torch.ones(2, 5, 5)},
    "A has shape": {"A_en": torch.ones(5, 4)},
    "B has shape": {"B_bln": torch.ones(2, 5, 3)},
    "C has 4 groups": {"C_bln": torch.ones(2, 5, 4, 4)},
    "D has shape": {"D_e": torch.ones(4)},
    "z has shape": {"z_ble": torch.ones(2, 4, 6)},
    "initial_state has shape": {"initial_state": torch.ones(1, 6, 4)},
    "seq_idx must hold one integer": {"seq_idx": torch.ones(2, 4, dtype=torch.long)},
    "in one row": {"cu_seqlens": torch.tensor([0, 5])},
    "expected an input of shape": {"x_ble": torch.ones(5, 6)},
    "give only one": {
        "cu_seqlens": torch.tensor([0, 5]),
        "seq_idx": torch.ones(2, 5, dtype=torch.long),
    },
}


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_shapes_are_named(message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.selective_scan(**(scan_inputs(2, 5, 6, 4) | BAD_CALLS[message]))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("offsets", [[0, 3], [1, 5], [0, 4, 3, 5], []])
def test_offsets_that_do_not_cover_the_row_are_refused(offsets: list[int]) -> None:
    with pytest.raises(InputError, match="cu_seqlens must"):
        ops.selective_scan(
            **scan_inputs(1, 5, 6, 4), cu_seqlens=torch.tensor(offsets, dtype=torch.long)
        )

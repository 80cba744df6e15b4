"""Mamba-2's operator against a scalar loop, its recurrence, and the selective scan."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import ops
from anymamba.errors import InputError
from anymamba.ops import selective_scan, ssd, ssd_state_update
from anymamba.ops.segments import segments_of
from anymamba.ops.ssd.reference import ssd_sequential
from tests.support.operators import HALVES, LAYOUTS, gradients, leaves
from tests.support.operators import ssd_inputs as inputs
from tests.support.tolerance import assert_contract, assert_each, assert_gradients

SIZES = [(1, 1, 1, 1, 1, 1), (2, 37, 4, 8, 2, 5), (1, 130, 6, 5, 3, 3), (3, 64, 2, 3, 1, 7)]
EDGES = [(0, 5, 2, 3, 1, 4), (2, 0, 2, 3, 1, 4)]


@pytest.fixture(autouse=True, scope="module", params=["reference", "auto"])
def _each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """PyTorch's products, and the native core where it takes the call."""
    with ops.backend(request.param):
        yield


def by_recurrence(given: dict[str, Any], **packed: Tensor) -> tuple[Tensor, Tensor]:
    """The reference with what stands around it, in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    dt = F.softplus(wide["dt_blh"] + wide["dt_bias_h"])
    segments = segments_of(
        dt.shape[:2], packed.get("seq_idx"), packed.get("cu_seqlens"), reverse=False
    )
    x, A, B, C = (wide[name] for name in ("x_blhp", "A_h", "B_blgn", "C_blgn"))
    y, last = ssd_sequential(x, dt, A, B, C, wide["D_h"], wide["initial_state"], segments)
    return y * F.silu(wide["z_blhp"]), last


def test_the_reference_is_the_formula() -> None:
    given = inputs(1, 4, 4, 2, 2, 3, torch.float64)
    given = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    x, dt, A, B, C, D, S = (
        given[name].tolist()
        for name in ("x_blhp", "dt_blh", "A_h", "B_blgn", "C_blgn", "D_h", "initial_state")
    )
    y, last = ssd_sequential(
        *(given[name] for name in ("x_blhp", "dt_blh", "A_h", "B_blgn", "C_blgn", "D_h")),
        given["initial_state"],
        None,
    )
    for h in range(4):
        for p in range(2):
            state = S[0][h][p]
            for t in range(4):
                step = dt[0][t][h]
                for n in range(3):
                    drive = step * B[0][t][h // 2][n] * x[0][t][h][p]
                    state[n] = math.exp(step * A[h]) * state[n] + drive
                expected = sum(c * s for c, s in zip(C[0][t][h // 2], state, strict=True))
                assert float(y[0, t, h, p]) == pytest.approx(expected + D[h][p] * x[0][t][h][p])
            assert last[0, h, p].tolist() == pytest.approx(state)


@pytest.mark.parametrize("size", SIZES + EDGES)
@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_it_is_the_recurrence(size: tuple[int, ...], chunk_size: int | None) -> None:
    given = inputs(*size)
    y, last = ssd(**given, return_last_state=True, chunk_size=chunk_size)
    expected, expected_last = by_recurrence(given)
    assert_contract(y, expected)
    assert_contract(last, expected_last)
    assert y.dtype == last.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    given = inputs(2, 70, 4, 8, 2, 5, dtype)
    y, last = ssd(**given, return_last_state=True)
    expected, expected_last = by_recurrence(given)
    assert y.dtype == dtype
    assert_contract(y, expected)
    # The state never passes through half precision.
    assert last.dtype == torch.float32
    assert_contract(last, expected_last)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    given = inputs(2, 37, 4, 8, 2, 5)
    stored = {
        name: layout(value) if isinstance(value, Tensor) and value.ndim > 1 else value
        for name, value in given.items()
    }
    assert_contract(ssd(**stored), by_recurrence(given)[0])


def test_one_group_is_a_selective_scan_with_repeated_decays() -> None:
    b, l, h, p, n = 2, 90, 3, 4, 5
    given = inputs(b, l, h, p, 1, n) | {"initial_state": None, "D_h": torch.randn(h)}
    expected = selective_scan(
        given["x_blhp"].flatten(2),
        given["dt_blh"].repeat_interleave(p, 2),
        given["A_h"].repeat_interleave(p)[:, None].expand(-1, n),
        given["B_blgn"][:, :, 0],
        given["C_blgn"][:, :, 0],
        given["D_h"].repeat_interleave(p),
        given["z_blhp"].flatten(2),
        given["dt_bias_h"].repeat_interleave(p),
        True,
    )
    assert isinstance(expected, Tensor)
    y = ssd(**given)
    assert isinstance(y, Tensor)
    assert_contract(y.flatten(2), expected)


def test_limits_hold_steps_between_them() -> None:
    given = inputs(1, 9, 2, 3, 1, 4) | {"dt_bias_h": None, "dt_softplus": False}
    steps = given["dt_blh"].clamp(0.1, 0.5)
    expected = ssd(**given | {"dt_blh": steps})
    assert torch.equal(ssd(**given, dt_limit=(0.1, 0.5)), expected)
    # As without any limit: a negative step counts as none.
    assert torch.equal(ssd(**given), ssd(**given | {"dt_blh": given["dt_blh"].clamp(min=0)}))


@pytest.mark.parametrize("rate", [-1e4, -30.0, -1e-6, 0.0, 1.0])
def test_decays_from_all_to_nothing(rate: float) -> None:
    """Sums over a chunk reach -640,000; differences of neighbours must stay exact beside them."""
    given = inputs(1, 130, 2, 3, 1, 4) | {"A_h": torch.tensor([rate, -0.5])}
    given["dt_bias_h"] -= 3.0 if rate > 0 else 0.0
    given["dt_blh"][:, ::5] = 20.0 if rate < 0 else 0.0
    y, last = ssd(**given, return_last_state=True)
    expected, expected_last = by_recurrence(given)
    assert_contract(y, expected)
    assert_contract(last, expected_last)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), chunk=st.integers(1, 20))
def test_packed_sequences_are_sequences_alone(lengths: list[int], chunk: int) -> None:
    l = sum(lengths)
    given = inputs(1, l, 4, 3, 2, 3)
    states = torch.randn(len(lengths), 4, 3, 3)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    per_step = ("x_blhp", "dt_blh", "B_blgn", "C_blgn", "z_blhp")
    packed = given | {"initial_state": states, "cu_seqlens": offsets, "chunk_size": chunk}
    y, last = ssd(**packed, return_last_state=True)
    assert last.shape == states.shape
    for index, (start, stop) in enumerate(pairwise(offsets)):
        alone = given | {name: given[name][:, start:stop] for name in per_step}
        alone["initial_state"] = states[index : index + 1]
        expected, expected_last = by_recurrence(alone)
        assert_contract(y[:, start:stop], expected)
        assert_contract(last[index], expected_last[0])


def test_seq_idx_restarts_the_state_in_its_row() -> None:
    given = inputs(2, 90, 4, 3, 2, 3)
    seq_idx = torch.stack([torch.arange(90) // 13, (torch.arange(90) >= 88).long()])
    y, last = ssd(**given, seq_idx=seq_idx, return_last_state=True)
    expected, expected_last = by_recurrence(given, seq_idx=seq_idx)
    assert_contract(y, expected)
    assert_contract(last, expected_last)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1, 2, 1, 1, 2), (2, 5, 4, 1, 2, 2)])
@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_gradcheck(size: tuple[int, ...], packing: str) -> None:
    b, l = size[:2]
    given = inputs(*size, torch.float64)
    packed: dict[str, Tensor] = {}
    if packing == "seq_idx":
        packed = {"seq_idx": torch.arange(l).expand(b, l) // 3}
    if packing == "cu_seqlens":
        rows = ("x_blhp", "dt_blh", "B_blgn", "C_blgn", "z_blhp")
        given |= {name: given[name].flatten(0, 1)[None] for name in rows}
        packed = {"cu_seqlens": torch.arange(b + 1) * l}
    wanted = {k: v.double().requires_grad_() for k, v in given.items() if isinstance(v, Tensor)}

    def run(*tensors: Tensor) -> Any:
        arguments = dict(zip(wanted, tensors, strict=True))
        return ssd(**arguments, dt_softplus=True, **packed, return_last_state=True, chunk_size=3)

    assert torch.autograd.gradcheck(run, tuple(wanted.values()))


@pytest.mark.parametrize("size", SIZES + EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_recurrence_s(size: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(*size, dtype)
    ours, theirs = leaves(given), leaves(given, torch.float64)
    y, last = ssd(**ours, return_last_state=True)
    expected = by_recurrence(theirs)
    cotangents = [torch.randn_like(y), torch.randn_like(last)]
    found = gradients([y, last], cotangents, ours)
    assert {name: value.dtype for name, value in found.items()} == {
        name: given[name].dtype for name in found
    }
    # Rates and biases are float32, but what reaches them came through y's own type.
    as_exact_as_y = {name: value.to(dtype) for name, value in found.items()}
    assert_gradients(as_exact_as_y, gradients(expected, cotangents, theirs))


def test_gradients_where_decays_leave_almost_nothing() -> None:
    """What a step gives to itself is 10,000 and more here, and none of it belongs to the decays."""
    given = inputs(1, 130, 2, 3, 1, 4) | {"A_h": torch.tensor([-30.0, -50.0])}
    for name in ("x_blhp", "B_blgn", "C_blgn"):
        given[name] *= 10
    given["dt_bias_h"] += 3
    ours, theirs = leaves(given), leaves(given, torch.float64)
    y, last = ssd(**ours, return_last_state=True)
    expected = by_recurrence(theirs)
    cotangents = [torch.randn_like(y), torch.randn_like(last)]
    found = gradients([y, last], cotangents, ours)
    assert_gradients(found, gradients(expected, cotangents, theirs))


def test_only_the_gradients_that_are_asked_for() -> None:
    given = inputs(1, 5, 2, 3, 1, 4)
    x = given["x_blhp"].requires_grad_()
    y = ssd(**given)
    assert isinstance(y, Tensor)
    (dx,) = torch.autograd.grad(y.sum(), [x])
    assert dx.shape == x.shape


def test_memory_grows_with_the_input_and_not_with_the_states_of_all_steps() -> None:
    """What is kept for the backward pass, in bytes, beside the input's own."""
    given = leaves(inputs(1, 256, 2, 4, 1, 64) | {"z_blhp": None, "dt_bias_h": None})
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        ssd(**given)
    own = sum(value.nbytes for value in given.values() if isinstance(value, Tensor))
    assert kept <= 1.5 * own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_blhp": torch.zeros(1, 5, 6)}, "expected an input of shape"),
        ({"dt_blh": torch.zeros(1, 5, 1)}, "dt has shape"),
        ({"A_h": torch.zeros(3)}, "A has shape"),
        ({"C_blgn": torch.zeros(1, 5, 1, 2)}, "C has shape"),
        ({"D_h": torch.zeros(3)}, "D has shape"),
        ({"z_blhp": torch.zeros(1, 5, 2, 2)}, "z has shape"),
        ({"dt_bias_h": torch.zeros(3)}, "dt_bias has shape"),
        ({"initial_state": torch.zeros(1, 2, 3, 5)}, "initial_state has shape"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"dt_limit": (1.0, 0.0)}, "the smaller number first"),
        ({"seq_idx": torch.zeros(1, 4, dtype=torch.int32)}, "seq_idx must hold"),
        (
            {"B_blgn": torch.zeros(1, 5, 4, 4), "C_blgn": torch.zeros(1, 5, 4, 4)},
            "4 groups, which do not divide h=2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ssd(**inputs(1, 5, 2, 3, 1, 4) | change)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_operator_over_the_same_sequence(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = inputs(*size, dtype)
    limit = (0.01, 0.9)
    whole, last = ssd(**given, dt_limit=limit, return_last_state=True)
    state = given.pop("initial_state").clone()
    at_once = {name: given.pop(name) for name in ("A_h", "D_h", "dt_bias_h", "dt_softplus")}
    names = {name: name.replace("_bl", "_b") for name in given}
    for t in range(min(size[1], 40)):
        step = {names[name]: value[:, t] for name, value in given.items()}
        y = ssd_state_update(state, **step, **at_once, dt_limit=limit)
        assert y.dtype == dtype
        assert_contract(y, whole[:, t])
    if size[1] <= 40:
        assert_contract(state, last)


def test_a_step_keeps_a_state_of_another_type_and_layout() -> None:
    given = inputs(2, 1, 4, 3, 2, 5)
    step = {name: given[name][:, 0] for name in ("x_blhp", "dt_blh", "B_blgn", "C_blgn")}
    states = [torch.randn(4, 4, 3, 5)[::2], torch.randn(2, 4, 5, 3).mT, torch.zeros(2, 4, 3, 5)]
    for state in (*states, states[0].bfloat16()):
        expected = state.clone().float()
        arguments = (step["x_blhp"], step["dt_blh"].abs(), given["A_h"], *list(step.values())[2:])
        y = ssd_state_update(state, *arguments)
        assert_contract(y, ssd_state_update(expected, *arguments))
        assert_contract(state, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_bhp": torch.zeros(1, 6)}, "expected an input of shape"),
        ({"dt_bh": torch.zeros(1, 3)}, "dt has shape"),
        ({"C_bgn": torch.zeros(1, 1, 3)}, "C has shape"),
        ({"state_bhpn": torch.zeros(2, 2, 3, 4)}, "state_bhpn has shape"),
        ({"dt_limit": (1.0, 0.0)}, "the smaller number first"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    maps = {"B_bgn": torch.zeros(1, 1, 4), "C_bgn": torch.zeros(1, 1, 4)}
    given = {"state_bhpn": torch.zeros(1, 2, 3, 4), "x_bhp": torch.zeros(1, 2, 3)} | maps
    given |= {"dt_bh": torch.zeros(1, 2), "A_h": torch.zeros(2)}
    with pytest.raises(InputError, match=f"ssd_state_update: .*{message}"):
        ssd_state_update(**given | change)


def test_older_names_of_the_states_warn() -> None:
    given = inputs(1, 5, 2, 3, 1, 4)
    expected = ssd(**given, return_last_state=True)
    given["initial_states"] = given.pop("initial_state")
    with pytest.warns(DeprecationWarning, match="called initial_state and return_last_state"):
        found = ssd(**given, return_final_states=True)
    assert_each(torch.equal, found, expected)


def test_autocast_changes_nothing():
    """The operator chooses its types itself: also where backward runs inside of autocast."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, dt = leaf(2, 9, 4, 8), leaf(2, 9, 4)
    B, C = leaf(2, 9, 2, 5), leaf(2, 9, 2, 5)
    A = -torch.rand(4, generator=generator)

    def run():
        y = ssd(x, dt, A, B, C, dt_softplus=True)
        return [y, *torch.autograd.grad(y.square().sum(), (x, dt, B, C))]

    expected = run()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found = run()
        assert_each(torch.equal, found, expected)

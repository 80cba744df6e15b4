"""The state space duality in Triton, interpreted or on a GPU, against the reference in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba import ops
from anymamba.errors import BackendError
from tests.support.operators import (
    HALVES,
    IN_TIME_OF_HEADS,
    LAYOUTS,
    SSD,
    doubles,
    first_step_of_heads,
    gradients,
    leaves,
    ssd_inputs,
)
from tests.support.tolerance import assert_contract, assert_gradients, assert_same

from tests.support.triton import with_triton  # isort: skip  (skips where Triton is missing)
from anymamba.ops.ssd import triton as ssd_triton


@pytest.fixture(autouse=True, scope="module")
def _triton() -> Iterator[None]:
    with with_triton():
        yield


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 steps, so that short sequences have several."""
    monkeypatch.setattr(ssd_triton, "FORWARD_STEPS", 16)
    monkeypatch.setattr(ssd_triton, "BACKWARD_STEPS", 16)


# (b, l, h, p, g, n): around the sides of tiles (16, 32, 64) and the lengths of chunks (64, 128).
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 17, 4, 3, 2, 5), (1, 130, 2, 5, 1, 3), (1, 16, 3, 16, 3, 16)]
WIDE = [(1, 9, 1, 70, 1, 3), (1, 9, 2, 3, 1, 130)]


@pytest.mark.parametrize("shape", SHAPES + WIDE)
def test_shapes(shape: tuple[int, ...]) -> None:
    SSD.check(ssd_inputs(*shape))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype) -> None:
    """Also its states, and the gradients of what is float32, hold float32's contract."""
    SSD.check(ssd_inputs(2, 37, 2, 7, 1, 16, dtype))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    "absent", ["D_h", "z_blhp", "dt_bias_h", "dt_softplus", "initial_state", "D of channels"]
)
def test_each_option_may_be_absent(absent: str) -> None:
    inputs = ssd_inputs(1, 20, 2, 3, 1, 4)
    if absent == "D of channels":
        inputs["D_h"] = inputs["D_h"][:, 0]
    else:
        del inputs[absent]
    SSD.check(inputs)


@pytest.mark.parametrize("limit", [(0.1, 0.5), (-0.02, 2.0)])
@pytest.mark.parametrize("softplus", [True, False])
def test_limits(limit: tuple[float, float], softplus: bool) -> None:
    SSD.check(ssd_inputs(1, 9, 2, 3, 1, 4) | {"dt_softplus": softplus}, dt_limit=limit)


@pytest.mark.usefixtures("short_chunks")
def test_packed_sequences_of_mixed_types() -> None:
    """Some are empty, and hand their state on as it was."""
    inputs = ssd_inputs(1, 40, 2, 3, 1, 4)
    inputs["initial_state"] = torch.randn(5, 2, 3, 4)
    types = {"x_blhp": torch.bfloat16, "B_blgn": torch.float16, "D_h": torch.bfloat16}
    inputs |= {name: inputs[name].to(dtype) for name, dtype in types.items()}
    SSD.check(inputs, cu_seqlens=torch.tensor([0, 3, 3, 20, 40, 40]))


@pytest.mark.usefixtures("short_chunks")
def test_seq_idx() -> None:
    """States belong to rows: the first sequence starts from its row's, the last leaves its."""
    inputs = ssd_inputs(2, 18, 2, 3, 1, 4)
    seq_idx = torch.stack([torch.arange(18) // 7, (torch.arange(18) >= 17).long()])
    SSD.check(inputs, seq_idx=seq_idx)


@pytest.mark.parametrize("rate", [-1e4, -30.0, 0.0, 1.0])
def test_decays_from_all_to_nothing(rate: float) -> None:
    inputs = ssd_inputs(1, 66, 2, 3, 1, 4) | {"A_h": torch.tensor([rate, -0.5])}
    inputs["dt_bias_h"] -= 3.0 if rate > 0 else 0.0
    inputs["dt_blh"][:, ::5] = 20.0 if rate < 0 else 0.0
    SSD.assert_results(inputs)


def test_small_steps_behind_large_ones() -> None:
    """Sums over a chunk reach -2,600,000, and decays between them are of about -0.1 a step."""
    inputs = ssd_inputs(1, 66, 1, 3, 1, 4)
    inputs |= {"A_h": torch.tensor([-1e4]), "dt_softplus": False, "dt_bias_h": None, "D_h": None}
    inputs["dt_blh"] = 1e-5 + 1e-5 * inputs["dt_blh"].abs()
    inputs["x_blhp"] *= 1e4
    large = slice(None, None, 5)
    inputs["dt_blh"][:, large], inputs["x_blhp"][:, large] = 20.0, 0.0
    SSD.assert_results(inputs)


@pytest.mark.usefixtures("short_chunks")
def test_float32_keeps_its_digits() -> None:
    """Not those of TF32, nor the 16 bits that do for bfloat16."""
    inputs = ssd_inputs(1, 32, 1, 16, 1, 16)
    for found, expected in zip(SSD.call(inputs), SSD.exactly(inputs), strict=True):
        assert_same(found, expected, share=1e-6)


def test_gradients_where_decays_leave_almost_nothing() -> None:
    """What a step gives to itself is 10,000 and more here, and none of it belongs to the decays."""
    inputs = ssd_inputs(1, 66, 2, 3, 1, 4) | {"A_h": torch.tensor([-30.0, -50.0])}
    for name in ("x_blhp", "B_blgn", "C_blgn"):
        inputs[name] *= 10
    inputs["dt_bias_h"] += 3
    SSD.assert_gradients(inputs)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("first", [0, 3])
def test_any_strides(first: int) -> None:
    """Of the inputs, no two alike, and of the gradients."""
    ways = list(LAYOUTS.values())

    def laid_out(given: dict[str, Any]) -> dict[str, Any]:
        names = (*IN_TIME_OF_HEADS, "initial_state")
        pairs = [(name, ways[(first + i) % len(ways)]) for i, name in enumerate(names)]
        return given | {name: layout(given[name]) for name, layout in pairs}

    def in_memory(output: Tensor) -> Tensor:
        return ways[first + 1](torch.randn(output.shape))

    inputs = ssd_inputs(2, 17, 2, 3, 2, 5)
    assert_contract(SSD.call(laid_out(inputs))[0], SSD.exactly(inputs)[0])
    SSD.assert_gradients(inputs, lay_out=laid_out, cotangent=in_memory)


def test_gradients_that_are_one_number_for_all_or_of_one_output() -> None:
    """What `y.sum().backward()` sends back has no strides at all."""
    inputs = ssd_inputs(1, 9, 2, 3, 1, 4)
    ones = lambda output: torch.ones(()).expand(output.shape)  # noqa: E731
    for outputs in ([0], [1]):
        SSD.assert_gradients(inputs, outputs=outputs, cotangent=ones)
    SSD.assert_gradients(inputs, of=["B_blgn"])


def test_gradients_of_maps_are_added_up_by_several_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = ssd_inputs(1, 5, 6, 3, 2, 4)
    for programs in (1, 4, 1000):  # the three heads of a group: all in one, two and one, each alone
        monkeypatch.setattr(ssd_triton, "_PROGRAMS", programs)
        SSD.assert_gradients(inputs, of=["B_blgn", "C_blgn"])


def test_gradients_of_gradients() -> None:
    def twice(inputs: dict[str, Any]) -> dict[str, Tensor]:
        y, last = SSD.call(inputs)
        names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        tensors = [inputs[name] for name in names]
        first = torch.autograd.grad([y.sum() + last.square().sum()], tensors, create_graph=True)
        return gradients([(g * g).sum() for g in first], [torch.ones(())] * len(first), inputs)

    inputs = ssd_inputs(1, 5, 2, 2, 1, 2)
    ours = twice(leaves(inputs))
    with ops.backend("reference"):
        theirs = twice(leaves(inputs, torch.float64))
    assert_gradients(ours, theirs)


def test_nothing_is_kept_for_the_backward_pass_but_the_inputs() -> None:
    given, kept = leaves(ssd_inputs(1, 20, 2, 3, 1, 4)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SSD.call(given)
    own = sum(value.nbytes for value in given.values() if isinstance(value, Tensor))
    assert sum(tensor.nbytes for tensor in kept) <= own


@pytest.mark.parametrize("name", ["ssd", "ssd_state_update"])
@pytest.mark.parametrize("all_given", [True, False])
def test_it_keeps_the_rules_of_custom_operators(name: str, all_given: bool) -> None:
    """Schema, fake implementation, autograd registration, and tracing of both passes."""
    inputs = leaves(ssd_inputs(1, 5, 2, 3, 1, 4))
    optional = [inputs[key] if all_given else None for key in ("D_h", "z_blhp", "dt_bias_h")]
    options = (True, 0.0, float("inf"))
    if name == "ssd":
        start = inputs["initial_state"] if all_given else None
        sequences = [inputs[key] for key in ("x_blhp", "dt_blh", "A_h", "B_blgn", "C_blgn")]
        arguments = (*sequences, *optional, start, None, 1, *options)
    else:
        step = first_step_of_heads(inputs)
        sequences = [step[key] for key in ("x_bhp", "dt_bh", "A_h", "B_bgn", "C_bgn")]
        optional[1] = step["z_bhp"] if all_given else None
        tensors = (inputs["initial_state"], *sequences, *optional)
        arguments = (*(t if t is None else t.detach() for t in tensors), *options)
    torch.library.opcheck(getattr(torch.ops.anymamba, f"{name}_triton").default, arguments)


def test_a_steps_result_has_the_strides_that_the_fake_one_has() -> None:
    """Those of x, whose heads and channels lie the other way round here."""
    step = first_step_of_heads(ssd_inputs(2, 1, 4, 3, 2, 5))
    x = LAYOUTS["time contiguous"](step["x_bhp"])
    tensors = (torch.zeros(2, 4, 3, 5), x, step["dt_bh"], step["A_h"], step["B_bgn"], step["C_bgn"])
    arguments = (*tensors, None, None, None, True, 0.0, float("inf"))
    operator = torch.ops.anymamba.ssd_state_update_triton.default
    torch.library.opcheck(operator, arguments)
    assert operator(*arguments).stride() == x.stride()


def far_apart(tensor: Tensor) -> Tensor:
    """The same numbers with the three places of axis -2 2^30 numbers apart.

    The tensor begins in the middle of memory that is hardly touched, so that the offset 2^31, if it
    overflowed to -2^31, would find NaN.
    """
    step, strides = 1 << 30, list(tensor.stride())
    strides[-2] = step
    storage = torch.empty(4 * step + tensor.numel(), dtype=tensor.dtype)
    storage[: tensor.numel()] = float("nan")
    far = storage.as_strided(tensor.shape, strides, 2 * step)
    return far.copy_(tensor)


@pytest.mark.parametrize("name", ["x_blhp", "z_blhp", "B_blgn", "C_blgn"])
def test_heads_that_lie_far_apart(name: str) -> None:
    """Offsets of 2^31 elements, as in a tensor of (h, b, l, p)."""
    inputs = ssd_inputs(1, 3, 3, 2, 3, 2, torch.bfloat16)
    given = leaves(inputs) | {name: far_apart(inputs[name]).requires_grad_()}
    outputs, expected = SSD.call(given), SSD.exactly(inputs)
    assert_contract(outputs[0], expected[0])
    ours = gradients(outputs, [torch.ones_like(output) for output in outputs], given)
    theirs = leaves(doubles(inputs))
    exact = SSD.reference(theirs)
    assert_gradients(ours, gradients(exact, [torch.ones_like(output) for output in exact], theirs))
    step = first_step_of_heads(given)
    state = inputs["initial_state"].clone()
    y = ops.ssd_state_update(state, **step)
    assert_contract(y, expected[0][:, 0])


@pytest.mark.usefixtures("short_chunks")
def test_vectors_of_heads_lie_in_any_way() -> None:
    """One number for all heads, and columns of a matrix with NaN around them."""
    inputs = ssd_inputs(2, 17, 4, 3, 2, 5)
    inputs |= {"A_h": torch.tensor(-0.5).expand(4), "dt_bias_h": torch.tensor(0.25).expand(4)}
    columns = {
        name: LAYOUTS["cut out"](inputs[name][:, None])[:, 0] for name in ("A_h", "dt_bias_h")
    }
    for vectors in ({}, columns, {"D_h": torch.randn(4, 1).expand(4, 3)}):
        given = inputs | vectors
        SSD.assert_results(given)
        state = given["initial_state"].clone()
        y = ops.ssd_state_update(state, **first_step_of_heads(given))
        first = {name: t[:, :1] if name in IN_TIME_OF_HEADS else t for name, t in given.items()}
        expected_y, expected = SSD.exactly(first)
        assert_contract(y, expected_y[:, 0])
        assert_contract(state, expected)


STEPS = [
    (3, 4, 17, 2, 5, torch.float32, "contiguous", (0.0, float("inf"))),
    (1, 2, 3, 1, 130, torch.bfloat16, "every second number", (0.1, 0.4)),
    (2, 2, 16, 1, 16, torch.float16, "time contiguous", (0.0, float("inf"))),
]


@pytest.mark.parametrize(("b", "h", "p", "g", "n", "dtype", "layout", "limit"), STEPS)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_updates(
    b: int,
    h: int,
    p: int,
    g: int,
    n: int,
    dtype: torch.dtype,
    layout: str,
    limit: tuple[float, float],
    state_dtype: torch.dtype,
) -> None:
    """Of any types and strides; states of any type and layout are written to in place."""
    inputs = ssd_inputs(b, 1, h, p, g, n, dtype)
    inputs["initial_state"] = inputs["initial_state"].to(state_dtype)
    if g == 1:
        inputs["D_h"] = inputs["D_h"][:, 0]
    inputs |= {name: LAYOUTS[layout](inputs[name]) for name in IN_TIME_OF_HEADS}
    expected_y, expected = SSD.exactly(inputs, dt_limit=limit)
    state = LAYOUTS[layout](inputs["initial_state"])
    address, version = state.data_ptr(), state._version
    y = ops.ssd_state_update(state, **first_step_of_heads(inputs), dt_limit=limit)
    assert y.dtype == dtype
    assert_contract(y, expected_y[:, 0])
    assert_contract(state, expected)
    assert (state.data_ptr(), state._version > version) == (address, True)


@pytest.mark.parametrize(
    ("l", "n", "dtype", "reason"),
    [
        (2, 2, torch.float64, r"do not offer torch\.float64"),
        (2, 0, torch.float32, "need a state"),
        (0, 2, torch.float32, "refuse empty tensors"),
    ],
)
def test_what_the_kernels_do_not_offer_is_said(
    l: int, n: int, dtype: torch.dtype, reason: str
) -> None:
    inputs = ssd_inputs(1, l, 2, 2, 1, n)
    with pytest.raises(BackendError, match=reason):
        SSD.call(inputs if dtype == torch.float32 else doubles(inputs))

"""The native scan, with each instruction set, against the reference in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import _core, ops
from anymamba.errors import BackendError
from anymamba.ops.scan.arguments import ScanArguments
from anymamba.ops.scan.reference import selective_scan_sequential
from tests.support.operators import (
    HALVES,
    IN_TIME,
    LAYOUTS,
    SCAN,
    TYPES,
    doubles,
    first_step,
    natively,
    scan_inputs,
)
from tests.support.tolerance import assert_contract

pytestmark = pytest.mark.usefixtures("each_isa")

# Around the widths of vectors (4, 8, 16), of tiles (32) and of the largest common state (256).
STATE_SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 128, 255, 256]
SHAPES = [(2, 37, 19, n) for n in [*STATE_SIZES, 257, 300]]
SHAPES += [(1, 35, e, 16) for e in (1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 257)]
SHAPES += [(b, 9, 6, 4) for b in (0, 1, 3, 17)]


@pytest.mark.parametrize(("b", "l", "e", "n"), SHAPES)
def test_shapes(b: int, l: int, e: int, n: int) -> None:
    SCAN.check(scan_inputs(b, l, e, n) | {"initial_state": torch.randn(b, e, n)})


@pytest.mark.parametrize("l", [0, 1, 2, 31, 32, 33, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_around_the_borders_of_chunks(l: int, reverse: bool) -> None:
    inputs = scan_inputs(2, l, 5, 16) | {"initial_state": torch.randn(2, 5, 16)}
    SCAN.check(inputs, reverse=reverse)


@pytest.mark.parametrize("absent", ["D_e", "z_ble", "delta_bias_e", "delta_softplus"])
def test_each_option_may_be_absent(absent: str) -> None:
    inputs = scan_inputs(2, 40, 19, 5)
    del inputs[absent]
    # Without softplus, negative steps would make states grow beyond all numbers.
    for name in ("delta_ble", "delta_bias_e"):
        if name in inputs:
            inputs[name] = inputs[name].abs() * 0.1
    SCAN.check(inputs)


@pytest.mark.parametrize("groups", [1, 2, 3, 9, 18])
@pytest.mark.parametrize("n", [5, 16])
def test_groups(groups: int, n: int) -> None:
    inputs = scan_inputs(2, 40, 18, n, groups=groups)
    inputs["initial_state"] = torch.randn(2, 18, n)
    SCAN.check(inputs)
    turned = {name: inputs[name].permute(0, 3, 2, 1).contiguous() for name in ("B_bln", "C_bln")}
    SCAN.assert_results(
        inputs | {name: value.permute(0, 3, 2, 1) for name, value in turned.items()}
    )


def test_groups_of_wide_states_in_half_precision() -> None:
    SCAN.check(scan_inputs(1, 40, 34, 70, groups=2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_half_precision(dtype: torch.dtype) -> None:
    inputs = scan_inputs(2, 70, 19, 16, dtype=dtype)
    inputs["initial_state"] = torch.randn(2, 19, 16)
    SCAN.assert_gradients(inputs)


@settings(max_examples=40)
@given(
    b=st.integers(1, 3),
    l=st.integers(0, 70),
    e=st.integers(1, 35),
    n=st.integers(1, 20),
    reverse=st.booleans(),
    types=st.lists(st.sampled_from(TYPES), min_size=9, max_size=9),
)
def test_any_mixture_of_types(
    b: int, l: int, e: int, n: int, reverse: bool, types: list[torch.dtype]
) -> None:
    inputs = scan_inputs(b, l, e, n) | {"initial_state": torch.randn(b, e, n)}
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    mixed = inputs | {name: inputs[name].to(t) for name, t in zip(names, types, strict=True)}
    SCAN.check(mixed, reverse=reverse)


def test_long_sequences_do_not_drift() -> None:
    """Decays just below 1 for 6,000 steps, where an error in them would be counted each time."""
    inputs = scan_inputs(1, 6000, 3, 4)
    inputs["A_en"] = -torch.rand(3, 4) * 1e-3
    y, last = SCAN.call(inputs)
    expected_y, expected_last = selective_scan_sequential(ScanArguments(**doubles(inputs)))
    assert_contract(y, expected_y)
    assert_contract(last, expected_last)


def test_extreme_step_sizes() -> None:
    """States that vanish at once, stay for ever, or would overflow in half precision."""
    inputs = scan_inputs(1, 40, 6, 4)
    del inputs["z_ble"]
    steps = torch.tensor([-200.0, -90.0, -20.0, 20.0, 90.0, 1e4])
    inputs["delta_ble"] = steps.expand(1, 40, 6).clone()
    inputs["delta_bias_e"] = torch.zeros(6)
    SCAN.assert_results(inputs)
    inputs["A_en"] = torch.tensor([0.0, -1e-30, -1.0, -1e30]).expand(6, 4).clone()
    y, last = SCAN.call(inputs)
    expected_y, expected_last = SCAN.exactly(inputs)
    assert_contract(y, expected_y)
    assert_contract(last, expected_last)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(value: float) -> None:
    inputs = scan_inputs(2, 40, 19, 16)
    clean, _ = SCAN.call(inputs)
    inputs["x_ble"][1, 7, 3] = value
    y, last = SCAN.call(inputs)
    assert not y[1, 7:, 3].isfinite().any()
    assert not last[1, 3].isfinite().any()
    y[1, 7:, 3] = clean[1, 7:, 3]
    assert torch.equal(y, clean)


def test_states_that_fade_end_as_zeros() -> None:
    """e^-95 would be a subnormal number, with which processors compute many times more slowly."""
    steps = 96
    inputs = {
        "x_ble": torch.eye(steps)[0].view(1, steps, 1).requires_grad_(),
        "delta_ble": torch.ones(1, steps, 1),
        "A_en": -torch.ones(1, 1),
        "B_bln": torch.ones(1, steps, 1),
        "C_bln": torch.ones(1, steps, 1),
    }
    y, last = SCAN.call(inputs)
    state, step = torch.full((1, 1, 1), math.exp(-80)), {"x_ble": torch.zeros(1, 1, 1)}
    one_step = {name: value[:, :1] if name in IN_TIME else value for name, value in inputs.items()}
    for _ in range(15):
        update(state, one_step | step)
    (gradient_bl1,) = torch.autograd.grad(y[0, -1, 0], inputs["x_ble"])
    assert SCAN.exactly(inputs)[1].item() > 0
    for faded in (last, y[0, -1], state, gradient_bl1[0, 0]):
        assert float(faded) == 0
    # 80 steps fade as they should, 1e-5 being what 80 roundings and as many powers may add up to.
    assert float(gradient_bl1[0, -81]) == pytest.approx(math.exp(-80), rel=1e-5)


def test_as_many_threads_as_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYMAMBA_NUM_THREADS")
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 4):
            torch.set_num_threads(threads)
            SCAN.call(scan_inputs(1, 2, 2, 2))
            assert _core.threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", " "])
def test_a_wrong_number_of_threads_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ANYMAMBA_NUM_THREADS", text)
    with pytest.raises(BackendError, match="ANYMAMBA_NUM_THREADS is"):
        SCAN.call(scan_inputs(1, 2, 2, 2))


def test_what_the_core_does_not_offer_is_said() -> None:
    inputs = doubles(scan_inputs(1, 2, 2, 2))
    with pytest.raises(BackendError, match=r"do not offer torch\.float64"):
        SCAN.call(inputs)
    with ops.backend("auto"):
        assert SCAN.call(inputs)[0].dtype == torch.float64


def test_the_instruction_sets_agree() -> None:
    inputs = scan_inputs(2, 70, 35, 16)
    results = []
    for isa in _core.isas():
        with natively(isa):
            results.append(SCAN.call(inputs)[0])
    for other in results[1:]:
        assert_contract(other, results[0])


def update(state: Tensor, inputs: dict[str, Any]) -> Tensor:
    return ops.selective_state_update(state, **first_step(inputs))


@pytest.mark.parametrize("n", [1, 3, 8, 16, 17, 64, 256, 300])
@pytest.mark.parametrize("b", [0, 1, 3, 17])
def test_updates(b: int, n: int) -> None:
    inputs, state = scan_inputs(b, 1, 19, n), torch.randn(b, 19, n)
    expected_y, expected = SCAN.exactly(inputs | {"initial_state": state})
    y = update(state, inputs)
    assert_contract(y, expected_y[:, 0])
    assert_contract(state, expected)


@pytest.mark.parametrize("groups", [1, 3, 9])
@pytest.mark.parametrize("extras", [True, False])
def test_updates_in_groups(groups: int, extras: bool) -> None:
    inputs = scan_inputs(4, 1, 18, 16, groups=groups, extras=extras)
    state = torch.randn(4, 18, 16)
    expected_y, expected = SCAN.exactly(inputs | {"initial_state": state})
    assert_contract(update(state, inputs), expected_y[:, 0])
    assert_contract(state, expected)


@settings(max_examples=40)
@given(
    b=st.integers(1, 5),
    e=st.integers(1, 300),
    n=st.integers(1, 20),
    types=st.lists(st.sampled_from(TYPES), min_size=8, max_size=8),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_updates_of_any_types_and_strides(
    b: int, e: int, n: int, types: list[torch.dtype], layout: str
) -> None:
    inputs, state = scan_inputs(b, 1, e, n), torch.randn(b, e, n)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    inputs |= {name: inputs[name].to(t) for name, t in zip(names, types, strict=True)}
    inputs |= {name: LAYOUTS[layout](inputs[name]) for name in IN_TIME}
    expected_y, expected = SCAN.exactly(inputs | {"initial_state": state})
    y = update(state, inputs)
    assert y.dtype == inputs["x_ble"].dtype
    assert_contract(y, expected_y[:, 0])
    assert_contract(state, expected)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_write_into_the_state_that_was_given(layout: str, dtype: torch.dtype) -> None:
    inputs = scan_inputs(3, 1, 19, 16)
    state = LAYOUTS[layout](torch.randn(3, 19, 16).to(dtype))
    before = state.clone()
    expected_y, expected = SCAN.exactly(inputs | {"initial_state": before})
    address, version = state.data_ptr(), state._version
    y = update(state, inputs)
    assert_contract(y, expected_y[:, 0])
    # A float64 state is computed in float32 too, as the reference does.
    assert_contract(state.float() if dtype == torch.float64 else state, expected)
    assert state.data_ptr() == address
    assert state._version > version


@pytest.mark.parametrize("name", ["x_ble", "A_en", "D_e"])
def test_updates_have_no_gradient(name: str) -> None:
    inputs, state = scan_inputs(2, 1, 6, 4), torch.zeros(2, 6, 4)
    expected, expected_state = update(state.clone(), inputs), state.clone()
    update(expected_state, inputs)
    inputs[name].requires_grad_()
    state.requires_grad_()
    y = update(state, inputs)
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    assert not y.requires_grad
    assert state.grad_fn is None

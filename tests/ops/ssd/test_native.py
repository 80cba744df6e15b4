"""The native state space duality, with each instruction set, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import _core, ops
from anymamba.errors import BackendError
from tests.support.operators import (
    HALVES,
    IN_TIME_OF_HEADS,
    LAYOUTS,
    SSD,
    TYPES,
    doubles,
    first_step_of_heads,
    natively,
    ssd_inputs,
)
from tests.support.tolerance import assert_contract

pytestmark = pytest.mark.usefixtures("each_isa")

# (b, l, h, p, g, n): around the widths of vectors (4, 8, 16), of chunks and of blocks (64).
SHAPES = [
    *((2, 37, 4, 6, 2, n) for n in (1, 4, 7, 16, 17, 33, 64, 128, 130)),
    *((1, 35, 2, p, 1, 16) for p in (1, 4, 5, 15, 16, 33, 64, 65, 80, 130)),
    *((1, l, 3, 8, 1, 5) for l in (0, 1, 2, 15, 63, 64, 65, 128, 129, 200)),
    *((b, 9, 4, 6, 4, 4) for b in (0, 1, 17)),
    *((2, 20, h, 3, 1, 4) for h in (1, 7, 8, 9, 17)),  # heads share partial sums
]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, ...]) -> None:
    SSD.check(ssd_inputs(*shape))


@pytest.mark.parametrize(
    "absent", ["D_h", "z_blhp", "dt_bias_h", "dt_softplus", "initial_state", "D of channels"]
)
def test_each_option_may_be_absent(absent: str) -> None:
    inputs = ssd_inputs(2, 70, 4, 6, 2, 5)
    if absent == "D of channels":
        inputs["D_h"] = inputs["D_h"][:, 0]
    else:
        del inputs[absent]
    SSD.check(inputs)


@pytest.mark.parametrize("limit", [(0.1, 0.5), (0.0, 0.3), (-0.02, 2.0)])
@pytest.mark.parametrize("softplus", [True, False])
def test_limits(limit: tuple[float, float], softplus: bool) -> None:
    inputs = ssd_inputs(1, 70, 2, 3, 1, 4) | {"dt_softplus": softplus}
    SSD.check(inputs, dt_limit=limit)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype) -> None:
    SSD.check(ssd_inputs(2, 70, 4, 16, 2, 16, dtype))


@settings(max_examples=30)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 70, 3, 20, 3, 20))),
    types=st.lists(st.sampled_from(TYPES), min_size=9, max_size=9),
    cuts=st.lists(st.integers(0, 70), max_size=4),
)
def test_any_mixture_of_types_and_packing(
    sizes: tuple[int, ...], types: list[torch.dtype], cuts: list[int]
) -> None:
    b, l, per_group, p, g, n = sizes
    inputs = ssd_inputs(b, l, per_group * g, p, g, n)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    inputs |= {name: inputs[name].to(t) for name, t in zip(names, types, strict=True)}
    places = torch.arange(l)
    marks = sum((places >= cut).int() for cut in cuts) if cuts else torch.zeros_like(places)
    SSD.check(inputs, seq_idx=marks.expand(b, l))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel_and_behind_it(value: float) -> None:
    inputs = ssd_inputs(2, 100, 4, 6, 2, 5)
    clean, _ = SSD.call(inputs)
    inputs["x_blhp"][1, 37, 2, 3] = value
    y, last = SSD.call(inputs)
    assert not y[1, 37:, 2, 3].isfinite().any()
    assert not last[1, 2, 3].isfinite().any()
    y[1, 37:, 2, 3] = clean[1, 37:, 2, 3]
    # Its chunk is computed step by step then, which rounds in another way.
    assert_contract(y, clean)


def test_the_instruction_sets_agree() -> None:
    inputs = ssd_inputs(2, 70, 4, 35, 2, 16)
    results = []
    for isa in _core.isas():
        with natively(isa):
            results.append(SSD.call(inputs)[0])
    for other in results[1:]:
        assert_contract(other, results[0])


def test_what_the_core_does_not_offer_is_said() -> None:
    inputs = doubles(ssd_inputs(1, 2, 2, 2, 1, 2))
    with pytest.raises(BackendError, match=r"do not offer torch\.float64"):
        SSD.call(inputs)
    without_states = ssd_inputs(1, 2, 2, 2, 1, 0)
    with pytest.raises(BackendError, match="need a head, a channel and a state"):
        SSD.call(without_states)
    with ops.backend("auto"):
        assert SSD.call(inputs)[0].dtype == torch.float64


@settings(max_examples=40)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (4, 3, 80, 3, 40))),
    types=st.lists(st.sampled_from(TYPES), min_size=9, max_size=9),
    layout=st.sampled_from(sorted(LAYOUTS)),
    per_channel=st.booleans(),
    limit=st.sampled_from([(0.0, float("inf")), (0.1, 0.4)]),
)
def test_updates(
    sizes: tuple[int, ...],
    types: list[torch.dtype],
    layout: str,
    per_channel: bool,
    limit: tuple[float, float],
) -> None:
    """Of any types and strides; states of any type and layout are written to."""
    b, per_group, p, g, n = sizes
    inputs = ssd_inputs(b, 1, per_group * g, p, g, n)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    inputs |= {name: inputs[name].to(t) for name, t in zip(names, types, strict=True)}
    if not per_channel:
        inputs["D_h"] = inputs["D_h"][:, 0]
    inputs |= {name: LAYOUTS[layout](inputs[name]) for name in IN_TIME_OF_HEADS}
    expected_y, expected = SSD.exactly(inputs, dt_limit=limit)
    state = LAYOUTS[layout](inputs["initial_state"])
    address, version = state.data_ptr(), state._version
    y = ops.ssd_state_update(state, **first_step_of_heads(inputs), dt_limit=limit)
    assert y.dtype == inputs["x_blhp"].dtype
    assert_contract(y, expected_y[:, 0])
    assert_contract(state, expected)
    assert (state.data_ptr(), state._version > version) == (address, True)

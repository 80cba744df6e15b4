"""The single step under the original's names, against a loop over single numbers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba.dropin.mamba_ssm.ops.triton.selective_state_update import (
    _one_decay_a_head,
    selective_state_update,
    selective_state_update_ref,
)
from anymamba.errors import InputError
from tests.ops.scan.test_scan import brute_force
from tests.support.tolerance import assert_contract

UPDATES = [selective_state_update, selective_state_update_ref]


def by_hand(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and next state with heads: one step of the scan's loop, whose channels they are."""
    x_ble, delta_ble, z_ble = (None if t is None else t.flatten(1)[:, None] for t in (x, dt, z))
    D_e, bias_e = (None if t is None else t.flatten() for t in (D, dt_bias))
    maps, channels = (B[:, None], C[:, None]), (D_e, z_ble, bias_e)
    start_ben = state.flatten(1, 2)
    y, last = brute_force(
        x_ble, delta_ble, A.flatten(0, 1), *maps, *channels, dt_softplus, start_ben
    )
    return y.view(x.shape), last.view(state.shape)


def inputs(
    sizes: tuple[int, int, int, int, int] = (2, 6, 3, 5, 2), tied: bool = False, extras: bool = True
) -> dict[str, Any]:
    """With heads; `tied` expands one decay over a head, as Mamba-2 does."""
    (b, h, p, n, groups), g = sizes, torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=g)
    channels = 1 if tied else p
    call: dict[str, Any] = {
        "state": normal(b, h, p, n),
        "x": normal(b, h, p),
        "dt": normal(b, h, channels).abs().expand(b, h, p),
        "A": (-torch.rand(h, channels, 1 if tied else n, generator=g)).expand(h, p, n),
        "B": normal(b, groups, n),
        "C": normal(b, groups, n),
    }
    if extras:
        call |= {
            "D": normal(h, p),
            "z": normal(b, h, p),
            "dt_bias": normal(h, channels).expand(h, p),
            "dt_softplus": True,
        }
    return call


def without_heads(call: dict[str, Any]) -> dict[str, Any]:
    """Of a call with one head and one group."""
    axes = {"A": 0, "D": 0, "dt_bias": 0}
    return {
        name: value.squeeze(axes.get(name, 1)) if isinstance(value, Tensor) else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    "sizes", [(2, 6, 3, 5, 2), (1, 1, 1, 1, 1), (3, 4, 17, 16, 4), (0, 2, 3, 4, 1)]
)
def test_equals_the_loop(update: Any, tied: bool, extras: bool, sizes: Any) -> None:
    call = inputs(sizes, tied, extras)
    expected, after = by_hand(**call)
    out = update(**call)
    assert_contract(out, expected)
    assert_contract(call["state"], after)


def test_tied_inputs_are_seen_as_such() -> None:
    for tied in (False, True):
        call = inputs(tied=tied)
        assert _one_decay_a_head(call["A"], call["dt"], call["dt_bias"]) is tied


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("with_group", [False, True])
def test_without_heads(update: Any, extras: bool, with_group: bool) -> None:
    call = inputs((2, 1, 6, 5, 1), extras=extras)
    expected, after = by_hand(**call)
    flat = without_heads(call)
    if with_group:
        flat |= {"B": call["B"], "C": call["C"]}
    out = update(**flat)
    assert_contract(out, expected[:, 0])
    assert_contract(flat["state"], after[:, 0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_storage(tied: bool, dtype: torch.dtype) -> None:
    call = inputs(tied=tied)
    call |= {name: call[name].to(dtype) for name in ("x", "dt", "B", "C", "z")}
    if tied:  # a change of type undoes the expansion
        call["dt"] = call["dt"][..., :1].expand(call["x"].shape)
    expected, after = by_hand(**call)
    rounded = call | {"state": call["state"].to(dtype)}
    out = selective_state_update(**call)
    assert out.dtype == dtype
    assert_contract(out, expected)
    assert_contract(call["state"], after)
    selective_state_update(**rounded)
    assert_contract(rounded["state"], after)


@pytest.mark.parametrize("tied", [False, True])
def test_states_may_lie_anyhow_in_memory(tied: bool) -> None:
    call = inputs(tied=tied)
    expected, after = by_hand(**call)
    turned = call["state"].mT.contiguous().mT
    cut_out = torch.zeros(5, 6, 3, 5)[1:5:2].copy_(call["state"])
    for state in (turned, cut_out):
        assert_contract(selective_state_update(**call | {"state": state}), expected)
        assert_contract(state, after)


@pytest.mark.parametrize("tied", [False, True])
def test_chosen_states_are_updated_and_others_left(tied: bool) -> None:
    call = inputs((4, 6, 3, 5, 2), tied)
    states = torch.randn(7, 6, 3, 5)
    rows = torch.tensor([5, -1, 0, 2], dtype=torch.int32)
    expected, used = states.clone(), [0, 2, 3]
    alone = {k: call[k][used] for k in ("x", "dt", "B", "C", "z")}
    out_alone, after = by_hand(**call | alone | {"state": states[[5, 0, 2]]})
    expected[[5, 0, 2]] = after.float()
    out = selective_state_update(**call | {"state": states}, state_batch_indices=rows)
    assert_contract(states, expected)
    assert torch.equal(states[[1, 3, 4, 6]], expected[[1, 3, 4, 6]])
    assert_contract(out[used], out_alone)
    assert not out[1].any()


def test_there_is_no_gradient() -> None:
    call = inputs()
    call["x"].requires_grad_()
    assert not selective_state_update(**call).requires_grad
    assert not call["state"].requires_grad


BAD_CALLS: dict[str, dict[str, Any]] = {
    "expected state of shape": {"x": torch.ones(2, 3)},
    "state has shape": {"state": torch.ones(3, 6, 3, 5)},
    "dt has shape": {"dt": torch.ones(2, 6, 4)},
    "A has shape": {"A": torch.ones(6, 5, 3)},
    "C has shape": {"C": torch.ones(2, 3, 5)},
    "D has shape": {"D": torch.ones(3)},
    "4 groups, which do not divide the 6 heads": {
        "B": torch.ones(2, 4, 5),
        "C": torch.ones(2, 4, 5),
    },
    "must be 2 integers": {"state_batch_indices": torch.ones(2)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message: str) -> None:
    with pytest.raises(InputError, match=message):
        selective_state_update(**(inputs() | BAD_CALLS[message]))

"""The adapter to `mamba_ssm`'s state space duality, against a stand-in of the package."""

import importlib
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba import ops
from anymamba.ops.mamba_ssm_limits import unsupported_reason
from anymamba.ops.ssd.arguments import SsdArguments, SsdStepArguments
from tests.support.operators import first_step_of_heads, ssd_inputs
from tests.support.tolerance import assert_contract


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
) -> Tensor:
    """The package's `selective_state_update` with heads, by its documentation and source."""
    (b, h, p, n), g = state.shape, B.shape[1]
    assert (x.shape, dt.shape, A.shape) == ((b, h, p), (b, h, p), (h, p, n))
    assert A.dtype == torch.float32
    tied = A.stride(-1) == 0 and A.stride(-2) == 0 and dt.stride(-1) == 0
    # The package asks for the strides of a bias that is None, too, and fails.
    tied = tied and dt_bias.stride(-1) == 0
    assert tied, "its fast path is not taken"
    assert dt_bias.shape == (h, p)
    dt = dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    B, C = (t.repeat_interleave(h // g, 1)[:, :, None] for t in (B, C))
    state.copy_(state * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B)
    y = (state * C).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z)).to(x.dtype)


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Any:
    """The package's `mamba_chunk_scan_combined`, by its documentation, step by step."""
    b, l, h, p = x.shape
    assert chunk_size >= 1
    assert A.dtype == torch.float32
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    state = x.new_zeros(b, h, p, B.shape[-1], dtype=torch.float32)
    state = state if initial_states is None else state + initial_states
    D_hp = D[:, None].expand(h, p) if D is not None and D.ndim == 1 else D
    A_hpn = A[:, None, None].expand(state.shape[1:])
    no_bias = A.new_zeros(()).expand(h, p)
    outputs = []
    for t in range(l):
        now = (x[:, t].float(), dt[:, t, :, None].expand(b, h, p), A_hpn)
        maps = (B[:, t].float(), C[:, t].float())
        gate = None if z is None else z[:, t].float()
        outputs.append(step(state, *now, *maps, D_hp, gate, no_bias))
    y = torch.stack(outputs, 1).to(x.dtype)
    return (y, state) if return_final_states else y


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    kernels: dict[str, Any] = {"ssd_combined": chunk_scan, "selective_state_update": step}
    modules = {name: ModuleType(name) for name in names}
    for name, function in kernels.items():
        module = ModuleType(f"mamba_ssm.ops.triton.{name}")
        setattr(module, "mamba_chunk_scan_combined" if function is chunk_scan else name, function)
        modules[module.__name__] = module
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "anymamba.ops.ssd.mamba_ssm", raising=False)
    yield importlib.import_module("anymamba.ops.ssd.mamba_ssm")
    sys.modules.pop("anymamba.ops.ssd.mamba_ssm")


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.1, 0.4)])
def test_sequences(adapter: ModuleType, per_channel: bool, limit: tuple[float, float]) -> None:
    inputs = ssd_inputs(2, 9, 4, 3, 2, 5)
    if not per_channel:
        inputs["D_h"] = inputs["D_h"][:, 0]
    expected = ops.ssd(**inputs, dt_limit=limit, return_last_state=True, backend="reference")
    arguments = SsdArguments(**inputs, dt_limit=limit)
    y, last = adapter.ssd(arguments._replace(return_last_state=True))
    assert_contract(y, expected[0])
    assert_contract(last, expected[1])
    alone, none = adapter.ssd(arguments)
    assert torch.equal(alone, y)
    assert none is None


@pytest.mark.parametrize("bare", [True, False])
def test_steps(adapter: ModuleType, bare: bool) -> None:
    inputs = ssd_inputs(2, 1, 4, 3, 2, 5)
    if bare:
        inputs |= dict.fromkeys(("D_h", "z_blhp", "dt_bias_h"))
    else:
        inputs["D_h"] = inputs["D_h"][:, 0]
    given = {name: value for name, value in inputs.items() if value is not None}
    arguments = dict.fromkeys(("D_h", "z_bhp", "dt_bias_h")) | first_step_of_heads(given)
    ours, theirs = given["initial_state"].clone(), given["initial_state"].clone()
    expected = ops.ssd_state_update(ours, **arguments, backend="reference")
    y = adapter.ssd_state_update(SsdStepArguments(**arguments, dt_limit=(0, 1), state_bhpn=theirs))
    assert_contract(y, expected)
    assert_contract(theirs, ours)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segments": object()}, "no packed sequences"),
        ({"x_blhp": torch.zeros(1, 3, 2, 4)}, "round float32 numbers to TF32"),
        ({"z_blhp": torch.zeros(1, 3, 2, 4)}, "x, B, C and z in one type"),
        ({"B_blgn": torch.zeros(1, 3, 1, 0, dtype=torch.bfloat16)}, "need a state"),
    ],
)
def test_what_it_cannot_do_has_a_reason(change: dict[str, Any], reason: str) -> None:
    arguments = SsdArguments(**ssd_inputs(1, 3, 2, 4, 1, 5, torch.bfloat16))
    assert unsupported_reason("ssd", arguments) is None
    assert reason in str(unsupported_reason("ssd", arguments._replace(**change)))


def test_a_step_that_needs_limits_has_a_reason() -> None:
    given = first_step_of_heads(ssd_inputs(1, 1, 2, 4, 1, 5))
    fits = SsdStepArguments(**given, dt_limit=(0.0, math.inf), state_bhpn=torch.zeros(1, 2, 4, 5))
    assert unsupported_reason("ssd_state_update", fits) is None
    for change in ({"dt_limit": (0.0, 0.1)}, {"dt_softplus": False}):
        reason = unsupported_reason("ssd_state_update", fits._replace(**change))
        assert "no limits" in str(reason)

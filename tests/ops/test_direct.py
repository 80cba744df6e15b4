"""A step straight to the core is the step that the general functions take, or is not taken."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anymamba import ops
from anymamba.dropin.causal_conv1d import causal_conv1d_update
from anymamba.dropin.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from anymamba.errors import InputError
from anymamba.ops.direct import conv_step, scan_step
from tests.support import operators
from tests.support.operators import first_step
from tests.support.tolerance import assert_contract

# Around a register's 16 channels; the last is too large for one thread alone, and (0, 3, 4) empty.
SIZES = [(1, 17, 5), (3, 16, 16), (1, 1, 1), (0, 3, 4), (2, 1100, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda tensor: tensor,
    "every other column": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "first axis last": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "rows apart": lambda tensor: torch.stack([tensor, tensor], 1)[:, 0],
}


def scan_inputs(b: int, e: int, n: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    step = first_step(operators.scan_inputs(b, 1, e, n, dtype=dtype))
    step |= {name: step[name].to(dtype) for name in ("D_e", "delta_bias_e")}
    return {"state_ben": torch.randn(b, e, n, generator=torch.Generator().manual_seed(1)), **step}


def conv_inputs(b: int, e: int, k: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"x_be": (b, e), "window_bek": (b, e, k), "weight_ek": (e, k), "bias_e": (e,)}
    inputs: dict[str, Any] = {
        name: torch.randn(*shape, generator=g).to(dtype) for name, shape in shapes.items()
    }
    return inputs | {"activation": "silu"}


STEPS: dict[str, tuple[Any, Any, Any, str, str]] = {
    "scan": (scan_step, ops.selective_state_update, scan_inputs, "state_ben", "x_be"),
    "conv": (conv_step, ops.causal_conv1d_update, conv_inputs, "window_bek", "x_be"),
}


def changed(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def assert_is_the_reference(kind: str, inputs: dict[str, Any]) -> None:
    """Output and state; a state in half precision is rounded by either side."""
    direct, general, _, state, _ = STEPS[kind]
    theirs = changed(inputs, Tensor.clone)
    expected = general(**theirs, backend="reference")
    kept = changed(inputs, Tensor.clone)
    version = inputs[state]._version
    out = direct(**inputs)
    assert out is not None
    assert out.dtype == inputs["x_be"].dtype
    assert not out.requires_grad
    assert inputs[state]._version > version
    assert_contract(out, expected)
    assert_contract(inputs[state], theirs[state])
    for name in inputs.keys() - {state}:
        value = inputs[name]
        assert torch.equal(value, kept[name]) if isinstance(value, Tensor) else True, name


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_is_the_reference_on_every_instruction_set(
    kind: str, dtype: torch.dtype, size: Any
) -> None:
    assert_is_the_reference(kind, STEPS[kind][2](*size, dtype))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_may_lie_anyhow_in_memory(kind: str, layout: str, dtype: torch.dtype) -> None:
    inputs = STEPS[kind][2](3, 18, 4, dtype)
    assert_is_the_reference(kind, changed(inputs, LAYOUTS[layout]))


@pytest.mark.parametrize("kind", STEPS)
def test_types_may_be_mixed_and_extras_left_out(kind: str) -> None:
    inputs = STEPS[kind][2](2, 18, 4)
    state = STEPS[kind][3]
    assert_is_the_reference(kind, inputs | {state: inputs[state].bfloat16()})
    if kind == "scan":  # the convolution's reference rounds the window to the type of x as well
        assert_is_the_reference(kind, inputs | {"x_be": inputs["x_be"].bfloat16()})
    extras = ("D_e", "z_be", "delta_bias_e", "bias_e", "activation")
    assert_is_the_reference(kind, {k: None if k in extras else v for k, v in inputs.items()})


@pytest.mark.parametrize("kind", STEPS)
def test_a_state_may_be_a_view_of_a_larger_one(kind: str) -> None:
    inputs = STEPS[kind][2](2, 18, 4)
    whole = torch.full((6, 18, 4), 7.0)
    whole[1:5:2] = inputs[STEPS[kind][3]]
    assert_is_the_reference(kind, inputs | {STEPS[kind][3]: whole[1:5:2]})
    assert bool((whole[::2] == 7).all())
    assert bool((whole[5] == 7).all())


@pytest.mark.parametrize("kind", STEPS)
def test_gradients_and_inference_mode_make_no_difference(kind: str) -> None:
    inputs = STEPS[kind][2](2, 18, 4)
    state = STEPS[kind][3]
    weights = {
        k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor) and k != state
    }
    assert_is_the_reference(kind, inputs | weights)
    with torch.inference_mode():
        assert STEPS[kind][0](**STEPS[kind][2](2, 18, 4)) is not None


@pytest.mark.parametrize("kind", STEPS)
def test_is_not_taken_where_something_watches_or_does_not_fit(kind: str) -> None:
    direct, _, make, state, x = STEPS[kind]
    inputs = make(2, 18, 4)
    before = inputs[state].clone()

    def declined(**changes: Any) -> bool:
        return direct(**(inputs | changes)) is None and torch.equal(inputs[state], before)

    for name, value in inputs.items():
        if isinstance(value, Tensor):
            for axis in range(value.ndim):
                longer = torch.cat([value, value.narrow(axis, 0, 1)], axis)
                assert declined(**{name: longer}), (name, axis)
            assert declined(**{name: value[None]}), name
            assert declined(**{name: value.double()}), name
            assert declined(**{name: value.to("meta")}), name
            assert declined(**{name: value.to(torch.int64)}), name
    with ops.backend("reference"):
        assert declined()
    with FlopCounterMode(display=False):
        assert declined()
    asked = []
    torch.func.vmap(lambda row: (asked.append(direct(**inputs | {x: row})), row)[1])(
        inputs[x][None].clone()
    )
    assert asked == [None]
    torch.func.grad(lambda row: (asked.append(direct(**inputs | {x: row})), row.sum())[1])(
        inputs[x].clone()
    )
    assert asked == [None, None]
    assert torch.equal(inputs[state], before)


def in_their_words(inputs: dict[str, Any]) -> dict[str, Any]:
    names = {"window_bek": "conv_state", "delta_be": "dt", "delta_bias_e": "dt_bias"}
    names |= {"delta_softplus": "dt_softplus"}
    return {names.get(k, re.sub("_[bekn]+$", "", k)): v for k, v in inputs.items()}


@pytest.mark.parametrize(
    ("function", "kind"), [(selective_state_update, "scan"), (causal_conv1d_update, "conv")]
)
def test_the_drop_in_answers_both_ways_alike_and_refuses_alike(function: Any, kind: str) -> None:
    inputs = STEPS[kind][2](2, 18, 4)
    ours = in_their_words(changed(inputs, Tensor.clone))
    seen = in_their_words(changed(inputs, Tensor.clone))
    out = function(**ours)
    with FlopCounterMode(display=False):  # watched, so the general way
        general = function(**seen)
    # One kernel serves both.
    assert torch.equal(out, general)
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, seen[name]), name
            with pytest.raises(InputError, match=function.__name__):
                function(**ours | {name: torch.cat([value, value[:1]])})


def test_one_step_of_the_convolution_keeps_its_axis() -> None:
    inputs = in_their_words(conv_inputs(2, 18, 4))
    alone = causal_conv1d_update(**changed(inputs, Tensor.clone))
    x = inputs["x"][..., None]
    assert torch.equal(causal_conv1d_update(**inputs | {"x": x}), alone[..., None])


def test_a_compiled_program_takes_the_general_way_in_one_graph() -> None:
    inputs = in_their_words(scan_inputs(2, 8, 4))
    ours, theirs = (changed(inputs, Tensor.clone) for _ in range(2))
    compiled = torch.compile(selective_state_update, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**ours), selective_state_update(**theirs))
    assert torch.equal(ours["state"], theirs["state"])

"""The drop-in's Mamba layer against a loop over time, and its steps against its forward."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anymamba.dropin.mamba_ssm.modules.block import Block
from anymamba.dropin.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams
from anymamba.errors import ConfigError, InputError
from tests.support import loops
from tests.support.models import hidden as inputs
from tests.support.models import unhidden
from tests.support.stepping import prompt_and_steps
from tests.support.tolerance import assert_layer


def layer(**arguments: Any) -> Mamba:
    torch.manual_seed(0)
    made: Mamba = unhidden(Mamba(**{"d_model": 12, "d_state": 5, "layer_idx": 0} | arguments))
    return made


VARIANTS: list[dict[str, Any]] = [
    {},
    {"d_model": 20, "expand": 1.5, "d_conv": 3, "d_state": 1},
    {"bias": True, "conv_bias": False, "dt_rank": 3},
    {"d_conv": 2, "dt_init": "constant", "dt_scale": 2.0},
]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_are_those_of_a_loop(variant: dict[str, Any], fast: bool) -> None:
    mamba = layer(**variant, use_fast_path=fast)
    u = inputs(d=mamba.d_model)
    assert_layer(mamba(u), loops.mamba(mamba, u))
    loops.assert_layer_gradients(mamba, u, loops.mamba)


@pytest.mark.parametrize(("b", "l"), [(1, 1), (3, 2), (0, 4)])
def test_short_and_empty_inputs(b: int, l: int) -> None:
    mamba, u = layer(), inputs(b, l)
    assert_layer(mamba(u), loops.mamba(mamba, u))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype, fast: bool) -> None:
    mamba = layer(dtype=dtype, use_fast_path=fast)
    assert mamba.A_log.dtype == mamba.D.dtype == torch.float32
    y = mamba(inputs(dtype=dtype))
    assert y.dtype == dtype
    assert_layer(y, loops.mamba(mamba, inputs(dtype=dtype)))


@settings(max_examples=20)
@given(l=st.integers(1, 9), cut=st.integers(1, 9), b=st.integers(1, 3), k=st.integers(1, 4))
def test_a_prompt_and_steps_give_what_forward_gives(l: int, cut: int, b: int, k: int) -> None:
    mamba, u = layer(d_conv=max(2, k)), inputs(b, l)
    assert_layer(prompt_and_steps(mamba, u, cut), loops.mamba(mamba, u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_from_nothing(dtype: torch.dtype) -> None:
    mamba, u = layer(dtype=dtype), inputs(l=30, dtype=dtype)
    conv_state, ssm_state = mamba.allocate_inference_cache(2, 30)
    assert conv_state.shape == (2, 24, 4)
    assert conv_state.dtype == dtype
    assert ssm_state.shape == (2, 24, 5)
    assert ssm_state.dtype == torch.float32
    with torch.no_grad():
        parts = []
        for t in range(30):
            y, same_conv, same_ssm = mamba.step(u[:, t : t + 1], conv_state, ssm_state)
            assert same_conv is conv_state
            assert same_ssm is ssm_state
            parts.append(y)
        assert_layer(torch.cat(parts, dim=1), loops.mamba(mamba, u))


def test_states_of_a_type_that_is_asked_for() -> None:
    states = layer().allocate_inference_cache(1, 10, dtype=torch.float16)
    assert [state.dtype for state in states] == [torch.float16, torch.float16]


def test_what_replaces_a_projection_is_called() -> None:
    """The original's fast path reads weights past adapters and hooks; they count here."""
    mamba, u = layer(), inputs()
    before = mamba(u)
    mamba.x_proj.register_forward_hook(lambda module, args, out: 2 * out)
    doubled = mamba(u)
    assert not torch.allclose(before, doubled, atol=1e-3)
    with torch.no_grad():
        plain = layer()
        plain.x_proj.weight.mul_(2)
        assert_layer(doubled, plain(u))
    for name in ("conv1d", "dt_proj", "out_proj"):
        # The same function, but no longer plain: steps and forward go by the modules.
        getattr(plain, name).register_forward_hook(lambda module, args, out: out)
    assert_layer(plain(u), doubled)
    states = plain.allocate_inference_cache(2, 7)
    with torch.no_grad():
        steps = [plain.step(u[:, t : t + 1], *states)[0] for t in range(7)]
    assert_layer(torch.cat(steps, dim=1), doubled)


def test_one_seed_gives_the_weights_of_the_original() -> None:
    """The original draws in this order: three layers, dt_proj, its weight again, its bias, one."""
    torch.manual_seed(5)
    mamba = Mamba(d_model=32)
    torch.manual_seed(5)
    for name, shape in {"in_proj": (128, 32), "conv1d": (64, 1, 4)}.items():
        module = (
            nn.Linear(32, 128, bias=False) if name == "in_proj" else nn.Conv1d(64, 64, 4, groups=64)
        )
        assert module.weight.shape == shape
        assert torch.equal(getattr(mamba, name).weight, module.weight)
    nn.Linear(64, 34, bias=False), nn.Linear(2, 64)
    drawn = torch.empty(64, 2).uniform_(-(2**-0.5), 2**-0.5)
    assert torch.equal(mamba.dt_proj.weight, drawn)
    steps = (torch.rand(64) * 4.605170186 - 6.907755279).exp()
    assert torch.allclose(nn.functional.softplus(mamba.dt_proj.bias), steps, atol=1e-6)
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 17.0).expand(64, 16))
    assert mamba.D.eq(1).all()


def test_marks_for_optimizers_and_initializers() -> None:
    mamba = layer()
    assert mamba.dt_proj.bias._no_reinit  # type: ignore[attr-defined]
    assert mamba.A_log._no_weight_decay  # type: ignore[attr-defined]
    assert mamba.D._no_weight_decay  # type: ignore[attr-defined]


def test_names_of_weights() -> None:
    layers = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    names = [f"{name}.{part}" for name in layers for part in ("weight", "bias")]
    names.remove("x_proj.bias")
    assert list(layer(bias=True).state_dict()) == ["A_log", "D", *names]


def test_wrong_uses_say_what_is_wrong() -> None:
    mamba, params = layer(), InferenceParams(max_seqlen=9, max_batch_size=2)
    with pytest.raises(ConfigError, match="dt_init is 'zero'"):
        layer(dt_init="zero")
    mamba(inputs(), inference_params=params)
    params.seqlen_offset = 7
    with pytest.raises(InputError, match="one token a call"):
        mamba(inputs(l=2), inference_params=params)
    with pytest.raises(InputError, match="holds 2 rows, the input has 3"):
        mamba(inputs(b=3, l=1), inference_params=params)
    with pytest.raises(InputError, match="needs a layer_idx"):
        layer(layer_idx=None)(inputs(), inference_params=params)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_a_block_adds_norms_and_mixes(fused: bool, residual_in_fp32: bool) -> None:
    torch.manual_seed(0)
    block = Block(
        12, lambda d: unhidden(Mamba(d)), nn.Identity, nn.LayerNorm, fused, residual_in_fp32
    )
    x, residual = inputs(), 3 * inputs()
    y, total = block(x, residual)
    assert_layer(total, x + residual)
    assert_layer(y, loops.mamba(block.mixer, nn.functional.layer_norm(x + residual, (12,))))
    first = block(x)
    assert torch.equal(first[1], x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.mixer.parameters())


@pytest.mark.parametrize("name", ["d_model", "d_state", "d_conv", "expand", "dt_rank"])
@pytest.mark.parametrize("size", [0, -1, None, float("nan")])
def test_sizes_that_make_no_layer_are_named(name: str, size: object) -> None:
    given: dict[str, Any] = {"d_model": 16} | {name: size}
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        Mamba(**given)

"""The drop-in's attention and feed-forward layers against plain loops."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.dropin.mamba_ssm.modules.mha import MHA
from anymamba.dropin.mamba_ssm.modules.mlp import GatedMLP
from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams
from anymamba.errors import ConfigError, InputError
from tests.support import loops
from tests.support.models import hidden, unhidden
from tests.support.stepping import prompt_and_steps
from tests.support.tolerance import assert_layer

inputs = partial(hidden, l=6)


def layer(**arguments: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "num_heads": 3, "causal": True, "layer_idx": 0}
    return unhidden(MHA(**sizes | arguments))


CAUSAL: list[dict[str, Any]] = [
    {},
    {"num_heads": 6, "num_heads_kv": 2, "head_dim": 4, "qkv_proj_bias": False},
    {"rotary_emb_dim": 4, "out_proj_bias": False},
    {"num_heads": 2, "num_heads_kv": 1, "rotary_emb_dim": 2, "rotary_emb_interleaved": True},
    {"d_conv": 3, "rotary_emb_dim": 2, "rotary_emb_base": 100.0},
    {"mlp_dim": 100, "softmax_scale": 0.3},
]
VARIANTS = [*CAUSAL, {"causal": False}, {"causal": False, "num_heads_kv": 1, "d_conv": 2}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_are_those_of_a_loop(variant: dict[str, Any]) -> None:
    mha = layer(**variant)
    assert_layer(mha(inputs()), loops.attention(mha, inputs()))
    loops.assert_layer_gradients(mha, inputs(), loops.attention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    mha = layer(dtype=dtype, rotary_emb_dim=4, d_conv=2)
    y = mha(inputs(dtype=dtype))
    assert y.dtype == dtype
    assert_layer(y, loops.attention(mha, inputs(dtype=dtype)))


@settings(max_examples=20)
@given(
    l=st.integers(1, 8),
    cut=st.integers(1, 8),
    b=st.integers(1, 3),
    variant=st.sampled_from(CAUSAL),
    by_lengths=st.booleans(),
)
def test_a_prompt_and_steps_give_what_forward_gives(
    l: int, cut: int, b: int, variant: dict[str, Any], by_lengths: bool
) -> None:
    mha, x = layer(**variant), inputs(b, l=l)
    lengths = torch.zeros(b, dtype=torch.int32) if by_lengths else None
    assert_layer(prompt_and_steps(mha, x, cut, lengths), loops.attention(mha, x))


def test_several_tokens_may_follow_a_prompt() -> None:
    mha, x = layer(rotary_emb_dim=4), inputs(l=7)
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        first = mha(x[:, :3], inference_params=params)
        params.seqlen_offset = 3
        rest = mha(x[:, 3:], inference_params=params)
        assert_layer(torch.cat([first, rest], dim=1), loops.attention(mha, x))


def test_rows_of_different_lengths() -> None:
    """Each row goes on behind its own prompt, and does not see what stands behind that."""
    mha, x = layer(rotary_emb_dim=4), inputs(b=2, l=6)
    params = InferenceParams(
        max_seqlen=9, max_batch_size=2, lengths_per_sample=torch.tensor([0, 0])
    )
    with torch.no_grad():
        mha(x[:, :5], inference_params=params)
        params.seqlen_offset = 5
        params.lengths_per_sample = torch.tensor([2, 5])
        y = mha(x[:, 5:], inference_params=params)
        shorter = torch.cat([x[:1, :2], x[:1, 5:]], dim=1)
        assert_layer(y[:1], loops.attention(mha, shorter)[:, -1:])
        assert_layer(y[1:], loops.attention(mha, x[1:])[:, -1:])


def test_a_batch_in_two_parts() -> None:
    mha, x = layer(d_conv=2), inputs(b=3)
    cache = {0: mha.allocate_inference_cache(3, 6)}
    with torch.no_grad():
        for start, rows in ((0, x[:1]), (1, x[1:])):
            params = InferenceParams(6, 3, 0, start, cache)
            head = mha(rows[:, :5], inference_params=params)
            params.seqlen_offset = 5
            tail = mha(rows[:, 5:], inference_params=params)
            assert_layer(torch.cat([head, tail], dim=1), loops.attention(mha, rows))


def test_the_cache() -> None:
    keys_values, conv_state = layer(num_heads_kv=1, d_conv=3).allocate_inference_cache(2, 9)
    assert keys_values.shape == (2, 9, 2, 1, 4)
    assert conv_state.shape == (2, 4 * (3 + 2), 3)
    keys_values, conv_state = layer().allocate_inference_cache(2, 9, dtype=torch.float16)
    assert keys_values.dtype == torch.float16
    assert conv_state is None


def test_names_of_weights() -> None:
    names = ["in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"]
    assert list(layer(rotary_emb_dim=4).state_dict()) == names
    assert sorted(layer(d_conv=2).state_dict()) == sorted([*names, "conv1d.weight", "conv1d.bias"])
    assert layer(mlp_dim=300).in_proj.weight.shape == (36 + 512, 12)
    assert layer(mlp_dim=300).out_proj.weight.shape == (12, 12 + 256)


def test_wrong_uses_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="num_heads_kv=2"):
        layer(num_heads_kv=2)
    with pytest.raises(ConfigError, match="embed_dim=12, num_heads=5"):
        layer(num_heads=5)
    with pytest.raises(ConfigError, match="rotary_emb_dim is 3"):
        layer(rotary_emb_dim=3)
    params = InferenceParams(max_seqlen=5, max_batch_size=2)
    with pytest.raises(InputError, match="room for 5 tokens, and 6 are needed"):
        layer()(inputs(), inference_params=params)
    with pytest.raises(InputError, match="holds 2 rows"):
        layer()(inputs(b=3, l=1), inference_params=params)
    with pytest.raises(InputError, match="needs a layer_idx"):
        layer(layer_idx=None)(inputs(), inference_params=params)


def test_the_gated_mlp() -> None:
    torch.manual_seed(0)
    mlp, x = GatedMLP(12, 20, 5, activation=torch.tanh, bias=True, multiple_of=16), inputs()
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert mlp.fc2.weight.shape == (5, 32)
    up, gate = loops.linear(mlp.fc1, x.double()).chunk(2, dim=-1)
    assert_layer(mlp(x), loops.linear(mlp.fc2, up * gate.tanh()))
    assert list(GatedMLP(12).state_dict()) == ["fc1.weight", "fc2.weight"]
    assert GatedMLP(100).fc1.weight.shape == (2 * 384, 100)

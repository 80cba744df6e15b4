"""The drop-in's Mamba-2 layers against a loop over time and Transformers' mixer."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from anymamba import minimal_mamba2
from anymamba.dropin.mamba_ssm.modules.mamba2 import Mamba2
from anymamba.dropin.mamba_ssm.modules.mamba2_simple import Mamba2Simple
from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams
from anymamba.errors import ConfigError, InputError, NotIncludedError
from tests.support import loops
from tests.support.instruction_sets import ISAS
from tests.support.models import hidden, unhidden
from tests.support.operators import natively
from tests.support.stepping import prompt_and_steps
from tests.support.tolerance import assert_layer

SMALL = {"d_model": 12, "d_state": 6, "headdim": 4, "chunk_size": 8, "layer_idx": 0}
inputs = partial(hidden, l=21)


def layer(kind: type = Mamba2, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return unhidden(kind(**SMALL | arguments))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"ngroups": 3, "D_has_hdim": True},
    {"d_ssm": 8, "bias": True},
    {"rmsnorm": False, "conv_bias": False},
    {"norm_before_gate": True, "dt_limit": (0.02, 0.1)},
    {"rmsnorm": False, "d_ssm": 16, "D_has_hdim": True, "ngroups": 2, "d_conv": 3},
]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_are_those_of_a_loop(variant: dict[str, Any], fast: bool) -> None:
    mamba, u = layer(**variant, use_mem_eff_path=fast), inputs()
    slow = partial(loops.mamba2, d_ssm=mamba.d_ssm)
    assert_layer(mamba(u), slow(mamba, u))
    loops.assert_layer_gradients(mamba, u, slow)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_native_kernels_compute_it(variant: dict[str, Any], isa: str) -> None:
    """Demanded of the core, whose refusal would be an error."""
    mamba, u = layer(**variant), inputs()
    slow = partial(loops.mamba2, d_ssm=mamba.d_ssm)
    with natively(isa):
        found = mamba(u)
        loops.assert_layer_gradients(mamba, u, slow)
        with torch.no_grad():
            continued = prompt_and_steps(mamba, u, 19)
    assert_layer(found, slow(mamba, u))
    assert_layer(continued, found)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"ngroups": 3, "bias": True},
        {"norm_before_gate": True, "ngroups": 2, "dt_limit": (0.02, 0.1)},
        {"conv_bias": False, "d_conv": 3, "expand": 1},
    ],
)
def test_the_specification_of_the_same_weights(variant: dict[str, Any]) -> None:
    mamba, u = layer(**variant), inputs()
    sizes = {name: size for name, size in SMALL.items() if name != "layer_idx"}
    args = minimal_mamba2.ModelArgs(n_layer=1, vocab_size=1, **sizes | variant)
    block = minimal_mamba2.Mamba2Block(args)
    block.load_state_dict(mamba.state_dict())
    assert_layer(mamba(u), block(u))
    loops.assert_layer_gradients(mamba, u, lambda _mamba, x: _by_specification(mamba, args, x))


def _by_specification(mamba: Any, args: Any, u: torch.Tensor) -> torch.Tensor:
    """The specification's block on the layer's own weights, which get the gradients."""
    block = minimal_mamba2.Mamba2Block(args)
    weights = dict(mamba.named_parameters())
    result: torch.Tensor = torch.func.functional_call(block, weights, (u,))
    return result


@pytest.mark.parametrize("groups", [1, 3])
def test_transformers_mixer_of_the_same_weights(groups: int) -> None:
    mamba = layer(ngroups=groups)
    config = Mamba2Config(
        hidden_size=12, state_size=6, head_dim=4, num_heads=6, n_groups=groups, chunk_size=8,
        expand=2, layer_norm_epsilon=1e-5, num_hidden_layers=1,
    )  # fmt: skip
    mixer = Mamba2Mixer(config, layer_idx=0)
    mixer.load_state_dict(mamba.state_dict())
    assert_layer(mamba(inputs()), mixer(inputs()))


@pytest.mark.parametrize(("b", "l"), [(1, 1), (3, 2), (0, 4), (2, 8)])
def test_short_and_empty_inputs(b: int, l: int) -> None:
    mamba, u = layer(), inputs(b, l=l)
    assert_layer(mamba(u), loops.mamba2(mamba, u))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, fast: bool) -> None:
    mamba = layer(dtype=dtype, use_mem_eff_path=fast)
    y = mamba(inputs(dtype=dtype))
    assert y.dtype == dtype
    assert_layer(y, loops.mamba2(mamba, inputs(dtype=dtype)))


@pytest.mark.parametrize("fast", [True, False])
def test_rows_of_two_dimensions(fast: bool) -> None:
    mamba, u = layer(use_mem_eff_path=fast), inputs()
    assert_layer(mamba(u.flatten(0, 1), seqlen=21), mamba(u).flatten(0, 1))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("said_by", ["seq_idx", "cu_seqlens", "both"])
def test_packed_sequences_do_not_see_each_other(said_by: str, fast: bool) -> None:
    mamba, u = layer(use_mem_eff_path=fast), inputs(b=1)
    cu_seqlens = torch.tensor([0, 5, 6, 21], dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 5 + [1] + [2] * 15], dtype=torch.int32)
    said = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    packed = mamba(u, **(said if said_by == "both" else {said_by: said[said_by]}))
    assert_layer(packed, loops.mamba2(mamba, u, starts=(5, 6)))


@settings(max_examples=20)
@given(
    l=st.integers(1, 12),
    cut=st.integers(1, 12),
    b=st.integers(1, 3),
    variant=st.sampled_from(VARIANTS),
)
def test_a_prompt_and_steps_give_what_forward_gives(
    l: int, cut: int, b: int, variant: dict[str, Any]
) -> None:
    mamba, u = layer(**variant), inputs(b, l=l)
    expected = loops.mamba2(mamba, u, d_ssm=mamba.d_ssm)
    assert_layer(prompt_and_steps(mamba, u, cut), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_every_variant(variant: dict[str, Any]) -> None:
    mamba, u = layer(**variant), inputs(l=9)
    states = mamba.allocate_inference_cache(2, 9)
    with torch.no_grad():
        steps = [mamba.step(u[:, t : t + 1], *states)[0] for t in range(9)]
        assert_layer(torch.cat(steps, dim=1), loops.mamba2(mamba, u, d_ssm=mamba.d_ssm))


@pytest.mark.parametrize("mark", [-1, 3])
@pytest.mark.parametrize("empty", [True, False])
def test_padding_behind_the_last_packed_sequence(mark: int, empty: bool) -> None:
    """As upstream tests it: offsets end before the row does, perhaps with an empty sequence."""
    mamba, lengths, padding = layer(ngroups=2), [7, 4, 5], 6
    u = inputs(1, l=sum(lengths) + padding)
    numbers = [i for i, l in enumerate(lengths) for _ in range(l)] + [mark] * padding
    ends = torch.tensor([0, 7, 11, 16, *([16] if empty else [])], dtype=torch.int32)
    params = InferenceParams(max_seqlen=64, max_batch_size=len(ends) - 1)
    with torch.no_grad():
        seq_idx = torch.tensor([numbers], dtype=torch.int32)
        y = mamba(u, seq_idx=seq_idx, cu_seqlens=ends, inference_params=params)
        alone = mamba(u, cu_seqlens=ends)
        params.seqlen_offset = 1
        step = inputs(1, l=1).expand(len(ends) - 1, -1, -1)
        after = mamba(step, inference_params=params)
        for i, (start, stop) in enumerate(pairwise(ends)):
            row = torch.cat([u[:, start:stop], inputs(1, l=1)], dim=1)
            expected = loops.mamba2(mamba, row)
            assert_layer(y[:, start:stop], expected[:, :-1])
            assert_layer(alone[:, start:stop], expected[:, :-1])
            assert_layer(after[i : i + 1], expected[:, -1:])


def test_packed_prompts_and_steps_of_each() -> None:
    mamba = layer(ngroups=2)
    rows = [inputs(1, l=7), 2 * inputs(1, l=3), -inputs(1, l=9)]
    prompts = [5, 2, 6]
    packed = torch.cat([row[:, :l] for row, l in zip(rows, prompts, strict=True)], dim=1)
    params = InferenceParams(max_seqlen=9, max_batch_size=3)
    with torch.no_grad():
        cu_seqlens = torch.tensor([0, 5, 7, 13], dtype=torch.int32)
        mamba(packed, cu_seqlens=cu_seqlens, inference_params=params)
        params.seqlen_offset = 1
        following = torch.stack([row[0, l] for row, l in zip(rows, prompts, strict=True)])
        y = mamba(following.unsqueeze(1), inference_params=params)
        for i, (row, l) in enumerate(zip(rows, prompts, strict=True)):
            assert_layer(y[i : i + 1], loops.mamba2(mamba, row)[:, l : l + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_from_nothing(dtype: torch.dtype) -> None:
    mamba, u = layer(dtype=dtype), inputs(l=30, dtype=dtype)
    conv_state, ssm_state = mamba.allocate_inference_cache(2, 30)
    assert conv_state.shape == (2, 36, 4)
    assert conv_state.stride(1) == 1
    assert ssm_state.shape == (2, 6, 4, 6)
    assert ssm_state.dtype == torch.float32
    with torch.no_grad():
        steps = [mamba.step(u[:, t : t + 1], conv_state, ssm_state)[0] for t in range(30)]
        assert_layer(torch.cat(steps, dim=1), loops.mamba2(mamba, u))


def test_what_replaces_a_projection_is_called() -> None:
    mamba, u = layer(), inputs()
    before = mamba(u)
    mamba.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
    assert_layer(mamba(u), 2 * before)


def test_what_replaces_the_convolution_is_called_for_packed_sequences() -> None:
    mamba, u = layer(), inputs(b=2)
    seq_idx = torch.tensor([[0] * 5 + [1] * 16, [3] * 20 + [-1]], dtype=torch.int32)
    hooked = layer()
    hooked.conv1d.register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        for weight in mamba.conv1d.parameters():
            weight.mul_(2)
        assert_layer(hooked(u, seq_idx=seq_idx), mamba(u, seq_idx=seq_idx))


def test_names_of_weights() -> None:
    names = ["dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias"]
    names += ["norm.weight", "out_proj.weight"]
    assert list(layer().state_dict()) == names
    assert list(layer(Mamba2Simple).state_dict()) == names
    assert list(layer(rmsnorm=False).state_dict()) == [n for n in names if n != "norm.weight"]
    learnable = layer(Mamba2Simple, learnable_init_states=True)
    assert sorted(learnable.state_dict()) == sorted([*names, "init_states"])


def test_sizes_and_first_values_are_the_originals() -> None:
    torch.manual_seed(0)
    mamba = Mamba2(64, dt_min=0.01, dt_max=0.02, A_init_range=(2, 3), conv_init=0.01)
    assert {name: tuple(weight.shape) for name, weight in mamba.state_dict().items()} == {
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (2,),
        "in_proj.weight": (128 + 128 + 256 + 2, 64),
        "conv1d.weight": (128 + 256, 1, 4),
        "conv1d.bias": (128 + 256,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    steps = torch.nn.functional.softplus(mamba.dt_bias)
    assert steps.gt(0.0099).all()
    assert steps.lt(0.0201).all()
    rates = mamba.A_log.exp()
    assert rates.ge(1.999).all()
    assert rates.le(3.001).all()
    assert mamba.conv1d.weight.abs().max() <= 0.01
    assert mamba.D.eq(1).all()
    assert all(getattr(mamba, name)._no_weight_decay for name in ("dt_bias", "A_log", "D"))
    half = Mamba2(64, dtype=torch.bfloat16)
    assert half.A_log.dtype == half.dt_bias.dtype == torch.bfloat16
    assert half.D.dtype == torch.float32


def test_a_layer_is_saved_and_loaded_by_its_mixin(tmp_path) -> None:
    layer(dt_limit=(0.02, 0.1)).save_pretrained(tmp_path)
    loaded = Mamba2.from_pretrained(tmp_path)
    assert_layer(loaded(inputs()), layer(dt_limit=(0.02, 0.1))(inputs()))


def test_wrong_uses_say_what_is_wrong() -> None:
    with pytest.raises(NotIncludedError, match=r"process_group.*docs/drop-in\.md"):
        layer(process_group=object())
    with pytest.raises(ConfigError, match="headdim=5"):
        layer(headdim=5)
    with pytest.raises(ConfigError, match="ngroups=4"):
        layer(ngroups=4)
    with pytest.raises(ConfigError, match="A_init_range"):
        layer(A_init_range=(3, 2))
    with pytest.raises(ConfigError, match="activation is 'relu'"):
        layer(Mamba2Simple, activation="relu")
    with pytest.raises(InputError, match="in one row, the input has 2"):
        layer()(inputs(), cu_seqlens=torch.tensor([0, 3, 21]))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "variant", [{}, {"ngroups": 3, "bias": True}, {"learnable_init_states": True}]
)
def test_the_simple_layer_is_a_loop(variant: dict[str, Any], fast: bool) -> None:
    mamba, u = layer(Mamba2Simple, **variant, use_mem_eff_path=fast), inputs()

    def slow(module: Any, x: torch.Tensor) -> torch.Tensor:
        return loops.mamba2(module, x, first_state=getattr(module, "init_states", None))

    assert_layer(mamba(u), slow(mamba, u))
    loops.assert_layer_gradients(mamba, u, slow)


@pytest.mark.parametrize("fast", [True, False])
def test_the_simple_layer_takes_packed_sequences(fast: bool) -> None:
    mamba, u = layer(Mamba2Simple, use_mem_eff_path=fast), inputs(b=1)
    seq_idx = torch.tensor([[4] * 9 + [7] * 12], dtype=torch.int32)
    assert_layer(mamba(u, seq_idx=seq_idx), loops.mamba2(mamba, u, starts=(9,)))


@pytest.mark.parametrize("layer", [Mamba2, Mamba2Simple])
@pytest.mark.parametrize("name", ["d_model", "d_state", "d_conv", "headdim", "ngroups", "expand"])
@pytest.mark.parametrize("size", [0, -1, "x"])
def test_sizes_that_make_no_layer_are_named(layer: Any, name: str, size: object) -> None:
    given: dict[str, Any] = {"d_model": 16, "headdim": 8, "d_state": 4} | {name: size}
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        layer(**given)

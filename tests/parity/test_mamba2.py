"""What Mamba-2 alone has: the original layout, states of heads, and native passes of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.parity.architectures import MAMBA2, OPTIONS, run_anymamba, run_specification, tokens
from tests.support.instruction_sets import ISAS
from tests.support.tolerance import assert_same

import anymamba
from anymamba import _core, minimal_mamba2, ops
from anymamba.checkpoint import architecture
from anymamba.errors import CheckpointError, ConfigError, InputError, StateError
from anymamba.layers.native import core_tensors
from anymamba.modeling.fused import why_not_fused

NATIVE = {**MAMBA2.shapes, **OPTIONS}


def test_states_are_saved_forked_and_refused(tmp_path: Path) -> None:
    _, ours = MAMBA2.pair()
    ids = tokens(2, 12)
    cache = ours(ids[:, :5], use_cache=True).cache
    assert cache.ssm_states.shape == (2, 2, 8, 6, 5)
    assert cache.conv_states.shape == (2, 2, 48 + 2 * 2 * 5, 4)
    cache.save(tmp_path / "state", model=ours)
    again = anymamba.MambaCache.load(tmp_path / "state", model=ours)
    assert_same(ours(ids[:, 5:], cache=again).logits, ours(ids).logits[:, 5:])
    other = anymamba.Mamba2Config(**MAMBA2.base | {"num_heads": 4, "head_dim": 12})
    with pytest.raises(StateError, match="num_heads=8"):
        anymamba.MambaCache.load(tmp_path / "state", config=other)
    with pytest.raises(InputError, match="cache holds states of shape"):
        ours(ids, cache=anymamba.MambaCache(other, 2))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_original_as_specified(name: str) -> None:
    ours, ids = MAMBA2.model(**OPTIONS[name]), tokens(2, 19)
    found = run_anymamba(ours, ids)
    specified = MAMBA2.specification(ours)
    found.agrees(run_specification(specified, ids, found.gradients))
    usual = MAMBA2.model(**OPTIONS[name] | {"gate_after_norm": False, "use_gated_norm": True})
    usual.load_state_dict(ours.state_dict(), strict=False)
    with torch.no_grad():
        assert float((usual(ids).logits - found.logits).abs().max()) > 1e-2
        mask = torch.tensor([[0] * 4 + [1] * 15, [1] * 19])
        masked = ours(ids, attention_mask=mask).logits
        packed = ours(ids.view(1, -1), cu_seq_lens_q=torch.tensor([0, 19, 38])).logits
        assert_same(masked[0, 4:], ours(ids[:1, 4:]).logits[0])
        assert_same(packed.view(found.logits.shape), found.logits)


@pytest.mark.parametrize("options", [{}, {"norm_before_gate": True}, {"rmsnorm": False}])
def test_the_original_layout_loads(options: dict[str, bool], tmp_path: Path) -> None:
    layer = {"d_state": 5, "headdim": 6, "ngroups": 2, "chunk_size": 8, **options}
    args: Any = {"d_model": 24, "n_layer": 2, "vocab_size": 48, **layer}
    model = minimal_mamba2.Mamba2(minimal_mamba2.ModelArgs(**args))
    weights = {f"backbone.{n}": w for n, w in model.state_dict().items() if "lm_head" not in n}
    save_file(
        weights | {"lm_head.weight": model.lm_head.weight.clone()}, tmp_path / "model.safetensors"
    )
    fields = {"d_model": 24, "n_layer": 2, "vocab_size": 48, "pad_vocab_size_multiple": 16}
    described = fields | {"ssm_cfg": {"layer": "Mamba2", **layer}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    ours = anymamba.Mamba2ForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 9)
    assert_same(ours(ids).logits, model(ids))
    assert_same(anymamba.load(tmp_path).logits(ids[0].tolist()), model(ids)[0].detach())
    ours.save_pretrained(tmp_path / "ours")
    again = anymamba.Mamba2ForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert_same(minimal_mamba2.Mamba2.from_pretrained(tmp_path / "ours")(ids), model(ids))


@pytest.mark.parametrize("option", ["D_has_hdim", "d_ssm"])
def test_other_options_of_the_original_are_refused(option: str, tmp_path: Path) -> None:
    layer = {"layer": "Mamba2", "headdim": 6, option: 6}
    fields = {"d_model": 24, "n_layer": 2, "vocab_size": 48, "ssm_cfg": layer}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=f"ssm_cfg.{option} is 6.*drop-in"):
        anymamba.load(tmp_path)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [name for name in NATIVE if name != "another activation"])
@torch.no_grad()
def test_the_native_core_computes_the_same(name: str, isa: str) -> None:
    ours = MAMBA2.model(**NATIVE[name])
    ids = tokens(2, 83)
    with ops.backend("reference"):
        expected = ours(ids, use_cache=True)
    before = _core.isa()
    _core.use_isa(isa)
    try:
        assert why_not_fused(ours) is None
        prompt = ours(ids[:, :75], use_cache=True)
        parts = [prompt.logits]
        for step in range(75, 83):
            parts.append(ours(ids[:, step : step + 1], cache=prompt.cache).logits)
    finally:
        _core.use_isa(before)
    assert_same(torch.cat(parts, 1), expected.logits)
    assert_same(prompt.cache.ssm_states, expected.cache.ssm_states)
    assert_same(prompt.cache.conv_states, expected.cache.conv_states)


@pytest.mark.parametrize("batch", [3, 70])  # more rows than a step takes are a prompt of one each
@torch.no_grad()
def test_native_steps_of_a_batch(batch: int) -> None:
    _, ours = MAMBA2.pair()
    ids, row = tokens(batch, 4), batch // 2
    cache = anymamba.MambaCache.for_model(ours, batch)
    together = torch.cat([ours(ids[:, i : i + 1], cache=cache).logits for i in range(4)], 1)
    assert_same(together[row], ours(ids[row : row + 1]).logits[0])


@pytest.mark.parametrize("name", ["limited steps", *OPTIONS])
@torch.no_grad()
def test_a_mixer_steps_alone(name: str) -> None:
    ours = MAMBA2.model(**NATIVE[name])
    mixer, cache = ours.backbone.layers[1].mixer, anymamba.MambaCache.for_model(ours, 3)
    native = _core.Mixer(
        core_tensors(mixer, architecture.MAMBA2), *(24, *mixer.core_settings().values())
    )
    window, state, y = cache.conv_states[0].clone(), cache.ssm_states[0].clone(), torch.empty(3, 24)
    for x in torch.randn(4, 3, 24):
        native.step(x, window, state, y)
        assert_same(y, mixer(x[:, None], cache.layer(1))[:, 0])
    assert_same(state, cache.ssm_states[1])


@pytest.mark.parametrize("change", ["group_size", "variance_epsilon", "norm_before_gate", "a hook"])
@torch.no_grad()
def test_a_changed_mixer_goes_through_its_modules(change: str) -> None:
    _, ours = MAMBA2.pair()
    ids = tokens(1, 5)
    before, norm = ours(ids).logits, ours.backbone.layers[1].mixer.norm
    if change == "a hook":
        norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        changed = {"group_size": 8, "variance_epsilon": 1.0, "norm_before_gate": True}
        setattr(norm, change, changed[change])
    assert why_not_fused(ours) is not None
    assert float((ours(ids).logits - before).abs().max()) > 1e-3


@torch.no_grad()
def test_the_runtime_computes_the_same(tmp_path: Path) -> None:
    _, ours = MAMBA2.pair(**MAMBA2.shapes["limited steps"], layer_norm_epsilon=0.1)
    ours.save_pretrained(tmp_path)
    ids = tokens(1, 83)
    with ops.backend("reference"):
        expected = ours(ids).logits[0]
    assert_same(anymamba.load(tmp_path).logits(ids[0].tolist()), expected.numpy())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"time_step_limit": [2, 1]}))
    with pytest.raises(CheckpointError, match="time_step_limit"):
        anymamba.load(tmp_path)


def test_config() -> None:
    theirs = transformers.Mamba2Config(hidden_size=32, num_heads=4, head_dim=16).to_dict()
    config = anymamba.Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, n_groups=4)
    # A tuple there, a list of Transformers' words for infinity here: the same pair.
    same = {n: v for n, v in theirs.items() if n not in ("n_groups", "time_step_limit")}
    assert {name: config.to_dict()[name] for name in same} == same
    for fields, word in (
        ({"num_heads": 3}, "num_heads=3 times head_dim=64"),
        ({"n_groups": 3}, "n_groups=3"),
        ({"time_step_limit": (1, 0)}, "time_step_limit"),
    ):
        with pytest.raises(ConfigError, match=word):
            anymamba.Mamba2Config(**fields)

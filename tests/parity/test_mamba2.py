"""Mamba-2 beside Transformers' own class and the specification, with the same weights."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parity.test_three_way import run_anymamba, run_transformers, with_gradients
from tests.support.operators import ISAS
from tests.support.tolerance import assert_same, naming
from torch import Tensor

import anymamba
from anymamba import _core, minimal_mamba2, ops
from anymamba.checkpoint.architecture import MAMBA2
from anymamba.errors import CheckpointError, ConfigError, InputError, StateError
from anymamba.layers.native import core_tensors
from anymamba.modeling.fused import why_not_fused

# Every size is another, and chunks are shorter than the texts.
BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "state_size": 5,
    "num_heads": 8,
    "head_dim": 6,
    "n_groups": 2,
    "chunk_size": 8,
    "pad_token_id": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "one group": {"n_groups": 1},
    "a group for each head": {"n_groups": 8},
    "one head": {"num_heads": 1, "head_dim": 48, "n_groups": 1},
    "heads of width one": {"num_heads": 48, "head_dim": 1},
    "state of 64": {"state_size": 64},
    "state of 1": {"state_size": 1},
    "kernel of 2": {"conv_kernel": 2},
    "biases everywhere": {"use_bias": True, "use_conv_bias": True},
    "no bias at all": {"use_bias": False, "use_conv_bias": False},
    "tied head": {"tie_word_embeddings": True},
    "limited steps": {"time_step_limit": (0.2, 0.4)},
    "chunks longer than the text": {"chunk_size": 256},
    "another activation": {"hidden_act": "gelu"},
    "all at once": {
        "hidden_size": 20,
        "expand": 3,
        "num_heads": 4,
        "head_dim": 15,
        "n_groups": 4,
        "conv_kernel": 3,
        "num_hidden_layers": 3,
        "use_bias": True,
        "vocab_size": 37,
    },
}


def pair(**fields: Any) -> tuple[Any, Any]:
    """Transformers' model and ours with equal weights, no bias zero and no two rows alike."""
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**BASE | fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ours = anymamba.Mamba2ForCausalLM(anymamba.Mamba2Config(**BASE | fields)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def tokens(b: int, l: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 37, (b, l), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_layers_and_gradients(name: str) -> None:
    theirs, ours = pair(**SHAPES[name])
    ids = tokens(2, 19)
    expected = with_gradients(run_transformers, theirs, ids)
    actual = with_gradients(run_anymamba, ours, ids)
    assert_same(actual.logits, expected.logits)
    assert_same(actual.loss, expected.loss)
    for mine, its in zip(actual.layers, expected.layers, strict=True):
        assert_same(mine, its)
    for tensor, gradient in expected.gradients.items():
        with naming(f"gradient of {tensor}"):
            assert_same(actual.gradients[tensor], gradient)


@pytest.mark.parametrize("name", ["default", "biases everywhere", "tied head", "limited steps"])
def test_the_specification_computes_the_same(name: str, tmp_path: Path) -> None:
    _, ours = pair(**SHAPES[name])
    ours.save_pretrained(tmp_path)
    specified = minimal_mamba2.Mamba2.from_pretrained(tmp_path)
    assert_same(ours(tokens(2, 19)).logits, specified(tokens(2, 19)))


@pytest.mark.parametrize("name", ["default", "one head", "all at once"])
@torch.no_grad()
def test_error_beside_float64(name: str) -> None:
    theirs, ours = pair(**SHAPES[name])
    ids = tokens(2, 40)
    found = [model(ids).logits.double() for model in (theirs, ours)]
    # In float64 the specification; Transformers' class computes parts of it in float32 always.
    exact = ours.double()(ids).logits
    their_error, our_error = (float((logits - exact).abs().max()) for logits in found)
    # Twice theirs, and beyond that what the last digit of the largest logit is.
    assert our_error <= 2 * their_error + float(exact.abs().max()) * 2**-23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_types(dtype: torch.dtype) -> None:
    _, ours = pair()
    ids = tokens(2, 19)
    expected = ours.to(dtype).float()(ids).logits
    # bfloat16 keeps 8 bits of each activation.
    assert_same(ours.to(dtype)(ids).logits, expected, share=5e-2)


@pytest.mark.parametrize("batch", [1, 3])
def test_generation(batch: int) -> None:
    theirs, ours = pair()
    ids = tokens(batch, 7)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24}
    arguments["eos_token_id"] = None
    greedy = ours.generate(ids, do_sample=False, **arguments)
    assert torch.equal(greedy, theirs.generate(ids, do_sample=False, **arguments))
    beams = ours.generate(ids, num_beams=2, do_sample=False, **arguments)
    assert torch.equal(beams, theirs.generate(ids, num_beams=2, do_sample=False, **arguments))


@pytest.mark.parametrize("masked", [0, 3, 8])
def test_padded_rows_are_as_alone(masked: int) -> None:
    _, ours = pair()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :masked] = 0
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    padded = ours.generate(ids, attention_mask=mask, **settings)
    alone = ours.generate(ids[1:, masked:], **settings)
    assert torch.equal(padded[1, 12:], alone[0, 12 - masked :])


_, OURS = pair()


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=4), grad=st.booleans())
def test_cuts_change_nothing(length: int, cuts: list[int], grad: bool) -> None:
    ids = tokens(2, length)
    borders = sorted({0, length, *(cut for cut in cuts if cut < length)})
    with torch.set_grad_enabled(grad):
        whole, cache, parts = OURS(ids).logits, None, []
        for start, stop in pairwise(borders):
            output = OURS(ids[:, start:stop], cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)
    assert_same(torch.cat(parts, 1), whole)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_packed_documents_are_as_alone(lengths: list[int]) -> None:
    documents = [tokens(1, length, seed) for seed, length in enumerate(lengths)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = OURS(torch.cat(documents, 1), cu_seq_lens_q=offsets.int()).logits
    assert_same(packed, torch.cat([OURS(document).logits for document in documents], 1))


@settings(max_examples=25, deadline=None)
@given(
    mask=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3),
    before=st.integers(0, 3),
)
def test_masked_positions_count_as_deleted(mask: list[list[bool]], before: int) -> None:
    kept = torch.tensor(mask)
    ids, head = tokens(len(mask), 7), tokens(len(mask), before, seed=5)
    cache = anymamba.MambaCache.for_model(OURS, len(mask))
    with torch.no_grad():
        if before:
            OURS(head, cache=cache)
        masked = OURS(ids, cache=cache, attention_mask=kept.long()).logits
        for row in range(len(mask)):
            text = torch.cat([head[row], ids[row][kept[row]]])[None]
            if kept[row].any():
                alone = OURS(text, use_cache=True)
                assert_same(masked[row][kept[row]], alone.logits[0, before:])
                assert_same(cache.ssm_states[:, row], alone.cache.ssm_states[:, 0])
                assert_same(cache.conv_states[:, row], alone.cache.conv_states[:, 0])


def test_checkpointing_changes_nothing() -> None:
    _, ours = pair()
    ids = tokens(2, 9)
    expected = with_gradients(run_anymamba, ours, ids)
    ours.zero_grad()
    ours.train().gradient_checkpointing_enable()
    assert_same(with_gradients(run_anymamba, ours, ids).logits, expected.logits)


def test_states_are_saved_forked_and_refused(tmp_path: Path) -> None:
    _, ours = pair()
    ids = tokens(2, 12)
    cache = ours(ids[:, :5], use_cache=True).cache
    assert cache.ssm_states.shape == (2, 2, 8, 6, 5)
    assert cache.conv_states.shape == (2, 2, 48 + 2 * 2 * 5, 4)
    cache.save(tmp_path / "state", model=ours)
    again = anymamba.MambaCache.load(tmp_path / "state", model=ours)
    assert_same(ours(ids[:, 5:], cache=again).logits, ours(ids).logits[:, 5:])
    other = anymamba.Mamba2Config(**BASE | {"num_heads": 4, "head_dim": 12})
    with pytest.raises(StateError, match="num_heads=8"):
        anymamba.MambaCache.load(tmp_path / "state", config=other)
    with pytest.raises(InputError, match="cache holds states of shape"):
        ours(ids, cache=anymamba.MambaCache(other, 2))


def test_files_there_and_back(tmp_path: Path) -> None:
    theirs, ours = pair(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    ids = tokens(1, 9)
    expected = theirs(ids).logits
    for cls, folder in (
        (anymamba.Mamba2ForCausalLM, "theirs"),
        (transformers.Mamba2ForCausalLM, "ours"),
    ):
        assert_same(cls.from_pretrained(tmp_path / folder)(ids).logits, expected)
    config = anymamba.Mamba2Config.from_pretrained(tmp_path / "theirs")
    assert config == anymamba.Mamba2Config.from_pretrained(tmp_path / "ours")


def test_the_original_layout_loads(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    args = minimal_mamba2.ModelArgs(
        d_model=24, n_layer=2, vocab_size=48, d_state=5, headdim=6, chunk_size=8
    )
    model = minimal_mamba2.Mamba2(args)
    weights = {f"backbone.{n}": w for n, w in model.state_dict().items() if "lm_head" not in n}
    save_file(
        weights | {"lm_head.weight": model.lm_head.weight.clone()}, tmp_path / "model.safetensors"
    )
    layer = {"layer": "Mamba2", "d_state": 5, "headdim": 6, "chunk_size": 8}
    fields = {"d_model": 24, "n_layer": 2, "vocab_size": 48, "pad_vocab_size_multiple": 16}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"ssm_cfg": layer}))
    ours = anymamba.Mamba2ForCausalLM.from_pretrained(tmp_path)
    assert_same(ours(tokens(2, 9)).logits, model(tokens(2, 9)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "another activation"])
@torch.no_grad()
def test_the_native_core_computes_the_same(name: str, isa: str) -> None:
    _, ours = pair(**SHAPES[name])
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
    _, ours = pair()
    ids, row = tokens(batch, 4), batch // 2
    cache = anymamba.MambaCache.for_model(ours, batch)
    together = torch.cat([ours(ids[:, i : i + 1], cache=cache).logits for i in range(4)], 1)
    assert_same(together[row], ours(ids[row : row + 1]).logits[0])


@torch.no_grad()
def test_a_mixer_steps_alone() -> None:
    _, ours = pair(**SHAPES["limited steps"])
    mixer, cache = ours.backbone.layers[1].mixer, anymamba.MambaCache.for_model(ours, 3)
    native = _core.Mixer(core_tensors(mixer, MAMBA2), *(24, *mixer.core_settings().values()))
    window, state, y = cache.conv_states[0].clone(), cache.ssm_states[0].clone(), torch.empty(3, 24)
    for x in torch.randn(4, 3, 24):
        native.step(x, window, state, y)
        assert_same(y, mixer(x[:, None], cache.layer(1))[:, 0])
    assert_same(state, cache.ssm_states[1])


@pytest.mark.parametrize("change", ["group_size", "variance_epsilon", "a hook"])
@torch.no_grad()
def test_a_changed_mixer_goes_through_its_modules(change: str) -> None:
    _, ours = pair()
    ids = tokens(1, 5)
    before, norm = ours(ids).logits, ours.backbone.layers[1].mixer.norm
    if change == "a hook":
        norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        setattr(norm, change, {"group_size": 8, "variance_epsilon": 1.0}[change])
    assert why_not_fused(ours) is not None
    assert float((ours(ids).logits - before).abs().max()) > 1e-3


@torch.no_grad()
def test_the_runtime_computes_the_same(tmp_path: Path) -> None:
    _, ours = pair(**SHAPES["limited steps"], layer_norm_epsilon=0.1)
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

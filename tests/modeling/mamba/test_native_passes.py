"""Whole passes and prompts on the native core, in one call and in chunks."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import MambaCache, MambaForCausalLM, ops
from anymamba.errors import InputError
from anymamba.modeling import fused
from anymamba.ops import backends
from anymamba.ops.scan import native as scan_native
from anymamba.ops.scan.arguments import ScanArguments
from tests.support.instruction_sets import ISAS
from tests.support.models import lively_model, words
from tests.support.operators import HALVES, natively
from tests.support.stepping import (
    VARIANTS,
    assert_same_cache,
    exactly,
    pass_and_gradients,
    prefilled,
)
from tests.support.tolerance import assert_contract, assert_gradients, assert_same

# Whole passes.


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_against_the_reference(variant: str) -> None:
    model, ids = lively_model(**VARIANTS[variant]).train(), words(3, 41)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, 20:23], mask[2, -5:] = 0, 0, 0
    for marks in (None, mask):
        with ops.backend("reference"):
            expected = pass_and_gradients(model, ids, marks)
        actual = pass_and_gradients(model, ids, marks)
        assert len(actual[2]) == len(list(model.named_parameters()))
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1])
        assert_gradients(actual[2], expected[2])


@pytest.mark.parametrize("dtype", HALVES)
def test_the_state_space_is_computed_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ScanArguments] = []
    real = scan_native.selective_scan

    def spy(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
        seen.append(arguments)
        return real(arguments)

    monkeypatch.setitem(backends._loaded, "anymamba.ops.scan.native:selective_scan", spy)
    model = lively_model().to(dtype)
    cache = MambaCache(model.config, 2, dtype)
    with torch.no_grad(), ops.backend("cpu"):
        for _ in range(2):  # through the modules, for only they return hidden states
            model(words(2, 5), cache=cache, output_hidden_states=True)
    assert len(seen) == 4
    for arguments, block in zip(seen, list(model.backbone.layers) * 2, strict=True):
        assert arguments.A_en.dtype == torch.float32
        assert torch.equal(arguments.A_en, -torch.exp(block.mixer.A_log.float()))
        # Added inside, in float32, and not by a projection in half precision.
        assert torch.equal(arguments.delta_bias_e, block.mixer.dt_proj.bias)
        assert arguments.initial_state.dtype == torch.float32
    assert cache.ssm_states.dtype == torch.float32


# A prompt in one call.


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_equals_the_modules(variant: str, mixers: list[int]) -> None:
    model = lively_model(**VARIANTS[variant])
    cache = prefilled(model, 3)
    expected_cache = cache.clone()
    ids = words(3, 37)
    with torch.no_grad():
        with ops.backend("reference"):
            expected = model(ids, cache=expected_cache).logits
        del mixers[:]
        assert_same(model(ids, cache=cache).logits, expected)
    assert_same_cache(cache, expected_cache)
    assert not mixers


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("dtype", HALVES)
def test_a_prompt_in_half_precision(dtype: torch.dtype) -> None:
    """Against float32 on the same weights: activations keep 8 bits or more between operators."""
    model = lively_model().to(dtype)
    with torch.no_grad():
        logits = model(words(2, 37)).logits
        with ops.backend("reference"):
            expected = exactly(model)(words(2, 37)).logits
    assert_contract(logits.to(dtype), expected)


def test_the_number_of_threads_changes_no_bit_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(hidden_size=80, use_bias=True)
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setenv("ANYMAMBA_NUM_THREADS", str(threads))
        with torch.no_grad():
            out = model(words(3, 50))
        results.append((out.logits, out.cache.conv_states, out.cache.ssm_states))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_a_wrong_token_late_in_a_prompt_leaves_the_state_alone(wrong: int) -> None:
    model = lively_model()
    cache = prefilled(model, 1)
    before = cache.clone()
    ids = words(1, 2 * fused.CHUNK_TOKENS)
    ids[0, -1] = wrong
    with torch.no_grad(), pytest.raises(InputError, match=f"token {wrong} is not in the vocab"):
        model(ids, cache=cache)
    assert_same_cache(cache, before)


# Long prompts.


@pytest.fixture(scope="module")
def _short_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "CHUNK_TOKENS", 7)
        yield


def in_one_pass(model: MambaForCausalLM, *args: Any, **options: Any) -> Any:
    """By the reference, without chunks."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), ops.backend("reference"):
        patch.setattr(fused, "CHUNK_TOKENS", 10**9)
        return model(*args, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("_short_chunks")
@settings(max_examples=40)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 40),
    keep=st.integers(1, 45),
    masked=st.booleans(),
    embedded=st.booleans(),
    continued=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_prompt_in_chunks_is_the_prompt(
    batch: int, length: int, keep: int, masked: bool, embedded: bool, continued: bool, seed: int
) -> None:
    model, ids = lively_model(), words(batch, length, seed)
    inputs: dict[str, Any] = {"logits_to_keep": keep}
    if embedded:
        inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    else:
        inputs["input_ids"] = ids
    if masked:
        generator = torch.Generator().manual_seed(seed)
        inputs["attention_mask"] = (torch.rand(batch, length, generator=generator) > 0.4).long()
    cache = prefilled(model, batch) if continued else None
    expected_cache = None if cache is None else cache.clone()
    with torch.no_grad():
        out = model(**inputs, cache=cache)
    expected = in_one_pass(model, **inputs, cache=expected_cache)
    assert_same(out.logits, expected.logits)
    assert_same_cache(out.cache, expected.cache)
    if cache is not None:
        assert out.cache is cache


@pytest.mark.usefixtures("_short_chunks")
def test_chunks_are_chunks(mixers: list[int]) -> None:
    model = lively_model()
    model.backbone.norm_f.register_forward_hook(lambda *_: None)  # so that the modules are called
    with torch.no_grad():
        model(words(1, 21), logits_to_keep=1)
        assert mixers == [0, 1] * 3
        del mixers[:]
        # 7 tokens are 3 columns of 2 rows.
        model(words(2, 10), logits_to_keep=2)
        assert mixers == [0, 1] * 4
        del mixers[:]
        # Everything is asked for, so that nothing is saved.
        model(words(1, 21))
        assert mixers == [0, 1]
    del mixers[:]
    model(words(1, 21), logits_to_keep=1)
    assert mixers == [0, 1]


@pytest.mark.usefixtures("_short_chunks")
def test_chunks_and_the_cache_that_is_asked_for() -> None:
    model = lively_model()
    with torch.no_grad():
        assert model(words(1, 21), logits_to_keep=1).cache is not None
        assert model(words(1, 21), logits_to_keep=1, use_cache=False).cache is None
        cache = prefilled(model, 1)
        out = model(words(1, 21), logits_to_keep=1, use_cache=False, cache=cache)
        assert out.cache is None
        assert cache.token_counts.tolist() == [27]
        with pytest.raises(InputError, match="attention_mask has"):
            model(words(1, 21), logits_to_keep=1, attention_mask=torch.ones(1, 20))
        with pytest.raises(InputError, match="exactly one of"):
            model(logits_to_keep=1)
    hidden = model(words(1, 21), logits_to_keep=1, output_hidden_states=True).hidden_states
    assert hidden[0].shape[1] == 21


@pytest.mark.usefixtures("_short_chunks")
def test_generate_from_a_long_prompt() -> None:
    model, ids = lively_model(), words(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    text = model.generate(ids, **options)
    with ops.backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "CHUNK_TOKENS", 10**9)
        assert torch.equal(text, model.generate(ids, **options))


# Not a fixture for the instruction set: Hypothesis would run all examples inside one set-up.
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 33), max_size=8))
@example(cuts=list(range(33)))
def test_any_cut_gives_what_one_pass_gives(isa: str, cuts: list[int]) -> None:
    """Pieces of any length through the kernels, single tokens through the one-call step."""
    model, ids = lively_model(), words(2, 33)
    cache = MambaCache(model.config, 2, torch.float32)
    last, pieces = cache.clone(), []
    with torch.no_grad(), natively(isa):
        whole = model(ids, cache=last).logits
        for start, stop in itertools.pairwise([0, *sorted(cuts), 33]):
            pieces.append(model(ids[:, start:stop], cache=cache).logits)
    assert_same(torch.cat(pieces, 1), whole)
    assert_same_cache(cache, last)


@pytest.mark.slow
def test_checkpointing_and_compiling() -> None:
    model, ids = lively_model().train(), words(2, 17)
    expected = pass_and_gradients(model, ids, None)
    model.gradient_checkpointing_enable()
    again = pass_and_gradients(model, ids, None)
    assert_same(again[1], expected[1])
    assert_gradients(again[2], expected[2])
    model.gradient_checkpointing_disable()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), nullcontext():
        assert_same(compiled(ids, use_cache=False).logits, expected[0])

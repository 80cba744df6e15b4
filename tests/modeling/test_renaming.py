"""`cache_params`, the name that `cache` had before Transformers 5.24."""

import copy
from typing import Any

import pytest
import torch

from anymamba import MambaCache
from anymamba.errors import InputError
from anymamba.modeling.mamba.outputs import MambaCausalLMOutput, MambaOutput
from tests.support.models import small_model, words
from tests.support.tolerance import assert_same

MODEL = small_model()
BLOCK: Any = MODEL.backbone.layers[0]
HIDDEN = torch.randn(2, 5, MODEL.config.hidden_size, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, tuple[Any, torch.Tensor]] = {
    "language model": (MODEL, words(2, 5)),
    "model": (MODEL.backbone, words(2, 5)),
    "block": (BLOCK, HIDDEN),
    "mixer": (BLOCK.mixer, HIDDEN),
}


def state() -> MambaCache:
    """A state that is not the empty one."""
    cache = MambaCache(MODEL.config, 2, dtype=torch.float32)
    with torch.no_grad():
        MODEL(words(2, 3), cache=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
def test_forward_takes_the_old_name(name: str) -> None:
    module, inputs = CALLS[name]
    expected_cache, cache = state(), state()
    expected = module(inputs, cache=expected_cache)
    with pytest.warns(FutureWarning, match="`cache_params` is deprecated.* Use `cache`"):
        result = module(inputs, cache_params=cache)
    if inputs is not HIDDEN:
        expected, result = expected[0], result[0]
    assert_same(result, expected)
    assert_same(cache.ssm_states, expected_cache.ssm_states)
    assert not torch.equal(cache.ssm_states[0], state().ssm_states[0])


@pytest.mark.parametrize("name", CALLS)
def test_forward_refuses_both_names(name: str) -> None:
    module, inputs = CALLS[name]
    with pytest.raises(InputError, match="cache and its old name cache_params are both given"):
        module(inputs, cache=state(), cache_params=state())


def test_generate_takes_the_old_name() -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cache = state()
    expected = MODEL.generate(words(2, 1), cache=copy.deepcopy(cache), **options)
    with pytest.warns(FutureWarning, match="`cache_params` is deprecated"):
        generated = MODEL.generate(words(2, 1), cache_params=cache, **options)
    assert torch.equal(generated, expected)
    assert cache.token_counts.tolist() == [8, 8]


def test_inputs_for_generation_are_prepared_from_the_old_name() -> None:
    cache = state()
    with pytest.warns(FutureWarning, match="`cache_params` is deprecated"):
        inputs = MODEL.prepare_inputs_for_generation(words(2, 1), cache_params=cache)
    assert inputs["cache"] is cache
    assert "cache_params" not in inputs
    with pytest.raises(InputError, match="both given"):
        MODEL.prepare_inputs_for_generation(words(2, 1), cache=cache, cache_params=cache)


@pytest.mark.parametrize("kind", [MambaOutput, MambaCausalLMOutput])
def test_outputs_answer_to_the_old_name(kind: type[Any]) -> None:
    cache = state()
    for output in (kind(cache=cache), kind(cache_params=cache)):
        assert output.cache is cache
        assert output.cache_params is cache
        assert output["cache_params"] is cache
        assert list(output) == ["cache"]
    with pytest.raises(ValueError, match="both `cache` and `cache_params`"):
        kind(cache=cache, cache_params=cache)


@torch.no_grad()
def test_a_compiled_model_takes_the_old_name() -> None:
    torch.compiler.reset()
    compiled = torch.compile(MODEL, backend="eager", fullgraph=True)
    expected_cache, cache = state(), state()
    expected = MODEL(words(2, 5), cache=expected_cache).logits
    assert_same(compiled(words(2, 5), cache_params=cache).logits, expected)
    assert_same(cache.ssm_states, expected_cache.ssm_states)

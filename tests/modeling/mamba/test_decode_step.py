"""One token in one native call: the numbers, the state, and what is refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from anymamba import _core, ops
from anymamba.errors import InputError
from anymamba.modeling.fused import MOST_ROWS, why_not_fused
from tests.support.models import lively_model, small_model, words
from tests.support.operators import HALVES
from tests.support.stepping import (
    VARIANTS,
    assert_same_cache,
    assert_steps,
    by_modules,
    exactly,
    prefilled,
    step,
)
from tests.support.tolerance import assert_contract, assert_same


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_equals_the_modules(variant: str, mixers: list[int]) -> None:
    model = lively_model(**VARIANTS[variant])
    assert why_not_fused(model) is None
    for batch in (1, 3):
        cache = prefilled(model, batch)
        del mixers[:]
        step(model, words(batch, 1), cache)
        assert not mixers
        assert_steps(model, batch)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("batch", [0, 1, 2, 15, 16, 17, 33, MOST_ROWS])
def test_the_step_for_batches(batch: int) -> None:
    model = lively_model(hidden_size=20, use_bias=True)
    assert_steps(model, batch)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", ["as usual", "with all biases", "untied head", "state 17"])
def test_the_step_in_half_precision_is_exact_about_its_weights(
    variant: str, dtype: torch.dtype, mixers: list[int]
) -> None:
    """Only weights are stored in half precision, so float32's tolerance holds."""
    model = lively_model(**VARIANTS[variant]).to(dtype)
    wide = exactly(model)
    for batch in (1, 5, 17):
        cache = prefilled(wide, batch, torch.float32)
        expected_cache = cache.clone()
        del mixers[:]
        for turn in range(3):
            logits = step(model, words(batch, 1, turn), cache)
            assert not mixers
            assert_same(logits, by_modules(wide, words(batch, 1, turn), expected_cache))
            del mixers[:]
        assert_same_cache(cache, expected_cache)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("dtype", HALVES)
def test_the_step_with_a_window_in_half_precision(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    cache = prefilled(model, 3)
    assert cache.conv_states.dtype == dtype
    expected_cache = cache.clone()
    for turn in range(3):
        ids = words(3, 1, turn)
        logits, expected = step(model, ids, cache), by_modules(model, ids, expected_cache)
        assert_contract(logits.to(dtype), expected)
        assert_contract(cache.conv_states, expected_cache.conv_states)


def test_more_rows_than_the_step_takes_are_read_as_prompts(mixers: list[int]) -> None:
    model, rows = lively_model(), MOST_ROWS + 1
    cache = prefilled(model, rows)
    expected_cache = cache.clone()
    ids = words(rows, 1)
    with ops.backend("reference"):
        expected = step(model, ids, expected_cache)
    del mixers[:]
    assert_same(step(model, ids, cache), expected)
    assert_same_cache(cache, expected_cache)
    assert not mixers


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(hidden_size=80, use_bias=True)
    cache = prefilled(model, 5)
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setenv("ANYMAMBA_NUM_THREADS", str(threads))
        mine = cache.clone()
        results.append((step(model, words(5, 1), mine), mine.conv_states, mine.ssm_states))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_what_the_step_returns() -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    with torch.no_grad():
        out = model(words(2, 1), cache=cache)
        assert out.cache is cache
        assert out.hidden_states is None
        assert cache.token_counts.tolist() == [7, 7]
        assert model(words(2, 1), cache=cache, use_cache=False).cache is None
        logits, kept = model(words(2, 1), cache=cache, return_dict=False)
        assert logits.shape == (2, 1, 61)
        assert kept is cache
        assert model(words(2, 1), cache=cache, logits_to_keep=1).logits.shape[1] == 1
        hidden = model(words(2, 1), cache=cache, output_hidden_states=True).hidden_states
        assert len(hidden) == 3
        assert model(words(2, 1), cache=cache, labels=words(2, 1)).loss is not None
    assert cache.token_counts.tolist() == [12, 12]
    assert model(words(2, 1), cache=cache).logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_integer_type_and_strides(dtype: torch.dtype) -> None:
    model = lively_model()
    cache = prefilled(model, 3)
    ids = words(3, 4).to(dtype)
    for column in (ids[:, 1:2], ids.T.contiguous().T[:, 1:2]):
        assert_same(step(model, column, cache.clone()), by_modules(model, column, cache.clone()))


@pytest.mark.parametrize("wrong", [61, -1, 2**40, -(2**40)])
def test_a_token_that_does_not_exist_leaves_the_state_alone(wrong: int) -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    before = cache.clone()
    with pytest.raises(InputError, match="not in the vocabulary"):
        step(model, torch.tensor([[3], [wrong]]), cache)
    assert torch.equal(cache.ssm_states, before.ssm_states)
    assert torch.equal(cache.conv_states, before.conv_states)
    assert torch.equal(cache.token_counts, before.token_counts)


def test_what_the_modules_refuse_the_step_refuses() -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    with pytest.raises(InputError, match="attention_mask has shape"):
        step(model, words(2, 1), cache, attention_mask=torch.ones(3, 7))
    with pytest.raises(InputError, match="cache holds states"):
        step(model, words(3, 1), cache)
    with pytest.raises(InputError, match="cache_position"):
        step(model, words(2, 1), cache, cache_position=torch.zeros(1, 1))
    with pytest.raises((RuntimeError, InputError)):
        step(model, words(2, 1).float(), cache)
    assert cache.token_counts.tolist() == [6, 6]


def test_masks_on_a_single_token() -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    ids, plain = words(2, 1), cache.clone()
    expected = step(model, ids, plain)
    # generate passes the mask of all that came before.
    everything = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    assert torch.equal(step(model, ids, cache.clone(), attention_mask=everything), expected)
    mine = cache.clone()
    one_masked = step(model, ids, mine, attention_mask=torch.tensor([[1], [0]]))
    assert_same(one_masked[0], expected[0])
    assert torch.equal(mine.ssm_states[:, 1], cache.ssm_states[:, 1])
    assert mine.token_counts.tolist() == [7, 6]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generate_takes_one_step_a_token(
    mode: Callable[[], AbstractContextManager[Any]], mixers: list[int]
) -> None:
    model, ids = lively_model(), words(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 3:5] = 0, 0
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    with ops.backend("reference"):
        expected = model.generate(ids, **options)
        beams = model.generate(ids, **options, num_beams=3)
    del mixers[:]
    with mode():
        text = model.generate(ids, **options)
    # The prompt's pass alone calls the mixers.
    assert mixers == [0, 1]
    assert torch.equal(text, expected)
    assert torch.equal(model.generate(ids, **options, num_beams=3), beams)


def test_memory_that_is_fetched_ahead_decides_nothing() -> None:
    watch = _core.Watch()
    own = {"a": 1}
    watch.contents(own)
    watch.fetches(8, 200)  # no address of this process
    assert watch.holds()
    own["a"] = 2
    assert not watch.holds()

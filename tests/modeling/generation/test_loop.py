"""Our loop of `generate` against Transformers' own: the same tokens, scores and random numbers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from anymamba import MambaCache, MambaForCausalLM
from anymamba.modeling.generation import multinomial as drawing
from anymamba.modeling.generation.logits_processors import process, replaced
from anymamba.modeling.generation.logits_processors import softmax as softmax_by_rows
from anymamba.modeling.generation.loop import NativeLoop, why_not_native_loop
from anymamba.modeling.generation.multinomial import draws_like_torch, multinomial
from tests.support.models import small_model, words
from tests.support.stepping import Listener

MODEL = small_model(seed=3, eos_token_id=None)
PADDED = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0]])


class Favour(LogitsProcessor):
    """A user's processor, which writes into what it gets."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids.shape[1] % 60] += 1.5
        return scores


class Widen(LogitsProcessor):
    """A user's processor that returns another type."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.double()


class After(StoppingCriteria):
    """A user's criterion that ends the rows at different lengths."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= 9 + torch.arange(len(input_ids))


GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition_penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(5, 40))},
    "min_length": {"min_length": 10, "eos_token_id": [7, 9, 400]},
    "eos": {"eos_token_id": list(range(0, 61, 4)), "pad_token_id": 3},
    "max_time": {"max_time": 0.0},
    "bans": {"suppress_tokens": [4, 8], "bad_words_ids": [[9], [3, 4]], "forced_eos_token_id": 2},
    "bias": {"sequence_bias": [[[5], 3.0]], "remove_invalid_values": True},
    "processors": {"logits_processor": LogitsProcessorList([Favour()])},
    "criteria": {"stopping_criteria": StoppingCriteriaList([After()])},
    "guidance": {"guidance_scale": 1.5},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(10 + row, 40))},
    "chunks": {"prefill_chunk_size": 3},
    "config": {"generation_config": GenerationConfig(max_new_tokens=6, repetition_penalty=1.2)},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "all": {"temperature": 0.7, "top_k": 9, "top_p": 0.8},
    "top_p": {"temperature": 1.3, "top_k": 0, "top_p": 0.6},
    "min_p": {"top_k": 0, "min_p": 0.05},
    "typical": {"top_k": 0, "typical_p": 0.7, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    "several": {"num_return_sequences": 3, "top_k": 5, "eos_token_id": 11},
    "wide": {"logits_processor": LogitsProcessorList([Widen()]), "top_k": 0},
    "criteria": {"stopping_criteria": StoppingCriteriaList([After()]), "top_p": 0.9},
}
CASES = [("greedy", name) for name in GREEDY] + [("sampled", name) for name in SAMPLED]


@contextmanager
def transformers_loop() -> Iterator[None]:
    """`generate` without a loop of ours."""
    ours = MambaForCausalLM._sample
    MambaForCausalLM._sample = GenerationMixin._sample  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        MambaForCausalLM._sample = ours  # type: ignore[method-assign]


def generate(batch: int, seed: int, options: dict[str, Any]) -> tuple[Any, list[Any], Tensor]:
    """What `generate` returns, what a streamer heard, and PyTorch's random numbers after it."""
    listener = Listener()
    given: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0}
    given |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    if batch == 1:
        given["streamer"] = listener
    torch.manual_seed(seed)
    written = MODEL.generate(words(batch, 7), attention_mask=PADDED[:batch], **(given | options))
    return written, listener.heard, torch.get_rng_state()


def assert_equal(ours: Any, expected: Any) -> None:
    """Two outputs of `generate`, bit by bit."""
    assert type(ours) is type(expected)
    assert torch.equal(ours.sequences, expected.sequences)
    assert ours.sequences.dtype == expected.sequences.dtype
    for name in ("scores", "logits"):
        pairs = zip(ours[name], expected[name], strict=True)
        for left, right in pairs:
            assert left.dtype == right.dtype
            assert torch.equal(left, right), name
    for name in ("conv_states", "ssm_states", "token_counts"):
        assert torch.equal(getattr(ours.cache, name), getattr(expected.cache, name))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[NativeLoop]:
    """The loops of ours that have run."""
    seen: list[NativeLoop] = []
    run = NativeLoop.run

    def noted(self: NativeLoop, *args: Any) -> Any:
        seen.append(self)
        return run(self, *args)

    monkeypatch.setattr(NativeLoop, "run", noted)
    return seen


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_both_loops_give_the_same(kind: str, name: str, batch: int, runs: list[NativeLoop]) -> None:
    options = (GREEDY if kind == "greedy" else SAMPLED)[name]
    options = options | {"do_sample": kind == "sampled"}
    for seed in (1, 2) if kind == "sampled" else (1,):
        ours, heard, numbers = generate(batch, seed, options)
        with transformers_loop():
            expected, expected_heard, expected_numbers = generate(batch, seed, options)
        assert_equal(ours, expected)
        assert heard == expected_heard
        assert torch.equal(numbers, expected_numbers)
    assert len(runs) == (2 if kind == "sampled" else 1)


@pytest.mark.parametrize(
    "how", ["sequences alone", "embeddings", "cache", "int32", "1 row of many"]
)
def test_both_loops_take_every_prompt(how: str, runs: list[NativeLoop]) -> None:
    ids = words(2, 6)

    def written() -> Tensor:
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 0}
        torch.manual_seed(4)
        if how == "embeddings":
            return MODEL.generate(inputs_embeds=MODEL.backbone.embeddings(ids), **options)
        if how == "int32":
            return MODEL.generate(ids.int(), **options)
        if how == "cache":
            cache = MambaCache(MODEL.config, 2, dtype=torch.float32)
            MODEL(ids[:, :3], cache=cache)
            ahead = {"attention_mask": torch.ones_like(ids), "cache": cache}
            return torch.cat(
                [
                    MODEL.generate(ids[:, 3:], **ahead, **options),
                    cache.token_counts[None].expand(2, 2),
                ],
                1,
            )
        return MODEL.generate(ids[: 1 if how.startswith("1") else 2], **options)

    ours = written()
    with transformers_loop():
        expected = written()
    assert torch.equal(ours, expected)
    assert ours.dtype == expected.dtype
    assert len(runs) == 1


def test_stop_strings(runs: list[NativeLoop]) -> None:
    from transformers import AutoTokenizer

    from anymamba.assets import bundled_model

    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    model = MambaForCausalLM.from_pretrained(bundled_model())
    ids = tokenizer("ROMEO:", return_tensors="pt")
    options = {"max_new_tokens": 40, "stop_strings": ["\n", "."], "tokenizer": tokenizer}
    ours = model.generate(**ids, do_sample=False, **options)
    with transformers_loop():
        assert torch.equal(ours, model.generate(**ids, do_sample=False, **options))
    assert len(runs) == 1


def _hooked(model: MambaForCausalLM) -> None:
    model.register_forward_hook(lambda *_: None)


def _layer_hooked(model: MambaForCausalLM) -> None:
    model.backbone.layers[0].mixer.register_forward_hook(lambda *_: None)


def _wrapped(model: MambaForCausalLM) -> None:
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]


def _prepares(model: MambaForCausalLM) -> None:
    class Mine(MambaForCausalLM):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model.__class__ = Mine


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"output_hidden_states": True}, None, "output_hidden_states is asked for"),
        ({"use_cache": False}, None, "use_cache=False reads the whole text at each step"),
        ({"num_beams": 2}, None, "beam_search is asked for"),
        ({"num_beams": 2, "do_sample": True}, None, "beam_sample is asked for"),
        ({"custom_generate": GenerationMixin._sample}, None, "custom_generate is given"),
        ({}, _hooked, "the model has hooks"),
        ({}, _layer_hooked, "layers.0.mixer: it has hooks"),
        ({}, _wrapped, "forward was replaced"),
        ({}, _prepares, "prepare_inputs_for_generation was replaced"),
    ],
)
def test_the_unusual_runs_in_transformers_loop(
    options: dict[str, Any],
    change: Callable[[MambaForCausalLM], None] | None,
    reason: str,
    runs: list[NativeLoop],
) -> None:
    model = small_model(seed=3, eos_token_id=None)
    usual = {"max_new_tokens": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    if change is not None:
        expected = model.generate(words(1, 4), **usual)
        runs.clear()
        change(model)
        assert torch.equal(model.generate(words(1, 4), **usual), expected)
    else:
        model.generate(words(1, 4), **usual, **options)
    assert not runs
    assert why_not_native_loop(model, **usual, **options) == reason
    assert why_not_native_loop(MODEL, **usual) is None


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}])
def test_use_cache_of_none_is_the_default(options: dict[str, Any]) -> None:
    options = options | {"max_new_tokens": 6, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = MODEL.generate(words(2, 4), use_cache=True, **options)
    assert_equal(MODEL.generate(words(2, 4), use_cache=None, **options), expected)
    with transformers_loop():
        assert_equal(MODEL.generate(words(2, 4), use_cache=None, **options), expected)


def test_a_change_during_generation_is_noticed() -> None:
    model = small_model(seed=3, eos_token_id=None)
    lengths: list[int] = []

    class Change(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            if input_ids.shape[1] == 6:
                model.register_forward_hook(lambda *_: lengths.append(input_ids.shape[1]))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(words(1, 4), **options)
    criteria = StoppingCriteriaList([Change()])
    assert torch.equal(model.generate(words(1, 4), stopping_criteria=criteria, **options), expected)
    assert len(lengths) == 3  # tokens 7, 8 and 9


PROCESSORS: list[LogitsProcessor] = [
    TemperatureLogitsWarper(0.3),
    TopKLogitsWarper(1),
    TopKLogitsWarper(20),
    TopKLogitsWarper(5000, filter_value=-1e4),
    TopPLogitsWarper(0.0),
    TopPLogitsWarper(0.7, min_tokens_to_keep=4),
    TopPLogitsWarper(0.999),
    MinPLogitsWarper(0.1),
    MinPLogitsWarper(0.1, min_tokens_to_keep=6),
    RepetitionPenaltyLogitsProcessor(1.7),
    RepetitionPenaltyLogitsProcessor(0.4, prompt_ignore_length=3),
    RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=torch.tensor([0, 1, 2, 3])),
    MinLengthLogitsProcessor(4, 3),
    MinLengthLogitsProcessor(6, [3, 2000]),
    MinNewTokensLengthLogitsProcessor(2, 4, [0, 1]),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("vocabulary", [1, 33, 1000])
def test_replaced_processors_agree_to_the_bit(processor: LogitsProcessor, vocabulary: int) -> None:
    assert type(processor).__call__ in replaced()
    source = torch.Generator().manual_seed(vocabulary)
    drawn = torch.randn(4, vocabulary, generator=source) * 5
    ids = torch.randint(0, vocabulary + 2, (4, 5), generator=source)
    ids = ids if isinstance(processor, RepetitionPenaltyLogitsProcessor) else ids % vocabulary
    for scores in (
        drawn,
        drawn.round(),  # full of equal scores
        drawn.masked_fill(drawn < 0, -math.inf),
        drawn.masked_fill(drawn > 6, math.nan),
        torch.zeros_like(drawn),
    ):
        before = scores.clone()
        ours = process(LogitsProcessorList([processor]), ids, scores)
        assert torch.equal(scores.nan_to_num(9e9), before.nan_to_num(9e9))
        expected = processor(ids, scores)
        assert torch.equal(ours.nan_to_num(9e9), expected.nan_to_num(9e9))


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_draws_are_those_of_torch(spread: float) -> None:
    assert draws_like_torch()
    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(1 + seed % 3, 1 + 97 * seed) * spread
        logits[:, 1::3] = -math.inf
        probabilities = torch.softmax(logits, -1)
        state = torch.get_rng_state()
        ours = multinomial(probabilities)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert torch.equal(ours, torch.multinomial(probabilities, 1).squeeze(1))
        assert torch.equal(after, torch.get_rng_state())


def test_what_torch_refuses_to_draw_from_is_refused() -> None:
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(RuntimeError, match="probability tensor contains either"):
            multinomial(torch.tensor([[0.5, wrong]]))
    with pytest.raises(RuntimeError, match="invalid multinomial distribution"):
        multinomial(torch.zeros(1, 3))


def test_a_torch_that_draws_otherwise_draws_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "draws_like_torch", lambda: False)
    monkeypatch.setattr(drawing, "_draw", None)
    assert multinomial(torch.tensor([[0.0, 1.0]])).tolist() == [1]


@pytest.mark.parametrize(("device", "launches"), [("cpu", 3), ("meta", 1)])
def test_softmax_launches_once_on_a_gpu(
    device: str, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    softmax = torch.softmax

    def counted(scores: Tensor, axis: int) -> Tensor:
        calls.append(scores)
        return softmax(scores, axis)

    monkeypatch.setattr(torch, "softmax", counted)
    found = softmax_by_rows(torch.zeros(3, 5, device=device))
    assert found.shape == (3, 5)
    assert len(calls) == launches

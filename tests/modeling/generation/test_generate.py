"""`generate`, held to a loop that has no cache and runs every row alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.generation.utils import DeferredStopCheck

from anymamba import MambaCache, MambaForCausalLM
from anymamba.errors import InputError
from tests.support.models import small_model, words
from tests.support.stepping import Listener
from tests.support.tolerance import assert_same

MODEL = small_model(seed=3, eos_token_id=None)
GREEDY = {"do_sample": False, "pad_token_id": 0}


def greedy(ids: Tensor, count: int) -> Tensor:
    """The most likely continuation of one row, from the whole text each time."""
    for _ in range(count):
        best = MODEL(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    return ids


def test_greedy_equals_the_loop() -> None:
    ids = words(1, 7)
    generated = MODEL.generate(ids, max_new_tokens=9, **GREEDY)
    assert torch.equal(generated, greedy(ids, 9))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_with_and_without_a_cache(options: dict[str, int]) -> None:
    ids = words(2, 5)
    mask = torch.ones_like(ids)
    results = [
        MODEL.generate(
            ids, attention_mask=mask, max_new_tokens=7, use_cache=use, **options, **GREEDY
        )
        for use in (True, False)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_continues_from_a_cache(num_beams: int) -> None:
    ids = words(2, 9)
    mask = torch.ones_like(ids)
    expected = MODEL.generate(
        ids, attention_mask=mask, max_new_tokens=6, num_beams=num_beams, **GREEDY
    )
    cache = MambaCache(MODEL.config, 2, dtype=torch.float32)
    MODEL(ids[:, :5], cache=cache)
    before = cache.clone()
    generated = MODEL.generate(
        ids[:, 5:],
        attention_mask=mask,
        cache=cache,
        max_new_tokens=6,
        num_beams=num_beams,
        **GREEDY,
    )
    assert torch.equal(generated[:, -6:], expected[:, -6:])
    if num_beams == 1:
        # The last token was chosen and not fed.
        assert cache.token_counts.tolist() == [14, 14]
    else:
        assert torch.equal(cache.ssm_states, before.ssm_states)


@pytest.mark.parametrize("given", [True, False])
def test_no_needless_step_is_run_on_a_caller_s_state(
    monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """On mps, Transformers runs one step too many where nobody sees the state afterwards."""
    supported = DeferredStopCheck.is_supported
    answers = []

    def answer(device: torch.device, *rest: Any, **options: Any) -> bool:
        answers.append(supported(torch.device("mps"), *rest, **options))
        return False

    monkeypatch.setattr(DeferredStopCheck, "is_supported", answer)
    monkeypatch.setattr(MambaForCausalLM, "_sample", GenerationMixin._sample)
    cache = MambaCache(MODEL.config, 1, dtype=torch.float32) if given else None
    MODEL.generate(words(1, 4), cache=cache, max_new_tokens=2, **GREEDY)
    assert answers == [not given]


def test_generate_builds_a_mamba_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    forward = type(MODEL).forward

    def spy(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        seen.append(kwargs["cache"])
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(MODEL), "forward", spy)
    MODEL.generate(words(1, 4), max_new_tokens=3, **GREEDY)
    assert [type(cache) for cache in seen] == [MambaCache] * 3
    assert not any(isinstance(cache, DynamicCache) for cache in seen)


def test_sampling_is_repeatable_and_returns_several() -> None:
    def draw() -> Tensor:
        torch.manual_seed(5)
        options = {"do_sample": True, "num_return_sequences": 3, "pad_token_id": 0}
        return MODEL.generate(words(2, 4), max_new_tokens=5, top_k=20, **options)

    first = draw()
    assert first.shape == (6, 9)
    assert torch.equal(first, draw())


def test_a_streamer_gets_each_token() -> None:
    listener, ids = Listener(), words(1, 4)
    generated = MODEL.generate(ids, max_new_tokens=5, streamer=listener, **GREEDY)
    *pieces, end = listener.heard
    heard = torch.cat([torch.tensor(piece).flatten() for piece in pieces])
    assert (heard.tolist(), end) == (generated[0].tolist(), "end")


def test_embeddings_can_be_the_prompt() -> None:
    ids = words(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
    embeds = MODEL.backbone.embeddings(ids)
    expected = MODEL.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
    generated = MODEL.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4, **GREEDY
    )
    assert torch.equal(generated, expected[:, -4:])


def test_a_row_without_a_token_is_refused() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(InputError, match="masks every position of row 1"):
        MODEL.generate(words(2, 2), attention_mask=mask, max_new_tokens=2, **GREEDY)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="at least one token"):
        MODEL.generate(words(1, 0), cache=MambaCache(MODEL.config, 1), **GREEDY)


def test_assisted_decoding_keeps_its_error() -> None:
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        MODEL.generate(words(1, 4), assistant_model=MODEL, max_new_tokens=2, **GREEDY)


def test_one_pass_and_steps_give_the_same_logits() -> None:
    ids = words(1, 5)
    outputs = MODEL.generate(
        ids, max_new_tokens=5, output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    whole = MODEL(outputs.sequences).logits
    assert_same(torch.stack(outputs.logits, 1), whole[:, 4:-1])

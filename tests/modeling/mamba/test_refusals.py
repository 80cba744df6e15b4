"""What a model with a state cannot do is refused, and what it can do is done right."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from anymamba import MambaCache, MambaForCausalLM
from anymamba.errors import InputError
from tests.support.models import small_model, talkative_model, words
from tests.support.tolerance import assert_same

IDS = words(2, 7)
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
# PEFT asks for heads, which are no field of this model's config.
CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_attention_heads": 1}


@pytest.mark.parametrize("backbone", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {"past_key_values": DynamicCache()},
        {"past_key_values": MambaCache(small_model().config, 2)},
        {"output_attentions": True},
        {"head_mask": torch.ones(1)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_only_attention_has_is_refused(given: dict[str, Any], backbone: bool) -> None:
    model = small_model()
    with pytest.raises(InputError, match=f"{next(iter(given))}: a Mamba model has no attention"):
        (model.backbone if backbone else model)(IDS, **given)
    # What asks for nothing passes, and a state may be given by both names.
    nothing = dict.fromkeys(given, None) | {"output_attentions": False}
    cache = MambaCache.for_model(model, 2)
    assert model(IDS, cache=cache, **nothing).logits is not None
    assert model(IDS, cache=cache, past_key_values=cache).cache is cache


def test_prefix_tuning_is_refused() -> None:
    config = peft.PrefixTuningConfig(**CAUSAL)
    adapted = peft.get_peft_model(small_model(), config).eval()
    with pytest.raises(InputError, match="use prompt tuning"):
        adapted(IDS)
    with pytest.raises(InputError, match="use prompt tuning"):
        adapted.generate(input_ids=IDS, max_new_tokens=2)


def prompted(method: str) -> tuple[Any, MambaForCausalLM]:
    configs = {
        "prompt tuning": peft.PromptTuningConfig(**CAUSAL),
        "p-tuning": peft.PromptEncoderConfig(**CAUSAL, encoder_hidden_size=8),
    }
    model = talkative_model()
    adapted = peft.get_peft_model(model, configs[method]).eval()
    torch.manual_seed(0)
    for weight in adapted.prompt_encoder.parameters():
        torch.nn.init.normal_(weight)
    return adapted, model


def greedy_by_hand(model: MambaForCausalLM, prompt_vd: Tensor, ids: Tensor, steps: int) -> Tensor:
    """One row, the whole text anew for each token, with the virtual tokens before it."""
    for _ in range(steps):
        embedded = model.get_input_embeddings()(ids)
        logits = model(inputs_embeds=torch.cat([prompt_vd[None], embedded], 1)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("method", ["prompt tuning", "p-tuning"])
def test_prompt_tuning_reads_its_tokens_once(method: str) -> None:
    adapted, model = prompted(method)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        prompt_vd = adapted.get_prompt(batch_size=1)[0]
        found = adapted.generate(input_ids=IDS, attention_mask=MASK, **options)
        again = adapted.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **options)
        assert torch.equal(found, again)
        for row, ids in enumerate((IDS[:1, 3:], IDS[1:])):
            expected = greedy_by_hand(model, prompt_vd, ids, 6)
            assert torch.equal(found[row, -6:], expected[0, -6:])
        without = model.generate(input_ids=IDS, attention_mask=MASK, **options)
    assert not torch.equal(found, without)
    loss = adapted(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in adapted.prompt_encoder.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": small_model()},
        {"past_key_values": DynamicCache()},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_refuses_what_needs_the_past(options: dict[str, Any]) -> None:
    with pytest.raises((InputError, ValueError)):
        small_model().generate(IDS[:1], max_new_tokens=4, do_sample=False, **options)


def test_generate_in_one_form_of_state_whatever_is_asked() -> None:
    model = small_model()
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(IDS, **options)
    for form in ("static", "dynamic"):
        assert torch.equal(model.generate(IDS, cache_implementation=form, **options), expected)
    cache = MambaCache.for_model(model, 2)
    with pytest.raises(InputError, match="cannot forget"):
        cache.crop(1)


def test_positions_that_do_not_begin_at_zero_mark_no_document() -> None:
    """As after a state, or in a chunk: only falling back begins a document."""
    model = small_model()
    with torch.no_grad():
        whole = model(IDS).logits
        positions = torch.arange(100, 107)[None].expand(2, 7)
        assert_same(model(IDS, position_ids=positions).logits, whole)
        cache = model(IDS[:, :4], position_ids=torch.arange(4)[None]).cache
        rest = model(IDS[:, 4:], cache=cache, position_ids=torch.arange(4, 7)[None])
        assert_same(rest.logits, whole[:, 4:])

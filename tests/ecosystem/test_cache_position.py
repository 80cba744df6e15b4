"""A `MambaCache` made by hand and passed to forward with `cache_position`."""

import pytest
import torch

from anymamba import MambaCache, MambaForCausalLM
from tests.support.tolerance import assert_same

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [1, 2, 4, 8])
def test_a_prompt_and_then_token_by_token(model: MambaForCausalLM, prompt_length: int) -> None:
    whole = model(IDS).logits
    cache = MambaCache(model.config, max_batch_size=2, dtype=model.dtype, device=model.device)
    outputs = model(
        IDS[:, :prompt_length],
        cache=cache,
        use_cache=True,
        cache_position=torch.arange(prompt_length),
    )
    assert outputs.cache is cache
    logits = [outputs.logits]
    for position in range(prompt_length, IDS.shape[1]):
        outputs = model(
            IDS[:, position : position + 1],
            cache=cache,
            use_cache=True,
            cache_position=torch.tensor([position]),
        )
        logits.append(outputs.logits)
    assert_same(torch.cat(logits, 1), whole)
    assert cache.token_counts.tolist() == [9, 9]


@torch.no_grad()
def test_the_default_type_of_a_cache_rounds_the_window_alone(model: MambaForCausalLM) -> None:
    whole = model(IDS).logits
    cache = MambaCache(model.config, max_batch_size=2)
    model(IDS[:, :-1], cache=cache, use_cache=True, cache_position=torch.arange(8))
    last = model(IDS[:, -1:], cache=cache, use_cache=True, cache_position=torch.tensor([8])).logits
    # float16 keeps 11 bits; the design's bound for 16-bit storage.
    assert_same(last, whole[:, -1:], 2e-2)

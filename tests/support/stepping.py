"""Passes and decode steps of small models, natively and through the modules."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from anymamba import MambaCache, MambaForCausalLM, ops
from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams
from anymamba.modeling.mamba.model import MambaMixer
from tests.support.models import words
from tests.support.tolerance import assert_contract, assert_same

# What a model may differ in, odd sizes included: width 24 makes an inner width of 48.
VARIANTS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "with all biases": {"use_bias": True, "use_conv_bias": True},
    "without biases": {"use_bias": False, "use_conv_bias": False},
    "untied head": {"tie_word_embeddings": False},
    "residual stream in the weights' type": {"residual_in_fp32": False},
    "one layer of odd sizes": {"hidden_size": 7, "expand": 3, "num_hidden_layers": 1},
    "narrow steps": {"time_step_rank": 1},
    "wide steps": {"time_step_rank": 33},
    "swish": {"hidden_act": "swish"},
}
VARIANTS |= {f"kernel {k}": {"conv_kernel": k} for k in (1, 2, 3, 5)}
VARIANTS |= {f"state {n}": {"state_size": n} for n in (1, 3, 16, 17, 64)}


class Listener(BaseStreamer):
    """Notes what a streamer is given, and "end"."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def prefilled(model: MambaForCausalLM, batch: int, dtype: torch.dtype | None = None) -> MambaCache:
    """The state after a few tokens, through the reference."""
    cache = MambaCache(model.config, batch, dtype or model.dtype)
    with torch.no_grad(), ops.backend("reference"):
        model(words(batch, 6), cache=cache)
    return cache


def mixer(model: MambaForCausalLM) -> MambaMixer:
    found = model.backbone.layers[1].mixer
    assert isinstance(found, MambaMixer)
    return found


def step(model: MambaForCausalLM, ids: Tensor, cache: MambaCache, **options: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, cache=cache, **options).logits
    assert logits.shape[1] == 1
    return logits[:, 0]


def by_modules(model: MambaForCausalLM, ids: Tensor, cache: MambaCache) -> Tensor:
    with ops.backend("reference"):
        return step(model, ids, cache)


def assert_same_cache(actual: MambaCache, expected: MambaCache) -> None:
    assert_contract(actual.conv_states, expected.conv_states.float(), factor=10)
    assert_contract(actual.ssm_states, expected.ssm_states, factor=10)
    assert torch.equal(actual.token_counts, expected.token_counts)


def assert_steps(model: MambaForCausalLM, batch: int, seed: int = 3) -> None:
    """Three steps of one native call each, against the modules with the reference."""
    cache = prefilled(model, batch)
    expected_cache = cache.clone()
    for turn in range(3):
        ids = words(batch, 1, seed + turn) % model.config.vocab_size
        logits, expected = step(model, ids, cache), by_modules(model, ids, expected_cache)
        assert logits.dtype == torch.float32
        assert_same(logits, expected)
        assert_same_cache(cache, expected_cache)


def exactly(model: MambaForCausalLM) -> MambaForCausalLM:
    """The same numbers in float32."""
    return copy.deepcopy(model).float()


def pass_and_gradients(
    model: MambaForCausalLM, ids: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), out.loss.detach(), found


def prompt_and_steps(
    layer: Callable[..., Tensor], x: Tensor, cut: int, lengths: Tensor | None = None
) -> Tensor:
    """What a drop-in's layer gives for a prompt of at most `cut` steps and single steps behind it.

    `lengths`, where given, is updated in place, as programs do that keep those of each row.
    """
    b, l = x.shape[:2]
    params = InferenceParams(max_seqlen=l, max_batch_size=b, lengths_per_sample=lengths)
    with torch.no_grad():
        parts = [layer(x[:, :cut], inference_params=params)]
        for t in range(cut, l):
            params.seqlen_offset = t
            if lengths is not None:
                lengths[:] = t
            parts.append(layer(x[:, t : t + 1], inference_params=params))
    return torch.cat(parts, dim=1)

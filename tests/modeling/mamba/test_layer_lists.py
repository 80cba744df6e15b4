"""Layers cut, repeated and reordered: what counts is the place in the list, everywhere."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anymamba import MambaCache, MambaForCausalLM, ops
from anymamba.errors import InputError, StateError
from anymamba.modeling.fused import why_not_fused
from tests.support.models import talkative_model, words
from tests.support.tolerance import assert_same

ORDERS = {
    "cut": (0, 1),
    "cut in front": (2, 3),
    "reordered": (3, 1, 2, 0),
    "repeated": (0, 1, 1, 0, 2, 1),
    "one layer thrice": (2, 2, 2),
    "none": (),
}


def model_of(order: tuple[int, ...], shared: bool = True) -> MambaForCausalLM:
    """Layers in another order; repeated ones are one module, or copies with places of their own."""
    model = talkative_model(num_hidden_layers=4)
    layers = [model.backbone.layers[i] for i in order]
    if not shared:
        layers = [copy.deepcopy(layer) for layer in layers]
        for place, layer in enumerate(layers):
            layer.mixer.layer_idx = place
        model.config.num_hidden_layers = max(len(layers), 1)
    model.backbone.layers = nn.ModuleList(layers)
    return model


IDS = words(2, 13)
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


def text(model: MambaForCausalLM, **options: Any) -> Tensor:
    found: Tensor = model.generate(
        IDS, max_new_tokens=8, pad_token_id=0, do_sample=False, **options
    )
    return found


@pytest.mark.parametrize("name", ORDERS)
def test_every_way_through_a_changed_list_gives_one_text(name: str) -> None:
    model = model_of(ORDERS[name])
    plain = model_of(ORDERS[name], shared=False)
    for mask in (None, MASK):
        expected = text(plain, attention_mask=mask, use_cache=False)
        for use_cache in (True, False):
            assert torch.equal(text(model, attention_mask=mask, use_cache=use_cache), expected)
        with ops.backend("reference"):
            assert torch.equal(text(model, attention_mask=mask), expected)
    if ORDERS[name]:
        assert why_not_fused(model) is None


@pytest.mark.parametrize("name", ["cut", "repeated", "one layer thrice"])
def test_a_state_of_a_changed_list(name: str, tmp_path: Path) -> None:
    """Made, advanced in two pieces by either path, saved with its weights' digest, continued."""
    model = model_of(ORDERS[name])
    with torch.no_grad():
        whole = model(IDS).logits[:, -1:]
        cache = MambaCache.for_model(model, 2)
        assert len(cache) == len(ORDERS[name])
        with ops.backend("reference"):
            model(IDS[:, :6], cache=cache)
        model(IDS[:, 6:-1], cache=cache)
        cache.save(tmp_path / "state", model=model)
        restored = MambaCache.load(tmp_path / "state", model=model)
        assert_same(model(IDS[:, -1:], cache=restored).logits, whole)
    other = model_of((*ORDERS[name], 3))
    with pytest.raises(StateError, match="num_hidden_layers"):
        MambaCache.load(tmp_path / "state", model=other)
    moved = model_of(tuple(reversed(ORDERS[name])))
    if ORDERS[name] != tuple(reversed(ORDERS[name])):
        with pytest.raises(StateError, match="weights"):
            MambaCache.load(tmp_path / "state", model=moved)


def test_a_cache_as_the_stale_config_tells_is_refused_with_the_remedy() -> None:
    model = model_of((0, 1))
    with pytest.raises(InputError, match=r"4 layers: make the cache with MambaCache.for_model"):
        model(IDS, cache=MambaCache(model.config, 2))
    model.config.num_hidden_layers = 2
    assert len(model(IDS, cache=MambaCache(model.config, 2, torch.float32)).cache) == 2


def test_layers_are_cut_while_the_model_is_in_use() -> None:
    model = model_of((0, 1, 2, 3))
    with torch.no_grad():
        for left in (4, 3, 1):
            model.backbone.layers = model.backbone.layers[:left]
            with ops.backend("reference"):
                expected = model(IDS)
            found = model(IDS)
            assert_same(found.logits, expected.logits)
            assert len(found.cache) == left
            assert_same(found.cache.ssm_states, expected.cache.ssm_states)


def test_gradients_with_a_repeated_layer() -> None:
    """With a cache and without, and recomputed: the gradients of one shared module add up."""
    found = []
    for options in ({"use_cache": False}, {"use_cache": True}):
        model = model_of((0, 1, 1))
        model(IDS, labels=IDS, **options).loss.backward()
        found.append(model.backbone.layers[1].mixer.A_log.grad)
    model = model_of((0, 1, 1)).train()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    for other in (found[1], model.backbone.layers[1].mixer.A_log.grad):
        assert_same(other, found[0])
    assert float(found[0].abs().max()) > 0

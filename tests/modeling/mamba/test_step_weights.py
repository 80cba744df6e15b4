"""Weights that change, however they do, are the next native step's weights."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from anymamba import MambaCache, MambaForCausalLM, ops
from anymamba.errors import InputError
from anymamba.modeling.fused import why_not_fused
from anymamba.modeling.mamba.model import MambaRMSNorm
from tests.support.models import lively_model, words
from tests.support.stepping import by_modules, exactly, mixer, prefilled, step
from tests.support.tolerance import assert_same


def scale(model: MambaForCausalLM, factor: float = 1.25) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor)


def scale_data(model: MambaForCausalLM) -> None:
    """Behind autograd's back, as older optimizers and averages of weights do."""
    for weight in model.parameters():
        weight.data.mul_(1.25)


def scale_in_numpy(model: MambaForCausalLM) -> None:
    for weight in model.parameters():
        if weight.dtype == torch.float32:
            weight.detach().numpy()[...] *= 1.25
        else:
            weight.detach().view(torch.int16).numpy()[...] ^= 64


def scale_rates_behind_autograd(model: MambaForCausalLM) -> None:
    mixer(model).A_log.data.mul_(0.5)


def replace_data(model: MambaForCausalLM) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.25


def scale_in_inference_mode(model: MambaForCausalLM) -> None:
    with torch.inference_mode():
        for weight in model.parameters():
            weight.mul_(1.25)


def replace_parameters(model: MambaForCausalLM) -> None:
    with torch.no_grad():
        mixer(model).D = nn.Parameter(mixer(model).D * 3)
        mixer(model).in_proj.weight = nn.Parameter(mixer(model).in_proj.weight * 2)
        mixer(model).A_log = nn.Parameter(mixer(model).A_log * 0.5)


def load(model: MambaForCausalLM) -> None:
    model.load_state_dict(lively_model(seed=9).to(model.dtype).state_dict())


def load_and_assign(model: MambaForCausalLM) -> None:
    model.load_state_dict(lively_model(seed=9).to(model.dtype).state_dict(), assign=True)
    model.tie_weights()


def train(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Any:
    def change(model: MambaForCausalLM) -> None:
        rule = optimizer(model.parameters(), **options)
        with ops.backend("reference"):
            model(words(2, 9), labels=words(2, 9)).loss.backward()
        rule.step()
        rule.zero_grad()

    return change


def add_a_bias(model: MambaForCausalLM) -> None:
    mixer(model).in_proj.bias = nn.Parameter(torch.randn(96, dtype=model.dtype))


def take_a_bias_away(model: MambaForCausalLM) -> None:
    mixer(model).conv1d.bias = None


def replace_a_module(model: MambaForCausalLM) -> None:
    mixer(model).out_proj = nn.Linear(48, 24, bias=False, dtype=model.dtype)


def swap_layers(model: MambaForCausalLM) -> None:
    first, second = model.backbone.layers
    model.backbone.layers[0], model.backbone.layers[1] = second, first
    first.mixer.layer_idx, second.mixer.layer_idx = 1, 0


def another_eps(model: MambaForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, MambaRMSNorm):
            module.variance_epsilon = 0.5


CHANGES: dict[str, Callable[[MambaForCausalLM], Any]] = {
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "to float32": lambda model: model.float(),
    "to half and back": lambda model: model.half().to(torch.float32),
    "to half after a change": lambda model: (scale(model), model.half()),
    "untied": lambda model: setattr(
        model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach() * 2)
    ),
    "SGD": train(torch.optim.SGD, lr=1.0),
    "AdamW": train(torch.optim.AdamW, lr=0.05),
    "AdamW for each": train(torch.optim.AdamW, lr=0.05, foreach=True),
    "AdamW fused": train(torch.optim.AdamW, lr=0.05, fused=True),
}
CHANGES |= {
    function.__name__.replace("_", " "): function
    for function in (
        scale,
        scale_data,
        scale_in_numpy,
        scale_rates_behind_autograd,
        scale_in_inference_mode,
        replace_data,
        replace_parameters,
        load,
        load_and_assign,
        add_a_bias,
        take_a_bias_away,
        replace_a_module,
        swap_layers,
        another_eps,
    )
}


NO_CHANGES = ("to float32", "to bfloat16", "to half and back")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", CHANGES)
def test_a_step_sees_every_change_of_the_weights(what: str, dtype: torch.dtype) -> None:
    model = lively_model().to(dtype)
    cache = prefilled(model, 2, torch.float32)
    before = step(model, words(2, 1), cache.clone())
    CHANGES[what](model)
    model.eval()
    # Exact about its weights, whatever their type: see above.
    expected = by_modules(exactly(model), words(2, 1), cache.clone())
    # So much that a step that does not see the change is seen here.
    assert what in NO_CHANGES or float((expected - before).abs().max()) > 1e-2
    assert_same(step(model, words(2, 1), cache.clone()), expected)
    assert why_not_fused(model) is None


def test_resized_embeddings() -> None:
    model = lively_model()
    step(model, words(2, 1), prefilled(model, 2))
    model.resize_token_embeddings(70)
    cache = prefilled(model, 2)
    ids = torch.tensor([[69], [65]])
    logits = step(model, ids, cache.clone())
    assert logits.shape == (2, 70)
    assert_same(logits, by_modules(model, ids, cache.clone()))
    model.resize_token_embeddings(50)
    with pytest.raises(InputError, match="not in the vocabulary"):
        step(model, torch.tensor([[49], [50]]), cache.clone())


def test_a_copy_has_its_own_step() -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    expected = step(model, words(2, 1), cache.clone())
    twin = copy.deepcopy(model)
    assert torch.equal(step(twin, words(2, 1), cache.clone()), expected)
    scale(twin)
    assert torch.equal(step(model, words(2, 1), cache.clone()), expected)
    assert_same(
        step(twin, words(2, 1), cache.clone()), by_modules(twin, words(2, 1), cache.clone())
    )
    del model
    gc.collect()
    assert_same(
        step(twin, words(2, 1), cache.clone()), by_modules(twin, words(2, 1), cache.clone())
    )


def test_weights_lent_for_one_call() -> None:
    model, other = lively_model(), lively_model(seed=9)
    cache = prefilled(model, 2)
    own = step(model, words(2, 1), cache.clone())
    lent = dict(other.named_parameters())
    mine = cache.clone()
    with torch.no_grad():
        out = torch.func.functional_call(
            model, lent, (words(2, 1),), {"cache": mine}, tie_weights=True
        )
    assert_same(out.logits[:, 0], by_modules(other, words(2, 1), cache.clone()))
    assert torch.equal(step(model, words(2, 1), cache.clone()), own)


def test_a_model_that_is_dropped_is_freed() -> None:
    model = lively_model()
    step(model, words(2, 1), prefilled(model, 2))
    weight = weakref.ref(model.backbone.layers[0].mixer.in_proj.weight)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert weight() is None


def test_weights_of_an_earlier_step_are_freed() -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    step(model, words(2, 1), cache.clone())
    old = weakref.ref(mixer(model).in_proj.weight)
    replace_parameters(model)
    step(model, words(2, 1), cache.clone())
    gc.collect()
    assert old() is None


def test_weights_made_in_inference_mode() -> None:
    """They have no version that a change would count up, so the step does not rely on them."""
    with torch.inference_mode():
        model = lively_model()
        cache = prefilled(model, 2)
        step(model, words(2, 1), cache.clone())
        scale(model)
        logits = step(model, words(2, 1), cache.clone())
        assert_same(logits, by_modules(model, words(2, 1), cache.clone()))


def test_weights_and_caches_on_no_device_or_of_other_types() -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    wide = exactly(model).double()
    wide_cache = MambaCache(wide.config, 2, torch.float64)
    wide_cache.conv_states.copy_(cache.conv_states)
    wide_cache.ssm_states.copy_(cache.ssm_states)
    logits = step(wide, words(2, 1), wide_cache.clone())
    assert_same(step(model, words(2, 1), cache.clone()), logits)
    # float32 weights with a window of float64.
    assert_same(step(model, words(2, 1), wide_cache.clone()), logits)

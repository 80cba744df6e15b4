"""Hooks, modules and weights in another's place: a native step must not pass them by."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from anymamba import MambaForCausalLM, ops
from anymamba.modeling.fused import why_not_fused
from anymamba.modeling.mamba.model import MambaMixer, MambaRMSNorm
from tests.support.models import lively_model, small_model, words
from tests.support.stepping import assert_steps, by_modules, mixer, prefilled, step
from tests.support.tolerance import assert_gradients, assert_same


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parts(model: MambaForCausalLM) -> dict[str, nn.Module]:
    """Every module that a pass calls, but for the model itself."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList)
    }


PARTS = sorted(parts(small_model(num_hidden_layers=1)))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_hooks_are_called(name: str, when: str, mixers: list[int]) -> None:
    model = lively_model(num_hidden_layers=1)
    cache = prefilled(model, 1)
    if when == "after it":
        step(model, words(1, 1), cache.clone())
    module, called = parts(model)[name], []
    registrations: list[Callable[[], Any]] = [
        lambda: module.register_forward_hook(lambda *_: called.append(1)),
        lambda: module.register_forward_pre_hook(lambda *_: called.append(1)),
    ]
    for register in registrations:
        del called[:]
        handle = register()
        step(model, words(1, 1), cache.clone())
        assert called
        handle.remove()
        # And without it the step is back.
        del mixers[:]
        step(model, words(1, 1), cache.clone())
        assert not mixers


def test_hooks_for_all_modules_are_called() -> None:
    model = lively_model()
    cache, called = prefilled(model, 1), []
    step(model, words(1, 1), cache)
    handle = register_module_forward_hook(lambda *_: called.append(1))
    try:
        step(model, words(1, 1), cache)
    finally:
        handle.remove()
    assert len(called) > 10


def replace_projection(name: str) -> Callable[[MambaForCausalLM], None]:
    def change(model: MambaForCausalLM) -> None:
        old = getattr(mixer(model), name)
        new = Doubled(old.in_features, old.out_features, bias=old.bias is not None)
        new.load_state_dict(old.state_dict())
        setattr(mixer(model), name, new)

    return change


def override_forward(model: MambaForCausalLM) -> None:
    forward = mixer(model).x_proj.forward
    mixer(model).x_proj.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def parametrize_weight(model: MambaForCausalLM) -> None:
    parametrize.register_parametrization(mixer(model).in_proj, "weight", Twice())


def normalize_weight(model: MambaForCausalLM) -> None:
    linear = torch.nn.utils.parametrizations.weight_norm(mixer(model).out_proj)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(2)


def quantize(model: MambaForCausalLM) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.backbone.layers, torchao.Int8WeightOnlyConfig())


def bias_where_none_was(model: MambaForCausalLM) -> None:
    mixer(model).x_proj.bias = nn.Parameter(torch.randn(mixer(model).x_proj.out_features))


def head_with_a_bias(model: MambaForCausalLM) -> None:
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=True)
    model.lm_head.weight = weight
    nn.init.normal_(model.lm_head.bias)


def another_norm(model: MambaForCausalLM) -> None:
    model.backbone.layers[1].norm = nn.LayerNorm(24)


def another_final_norm(model: MambaForCausalLM) -> None:
    model.backbone.norm_f = nn.LayerNorm(24)


def another_embedding(model: MambaForCausalLM) -> None:
    class Shifted(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    new = Shifted(61, 24)
    new.weight = model.backbone.embeddings.weight
    model.backbone.embeddings = new


def embedding_of_limited_norm(model: MambaForCausalLM) -> None:
    model.backbone.embeddings.max_norm = 0.05


def another_convolution(model: MambaForCausalLM) -> None:
    class Halved(nn.Conv1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    old = mixer(model).conv1d
    new = Halved(48, 48, 4, groups=48, padding=3)
    new.load_state_dict(old.state_dict())
    mixer(model).conv1d = new


def another_activation(model: MambaForCausalLM) -> None:
    mixer(model).act = nn.Tanh()


def another_class(model: MambaForCausalLM) -> None:
    """As some libraries wrap a module: in place, without a trace in its dict."""
    mixer(model).out_proj.__class__ = Doubled


def another_mixer(model: MambaForCausalLM) -> None:
    class Quiet(MambaMixer):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 0 * super().forward(*args, **kwargs)

    mixer(model).__class__ = Quiet


def another_block_in_the_list(model: MambaForCausalLM) -> None:
    class Nothing(nn.Module):
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

    model.backbone.layers[1] = Nothing()


def one_norm_of_another_eps(model: MambaForCausalLM) -> None:
    norm = model.backbone.layers[1].norm
    assert isinstance(norm, MambaRMSNorm)
    norm.variance_epsilon = 0.5


LORA = ["in_proj", "x_proj", "dt_proj"]  # PEFT itself refuses Mamba's out_proj


def lora(model: MambaForCausalLM) -> None:
    """PEFT puts its own modules into the model that it is given."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=LORA, init_lora_weights=False)
    peft.get_peft_model(model, config)


INTERFERENCES: dict[str, Callable[[MambaForCausalLM], None]] = {
    f"{name} replaced": replace_projection(name)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
}
INTERFERENCES |= {
    function.__name__.replace("_", " "): function
    for function in (
        override_forward,
        parametrize_weight,
        normalize_weight,
        quantize,
        bias_where_none_was,
        head_with_a_bias,
        another_norm,
        another_final_norm,
        another_embedding,
        embedding_of_limited_norm,
        another_convolution,
        another_activation,
        another_class,
        another_mixer,
        another_block_in_the_list,
        one_norm_of_another_eps,
        lora,
    )
}


@pytest.mark.parametrize("what", INTERFERENCES)
@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_what_stands_in_a_modules_place_is_used(what: str, when: str) -> None:
    """A step then gives what the modules give, and not what it gave before."""
    model = lively_model()
    cache = prefilled(model, 2)
    before = step(model, words(2, 1), cache.clone())
    if when == "before the first step":
        model = lively_model()
    INTERFERENCES[what](model)
    model.eval()
    expected = by_modules(model, words(2, 1), cache.clone())
    assert float((expected - before).abs().max()) > 1e-2
    assert_same(step(model, words(2, 1), cache.clone()), expected)


@pytest.mark.parametrize("when", ["before the first step", "after it"])
@pytest.mark.parametrize("options", [{"groups": 1}, {"groups": 48, "padding_mode": "circular"}])
def test_a_convolution_of_another_kind_is_called(options: dict[str, Any], when: str) -> None:
    """Of the same class, so that only its settings tell. A hook has the forward called."""
    model = lively_model()
    cache = prefilled(model, 2)
    if when == "after it":
        step(model, words(2, 1), cache.clone())
    mixer(model).conv1d = nn.Conv1d(48, 48, 4, padding=3, **options)
    actual = step(model, words(2, 1), cache.clone())
    with torch.no_grad():
        whole = model(words(2, 9)).logits
    mixer(model).conv1d.register_forward_hook(lambda *_: None)
    assert_same(actual, by_modules(model, words(2, 1), cache.clone()))
    with torch.no_grad(), ops.backend("reference"):
        assert_same(whole, model(words(2, 9)).logits)


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_other_activations(activation: str, mixers: list[int]) -> None:
    model = lively_model(hidden_act=activation)
    assert_steps(model, 2)
    assert mixers
    assert why_not_fused(model) == f"the activation is {activation}"


def test_autocast_is_respected(mixers: list[int]) -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    step(model, words(2, 1), cache.clone())
    del mixers[:]
    seen = []
    handle = None
    with torch.autocast("cpu", torch.bfloat16):
        step(model, words(2, 1), cache.clone())
        assert mixers == [0, 1]
        handle = mixer(model).in_proj.register_forward_hook(lambda *a: seen.append(a[2].dtype))
        step(model, words(2, 1), cache.clone())
    handle.remove()
    assert seen == [torch.bfloat16]


def test_the_choice_of_a_backend_is_respected(
    mixers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model()
    cache = prefilled(model, 2)
    for name, expected in (("cpu", []), ("reference", [0, 1]), ("auto", []), ("reference", [0, 1])):
        del mixers[:]
        with ops.backend(name):
            step(model, words(2, 1), cache)
        assert mixers == expected
    del mixers[:]
    monkeypatch.setenv("ANYMAMBA_BACKEND", "reference")
    step(model, words(2, 1), cache)
    assert mixers == [0, 1]
    assert why_not_fused(model) == "the backend 'reference' is chosen"


def test_lora_factors_get_gradients() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=LORA, init_lora_weights=False)
    model = peft.get_peft_model(lively_model(), config)
    model.train()

    def factors() -> dict[str, Tensor]:
        model.zero_grad()
        model(words(2, 17), labels=words(2, 17)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    with ops.backend("reference"):
        expected = factors()
    with ops.backend("cpu"):
        actual = factors()
    assert len(actual) == 2 * 2 * len(LORA)
    assert all(gradient.any() for gradient in actual.values())
    assert_gradients(actual, expected)

"""The model on the native core: passes, gradients, chunked prompts, and the one-call step."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from anymamba import MambaCache, MambaForCausalLM, _core, ops
from anymamba.errors import InputError
from anymamba.modeling import fused
from anymamba.modeling.fused import MOST_ROWS, why_not_fused
from anymamba.modeling.mamba.model import MambaMixer, MambaRMSNorm
from anymamba.ops import backends
from anymamba.ops.scan import native as scan_native
from anymamba.ops.scan.arguments import ScanArguments
from tests.ops.running import natively
from tests.support.models import assert_same, small_model, words
from tests.support.tolerance import assert_contract, assert_gradients

HALVES = (torch.bfloat16, torch.float16)
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


def lively_model(seed: int = 0, **fields: Any) -> MambaForCausalLM:
    """A small model in which every weight counts: states that keep much and move much."""
    model = small_model(seed, **fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.backbone.layers:
            mixer = block.mixer
            mixer.dt_proj.bias.normal_(generator=generator)
            mixer.D.normal_(generator=generator)
            mixer.A_log.uniform_(-1, 1, generator=generator)
            for weight in (mixer.x_proj.weight, mixer.dt_proj.weight, mixer.conv1d.weight):
                weight.mul_(3)
            block.norm.weight.normal_(1, 0.3, generator=generator)
        model.backbone.norm_f.weight.normal_(1, 0.3, generator=generator)
    return model


@pytest.fixture(params=_core.isas())
def each_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with natively(request.param):
        yield


@pytest.fixture
def mixers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose mixer was called; none where a step was one native call.

    Through a private method, for a replaced forward would keep the native calls away.
    """
    called: list[int] = []
    convolve = MambaMixer._convolve

    def counted(self: MambaMixer, *args: Any, **kwargs: Any) -> Tensor:
        called.append(self.layer_idx)
        return convolve(self, *args, **kwargs)

    monkeypatch.setattr(MambaMixer, "_convolve", counted)
    return called


def prefilled(model: MambaForCausalLM, batch: int, dtype: torch.dtype | None = None) -> MambaCache:
    """The state after a few tokens, through the reference."""
    cache = MambaCache(model.config, batch, dtype or model.dtype)
    with torch.no_grad(), ops.backend("reference"):
        model(words(batch, 6), cache=cache)
    return cache


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


# Whole passes.


def pass_and_gradients(
    model: MambaForCausalLM, ids: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), out.loss.detach(), found


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_against_the_reference(variant: str) -> None:
    model, ids = lively_model(**VARIANTS[variant]).train(), words(3, 41)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, 20:23], mask[2, -5:] = 0, 0, 0
    for marks in (None, mask):
        with ops.backend("reference"):
            expected = pass_and_gradients(model, ids, marks)
        actual = pass_and_gradients(model, ids, marks)
        assert len(actual[2]) == len(list(model.named_parameters()))
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1])
        assert_gradients(actual[2], expected[2])


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_against_float32_on_the_same_weights(dtype: torch.dtype) -> None:
    model, ids = small_model().to(dtype), words(3, 41)
    with torch.no_grad():
        logits = model(ids).logits
        with ops.backend("reference"):
            expected = exactly(model)(ids).logits
    # Activations are rounded to 8 bits between operators: the contract of bfloat16.
    assert_contract(logits.to(dtype), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_state_space_is_computed_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ScanArguments] = []
    real = scan_native.selective_scan

    def spy(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
        seen.append(arguments)
        return real(arguments)

    monkeypatch.setitem(backends._loaded, "anymamba.ops.scan.native:selective_scan", spy)
    model = lively_model().to(dtype)
    cache = MambaCache(model.config, 2, dtype)
    with torch.no_grad(), ops.backend("cpu"):
        for _ in range(2):  # through the modules, for only they return hidden states
            model(words(2, 5), cache=cache, output_hidden_states=True)
    assert len(seen) == 4
    for arguments, block in zip(seen, list(model.backbone.layers) * 2, strict=True):
        assert arguments.A_en.dtype == torch.float32
        assert torch.equal(arguments.A_en, -torch.exp(block.mixer.A_log.float()))
        # Added inside, in float32, and not by a projection in half precision.
        assert torch.equal(arguments.delta_bias_e, block.mixer.dt_proj.bias)
        assert arguments.initial_state.dtype == torch.float32
    assert cache.ssm_states.dtype == torch.float32


# One token in one call.


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


# A prompt in one call.


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_equals_the_modules(variant: str, mixers: list[int]) -> None:
    model = lively_model(**VARIANTS[variant])
    cache = prefilled(model, 3)
    expected_cache = cache.clone()
    ids = words(3, 37)
    with torch.no_grad():
        with ops.backend("reference"):
            expected = model(ids, cache=expected_cache).logits
        del mixers[:]
        assert_same(model(ids, cache=cache).logits, expected)
    assert_same_cache(cache, expected_cache)
    assert not mixers


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("dtype", HALVES)
def test_a_prompt_in_half_precision(dtype: torch.dtype) -> None:
    """Against float32 on the same weights: activations keep 8 bits or more between operators."""
    model = lively_model().to(dtype)
    wide = copy.deepcopy(model).float()
    with torch.no_grad():
        logits = model(words(2, 37)).logits
        with ops.backend("reference"):
            expected = wide(words(2, 37)).logits
    assert_contract(logits.to(dtype), expected)


def test_the_number_of_threads_changes_no_bit_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(hidden_size=80, use_bias=True)
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setenv("ANYMAMBA_NUM_THREADS", str(threads))
        with torch.no_grad():
            out = model(words(3, 50))
        results.append((out.logits, out.cache.conv_states, out.cache.ssm_states))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_a_wrong_token_late_in_a_prompt_leaves_the_state_alone(wrong: int) -> None:
    model = lively_model()
    cache = prefilled(model, 1)
    before = cache.clone()
    ids = words(1, 2 * fused.CHUNK_TOKENS)
    ids[0, -1] = wrong
    with torch.no_grad(), pytest.raises(InputError, match=f"token {wrong} is not in the vocab"):
        model(ids, cache=cache)
    assert_same_cache(cache, before)


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
    del mixers[:]
    with mode():
        text = model.generate(ids, **options)
    # The prompt's pass alone calls the mixers.
    assert mixers == [0, 1]
    assert torch.equal(text, expected)
    assert torch.equal(
        model.generate(ids, **options, num_beams=3),
        reference_beams(model, ids, options),
    )


def reference_beams(model: MambaForCausalLM, ids: Tensor, options: dict[str, Any]) -> Tensor:
    with ops.backend("reference"):
        text: Tensor = model.generate(ids, **options, num_beams=3)
    return text


# What the step must not pass by.


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


def mixer(model: MambaForCausalLM) -> MambaMixer:
    found = model.backbone.layers[1].mixer
    assert isinstance(found, MambaMixer)
    return found


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


# Weights that change.


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


# Long prompts.


@pytest.fixture(scope="module")
def _short_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "CHUNK_TOKENS", 7)
        yield


def in_one_pass(model: MambaForCausalLM, *args: Any, **options: Any) -> Any:
    """By the reference, without chunks."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), ops.backend("reference"):
        patch.setattr(fused, "CHUNK_TOKENS", 10**9)
        return model(*args, **options)


@pytest.mark.usefixtures("_short_chunks")
@settings(max_examples=40)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 40),
    keep=st.integers(1, 45),
    masked=st.booleans(),
    embedded=st.booleans(),
    continued=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_prompt_in_chunks_is_the_prompt(
    batch: int,
    length: int,
    keep: int,
    masked: bool,
    embedded: bool,
    continued: bool,
    seed: int,
) -> None:
    model, ids = lively_model(), words(batch, length, seed)
    inputs: dict[str, Any] = {"logits_to_keep": keep}
    if embedded:
        inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    else:
        inputs["input_ids"] = ids
    if masked:
        generator = torch.Generator().manual_seed(seed)
        inputs["attention_mask"] = (torch.rand(batch, length, generator=generator) > 0.4).long()
    cache = prefilled(model, batch) if continued else None
    expected_cache = None if cache is None else cache.clone()
    with torch.no_grad():
        out = model(**inputs, cache=cache)
    expected = in_one_pass(model, **inputs, cache=expected_cache)
    assert_same(out.logits, expected.logits)
    assert_same_cache(out.cache, expected.cache)
    if cache is not None:
        assert out.cache is cache


@pytest.mark.usefixtures("_short_chunks")
def test_chunks_are_chunks(mixers: list[int]) -> None:
    model = lively_model()
    model.backbone.norm_f.register_forward_hook(lambda *_: None)  # so that the modules are called
    with torch.no_grad():
        model(words(1, 21), logits_to_keep=1)
        assert mixers == [0, 1] * 3
        del mixers[:]
        # 7 tokens are 3 columns of 2 rows.
        model(words(2, 10), logits_to_keep=2)
        assert mixers == [0, 1] * 4
        del mixers[:]
        # Everything is asked for, so that nothing is saved.
        model(words(1, 21))
        assert mixers == [0, 1]
    del mixers[:]
    model(words(1, 21), logits_to_keep=1)
    assert mixers == [0, 1]


@pytest.mark.usefixtures("_short_chunks")
def test_chunks_and_the_cache_that_is_asked_for() -> None:
    model = lively_model()
    with torch.no_grad():
        assert model(words(1, 21), logits_to_keep=1).cache is not None
        assert model(words(1, 21), logits_to_keep=1, use_cache=False).cache is None
        cache = prefilled(model, 1)
        out = model(words(1, 21), logits_to_keep=1, use_cache=False, cache=cache)
        assert out.cache is None
        assert cache.token_counts.tolist() == [27]
        with pytest.raises(InputError, match="attention_mask has"):
            model(words(1, 21), logits_to_keep=1, attention_mask=torch.ones(1, 20))
        with pytest.raises(InputError, match="exactly one of"):
            model(logits_to_keep=1)
    hidden = model(words(1, 21), logits_to_keep=1, output_hidden_states=True).hidden_states
    assert hidden[0].shape[1] == 21


@pytest.mark.usefixtures("_short_chunks")
def test_generate_from_a_long_prompt() -> None:
    model, ids = lively_model(), words(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    text = model.generate(ids, **options)
    with ops.backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "CHUNK_TOKENS", 10**9)
        assert torch.equal(text, model.generate(ids, **options))


# Not a fixture for the instruction set: Hypothesis would run all examples inside one set-up.
@pytest.mark.parametrize("isa", _core.isas())
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 33), max_size=8))
def test_any_cut_gives_what_one_pass_gives(isa: str, cuts: list[int]) -> None:
    """Pieces of any length through the kernels, single tokens through the one-call step."""
    model, ids = lively_model(), words(2, 33)
    cache = MambaCache(model.config, 2, torch.float32)
    last, pieces = cache.clone(), []
    with torch.no_grad(), natively(isa):
        whole = model(ids, cache=last).logits
        for start, stop in itertools.pairwise([0, *sorted(cuts), 33]):
            pieces.append(model(ids[:, start:stop], cache=cache).logits)
    assert_same(torch.cat(pieces, 1), whole)
    assert_same_cache(cache, last)


def test_token_by_token_is_the_whole(mixers: list[int]) -> None:
    model, ids = lively_model(), words(2, 33)
    cache = MambaCache(model.config, 2, torch.float32)
    with torch.no_grad():
        whole = model(ids).logits
        del mixers[:]
        steps = [model(ids[:, t, None], cache=cache).logits for t in range(33)]
    assert not mixers
    assert_same(torch.cat(steps, 1), whole)


def test_checkpointing_and_compiling() -> None:
    model, ids = lively_model().train(), words(2, 17)
    expected = pass_and_gradients(model, ids, None)
    model.gradient_checkpointing_enable()
    again = pass_and_gradients(model, ids, None)
    assert_same(again[1], expected[1])
    assert_gradients(again[2], expected[2])
    model.gradient_checkpointing_disable()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), nullcontext():
        assert_same(compiled(ids, use_cache=False).logits, expected[0])


def test_memory_that_is_fetched_ahead_decides_nothing() -> None:
    watch = _core.Watch()
    own = {"a": 1}
    watch.contents(own)
    watch.fetches(8, 200)  # no address of this process
    assert watch.holds()
    own["a"] = 2
    assert not watch.holds()

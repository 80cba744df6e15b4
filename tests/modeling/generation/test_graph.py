"""Captured decode steps, with a recorder that repeats operators on the same memory for a graph."""

import gc
import weakref
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anymamba import MambaCache, MambaForCausalLM
from anymamba.modeling import why_not_native_loop
from anymamba.modeling.generation import graph
from anymamba.modeling.generation.graph import DecodeGraph, captured_steps, why_not_graph
from tests.parity.architectures import ARCHITECTURES
from tests.support.graphs import recorded
from tests.support.models import small_model, talkative_model, words
from tests.support.stepping import Listener


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """As on a GPU: steps are captured; the results of those that were."""
    seen: list[Tensor] = []

    def noted(step: Any, device: torch.device) -> Any:
        replay, result = recorded(step, device)
        seen.append(result)
        return replay, result

    monkeypatch.setitem(graph.CAPTURES, "cpu", noted)
    monkeypatch.setattr(MambaForCausalLM, "_fused", lambda *_: None)  # no prompt in native code
    return seen


def written(model: MambaForCausalLM, batch: int = 2, **options: Any) -> Any:
    given = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    given |= {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(words(batch, 5), **(given | options))


def one_by_one(model: MambaForCausalLM, batch: int = 2, **options: Any) -> Any:
    """The same, where nothing is captured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(graph.CAPTURES, "cpu")
        return written(model, batch, **options)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    for name in ("conv_states", "ssm_states", "token_counts"):
        torch.testing.assert_close(getattr(found.cache, name), getattr(expected.cache, name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture(name: str, captures: list[Tensor]) -> None:
    model = ARCHITECTURES[name].model(vocab_size=61)
    assert_same(written(model), one_by_one(model))
    assert len(captures) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 9},
        {"num_return_sequences": 3, "do_sample": True},
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])},
        {"eos_token_id": list(range(0, 61, 3))},
        {"repetition_penalty": 1.5, "output_scores": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_generate_is_asked_for(options: dict[str, Any], captures: list[Tensor]) -> None:
    model = talkative_model()
    torch.manual_seed(5)
    found = written(model, **options)
    torch.manual_seed(5)
    assert_same(found, one_by_one(model, **options))
    assert len(captures) == 1


def test_a_graph_serves_again_and_each_text_has_its_own_state(captures: list[Tensor]) -> None:
    model = talkative_model()
    first = written(model)
    kept = first.cache.clone()
    for _ in range(2):
        assert_same(written(model), one_by_one(model))
    assert len(captures) == 1
    assert torch.equal(first.cache.ssm_states, kept.ssm_states), "another text wrote into it"
    written(model, batch=3)
    assert len(captures) == 2


def test_a_text_goes_on_from_a_cache_in_place() -> None:
    model = talkative_model()
    ids = words(1, 5)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(ids, max_new_tokens=9, **options)
    cache = MambaCache.for_model(model)
    blocks = (cache.conv_states, cache.ssm_states)
    some = model.generate(ids, max_new_tokens=4, cache=cache, **options)
    assert (cache.conv_states, cache.ssm_states) == blocks
    assert cache.get_seq_length() == 8
    rest = model.generate(some[:, -1:], max_new_tokens=5, cache=cache, **options)
    assert torch.equal(torch.cat([some[:, :-1], rest], 1), whole)


@pytest.mark.parametrize("change", ["type", "replaced", "moved", "in place", "hook", "settings"])
def test_a_graph_is_of_the_model_as_it_is(change: str, captures: list[Tensor]) -> None:
    model = talkative_model()
    written(model)
    mixer = model.backbone.layers[0].mixer
    if change == "type":
        model.to(torch.bfloat16)
    elif change == "replaced":
        mixer.out_proj = nn.Linear(mixer.out_proj.in_features, 24, bias=False)
    elif change == "moved":
        mixer.D.data = torch.randn_like(mixer.D)
    elif change == "in place":
        with torch.no_grad():
            mixer.A_log.add_(1.0)
    elif change == "hook":
        mixer.register_forward_hook(lambda module, given, output: 2 * output)
    else:
        model.backbone.norm_f.variance_epsilon = 1.0
    found = written(model)
    captured = {"in place": 1, "hook": 1, "settings": 1}.get(change, 2)
    assert len(captures) == captured
    assert_same(found, one_by_one(model))


def test_a_change_during_a_text_counts_from_the_next_step() -> None:
    model = talkative_model()

    class Doubles(Listener):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.heard) == 4:
                model.lm_head.weight.data = -model.lm_head.weight.data

    with torch.no_grad():
        head = model.lm_head.weight.data.clone()
    found = written(model, batch=1, streamer=Doubles())
    model.lm_head.weight.data = head
    expected = one_by_one(model, batch=1, streamer=Doubles())
    model.lm_head.weight.data = head
    assert_same(found, expected)


def test_a_hook_that_comes_during_a_text_is_called() -> None:
    model = talkative_model()
    calls: list[int] = []

    class Hooks(Listener):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.heard) == 4:
                model.register_forward_hook(lambda *_: calls.append(len(self.heard)))

    written(model, batch=1, streamer=Hooks())
    assert calls == [4, 5, 6, 7]


def assign(model: MambaForCausalLM) -> None:
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_by_others(model: MambaForCausalLM) -> None:
    """As torchao's `quantize_` does."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Other))


class Other(Tensor):
    """A tensor with behaviour of its own."""


@pytest.mark.parametrize("change", [assign, replace_by_others])
def test_no_graph_keeps_old_weights_alive(change: Callable[[MambaForCausalLM], None]) -> None:
    model = talkative_model()
    written(model, batch=3)
    written(model)
    old = weakref.ref(model.backbone.layers[0].mixer.out_proj.weight)
    change(model)
    written(model)
    gc.collect()
    assert old() is None


def test_a_change_during_a_text_frees_old_weights_at_once() -> None:
    model = talkative_model()
    old = weakref.ref(model.backbone.layers[0].mixer.out_proj.weight)
    written(model, batch=3)
    alive: list[bool] = []

    class Assigns(Listener):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.heard) == 3:
                assign(model)
            gc.collect()
            alive.append(old() is not None)

    written(model, batch=1, streamer=Assigns())
    assert alive == [True] * 3 + [False] * 5


@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(
            torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
        ),
        lambda: torch.use_deterministic_algorithms(True),
    ],
    ids=["precision", "tf32", "bf16", "deterministic"],
)
def test_settings_of_arithmetic_count(setting: Callable[[], None], captures: list[Tensor]) -> None:
    model = talkative_model()
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    written(model)
    try:
        setting()
        written(model)
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.allow_bf16_reduced_precision_reduction = reduced
        torch.use_deterministic_algorithms(False)
    assert len(captures) == 2


def test_a_text_waits_for_the_copies_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, two texts may run on two streams."""
    notes: list[str] = []

    def mark(device: torch.device) -> Callable[[], object]:
        notes.append("mark")
        return lambda: notes.append("wait")

    def copied(source: MambaCache, target: MambaCache) -> None:
        notes.append("copy")

    monkeypatch.setitem(graph.MARKS, "cpu", mark)
    monkeypatch.setattr(graph, "_copy_state", copied)
    model = talkative_model()
    for _ in range(2):
        written(model)
    assert notes == ["copy", "copy", "mark", "wait", "copy", "copy", "mark"]


def test_two_texts_at_once_do_not_share_a_state(captures: list[Tensor]) -> None:
    model = talkative_model()
    written(model, batch=1)  # whose graph the first of them takes
    one, other = (MambaCache.for_model(model) for _ in range(2))
    tokens = words(1, 4)[0]

    def step(cache: MambaCache) -> Any:
        return lambda ids: model(ids, cache=cache, use_cache=True).logits[:, -1]

    with (
        torch.no_grad(),
        captured_steps(model, one, step(one)) as first,
        captured_steps(model, other, step(other)) as second,
    ):
        for token in tokens:
            first(token.view(1, 1))
            last = second(token.view(1, 1))
    assert len(captures) == 2
    assert torch.equal(one.ssm_states, other.ssm_states)
    torch.testing.assert_close(last, model(tokens[None]).logits[:, -1])


def test_replays_see_the_new_token_and_the_captured_state() -> None:
    model = talkative_model()
    cache = MambaCache.for_model(model, 2)
    decoding = DecodeGraph(model, cache, recorded)
    decoding.load_from(cache)
    tokens = words(2, 6)
    logits = [decoding.step(tokens[:, at, None]) for at in range(6)]
    torch.testing.assert_close(torch.stack(logits, 1), model(tokens).logits)
    decoding.save_to(cache)
    assert cache.token_counts.tolist() == [6, 6]


def test_graphs_work_in_inference_mode_and_out_of_it(captures: list[Tensor]) -> None:
    model = talkative_model()
    with torch.inference_mode():
        inside = written(model)
    assert_same(written(model), inside)
    assert len(captures) == 1


def test_no_graph_keeps_a_model_alive() -> None:
    model = talkative_model()
    written(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_few_graphs_are_kept(captures: list[Tensor]) -> None:
    model = small_model()
    for batch in range(1, graph.MOST_GRAPHS + 2):
        written(model, batch)
    written(model, 1)
    assert len(captures) == graph.MOST_GRAPHS + 2
    written(model, 1)
    assert len(captures) == graph.MOST_GRAPHS + 2


def test_a_step_that_cannot_be_captured_is_taken_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = talkative_model()
    expected = one_by_one(model)

    def fails(step: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setitem(graph.CAPTURES, "cpu", fails)
    for _ in range(2):
        assert_same(written(model), expected)
    assert why_not_native_loop(model) == (
        "capturing a step failed: operation not permitted when stream is capturing"
    )
    model.backbone.layers[0].mixer.D.data = model.backbone.layers[0].mixer.D.data.clone()
    assert why_not_native_loop(model) is None, "the next capture may succeed"


def test_a_failure_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(step: Any, device: torch.device) -> Any:
        raise RuntimeError

    monkeypatch.setitem(graph.CAPTURES, "cpu", fails)
    model = talkative_model()
    written(model)
    assert why_not_graph(model) == "capturing a step failed: RuntimeError()"


def test_one_thread_captures_at_a_time(
    captures: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other steps kernel by kernel, and captures its next text."""
    model, other = talkative_model(), talkative_model()
    expected = one_by_one(other)
    capture, texts = graph.CAPTURES["cpu"], []

    def slow(step: Any, device: torch.device) -> Any:
        monkeypatch.setitem(graph.CAPTURES, "cpu", capture)
        thread = Thread(target=lambda: texts.append(written(other)))
        thread.start()
        thread.join()
        return capture(step, device)

    monkeypatch.setitem(graph.CAPTURES, "cpu", slow)
    written(model)
    assert_same(texts[0], expected)
    assert len(captures) == 1
    assert why_not_graph(other) is None
    written(other)
    assert len(captures) == 2


def test_reasons_have_names() -> None:
    model = small_model()
    assert why_not_graph(model) is None
    assert why_not_native_loop(model) is None
    assert why_not_native_loop(model, num_beams=2) == "beam_search is asked for"
    assert why_not_native_loop(model, output_hidden_states=True) == (
        "output_hidden_states is asked for"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not_graph(model) == "autocast is on"
    handle = model.backbone.layers[1].mixer.register_forward_hook(lambda *_: None)
    assert why_not_graph(model) == "layers.1.mixer: it has hooks"
    handle.remove()
    model.backbone.layers[0].mixer.in_proj = nn.Sequential(model.backbone.layers[0].mixer.in_proj)
    assert why_not_graph(model) == "layers.0.mixer.in_proj: replaced by Sequential"
    other = small_model()
    other.backbone.norm_f.to("meta")
    assert why_not_graph(other) == "backbone.norm_f.weight is on meta, and others are on cpu"


@pytest.mark.parametrize(
    ("device", "reason", "compiles"),
    [("cuda", None, False), ("cuda", "autocast is on", True), ("xpu", None, True)],
)
def test_transformers_compiles_where_no_graph_serves(
    device: str, reason: str | None, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it would compile the step of every model with a cache of fixed size."""
    model = small_model()
    monkeypatch.setattr(type(model), "device", torch.device(device))
    monkeypatch.setattr("anymamba.modeling.mamba.causal_lm.why_not_graph", lambda model: reason)
    config = model.generation_config
    given = {"cache": MambaCache(model.config, 1, device="cpu")}
    assert model._valid_auto_compile_criteria(given, config) == compiles

"""Captured decode steps: the same texts as step by step, however often and from whatever state."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anymamba import MambaCache, MambaForCausalLM
from anymamba.modeling import why_not_native_loop
from anymamba.modeling.generation import graph, why_not_graph
from tests.modeling.test_devices import model_of
from tests.parity.architectures import ARCHITECTURES
from tests.support.models import talkative_model, words
from tests.support.processes import assert_ends_well, run_python

pytestmark = pytest.mark.usefixtures("captures")


def written(model: MambaForCausalLM, batch: int = 2, **options: Any) -> Any:
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    given |= {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(words(batch, 7).to(model.device), **(given | options))


def one_by_one(model: MambaForCausalLM, batch: int = 2, **options: Any) -> Any:
    """By Transformers' loop, which launches the kernels of each step one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymamba.modeling.mamba.causal_lm.why_not_loop", lambda *_: "a test")
        return written(model, batch, **options)


def assert_same_text(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    for name in ("conv_states", "ssm_states", "token_counts"):
        torch.testing.assert_close(getattr(found.cache, name), getattr(expected.cache, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_captured_and_one_by_one(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model = model_of(name).to(device, dtype)
    assert why_not_graph(model) is None
    assert why_not_native_loop(model) is None
    for batch in (1, 3, 1):
        found = written(model, batch)
        if dtype == torch.float32 or device.type == "cuda":  # the CPU's prompt is the core's
            assert_same_text(found, one_by_one(model, batch))
    assert why_not_graph(model) is None, "a capture failed"


def test_samples_are_of_the_seed(device: torch.device) -> None:
    model = talkative_model().to(device)
    texts: list[Tensor] = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(written(model, do_sample=True, top_k=0).sequences)
    torch.manual_seed(3)
    texts.append(one_by_one(model, do_sample=True, top_k=0).sequences)
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_weights_may_change(device: torch.device) -> None:
    model = talkative_model().to(device)
    before = written(model)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.A_log.add_(1.0)
    in_place = written(model)
    assert_same_text(in_place, one_by_one(model))
    assert not torch.equal(in_place.logits[-1], before.logits[-1])
    mixer.out_proj = nn.Linear(mixer.out_proj.in_features, 24, bias=False, device=device)
    assert_same_text(written(model), one_by_one(model))
    model.to(torch.bfloat16).float()
    assert_same_text(written(model), one_by_one(model))
    mixer.register_forward_hook(lambda module, given, output: 2 * output)
    assert why_not_graph(model) == "layers.0.mixer: it has hooks"
    assert_same_text(written(model), one_by_one(model))


def test_texts_go_on_from_caches(device: torch.device) -> None:
    model = talkative_model().to(device)
    ids = words(1, 5).to(device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(ids, max_new_tokens=16, **options)
    cache = MambaCache.for_model(model)
    some = model.generate(ids, max_new_tokens=7, cache=cache, **options)
    fork = cache.clone()
    for each in (cache, fork):
        rest = model.generate(some[:, -1:], max_new_tokens=9, cache=each, **options)
        assert torch.equal(torch.cat([some[:, :-1], rest], 1), whole)


@pytest.mark.parametrize("kind", ["number", "mask"])
def test_a_step_that_cannot_be_captured(kind: str, device: torch.device) -> None:
    """In a process of its own: what is left of a failed capture would spoil the tests after it."""
    if kind == "mask" and device.type == "cpu":
        pytest.skip("needs a GPU that PyTorch can use: on the CPU no capture fails halfway")
    assert_ends_well(run_python("-m", "tests.gpu.failed_capture", kind, str(device)))


def test_each_gpu_captures_its_own(device: torch.device) -> None:
    """In one process: PyTorch's stream for captures is of the GPU that captured first."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs that PyTorch can use; run pytest tests/gpu where they are")
    places = [torch.device(device.type, at) for at in (0, 1)] if device.type == "cuda" else [device]
    for place in (*places, *places):
        model = talkative_model().to(place)
        assert_same_text(written(model), one_by_one(model))
        assert why_not_graph(model) is None, "a capture failed"


def test_memory_does_not_grow(device: torch.device) -> None:
    model = talkative_model().to(device)
    held = []
    for _ in range(4):
        for batch in range(1, graph.MOST_GRAPHS + 3):
            written(model, batch)
        held.append(torch.cuda.memory_allocated() if device.type == "cuda" else 0)
    assert held[-1] == held[1]

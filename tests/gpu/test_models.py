"""Models on a GPU and on the CPU: logits, gradients, states and texts are the same."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import anymamba
from anymamba import MambaCache, MambaForCausalLM, load_causal_lm
from anymamba.assets import bundled_model
from tests.modeling.test_devices import WAYS, model_of
from tests.parity.architectures import ARCHITECTURES
from tests.support.models import talkative_model, words
from tests.support.tolerance import assert_same, naming

TYPES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
"""How far logits may be off, as a share of the largest: sums in another order, and two layers of
rounding to 11 and to 8 bits."""
IDS = words(2, 7)


def moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in given.items()}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_forward(name: str, way: str, dtype: str, device: torch.device) -> None:
    rounded = model_of(name).to(getattr(torch, dtype))
    expected = copy.deepcopy(rounded).float()(**WAYS[way]())
    found = rounded.to(device)(**moved(WAYS[way](), device))
    assert found.logits.device == device
    assert_same(found.logits.cpu(), expected.logits, TYPES[dtype])
    if expected.loss is not None:
        assert_same(found.loss.float().cpu(), expected.loss, TYPES[dtype])


@pytest.mark.parametrize("way", ["labels", "mask", "seq_idx"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients(name: str, way: str, device: torch.device) -> None:
    model = model_of(name).train()
    other = copy.deepcopy(model).to(device)
    model(**WAYS[way]()).loss.backward()
    other(**moved(WAYS[way](), device)).loss.backward()
    for (weight, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        with naming(weight):
            assert_same(ours.grad.cpu(), theirs.grad)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_twenty_runs_give_the_same_bits(name: str, device: torch.device) -> None:
    model = model_of(name).train().to(device)
    ids = words(3, 70).to(device)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    first: list[Tensor] = []
    for run in range(20):
        model.zero_grad()
        output = model(ids, attention_mask=mask, labels=ids)
        output.loss.backward()
        found = [output.logits.detach(), *(weight.grad for weight in model.parameters())]
        first = first or [tensor.clone() for tensor in found]
        assert all(map(torch.equal, found, first)), f"run {run} differs"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])},
        {"num_beams": 3},
        {"repetition_penalty": 1.4},
        {"eos_token_id": list(range(0, 61, 4))},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_generate(options: dict[str, Any], device: torch.device) -> None:
    model = talkative_model()
    given: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    given |= {"eos_token_id": None} | options
    expected = model.generate(IDS, **given)
    found = model.to(device).generate(IDS.to(device), **moved(given, device))
    assert torch.equal(found.cpu(), expected)


def test_samples_are_of_the_seed(device: torch.device) -> None:
    model = talkative_model().to(device)
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(IDS.to(device), max_new_tokens=12, do_sample=True, top_k=0))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@torch.no_grad()
def test_a_state_goes_from_device_to_device(tmp_path: Path, device: torch.device) -> None:
    model = talkative_model()
    expected = model(IDS).logits[:, 4:]
    other = copy.deepcopy(model).to(device)
    cache = other(IDS[:, :4].to(device)).cache
    cache.save(tmp_path / "state.safetensors", model=other)
    for each in (
        cache.clone(),
        cache.clone().to("cpu").to(device),
        MambaCache.load(tmp_path / "state.safetensors", model=other),
    ):
        assert each.device == device
        assert_same(other(IDS[:, 4:].to(device), cache=each).logits.cpu(), expected)
    there = MambaCache.load(tmp_path / "state.safetensors", model=model)
    for each in (there, cache.clone().to("cpu")):
        assert_same(model(IDS[:, 4:], cache=each).logits, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_loading(dtype: str, device: torch.device) -> None:
    expected = load_causal_lm(bundled_model(), dtype=getattr(torch, dtype)).float()
    for places in (str(device), {"": str(device)}, "auto"):
        model = load_causal_lm(bundled_model(), dtype=getattr(torch, dtype), device_map=places)
        assert {weight.device for weight in model.parameters()} == {device}
        with torch.no_grad():
            found = model(IDS.to(device)).logits.cpu()
            assert_same(found, expected(IDS).logits, TYPES[dtype])


def test_pipelines(device: torch.device) -> None:
    model = load_causal_lm(bundled_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_model())
    texts = []
    for place in ("cpu", device):
        made = transformers.pipeline(
            "text-generation", model=model, tokenizer=tokenizer, device=place
        )
        texts.append(made(["ROMEO:", "O"], batch_size=2, max_new_tokens=9, do_sample=False))
    assert texts[0] == texts[1]


def test_the_runtime_and_a_gpu_share_states(device: torch.device) -> None:
    engine = anymamba.load()
    model: MambaForCausalLM = load_causal_lm(bundled_model()).to(device)
    state = engine.prefill(engine.state(), "ROMEO:")
    cache = MambaCache.from_state(state, model.config, device=device)
    ids = torch.tensor([[10, 72]], device=device)
    with torch.no_grad():
        found = model(ids, cache=cache).logits[0, -1].cpu()
        whole = model(torch.tensor([[*b"ROMEO:", 10, 72]], device=device)).logits[0, -1].cpu()
    assert_same(found, whole)
    assert cache.to_state(engine).token_count == 8

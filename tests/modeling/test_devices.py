"""The public surface on a GPU that is not there: nothing is left behind on the CPU.

The stand-in refuses operators over tensors of two devices, and notes each time the host waits.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba import MambaCache, MambaForCausalLM
from tests.parity.architectures import ARCHITECTURES
from tests.support.models import talkative_model, words
from tests.support.stand_in_device import OnDevice, stand_in_device
from tests.support.tolerance import assert_same

IDS = words(2, 7)
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 0, 1, 1]])
WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"input_ids": IDS},
    "mask": lambda: {"input_ids": IDS, "attention_mask": MASK, "labels": IDS},
    "labels": lambda: {"input_ids": IDS, "labels": IDS, "output_hidden_states": True},
    "shifted": lambda: {"input_ids": IDS, "shift_labels": IDS, "attention_mask": MASK},
    "seq_idx": lambda: {"input_ids": IDS, "seq_idx": MASK.cumsum(1), "labels": IDS},
    "offsets": lambda: {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 3, 7])},
    "positions": lambda: {
        "input_ids": IDS[:1],
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]]),
        "labels": IDS[:1],
    },
    "some": lambda: {"input_ids": IDS, "logits_to_keep": torch.tensor([1, 5])},
    "long": lambda: {"input_ids": words(1, 600), "logits_to_keep": 2},
}
CONTINUED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "mask": {"attention_mask": MASK},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "ends": {"eos_token_id": list(range(0, 61, 4))},
    "scores": {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
}


def there(given: Any) -> Any:
    """Tensors moved to the device."""
    if isinstance(given, Tensor):
        return given.to("cuda")
    return {name: there(value) for name, value in given.items()} if type(given) is dict else given


def model_of(name: str) -> MambaForCausalLM:
    found: MambaForCausalLM = ARCHITECTURES[name].model(vocab_size=61)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_forward(name: str, way: str) -> None:
    model = model_of(name)
    expected = copy.deepcopy(model)(**WAYS[way]())
    given = WAYS[way]()
    with stand_in_device():
        model.to("cuda")
        found = model(**there(given))
        assert found.logits.device.type == "cuda"
        assert found.cache.device.type == "cuda"
        logits = found.logits.cpu()
        loss = None if found.loss is None else found.loss.cpu()
    assert_same(logits, expected.logits)
    if loss is not None:
        assert_same(loss, expected.loss)


@pytest.mark.parametrize("way", ["labels", "mask", "seq_idx"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_backward(name: str, way: str) -> None:
    model = model_of(name).train()
    WAYS[way]  # of the batch
    other = copy.deepcopy(model)
    other(**WAYS[way]()).loss.backward()
    given = WAYS[way]()
    with stand_in_device():
        model.to("xla")
        on_device = {n: v.to("xla") if isinstance(v, Tensor) else v for n, v in given.items()}
        model(**on_device).loss.backward()
        gradients = {}
        for weight, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.device == parameter.device
            gradients[weight] = parameter.grad.cpu()
    for weight, parameter in other.named_parameters():
        assert parameter.grad is not None
        assert_same(gradients[weight], parameter.grad)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_step_neither_waits_nor_uploads(name: str) -> None:
    """Such a step can be captured, and Python runs ahead of the GPU where it is not."""
    model = model_of(name)
    ids = words(2, 4)
    with stand_in_device() as notes:
        model.to("cuda")
        cache = MambaCache.for_model(model, 2)
        blocks = (cache.conv_states, cache.ssm_states, cache.token_counts)
        moved = ids.to("cuda")
        forget(notes)
        for at in range(4):
            logits = model(moved[:, at, None], cache=cache).logits
        assert notes.waits == []
        assert notes.uploads == []
        assert (cache.conv_states, cache.ssm_states, cache.token_counts) == blocks
        found = logits.cpu()
    assert_same(found[:, 0], model_of(name)(ids).logits[:, -1])


@pytest.mark.parametrize("way", CONTINUED)
def test_generate(way: str) -> None:
    model, options = talkative_model(), CONTINUED[way]
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given |= {"eos_token_id": None} | options
    expected = copy.deepcopy(model).generate(IDS, **given)
    with stand_in_device():
        model.to("cuda")
        found = model.generate(IDS.to("cuda"), **there(given))
        detailed = not isinstance(found, Tensor)
        sequences = (found.sequences if detailed else found).cpu()
    assert torch.equal(sequences, expected.sequences if detailed else expected)


def test_sampling_takes_few_waits() -> None:
    model = talkative_model()
    options: dict[str, Any] = {"do_sample": True, "top_k": 5, "eos_token_id": None}
    counts = []
    for tokens in (4, 8):
        with stand_in_device() as notes:
            model.to("cuda")
            ids = IDS.to("cuda")
            forget(notes)
            model.generate(ids, max_new_tokens=tokens, pad_token_id=0, **options)
            counts.append(len(notes.waits))
    assert counts[1] - counts[0] <= 2 * 4, "a wait to see whether all are done, and one to draw"


def test_a_text_goes_on_from_caches_that_moved(tmp_path: Path) -> None:
    model = talkative_model()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = copy.deepcopy(model).generate(IDS, max_new_tokens=6, **options)
    with torch.no_grad(), stand_in_device():
        model.to("cuda")
        cache = model(IDS[:, :4].to("cuda")).cache
        there_and_back = cache.to("cpu").to("cuda")
        fork = there_and_back.clone()
        fork.reorder_cache(torch.tensor([0, 1]))
        fork.save(tmp_path / "state.safetensors")
        loaded = MambaCache.load(tmp_path / "state.safetensors", model=model)
        for each in (cache, there_and_back, fork, loaded):
            assert each.device.type == "cuda"
            assert each.token_counts.cpu().tolist() == [4, 4]
            found = model.generate(IDS[:, 4:].to("cuda"), cache=each, max_new_tokens=6, **options)
            assert torch.equal(found.cpu(), whole[:, 4:])


def forget(notes: OnDevice) -> None:
    notes.waits.clear()
    notes.uploads.clear()

"""One contract for all architectures: beside Transformers' classes and the specifications.

They share no code, so that what all agree on is the model, and not a mistake made twice.
"""

from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parity.architectures import (
    ARCHITECTURES,
    EVERY_SHAPE,
    run_anymamba,
    run_specification,
    run_transformers,
    tokens,
)
from tests.support.tolerance import assert_same, naming
from torch import Tensor
from torch.nn.functional import cross_entropy

import anymamba

EVERY_NAME = pytest.mark.parametrize("name", ARCHITECTURES)
# With biases, behind which a masked position could leak. No text ends early.
MODELS: dict[str, Any] = {
    name: each.pair(use_bias=True, eos_token_id=None)[1] for name, each in ARCHITECTURES.items()
}
LENGTH = 14


@pytest.mark.parametrize(("name", "shape"), EVERY_SHAPE)
def test_models_agree(name: str, shape: str) -> None:
    architecture = ARCHITECTURES[name]
    theirs, ours = architecture.pair(**architecture.shapes[shape])
    ids = tokens(2, 19)
    expected = run_transformers(theirs, ids)
    assert len(expected.layers) == theirs.config.num_hidden_layers
    # Gradients that vanish would agree with anything.
    assert all(gradient.abs().max() > 1e-6 for gradient in expected.gradients.values())
    with naming("anymamba"):
        run_anymamba(ours, ids).agrees(expected)
    specified = architecture.specification(theirs)
    if specified is not None:
        with naming("the specification"):
            run_specification(specified, ids, expected.gradients).agrees(expected)


@EVERY_NAME
@pytest.mark.parametrize("shape", [0, 1, 3, -1])
@torch.no_grad()
def test_error_beside_float64(name: str, shape: int) -> None:
    architecture = ARCHITECTURES[name]
    theirs, ours = architecture.pair(**list(architecture.shapes.values())[shape])
    ids = tokens(2, 40)
    found = [model(ids).logits.double() for model in (theirs, ours)]
    # Transformers' Mamba-2 computes parts in float32 always.
    exact = (ours if name == "Mamba2" else theirs).double()(ids).logits
    their_error, our_error = (float((logits - exact).abs().max()) for logits in found)
    # Twice theirs, and beyond that what the last digit of the largest logit is.
    assert our_error <= 2 * their_error + float(exact.abs().max()) * 2**-23


@EVERY_NAME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_the_state_space_in_float32(name: str, dtype: torch.dtype) -> None:
    _, ours = ARCHITECTURES[name].pair()
    ids = tokens(2, 30)
    expected = ours.to(dtype).float()(ids).logits
    found = ours.to(dtype)(ids)
    # The contract's tolerance for half precision storage.
    assert_same(found.logits, expected, share=2e-2)
    assert found.cache.ssm_states.dtype == torch.float32
    assert found.cache.conv_states.dtype == dtype


@EVERY_NAME
@pytest.mark.parametrize("batch", [1, 3])
def test_generation(name: str, batch: int) -> None:
    theirs, ours = ARCHITECTURES[name].pair(tie_word_embeddings=False)
    ids = tokens(batch, 7)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24}
    arguments |= {"eos_token_id": None, "do_sample": False}
    for beams in (1, 2):
        generated = ours.generate(ids, num_beams=beams, **arguments)
        assert torch.equal(generated, theirs.generate(ids, num_beams=beams, **arguments))


@EVERY_NAME
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_each_row_of_a_masked_batch_continues_as_if_alone(name: str, side: str) -> None:
    model, ids, mask = MODELS[name], tokens(4, 12), torch.ones(4, 12, dtype=torch.long)
    for row, count in enumerate([0, 3, 6, 9]):
        start = {"left": 0, "right": 12 - count, "middle": 1}[side]
        mask[row, start : start + count] = 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row in range(4):
        text = ids[row, mask[row].bool()][None]
        for _ in range(6):  # the most likely continuation, from the whole text each time
            best = model(text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, best], 1)
        assert torch.equal(generated[row, -6:], text[0, -6:])


@EVERY_NAME
@settings(max_examples=25)
@given(length=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=5), grad=st.booleans())
def test_any_cut_gives_what_one_pass_gives(
    name: str, length: int, cuts: list[int], grad: bool
) -> None:
    model, ids = MODELS[name], tokens(2, length)
    borders = [0, *sorted(cut for cut in cuts if cut <= length), length]
    with torch.set_grad_enabled(grad):  # through modules, and through the core's single call
        whole, cache = model(ids, use_cache=True), anymamba.MambaCache.for_model(model, 2)
        parts = [model(ids[:, slice(*ends)], cache=cache).logits for ends in pairwise(borders)]
    assert_same(torch.cat(parts, 1), whole.logits)
    assert_same(cache.ssm_states, whole.cache.ssm_states)
    assert_same(cache.conv_states, whole.cache.conv_states)
    assert cache.token_counts.tolist() == [length, length]


@EVERY_NAME
@settings(max_examples=25)
@given(data=st.data())
@torch.no_grad()
def test_a_masked_position_counts_as_deleted(name: str, data: st.DataObject) -> None:
    model, ids = MODELS[name], tokens(3, LENGTH)
    mask = torch.tensor(
        data.draw(st.lists(st.integers(0, 1), min_size=3 * LENGTH, max_size=3 * LENGTH))
    ).view(3, LENGTH)
    cut = data.draw(st.integers(0, LENGTH))
    cache = anymamba.MambaCache.for_model(model, 3)
    first = model(ids[:, :cut], attention_mask=mask[:, :cut], cache=cache).logits
    # The second piece gets the whole mask, of which the last columns count.
    second = model(ids[:, cut:], attention_mask=mask, cache=cache).logits
    logits = torch.cat([first, second], 1)
    for row in range(3):
        kept = mask[row].bool()
        assert not logits[row, ~kept].any()
        alone = model(ids[row, kept][None], use_cache=True)
        assert_same(logits[row, kept], alone.logits[0])
        assert_same(cache.ssm_states[:, row], alone.cache.ssm_states[:, 0])
        assert_same(cache.conv_states[:, row], alone.cache.conv_states[:, 0])
        assert cache.token_counts[row] == kept.sum()


@EVERY_NAME
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    how=st.sampled_from(["seq_idx", "cu_seq_lens_q", "position_ids"]),
)
def test_packed_documents_are_as_alone(name: str, lengths: list[int], how: str) -> None:
    model, documents = MODELS[name], [tokens(1, l, seed) for seed, l in enumerate(lengths)]
    marks = {
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    row = torch.cat(documents, 1)
    packed = model(row, labels=row, **{how: marks[how]})
    alone = [model(document).logits for document in documents]
    assert_same(packed.logits, torch.cat(alone, 1))
    losses = [
        cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        for logits, ids in zip(alone, documents, strict=True)
    ]
    if predicted := sum(lengths) - len(lengths):
        assert_same(packed.loss, sum(losses, torch.zeros(())) / predicted)


@EVERY_NAME
def test_training_computes_what_evaluation_does_and_checkpointing_its_gradients(name: str) -> None:
    architecture, ids = ARCHITECTURES[name], tokens(2, 20)

    def gradients(model: Any, checkpointing: bool) -> dict[str, Tensor]:
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(ids, labels=ids)
        out.loss.backward()
        found = {name: weight.grad for name, weight in model.named_parameters()}
        return found | {"logits": out.logits}

    plain, checkpointed, evaluated = (architecture.pair()[1] for _ in range(3))
    expected = gradients(plain.train(), False)
    assert torch.equal(expected["logits"], evaluated(ids).logits)
    for tensor, gradient in gradients(checkpointed.train(), True).items():
        assert_same(gradient, expected[tensor])


@pytest.mark.parametrize("name", ["FalconMamba", "Mamba2"])
def test_files_there_and_back_and_registration(name: str, tmp_path: Path) -> None:
    theirs, ours = ARCHITECTURES[name].pair(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    ids = tokens(1, 9)
    expected = theirs(ids).logits
    assert_same(type(theirs).from_pretrained(tmp_path / "ours")(ids).logits, expected)
    configs = [type(ours.config).from_pretrained(tmp_path / who) for who in ("theirs", "ours")]
    assert configs[0] == configs[1]
    anymamba.register()
    try:
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        assert type(found) is type(ours)
        # The module is another object once Transformers has loaded a class.
        assert getattr(import_module("transformers"), type(ours).__name__) is type(ours)
    finally:
        anymamba.unregister()
    assert_same(found(ids).logits, expected)

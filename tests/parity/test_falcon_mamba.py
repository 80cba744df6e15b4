"""Falcon-Mamba beside Transformers' own class with the same weights."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parity.test_three_way import BASE, SHAPES, run_anymamba, run_transformers, with_gradients
from tests.support.tolerance import assert_same, naming
from torch import Tensor

import anymamba
from anymamba.errors import ConfigError, InputError
from anymamba.modeling.fused import why_not_fused

# An epsilon of the norms that no result can be right without.
SHAPE: dict[str, Any] = BASE | {"mixer_rms_eps": 0.3}


def pair(seed: int = 0, **fields: Any) -> tuple[Any, Any]:
    """Transformers' model and ours with equal weights, no bias zero and no two rows alike."""
    torch.manual_seed(seed)
    shape = SHAPE | fields
    theirs = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**shape)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ours = anymamba.FalconMambaForCausalLM(anymamba.FalconMambaConfig(**shape)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def tokens(b: int, l: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 37, (b, l), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_layers_and_gradients(name: str) -> None:
    theirs, ours = pair(**SHAPES[name])
    ids = tokens(2, 19)
    expected = with_gradients(run_transformers, theirs, ids)
    actual = with_gradients(run_anymamba, ours, ids)
    assert_same(actual.logits, expected.logits)
    assert_same(actual.loss, expected.loss)
    for mine, its in zip(actual.layers, expected.layers, strict=True):
        assert_same(mine, its)
    for tensor, gradient in expected.gradients.items():
        assert gradient.abs().max() > 1e-6  # one that vanishes would agree with anything
        with naming(f"gradient of {tensor}"):
            assert_same(actual.gradients[tensor], gradient)


@pytest.mark.parametrize("name", ["default", "odd widths", "all at once"])
@torch.no_grad()
def test_error_beside_float64(name: str) -> None:
    theirs, ours = pair(**SHAPES[name])
    ids = tokens(2, 40)
    found = [model(ids).logits.double() for model in (theirs, ours)]
    exact = theirs.double()(ids).logits
    their_error, our_error = (float((logits - exact).abs().max()) for logits in found)
    # Twice theirs, and beyond that what the last digit of the largest logit is.
    assert our_error <= 2 * their_error + float(exact.abs().max()) * 2**-23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_types(dtype: torch.dtype) -> None:
    _, ours = pair()
    ids = tokens(2, 19)
    expected = ours.to(dtype).float()(ids).logits
    # bfloat16 keeps 8 bits of each activation.
    assert_same(ours.to(dtype)(ids).logits, expected, share=5e-2)


def test_training_computes_what_evaluation_does() -> None:
    _, ours = pair()
    ids = tokens(2, 19)
    assert torch.equal(ours.train()(ids).logits, ours.eval()(ids).logits)


@pytest.mark.parametrize("batch", [1, 3])
def test_generation(batch: int) -> None:
    theirs, ours = pair(tie_word_embeddings=False)
    ids = tokens(batch, 7)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24}
    greedy = ours.generate(ids, do_sample=False, **arguments)
    assert torch.equal(greedy, theirs.generate(ids, do_sample=False, **arguments))
    beams = ours.generate(ids, num_beams=2, do_sample=False, **arguments)
    assert torch.equal(beams, theirs.generate(ids, num_beams=2, do_sample=False, **arguments))


@pytest.mark.parametrize("masked", [0, 3, 8])
def test_padded_rows_are_as_alone(masked: int) -> None:
    _, ours = pair()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :masked] = 0
    padded = ours.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = ours.generate(ids[1:, masked:], max_new_tokens=6, do_sample=False)
    assert torch.equal(padded[1, 12:], alone[0, 12 - masked :])


_, OURS = pair()


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=4), grad=st.booleans())
def test_cuts_change_nothing(length: int, cuts: list[int], grad: bool) -> None:
    ids = tokens(2, length)
    borders = sorted({0, length, *(cut for cut in cuts if cut < length)})
    with torch.set_grad_enabled(grad):  # through modules, and through the core's single call
        whole, cache, parts = OURS(ids).logits, None, []
        for start, stop in itertools.pairwise(borders):
            output = OURS(ids[:, start:stop], cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)
    assert_same(torch.cat(parts, 1), whole)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_packed_documents_are_as_alone(lengths: list[int]) -> None:
    documents = [tokens(1, length, seed) for seed, length in enumerate(lengths)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = OURS(torch.cat(documents, 1), cu_seq_lens_q=offsets.int()).logits
    assert_same(packed, torch.cat([OURS(document).logits for document in documents], 1))


def test_the_core_runs_the_whole_model() -> None:
    _, ours = pair()
    assert why_not_fused(ours) is None
    ours.backbone.layers[1].mixer.rms_eps = 0.5
    assert why_not_fused(ours) == "layers.1.mixer: its rms_eps is 0.5, expected 0.3"


def test_register_covers_it(tmp_path: Any) -> None:
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path)
    anymamba.register()
    try:
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(found) is anymamba.FalconMambaForCausalLM
        # The module is another object once Transformers has loaded a class.
        named = importlib.import_module("transformers").FalconMambaForCausalLM
        assert named is anymamba.FalconMambaForCausalLM
    finally:
        anymamba.unregister()
    assert_same(found(tokens(1, 9)).logits, ours(tokens(1, 9)).logits)


def test_the_wrong_class_is_refused(tmp_path: Any) -> None:
    _, ours = pair()
    ours.save_pretrained(tmp_path / "falcon")
    anymamba.MambaForCausalLM(anymamba.MambaConfig(**BASE)).save_pretrained(tmp_path / "mamba")
    with pytest.raises(InputError, match="'falcon_mamba', and MambaForCausalLM builds 'mamba'"):
        anymamba.MambaForCausalLM.from_pretrained(tmp_path / "falcon")
    with pytest.raises(InputError, match="use MambaForCausalLM"):
        anymamba.FalconMambaForCausalLM.from_pretrained(tmp_path / "mamba")
    with pytest.raises(InputError, match="builds 'mamba'"):
        anymamba.MambaModel(ours.config)


def test_config() -> None:
    config = anymamba.FalconMambaConfig(hidden_size=32, use_falcon_mambapy=False)
    theirs = transformers.FalconMambaConfig(hidden_size=32).to_dict()
    assert {name: config.to_dict()[name] for name in theirs} == theirs
    with pytest.raises(ConfigError, match="FalconMambaConfig: mixer_rms_eps must be a finite"):
        config.mixer_rms_eps = -1.0

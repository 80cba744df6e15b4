"""Vectors of texts are what Transformers' models make of them, however they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import anymamba
from anymamba import Engine, Sampling
from anymamba.checkpoint.dtypes import as_float32
from anymamba.errors import CheckpointError, InputError
from anymamba.modeling.auto import load_causal_lm
from anymamba.runtime.generation import Embedding, Pooling, TokenOutput
from tests.support.files import write_folder, write_small
from tests.support.reference import words
from tests.support.tolerance import assert_same

TEXTS = [words(1), words(70), words(7)]


@torch.no_grad()
def hidden_of(model: Any, ids: list[int]) -> np.ndarray:
    """`last_hidden_state` (l, d) of the model without its head."""
    output = model.base_model(torch.tensor([ids]))
    return output.last_hidden_state[0].float().numpy()


def pooled(hidden_ld: np.ndarray, pooling: str) -> np.ndarray:
    found: np.ndarray = hidden_ld.mean(axis=0) if pooling == "mean" else hidden_ld[-1]
    return found


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_transformers_own_mamba(tmp_path: Path, pooling: str) -> None:
    folder = write_small(tmp_path)
    model = transformers.MambaForCausalLM.from_pretrained(folder)
    found = anymamba.load(folder).embed(TEXTS, pooling, normalize=False)
    for ids, vector_d in zip(TEXTS, found, strict=True):
        assert_same(vector_d, pooled(hidden_of(model, ids), pooling))


@pytest.mark.parametrize("architecture", ["mamba", "falcon_mamba", "mamba2"])
def test_every_architecture_and_weight_type(tmp_path: Path, architecture: str) -> None:
    folder = write_folder(tmp_path / "m", model_type=architecture, tie_word_embeddings=True)
    expected = [hidden_of(load_causal_lm(folder), ids).mean(axis=0) for ids in TEXTS]
    for weights, tolerance in (("f32", 1e-4), ("bf16", 2e-2)):
        engine = anymamba.load(folder, weights)
        for vector_d, wanted_d in zip(engine.embed(TEXTS, normalize=False), expected, strict=True):
            assert_same(vector_d, wanted_d, tolerance)


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["mamba", "falcon_mamba", "mamba2"])
def test_the_head_of_the_vector_is_the_logits(
    tmp_path: Path, architecture: str, weights: str
) -> None:
    """However the weights are stored: so quantized ones are held to the logits' own tests."""
    fields = {"hidden_size": 64, "time_step_rank": 4} if architecture != "mamba2" else {}
    folder = write_folder(tmp_path / "m", model_type=architecture, **fields)
    engine = anymamba.load(folder, weights)
    tensors = engine.weights.tensors
    head = tensors.get("lm_head.weight", tensors["backbone.embeddings.weight"])
    hidden_d = engine.embed([words(40)], "last", normalize=False)[0]
    # All but float32 round the activations before the product too.
    tolerance = 1e-4 if weights == "f32" else 2e-2
    assert_same(as_float32(head) @ hidden_d, engine.logits(words(40))[-1], tolerance)


def test_however_it_is_cut_and_beside_others(engine: Engine) -> None:
    ids, length = words(700), 3
    alone = engine.embed([ids])[0]
    assert abs(np.linalg.norm(alone) - 1) < 1e-6
    for chunk_tokens in (64, 512):
        batch = engine.batch(length, chunk_tokens)
        prompt = np.array(ids, np.int64)
        batch.add(0, np.array(words(5), np.int64), engine.token_generator(prompt, Sampling()))
        batch.add(2, prompt, Pooling())
        found, tokens = None, 0
        while found is None:
            for _, outcome in batch.step():
                tokens += isinstance(outcome, TokenOutput)
                found = outcome.vector_d if isinstance(outcome, Embedding) else found
        assert tokens >= 700 // chunk_tokens  # the other text went on meanwhile
        assert batch.rows == [0]
        assert_same(found, alone)
        assert batch.blocks.logits[2] is None


def test_what_is_no_text_is_refused(engine: Engine) -> None:
    for texts, message in (([""], "token"), ([[]], "no text"), ("ab", "give a list")):
        with pytest.raises((InputError, CheckpointError), match=message):
            engine.embed(texts)
    with pytest.raises(InputError, match="expected 'mean' or 'last'"):
        engine.embed([[1]], pooling="max")
    assert engine.embed([]).shape[0] == 0


def test_broken_weights_are_named(tmp_path: Path) -> None:
    folder = write_small(tmp_path)
    engine = anymamba.load(folder, weights="f32")
    name = "backbone.layers.0.mixer.D"
    tensors = {**engine.weights.tensors}
    tensors[name] = np.full_like(tensors[name], np.nan)
    broken = Engine(replace(engine.weights, tensors=tensors), None)
    with pytest.raises(CheckpointError, match=name):
        broken.embed([[1, 2]])

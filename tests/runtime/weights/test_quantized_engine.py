"""Whole models in 8 and 4 bits against a reference that rounds weights and activations alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymamba
from anymamba import Engine
from anymamba.checkpoint import open_checkpoint
from anymamba.checkpoint.dtypes import to_float32
from anymamba.checkpoint.quantization import dequantize
from anymamba.runtime.weights.weights import load_weights
from tests.support.files import write_small
from tests.support.instruction_sets import ISAS, kernels_of
from tests.support.reference import reference_logits, rounded, words
from tests.support.tolerance import assert_same

WIDE = {"hidden_size": 128, "tie_word_embeddings": False}  # widths that groups divide


def as_numbers(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """The numbers that the weights stand for."""

    def wide(tensor: Any) -> np.ndarray:
        if not isinstance(tensor, np.ndarray):
            return dequantize(tensor)
        return to_float32(tensor) if tensor.dtype == np.uint16 else tensor

    tensors = load_weights(open_checkpoint(folder), kind).tensors
    return {name: wide(tensor) for name, tensor in tensors.items()}


def stepped(engine: Engine, ids: list[int]) -> np.ndarray:
    """(l, v) logits, by the calls that `generate` makes."""
    blocks = engine.state()._blocks
    logits = []
    for id in ids:
        engine._network.advance(blocks, [0], [np.array([id])])
        logits.append(blocks.logits[0])
    return np.array(logits)


# In the texts of these seeds no activation lies on the border between two whole numbers.
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_model_in_few_bits(tmp_path: Path, isa: str, kind: str, seed: int) -> None:
    folder = write_small(tmp_path, seed, **WIDE)
    engine = anymamba.load(folder, kind)
    numbers, ids = as_numbers(folder, kind), words(20)
    expected = reference_logits(numbers, ids, group=128)
    with kernels_of(isa):
        assert_same(engine.logits(ids), expected)
        assert_same(stepped(engine, ids), expected)
    # The reference's rounding is no formality: without it the logits are others.
    unrounded = reference_logits(numbers, ids)
    assert np.abs(unrounded - expected).max() > 0.01


# Where an activation lies on such a border, an error of 1e-7 moves it to the other number, and that
# moves others in the layers behind: as far as rounding them moves the logits, and no further.
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_promised_of_any_text(tmp_path: Path, kind: str) -> None:
    differences = []
    for seed in range(9):
        folder = write_small(tmp_path / str(seed), seed, **WIDE)
        engine, ids = anymamba.load(folder, kind), words(20, seed)
        numbers = as_numbers(folder, kind)
        expected = reference_logits(numbers, ids, group=128)
        by_rounding = np.abs(reference_logits(numbers, ids) - expected).max()
        for logits in (engine.logits(ids), stepped(engine, ids)):
            differences.append(np.abs(logits - expected).max())
            assert differences[-1] <= by_rounding
    assert np.median(differences) <= 1e-5 * np.abs(expected).max()


def test_the_reference_rounds_as_is_documented() -> None:
    x = np.array([[0.5, -1.0, *[0.0] * 126, *[2.0] * 128]])
    kept = rounded(x, 128)
    assert kept[0, :3].tolist() == pytest.approx([64 / 127, -1.0, 0.0])
    assert (kept[0, 128:] == 2.0).all()


def test_states_and_batches_in_few_bits(tmp_path: Path) -> None:
    engine = anymamba.load(write_small(tmp_path, **WIDE), "int4")
    prompts = [words(length, seed=length) for length in (3, 9, 1)]
    batch = engine.generate_batch(prompts, 20)
    for prompt, generation in zip(prompts, batch, strict=True):
        assert generation.ids == engine.generate(prompt, 20).ids
    state = engine.state()
    first = engine.generate(prompts[0], 8, state=state)
    assert first.ids + engine.generate([], 12, state=state).ids == batch[0].ids

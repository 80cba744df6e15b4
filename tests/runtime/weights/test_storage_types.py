"""Every mixture of storage types in one model, prompts and single tokens, against float64.

The sizes are those at which one answer for all matrices goes wrong: a group of 128 divides the
rows of some and not of others.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.checkpoint.dtypes import to_bfloat16, to_float32
from anymamba.checkpoint.quantization import QuantizedArray, dequantize, quantize
from anymamba.runtime.network import Network
from anymamba.runtime.state.batch_state import BatchState
from anymamba.runtime.weights.weights import Weights
from tests.support.files import SMALL, small_weights
from tests.support.instruction_sets import ISAS, kernels_of
from tests.support.reference import reference_logits, rounded, words
from tests.support.tolerance import WHOLE_MODEL

FIELDS = {"hidden_size": 64, "time_step_rank": 32, "tie_word_embeddings": False}  # e is 128
NAMES = [
    name
    for name in small_weights(**FIELDS)
    if name.endswith(("_proj.weight", "embeddings.weight", "lm_head.weight"))
]
TYPES = ("f32", "bf16", "f16", "int8", "int4")
LENGTH = 20  # more rows than the kernel for few rows takes

# An error of 1e-7 may move an activation to the next number of 8 bits, or of bfloat16, and that
# moves others in the layers behind. An operand read in the wrong type is off by its whole size.
WITH_ROUNDED_ACTIVATIONS = 0.05


def stored(tensor: np.ndarray, kind: str) -> Any:
    if kind == "f32":
        return tensor
    if kind == "f16":
        return tensor.astype(np.float16)
    if kind == "bf16":
        return to_bfloat16(tensor)
    group = next(group for group in (128, 64, 32) if tensor.shape[1] % group == 0)
    return quantize(tensor, 8 if kind == "int8" else 4, group)


def numbers(tensor: Any) -> np.ndarray:
    if isinstance(tensor, QuantizedArray):
        return dequantize(tensor)
    return to_float32(tensor) if tensor.dtype == np.uint16 else tensor.astype(np.float32)


def network(tensors: dict[str, Any]) -> Network:
    weights = Weights(SMALL | FIELDS, tensors, "f32", lambda: "", lambda: None)
    return Network(weights, threads=1)


def empty() -> BatchState:
    sizes = {"intermediate_size": 128, "num_hidden_layers": 2, "conv_kernel": 4, "state_size": 5}
    return BatchState.empty(sizes, 1)


def both_ways(model: Network, ids: list[int]) -> Iterator[np.ndarray]:
    """(l, v) logits: of the prompt at once, and token by token."""
    yield model.read_all(empty(), np.array(ids))
    blocks, logits = empty(), []
    for id in ids:
        model.advance(blocks, [0], [np.array([id])])
        assert blocks.logits[0] is not None
        logits.append(blocks.logits[0])
    yield np.array(logits)


@pytest.mark.parametrize("matmul_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12)
@given(kinds=st.tuples(*[st.sampled_from(TYPES)] * len(NAMES)))
def test_every_mixture(isa: str, matmul_dtype: str, kinds: tuple[str, ...]) -> None:
    tensors: dict[str, Any] = small_weights(**FIELDS)
    tensors |= {n: stored(tensors[n], kind) for n, kind in zip(NAMES, kinds, strict=True)}

    def operand(name: str, x: Any) -> Any:
        tensor = tensors[name]
        if isinstance(tensor, QuantizedArray):
            return rounded(x, tensor.group)
        if tensor.dtype == np.uint16 and matmul_dtype == "bfloat16":
            return to_float32(to_bfloat16(x.astype(np.float32))).astype(np.float64)
        return x

    ids = words(LENGTH)
    wide = {name: numbers(tensor) for name, tensor in tensors.items()}
    expected = reference_logits(wide, ids, operand=operand)
    rounds = {"int8", "int4"} | ({"bf16"} if matmul_dtype == "bfloat16" else set())
    exact = not rounds & set(kinds[1:])  # the embeddings, which come first, are only looked up
    bound = (WHOLE_MODEL if exact else WITH_ROUNDED_ACTIVATIONS) * np.abs(expected).max()
    model = network(tensors)
    model.matmul_dtype = matmul_dtype  # on every instruction set, also where it gains nothing
    with kernels_of(isa):
        for logits in both_ways(model, ids):
            assert np.abs(logits - expected).max() <= bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_weight_type_is_one_arithmetic_everywhere(isa: str, kind: str) -> None:
    """By default nothing but the weights is rounded, on whatever instruction set."""
    tensors: dict[str, Any] = {n: stored(t, kind) for n, t in small_weights(**FIELDS).items()}
    expected = reference_logits(
        {name: numbers(tensor) for name, tensor in tensors.items()}, words(40)
    )
    with kernels_of(isa):
        for logits in both_ways(network(tensors), words(40)):
            assert np.abs(logits - expected).max() <= WHOLE_MODEL * np.abs(expected).max()

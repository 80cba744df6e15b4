"""Choosing better numbers for few bits: narrower ranges, and errors that make up for each other.

Rounding to the nearest number treats every weight alike. Two things do better:

- `search_clip`: a group that gives up a little of its range has finer steps for all that is left.
  Each group tries some ranges and keeps the one with the least squared error. No text is needed.
- `round_with_feedback`: what counts is not the error of the weights but that of the products with
  what the matrix really reads. Columns are rounded one after the other, and those that are left
  change so as to make up for the error so far (Frantar et al., 'GPTQ: Accurate Post-Training
  Quantization for Generative Pre-trained Transformers', arXiv 2210.17323). With H = X^T X of the
  inputs X and U the upper Cholesky factor of H^-1, an error e in column j is spread to the columns
  after it as -e U[j, j+1:] / U[j, j].

`calibrate` runs a model on a text, layer by layer, each on what the quantized ones before it give,
so that later layers make up for the errors of earlier ones as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import expected_shapes, model_shape
from anymamba.checkpoint.architecture import EMBEDDINGS, FINAL_NORM, HEAD, MAMBA, in_layer
from anymamba.checkpoint.dtypes import to_bfloat16
from anymamba.checkpoint.quantization import (
    Bits,
    QuantizedArray,
    check_weight,
    dequantize,
    pack,
    quantize,
    ranges,
    round_to,
    row_blocks,
    scales_of,
    squared_errors,
    values_of,
)
from anymamba.checkpoint.quantized_folder import is_quantized
from anymamba.errors import InputError
from anymamba.runtime.analysis import Layer, normed
from anymamba.runtime.native import epsilon_of
from anymamba.runtime.tokenizer import check_vocabulary

Tensor = Callable[[str], NDArray[np.float32] | None]
"""Gives the float32 tensor of a name, None if there is none."""

_CLIPS = np.linspace(1.0, 0.6, 9, dtype=np.float32)
# The paper takes 0.01. On the bundled model that is no better with 32,768 tokens of text, and worse
# than no calibration at all with 256.
_DAMPING = 0.1
_ROWS = 2048  # rows of a weight that are rounded together: independent, and small enough to cache
_TEXTS_AT_ONCE = 32
WINDOW = 256
MOST_WINDOWS = 128
"""A text is read in windows of so many tokens, and of a long one so many are taken. A quarter of
them gave the same result on the bundled model."""


@dataclass(frozen=True)
class Recipe:
    """How a matrix becomes whole numbers.

    Args:
        bits: 8 or 4.
        group: how many weights share a scale.
        symmetric: whether zero lies in the middle.
        search: whether ranges are searched for. At 8 bits that gains nothing, and is not done.
        threads: how many search. The ranges that they find do not depend on it.

    Example:
        >>> Recipe(4, 32).rounded(np.ones((1, 32), np.float32), "out").bits
        4
    """

    bits: Bits
    group: int
    symmetric: bool = True
    search: bool = True
    threads: int = 1

    @property
    def searches(self) -> bool:
        """Whether ranges are searched for."""
        return self.search and self.bits == 4

    def rounded(self, weight_nk: NDArray[np.float32], name: str) -> QuantizedArray:
        """Quantize a weight by itself, without a text."""
        clip = search_clip(weight_nk, self, name) if self.searches else None
        return quantize(weight_nk, self.bits, self.group, self.symmetric, clip, name)


def search_clip(
    weight_nk: NDArray[np.float32], recipe: Recipe, name: str = "the weight"
) -> NDArray[np.float32]:
    """Find for each group of a weight (n, k) the range with the least squared error.

    Returns:
        (n, k / group): which share of its range each group keeps, from 0.6 to 1. `quantize` takes
        it as `clip`.

    Raises:
        ConfigError: there are no such bits or groups.
        InputError: the weight cannot be quantized.

    Example:
        >>> outlier = np.float32([[1] + 127 * [0.07]])
        >>> search_clip(outlier, Recipe(4, 128)).round(2)
        array([[0.7]], dtype=float32)
    """
    check_weight(weight_nk, recipe.bits, recipe.group, name)
    n, k = weight_nk.shape
    clip_ng = np.empty((n, k // recipe.group), np.float32)

    def search(rows: slice) -> None:
        parts = weight_nk[rows].reshape(-1, k // recipe.group, recipe.group)
        clip_ng[rows] = _best_clip(parts, recipe)

    with ThreadPoolExecutor(recipe.threads) as pool:  # numpy lets go of the interpreter's lock
        for _ in pool.map(search, row_blocks(n, k)):
            pass
    return clip_ng


def _best_clip(parts: NDArray[np.float32], recipe: Recipe) -> NDArray[np.float32]:
    """For parts (..., group) the best of the clips, (...). Of equal ones the widest."""
    low, high = ranges(parts)
    clips = np.expand_dims(_CLIPS, tuple(range(1, parts.ndim)))
    scales, minima = scales_of(low, high, recipe.bits, recipe.symmetric, clips)
    best = np.ones(low.shape, np.float32)
    least = np.full(low.shape, np.inf, np.float32)
    room = np.empty_like(parts)
    for index, clip in enumerate(_CLIPS):
        minimum = None if minima is None else minima[index]
        total = squared_errors(parts, scales[index], minimum, recipe.bits, room)
        np.copyto(best, clip, where=total < least)
        np.minimum(least, total, out=least)
    return best


def second_moment(inputs: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
    """X^T X (k, k) of all that a matrix reads, which comes in parts (..., k).

    Raises:
        InputError: there is nothing, or it holds NaN or infinity.

    Example:
        >>> second_moment([np.float32([[1, 2]]), np.float32([[3, 4]])]).tolist()
        [[10.0, 14.0], [14.0, 20.0]]
    """
    total: NDArray[np.float64] | None = None
    for x in inputs:
        rows = x.reshape(-1, x.shape[-1])
        product = (rows.T @ rows).astype(np.float64)
        total = product if total is None else total + product
    if total is None or not np.isfinite(total).all():
        raise InputError(
            "calibration needs a text on which the model computes finite numbers; the model's "
            "weights may be broken"
        )
    return total


def round_with_feedback(
    weight_nk: NDArray[np.float32],
    moment_kk: NDArray[np.float64],
    recipe: Recipe,
    name: str = "the weight",
) -> QuantizedArray:
    """Round a weight column by column, later columns making up for the errors of earlier ones.

    Args:
        moment_kk: `second_moment` of what the weight (n, k) reads. A tenth of its mean diagonal is
            added to the diagonal, so that few or alike inputs do no harm.

    Raises:
        ConfigError: there are no such bits or groups.
        InputError: the weight cannot be quantized, or the moment does not fit it.

    Example:
        >>> weight = np.float32([32 * [0.3]])
        >>> made = round_with_feedback(weight, np.ones((32, 32)), Recipe(4, 32))
        >>> made.shape, made.bits
        ((1, 32), 4)
    """
    check_weight(weight_nk, recipe.bits, recipe.group, name)
    n, k = weight_nk.shape
    if moment_kk.shape != (k, k):
        raise InputError(f"the moment of {name} must be ({k}, {k}), got {moment_kk.shape}")
    factor_kk = _inverse_factor(moment_kk)
    q = np.empty((n, k // recipe.group, recipe.group), np.uint8)
    scales = np.empty((n, k // recipe.group), np.float32)
    minima = None if recipe.symmetric else np.empty_like(scales)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        left_kn = weight_nk[rows].T.copy()  # a column of the weight is a row here, without gaps
        for g in range(k // recipe.group):
            numbers, scale, minimum = _round_group(left_kn, factor_kk, g, recipe)
            q[rows, g], scales[rows, g] = numbers.T, scale
            if minima is not None and minimum is not None:
                minima[rows, g] = minimum
    stored_minima = None if minima is None else to_bfloat16(minima)
    stored = (pack(q, recipe.bits), to_bfloat16(scales), stored_minima)
    return QuantizedArray(*stored, recipe.bits, recipe.group, (n, k))


def _inverse_factor(moment_kk: NDArray[np.float64]) -> NDArray[np.float32]:
    """U, upper triangular, with U^T U = H^-1."""
    damped = moment_kk.copy()
    diagonal = np.einsum("kk->k", damped)
    # Where nothing but zeros was read, every rounding is as good as another.
    diagonal += _DAMPING * diagonal.mean() or 1.0
    factor: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor.astype(np.float32)


def _round_group(
    left_kn: NDArray[np.float32], factor_kk: NDArray[np.float32], g: int, recipe: Recipe
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32] | None]:
    """Round group g of what is left of a weight, and change what comes after it in place.

    Returns:
        Whole numbers (group, n), scales (n,) and minima (n,).
    """
    begin, end = g * recipe.group, (g + 1) * recipe.group
    own, factor = left_kn[begin:end], factor_kk[begin:end]
    parts = np.ascontiguousarray(own.T)
    clip = _best_clip(parts, recipe) if recipe.searches else 1.0
    scale, minimum = scales_of(*ranges(parts), recipe.bits, recipe.symmetric, clip)
    numbers, errors = np.empty(own.shape, np.uint8), np.empty_like(own)
    for j in range(recipe.group):
        column = own[j, :, None]
        q = round_to(column, scale, minimum, recipe.bits)
        numbers[j] = q[:, 0]
        errors[j] = (column - values_of(q, scale, minimum, recipe.bits))[:, 0]
        errors[j] /= factor[j, begin + j]
        own[j + 1 :] -= np.outer(factor[j, begin + j + 1 : end], errors[j])
    left_kn[end:] -= factor[:, end:].T @ errors
    return numbers, scale, minimum


def windows_of(ids: NDArray[np.int64], window: int = WINDOW, most: int = MOST_WINDOWS) -> Any:
    """Cut windows out of a text, spread over all of it.

    Args:
        ids: the text's tokens.
        window: how many tokens a window has; a shorter text is one shorter window.
        most: how many windows are taken at most.

    Returns:
        (b, l) int64.

    Raises:
        InputError: there are no tokens.

    Example:
        >>> windows_of(np.arange(10), window=3, most=2).tolist()
        [[0, 1, 2], [6, 7, 8]]
    """
    if ids.size == 0:
        raise InputError("the calibration text is empty; give some pages of ordinary text")
    length = min(window, ids.size)
    starts = np.arange(0, ids.size - length + 1, length)
    chosen = starts[np.linspace(0, starts.size - 1, min(most, starts.size)).round().astype(int)]
    return np.stack([ids[start : start + length] for start in chosen])


def check_readable(ids_bl: NDArray[np.int64], config: Mapping[str, Any]) -> None:
    """Refuse windows of tokens, or a model, that cannot be calibrated with.

    Raises:
        ConfigError: the native core does not compute such a model.
        InputError: a token is not in the vocabulary.

    Example:
        >>> check_readable(np.array([[0, 7]]), {"vocab_size": 8})
    """
    epsilon_of(config, "quantize without a calibration text")
    check_vocabulary(ids_bl, model_shape(config).vocab_size, "the calibration text")


def calibrate(
    tensor: Tensor,
    config: Mapping[str, Any],
    ids_bl: NDArray[np.int64],
    recipe: Recipe,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[tuple[str, QuantizedArray]]:
    """Quantize a model's large matrices by what they read in a text.

    In memory are one layer, and what it reads and gives for all of the text: (d + e) numbers a
    token. An embedding table that is no head reads nothing, and is rounded by itself.

    Args:
        tensor: gives the float32 tensor of a name of Transformers', None if there is none; small
            matrices as rounded as they will be.
        config: fields in Transformers' names.
        ids_bl: the text, b windows of l tokens, each read from an empty state.
        recipe: the format. Matrices whose rows its group does not divide are left out.
        progress: told how many layers are done, and how many there are.

    Yields:
        Name and quantized matrix, as they are found.

    Raises:
        ConfigError: the native core does not compute such a model.
        InputError: a token is not in the vocabulary, or a weight cannot be quantized.
    """
    check_readable(ids_bl, config)
    _check_weights(tensor, config, recipe)
    table = _there(tensor, EMBEDDINGS)
    batches = [
        ids_bl[start : start + _TEXTS_AT_ONCE] for start in range(0, len(ids_bl), _TEXTS_AT_ONCE)
    ]
    shape = model_shape(config)
    if shape.d_model % recipe.group == 0:
        if shape.tied:
            hidden = _last_hidden(tensor, config, [table[ids] for ids in batches])
            quantized = round_with_feedback(table, second_moment(hidden), recipe, EMBEDDINGS)
        else:
            quantized = recipe.rounded(table, EMBEDDINGS)
        yield EMBEDDINGS, quantized
        table = dequantize(quantized)
    hidden = [table[ids] for ids in batches]
    for index in range(shape.n_layer):
        layer = Layer.read(index, tensor, config)
        yield from _calibrate_layer(index, layer, hidden, recipe)
        if progress is not None:
            progress(index + 1, shape.n_layer)
    if not shape.tied and shape.d_model % recipe.group == 0:
        moment = second_moment(_normed(tensor, config, hidden))
        yield HEAD, round_with_feedback(_there(tensor, HEAD), moment, recipe, HEAD)


def _check_weights(tensor: Tensor, config: Mapping[str, Any], recipe: Recipe) -> None:
    """Before anything is computed: what is broken in one place makes all that follows it NaN."""
    for name, shape in expected_shapes(config).items():
        if is_quantized(name, shape, recipe.group):
            check_weight(_there(tensor, name), recipe.bits, recipe.group, name)


def _calibrate_layer(
    index: int, layer: Layer, hidden: list[NDArray[np.float32]], recipe: Recipe
) -> Iterator[tuple[str, QuantizedArray]]:
    """Quantize a layer's two large matrices, and let `hidden` go through it."""
    reads = [layer.normed(batch) for batch in hidden]
    # Every architecture has these two, and calls them so.
    first, last = (row for row in MAMBA.layer if row.role == "large matrix")
    for row in (first, last):
        if row is last:
            reads = [layer.mixed(batch) for batch in reads]
        weight, name = getattr(layer, row.core), in_layer(index, row.name)
        if weight.shape[1] % recipe.group == 0:
            made = round_with_feedback(weight, second_moment(reads), recipe, name)
            setattr(layer, row.core, made)
            yield name, made
    for batch, mixed in enumerate(reads):
        hidden[batch] = layer.added(hidden[batch], mixed)


def _last_hidden(
    tensor: Tensor, config: Mapping[str, Any], hidden: list[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """What the head reads while nothing is quantized."""
    for index in range(model_shape(config).n_layer):
        layer = Layer.read(index, tensor, config)
        hidden = [layer.run(batch) for batch in hidden]
    return _normed(tensor, config, hidden)


def _normed(
    tensor: Tensor, config: Mapping[str, Any], hidden: list[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    weight_d = _there(tensor, FINAL_NORM)
    return [normed(batch, weight_d, epsilon_of(config)) for batch in hidden]


def _there(tensor: Tensor, name: str) -> NDArray[np.float32]:
    found = tensor(name)
    if found is None:
        raise InputError(f"the model has no {name}")
    return found

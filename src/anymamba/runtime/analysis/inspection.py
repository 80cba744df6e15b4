"""What selection does with a text: how long each step lasts, and how much each token leaves.

A layer's state follows h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t (equations 2 to 4 of 'Mamba:
Linear-Time Sequence Modeling with Selective State Spaces', Gu and Dao, arXiv 2312.00752), so token
s writes u_s = Delta_s B_s x_s, and of that is left t steps later

    u_s exp(A (Delta_{s+1} + ... + Delta_{s+t})),

whatever other tokens write. `inspect` sums up the sizes of these numbers, |.|, over a layer's
channels and states. A state that decays fast counts for little if little was written to it.

Shapes: y layers, l tokens, a ages; e channels and n states as in `anymamba.minimal`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import model_shape
from anymamba.checkpoint.architecture import EMBEDDINGS
from anymamba.checkpoint.finite import say_what_is_broken
from anymamba.errors import InputError
from anymamba.runtime.analysis.layerwise import Layer, Written
from anymamba.runtime.native import core
from anymamba.runtime.tokenizer import check_vocabulary
from anymamba.runtime.weights import to_weight_type

if TYPE_CHECKING:
    from anymamba.runtime.engine import Engine
    from anymamba.runtime.weights import Weights

_BLOCK = 1 << 21  # numbers of a block of channels, 8 MB


@dataclass(frozen=True)
class Inspection:
    """What was found in a text of l tokens.

    Args:
        ids: the tokens.
        ages: after how many steps was looked at what is left; the first is 0.
        step_sizes_yl: Delta of each layer and token, averaged over channels.
        left_yal: what each token wrote, and what is left of it at each age: the sum of sizes over
            channels and states. NaN where the text ends before.
        final_yl: what is left of each token at the text's end, the same way.
    """

    ids: list[int]
    ages: tuple[int, ...]
    step_sizes_yl: NDArray[np.float64]
    left_yal: NDArray[np.float64]
    final_yl: NDArray[np.float64]

    @property
    def retention_yal(self) -> NDArray[np.float64]:
        """Which share of what each token wrote is left at each age, from 1 down to 0."""
        written_yl = self.left_yal[:, 0]
        safe = np.where(written_yl > 0, written_yl, 1.0)  # who wrote nothing left nothing
        return self.left_yal / safe[:, None]

    @property
    def final_share_yl(self) -> NDArray[np.float64]:
        """Of what each layer remembers at the text's end, the share that is each token's."""
        total = self.final_yl.sum(axis=1, keepdims=True)
        return self.final_yl / np.where(total > 0, total, 1.0)

    def forgetting_ya(self) -> NDArray[np.float64]:
        """Which share of all that was written is left at each age, layer by layer."""
        shares = []
        for index, age in enumerate(self.ages):
            seen = len(self.ids) - age  # tokens old enough
            left, written = (self.left_yal[:, a, :seen].sum(axis=1) for a in (index, 0))
            shares.append(left / np.where(written > 0, written, 1.0))
        return np.stack(shares, axis=1)

    def held_yl(self, age: int) -> NDArray[np.float64]:
        """How much more is left of a token than of the average token of that age.

        Args:
            age: one of `ages`.

        Returns:
            (y, l), 1 for the average; NaN where the text ends before.
        """
        left_yl = self.left_yal[:, self.ages.index(age)]
        average_y1 = np.nanmean(left_yl, axis=1, keepdims=True)
        return left_yl / np.where(average_y1 > 0, average_y1, 1.0)


def inspect(
    engine: Engine,
    ids: Sequence[int],
    ages: Sequence[int] = (),
    progress: Callable[[int, int], object] | None = None,
) -> Inspection:
    """Let a model read a text from an empty state, and look at what selection does.

    Args:
        engine: the model.
        ids: the text's tokens.
        ages: after how many steps to look, beside 0, 1, 2, 4, 8 and so on to the text's end.
        progress: told how many layers are done, and how many there are.

    Returns:
        What was found. Memory and time grow with the text's length.

    Raises:
        InputError: there are no tokens, one is not in the vocabulary, or the text is no longer
            than an age.
        CheckpointError: the model's weights hold NaN or infinity, which the text met.

    Example:
        >>> import anymamba
        >>> engine = anymamba.load()
        >>> found = inspect(engine, engine.tokenize("ROMEO:"))
        >>> found.ages, found.step_sizes_yl.shape, found.left_yal.shape
        ((0, 1, 2, 4), (7, 6), (7, 4, 6))
    """
    ids_l = np.asarray(ids, np.int64)
    get = _getter(engine.weights)
    table_vd = get(EMBEDDINGS)
    check_vocabulary(ids_l, len(table_vd), "the text")
    if not ids_l.size:
        raise InputError("there is nothing to look at: the text is empty")
    looked = _all_ages(ids_l.size, ages)
    core().set_threads(engine.threads)
    hidden_bld = table_vd[ids_l][None]
    count = model_shape(engine.config).n_layer
    found = []
    for index in range(count):
        layer = Layer.read(index, get, engine.config)
        selected = layer.selected(layer.normed(hidden_bld))
        found.append(_inspect_layer(layer.written(selected), looked))
        hidden_bld = layer.added(hidden_bld, layer.scanned(selected))
        if not np.isfinite(hidden_bld).all():
            raise say_what_is_broken(float(hidden_bld.max()), engine.weights.tensors)
        if progress is not None:
            progress(index + 1, count)
    step_sizes, left, final = (np.stack(parts) for parts in zip(*found, strict=True))
    return Inspection(ids_l.tolist(), looked, step_sizes, left, final)


def _all_ages(length: int, asked: Sequence[int]) -> tuple[int, ...]:
    for age in asked:
        if not 0 <= age < length:
            raise InputError(
                f"the text has {length} tokens, and nothing is {age} steps old in it: take a "
                "longer text, or fewer steps"
            )
    doublings = [2**power for power in range((length - 1).bit_length())]
    return tuple(sorted({0, *doublings, *asked}))


def _getter(weights: Weights) -> Callable[[str], Any]:
    """Gives a tensor in float32; a large matrix that is quantized is multiplied with as it is."""

    def get(name: str) -> Any:
        tensor = weights.tensors.get(name)
        if tensor is None or (not isinstance(tensor, np.ndarray) and name != EMBEDDINGS):
            return tensor
        return to_weight_type({name: tensor}, "f32")[name]

    return get


def _inspect_layer(
    written: Written, ages: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A layer's step sizes (l,), what is left at each age (a, l), and at the end (l,)."""
    delta_lr = written.delta_lr
    length = len(delta_lr)
    left_al = np.zeros((len(ages), length))
    final_l = np.zeros(length)
    r, n = written.A_rn.shape
    width = max(1, _BLOCK // (length * n))
    for first in range(0, r, width):
        rates = slice(first, first + width)
        A_rn = written.A_rn[rates]
        # When each token came, in the model's own time: decay between two depends on that alone.
        time_lr = delta_lr[:, rates].cumsum(axis=0)
        written_lrn = written.size_lr[:, rates, None] * written.size_ln[:, None, :]
        for index, age in enumerate(ages):
            seen = length - age
            passed_lr = time_lr[age:] - time_lr[:seen]
            left_al[index, :seen] += _left(written_lrn[:seen], passed_lr, A_rn)
        final_l += _left(written_lrn, time_lr[-1] - time_lr, A_rn)
    for index, age in enumerate(ages):
        left_al[index, length - age :] = np.nan
    return delta_lr.mean(axis=1), left_al, final_l


def _left(
    written_lrn: NDArray[np.float64], passed_lr: NDArray[np.float64], A_rn: NDArray[np.float32]
) -> NDArray[np.float64]:
    """What is left of what was written, after so much of the model's time has passed."""
    decay_lrn = np.exp(passed_lr[:, :, None] * A_rn)
    left_l: NDArray[np.float64] = np.einsum("lrn,lrn->l", written_lrn, decay_lrn)
    return left_l

"""Transformers' commonest logits processors, faster and to the same last bit.

Between two steps of a small batch, Transformers' own cost more than their arithmetic: top-p sorts
the vocabulary with its indices, and PyTorch's OpenMP threads go on spinning for milliseconds on
the processors that the next step needs. What stands here is NumPy's, on one thread. A processor
that is not listed, or that the installed Transformers defines in another way, is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation import logits_process as theirs
from transformers.generation.logits_process import LogitsProcessorList

_Row = NDArray[np.float32]
# (processor, ids_l, scores_v) to the new scores, or None where Transformers' code is to decide.
_Replacement = Callable[[Any, NDArray[np.int64], _Row], _Row | None]

_MOST_ROWS = 64
"""Larger batches are worth PyTorch's threads."""


def process(processors: LogitsProcessorList, input_ids: Tensor, scores_bv: Tensor) -> Tensor:
    """Apply the processors one after the other.

    Args:
        processors: Transformers' list, which may be a subclass of it.
        input_ids: (b, l), all tokens so far.
        scores_bv: (b, v), the model's logits; a processor may write into them.

    Returns:
        (b, v): what `processors(input_ids, scores_bv)` returns.

    Example:
        >>> from transformers import TemperatureLogitsWarper
        >>> processors = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
        >>> process(processors, torch.tensor([[1]]), torch.tensor([[1.0, 2.0]]))
        tensor([[2., 4.]])
    """
    ids: Any = input_ids  # Transformers asks for a LongTensor by name
    if type(processors).__call__ is not LogitsProcessorList.__call__:
        return processors(ids, scores_bv)
    for processor in processors:
        replacement = replaced().get(type(processor).__call__)
        processed = None
        if replacement is not None and _is_usual(scores_bv):
            processed = _by_rows(replacement, processor, input_ids, scores_bv)
        if processed is None:
            processed = LogitsProcessorList([processor])(ids, scores_bv)
        scores_bv = processed
    return scores_bv


def softmax(scores_bv: Tensor) -> Tensor:
    """`torch.softmax` over the last axis.

    On the CPU a row at a time, so that no other thread wakes; on a GPU each row would be a launch.
    """
    if scores_bv.device.type != "cpu" or not 1 < len(scores_bv) <= _MOST_ROWS:
        return torch.softmax(scores_bv, -1)
    return torch.cat([torch.softmax(row, -1) for row in scores_bv.split(1)])


def _is_usual(scores_bv: Tensor) -> bool:
    usual = scores_bv.dtype == torch.float32 and scores_bv.device.type == "cpu"
    return usual and scores_bv.ndim == 2 and 0 < len(scores_bv) <= _MOST_ROWS


def _by_rows(
    replacement: _Replacement, processor: Any, input_ids: Tensor, scores_bv: Tensor
) -> Tensor | None:
    rows = []
    for ids_l, scores_v in zip(input_ids.numpy(), scores_bv.numpy(), strict=True):
        with np.errstate(all="ignore"):  # infinities and NaN take PyTorch's course, in silence
            row = replacement(processor, ids_l, scores_v)
        if row is None:
            return None
        rows.append(row)
    return torch.from_numpy(rows[0][None] if len(rows) == 1 else np.stack(rows))


def _temperature(processor: Any, ids_l: NDArray[np.int64], scores_v: _Row) -> _Row:
    return scores_v / np.float32(processor.temperature)


def _top_k(processor: Any, ids_l: NDArray[np.int64], scores_v: _Row) -> _Row:
    beyond = len(scores_v) - min(processor.top_k, len(scores_v))
    return _only(scores_v, ~(scores_v < np.partition(scores_v, beyond)[beyond]), processor)


def _top_p(processor: Any, ids_l: NDArray[np.int64], scores_v: _Row) -> _Row | None:
    sorted_v = np.sort(scores_v)
    sums = torch.from_numpy(sorted_v)[None].softmax(-1).cumsum(-1).numpy()
    # The sums never fall, so what goes is the first few.
    gone = int(np.count_nonzero(sums <= np.float32(1 - processor.top_p)))
    gone = max(min(gone, len(scores_v) - processor.min_tokens_to_keep), 0)
    if gone == 0:
        return scores_v.copy()
    if sorted_v[gone - 1] == sorted_v[gone]:
        return None  # which of the equal ones goes is a matter of PyTorch's sort
    return _only(scores_v, ~(scores_v < sorted_v[gone]), processor)


def _min_p(processor: Any, ids_l: NDArray[np.int64], scores_v: _Row) -> _Row | None:
    if processor.min_tokens_to_keep != 1:
        return None
    probabilities_v = torch.from_numpy(scores_v)[None].softmax(-1).numpy()[0]
    least = np.float32(processor.min_p) * probabilities_v.max()
    return _only(scores_v, ~(probabilities_v < least), processor)


def _repetition_penalty(processor: Any, ids_l: NDArray[np.int64], scores_v: _Row) -> _Row | None:
    if isinstance(processor.prompt_ignore_length, Tensor):
        return None
    ids = ids_l[processor.prompt_ignore_length or 0 :]
    ids = ids[ids < len(scores_v)]
    if (ids < 0).any():
        return None  # PyTorch refuses them
    penalty, old = np.float32(processor.penalty), scores_v[ids]
    processed_v = scores_v.copy()
    processed_v[ids] = np.where(old < 0, old * penalty, old / penalty)
    return processed_v


def _min_length(processor: Any, ids_l: NDArray[np.int64], scores_v: _Row) -> _Row:
    return _without_end(processor, len(ids_l) < processor.min_length, scores_v)


def _min_new_tokens(processor: Any, ids_l: NDArray[np.int64], scores_v: _Row) -> _Row:
    written = len(ids_l) - processor.prompt_length_to_skip
    return _without_end(processor, written < processor.min_new_tokens, scores_v)


def _without_end(processor: Any, is_early: bool, scores_v: _Row) -> _Row:
    processed_v = scores_v.copy()
    if is_early:
        ends = processor.eos_token_id.numpy()
        processed_v[ends[(ends >= 0) & (ends < len(scores_v))]] = -np.inf
    return processed_v


def _only(scores_v: _Row, kept_v: NDArray[np.bool_], processor: Any) -> _Row:
    """The scores at some places, the processor's filter value at all others."""
    kept = np.flatnonzero(kept_v)  # a masked copy takes ten times as long
    filtered_v = np.full_like(scores_v, processor.filter_value)
    filtered_v[kept] = scores_v[kept]
    return filtered_v


_REPLACEMENTS: dict[str, tuple[_Replacement, tuple[dict[str, Any], ...]]] = {
    "TemperatureLogitsWarper": (_temperature, ({"temperature": 0.7},)),
    "TopKLogitsWarper": (_top_k, ({"top_k": 7}, {"top_k": 10_000})),
    "TopPLogitsWarper": (_top_p, ({"top_p": 0.9}, {"top_p": 0.3, "min_tokens_to_keep": 9})),
    "MinPLogitsWarper": (_min_p, ({"min_p": 0.05},)),
    "RepetitionPenaltyLogitsProcessor": (
        _repetition_penalty,
        ({"penalty": 1.3}, {"penalty": 1.3, "prompt_ignore_length": 2}),
    ),
    "MinLengthLogitsProcessor": (_min_length, ({"min_length": 9, "eos_token_id": [3, 5]},)),
    "MinNewTokensLengthLogitsProcessor": (
        _min_new_tokens,
        ({"prompt_length_to_skip": 2, "min_new_tokens": 9, "eos_token_id": 3},),
    ),
}
"""By the name of Transformers' class: ours, and options to compare the two with."""


@cache
def replaced() -> dict[Callable[..., Any], _Replacement]:
    """What stands in for which `__call__`: those that agree with the installed Transformers."""
    found: dict[Callable[..., Any], _Replacement] = {}
    for name, (replacement, examples) in _REPLACEMENTS.items():
        kind = getattr(theirs, name)
        if all(_agrees(replacement, kind(**options)) for options in examples):
            found[kind.__call__] = replacement
    return found


def _agrees(replacement: _Replacement, processor: Any) -> bool:
    source = torch.Generator().manual_seed(0)
    scores_bv = torch.empty(4, 997, dtype=torch.float32, device="cpu").normal_(generator=source)
    scores_bv[1, :300] = -torch.inf
    ids_bl = torch.empty(4, 6, dtype=torch.int64, device="cpu").random_(0, 997, generator=source)
    ours = _by_rows(replacement, processor, ids_bl, scores_bv)
    return ours is not None and torch.equal(ours, processor(ids_bl, scores_bv))

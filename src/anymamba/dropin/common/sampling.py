"""Choosing the next token; `mamba_ssm.utils.generation` has these functions.

The filters change logits in place: what is left out becomes -inf. Sources: top-p from "The Curious
Case of Neural Text Degeneration" (arXiv 1904.09751), min-p from "Turning Up the Heat" (arXiv
2407.01082), the penalty from "CTRL" (arXiv 1909.05858).
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.errors import InputError

NEVER = float("-inf")


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Leave out what is below min_p, in place.

    As in the original, values are compared as they are: for the filter of the paper pass
    probabilities, as shares of the largest one (`sample` does).

    Args:
        logits: (b, v).
        min_p: at 0 or below, and at 1 or above, nothing is left out.

    Example:
        >>> shares = torch.tensor([[1.0, 0.05, 0.5]])
        >>> modify_logits_for_min_p_filtering(shares, 0.1)
        >>> shares.tolist()
        [[1.0, -inf, 0.5]]
    """
    if 0.0 < min_p < 1.0:
        logits.masked_fill_(logits < min_p, NEVER)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Leave out all but the k largest, and what equals the last of them, in place.

    Args:
        logits: (b, v).
        top_k: how many stay.

    Example:
        >>> logits = torch.tensor([[1.0, 3.0, 2.0]])
        >>> modify_logits_for_top_k_filtering(logits, 2)
        >>> logits.tolist()
        [[-inf, 3.0, 2.0]]
    """
    kth_largest = torch.topk(logits, top_k, dim=-1).values[..., -1:]
    logits.masked_fill_(logits < kth_largest, NEVER)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Leave out the least likely that together have a probability of at most 1 - top_p, in place.

    Args:
        logits: (b, v).
        top_p: at 0 or below, and at 1 or above, nothing is left out.

    Example:
        >>> logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
        >>> modify_logits_for_top_p_filtering(logits, 0.8)
        >>> [round(p, 1) for p in logits.exp().flatten().tolist()]
        [0.0, 0.6, 0.3]
    """
    if not 0.0 < top_p < 1.0:
        return
    ascending, order = torch.sort(logits, dim=-1)
    out_sorted = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    logits.masked_fill_(torch.zeros_like(out_sorted).scatter(-1, order, out_sorted), NEVER)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Make tokens that were there before less likely, in place.

    Args:
        logits: (b, v).
        prev_output_tokens: (b, l).
        repetition_penalty: positive logits are divided by it, negative ones multiplied.

    Returns:
        The logits.

    Example:
        >>> logits = torch.tensor([[2.0, -2.0, 1.0]])
        >>> modify_logit_for_repetition_penalty(logits, torch.tensor([[0, 1, 0]]), 2.0).tolist()
        [[1.0, -4.0, 1.0]]
    """
    if repetition_penalty == 1.0:
        return logits
    seen = logits.gather(1, prev_output_tokens)
    changed = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, changed)


def sample(
    logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Choose a token a row.

    Args:
        logits: (b, v); left as they are.
        top_k: 1 takes the likeliest; more draw from as many; 0 draws from all.
        top_p: draw from the likeliest that together have this probability, of those top_k left.
        min_p: draw from tokens at least this share as likely as the likeliest one. Counts where
            top_k is 0, and then in the place of top_p.
        temperature: divides the logits; with top_p before the filter, with min_p behind it.

    Returns:
        (b,) token ids.

    Raises:
        InputError: top_p is above 1.

    Example:
        >>> sample(torch.tensor([[1.0, 3.0, 2.0]])).tolist()
        [1]
        >>> sample(torch.tensor([[0.0, 9.0, 8.9]]), top_k=0, min_p=0.5).item() in (1, 2)
        True
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    if top_p > 1.0:
        raise InputError(f"top_p is {top_p}, expected at most 1")
    if top_k > 0:
        likeliest, ids = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
        likeliest = likeliest / temperature
        modify_logits_for_top_p_filtering(likeliest, top_p)
        return ids.gather(-1, _draw(likeliest)).squeeze(-1)
    if min_p > 0.0:
        shares = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
        modify_logits_for_min_p_filtering(shares, min_p)
        return _draw(logits.masked_fill(shares < 0, NEVER) / temperature).squeeze(-1)
    logits = logits / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    return _draw(logits).squeeze(-1)


def _draw(logits: Tensor) -> Tensor:
    """One index a row, (b, 1)."""
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)

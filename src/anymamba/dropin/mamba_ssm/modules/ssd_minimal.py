"""The state space duality in a few lines, to read, and to check faster code by.

Source: "Transformers are SSMs" (arXiv 2405.21060), listing 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.errors import InputError

__all__ = ["segsum", "segsum_unstable", "ssd_minimal_discrete"]


def segsum_unstable(x: Tensor) -> Tensor:
    """Sums over segments as differences of sums from the start, which round off small ones.

    Args:
        x: (..., T).

    Returns:
        (..., T, T): at [i, j] the sum of x[j + 1] to x[i]; minus infinity where j > i.

    Example:
        >>> segsum_unstable(torch.tensor([1.0, 2.0, 4.0])).tolist()
        [[0.0, -inf, -inf], [2.0, 0.0, -inf], [6.0, 4.0, 0.0]]
    """
    sums = x.cumsum(-1)
    return _up_to_the_diagonal(sums[..., :, None] - sums[..., None, :])


def segsum(x: Tensor) -> Tensor:
    """`segsum_unstable` with each sum taken by itself.

    Example:
        >>> segsum(torch.tensor([1.0, 2.0, 4.0])).tolist()
        [[0.0, -inf, -inf], [2.0, 0.0, -inf], [6.0, 4.0, 0.0]]
    """
    # Column j starts to count below the diagonal.
    columns = x[..., :, None].expand(*x.shape, x.shape[-1]).tril(-1)
    return _up_to_the_diagonal(columns.cumsum(-2))


def _up_to_the_diagonal(sums: Tensor) -> Tensor:
    later = torch.ones(sums.shape[-2:], dtype=torch.bool, device=sums.device).triu(1)
    return sums.masked_fill(later, float("-inf"))


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(A_t) h_{t-1} + B_t X_t, and y_t = C_t h_t, in blocks. Differentiable.

    Args:
        X: the input times its step size, (batch, length, n_heads, d_head).
        A: the logarithm of the decay, that is rate times step size, (batch, length, n_heads).
        B, C: (batch, length, n_heads, d_state).
        block_len: how many steps make a block; divides the length.
        initial_states: (batch, 1, n_heads, d_head, d_state); zeros when None.

    Returns:
        y like X, and the last state, (batch, n_heads, d_head, d_state).

    Raises:
        InputError: the types differ, or the blocks do not fill the length.

    Example:
        >>> X, A = torch.ones(1, 4, 1, 2), torch.zeros(1, 4, 1)
        >>> B = C = torch.ones(1, 4, 1, 3)
        >>> y, _ = ssd_minimal_discrete(X, A, B, C, block_len=2)
        >>> y[0, :, 0, 0].tolist()
        [3.0, 6.0, 9.0, 12.0]
    """
    if len({X.dtype, A.dtype, B.dtype, C.dtype}) > 1:
        raise InputError("ssd_minimal_discrete: X, A, B and C must be of one type")
    if X.shape[1] % block_len:
        raise InputError(
            f"ssd_minimal_discrete: block_len {block_len} does not divide the length {X.shape[1]}"
        )
    # Letters: b batch, z blocks, t and s steps of a block, h heads, p width of a head, n states.
    X, A, B, C = (tensor.unflatten(1, (-1, block_len)) for tensor in (X, A, B, C))
    A_bhzt = A.permute(0, 3, 1, 2)
    sums_bhzt = A_bhzt.cumsum(-1)

    decays_bhzts = segsum(A_bhzt).exp()
    within = torch.einsum("bzthn,bzshn,bhzts,bzshp->bzthp", C, B, decays_bhzts, X)

    to_end_bhzt = (sums_bhzt[..., -1:] - sums_bhzt).exp()
    states = torch.einsum("bzthn,bhzt,bzthp->bzhpn", B, to_end_bhzt, X)
    first = torch.zeros_like(states[:, :1]) if initial_states is None else initial_states
    states = torch.cat([first, states], dim=1)
    through_bhz = torch.nn.functional.pad(sums_bhzt[..., -1], (1, 0))
    states = torch.einsum("bhyz,bzhpn->byhpn", segsum(through_bhz).exp(), states)

    past = torch.einsum("bzthn,bzhpn,bhzt->bzthp", C, states[:, :-1], sums_bhzt.exp())
    return (within + past).flatten(1, 2), states[:, -1]

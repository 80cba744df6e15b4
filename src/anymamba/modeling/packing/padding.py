"""Masked batches where no number of the mask may decide a shape: in compiled and exported graphs.

A masked position counts as deleted, as everywhere. `PackedBatch` deletes it; here each row's kept
positions move to its front instead, and what stands behind them leaves the state as it is. Nothing
before the last kept position sees it, and all shapes are the batch's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Softplus of it is 0 in every type, so that the state neither decays nor takes anything in.
_NO_STEP = -1e4


@dataclass(frozen=True)
class PaddedBatch:
    """How the kept positions of a (b, l) batch lie at the front of their rows.

    Attributes:
        order_bl: which position of the batch stands at each place.
        place_bl: at which place each position stands.
        is_kept_bl: whether a place holds a kept position.
    """

    order_bl: Int[Tensor, "b l"]
    place_bl: Int[Tensor, "b l"]
    is_kept_bl: Bool[Tensor, "b l"]

    cu_seqlens = None  # a row is one sequence

    @property
    def counts_b(self) -> Int[Tensor, " b"]:
        """How many positions each row keeps."""
        return self.is_kept_bl.sum(1)

    def pack(self, x_bl: Float[Tensor, "b l ..."]) -> Float[Tensor, "b l ..."]:
        """The kept positions first, zeros behind them."""
        return _or_zero(self.is_kept_bl, _along_rows(x_bl, self.order_bl))

    def unpack(self, x_bl: Float[Tensor, "b l ..."]) -> Float[Tensor, "b l ..."]:
        """Positions laid back where they were, zeros at the masked ones."""
        return _along_rows(_or_zero(self.is_kept_bl, x_bl), self.place_bl)

    def states_before(self, state_b: Tensor) -> Tensor:
        """Each row's initial state: a row is one sequence."""
        return state_b

    def steps(self, delta_ble: Float[Tensor, "b l e"]) -> Float[Tensor, "b l e"]:
        """Step sizes before softplus, none behind the kept positions."""
        return torch.where(self.is_kept_bl[..., None], delta_ble, _NO_STEP)

    def windows_after(
        self, window_bek: Tensor, x_ble: Float[Tensor, "b l e"], last_bek: Tensor
    ) -> Tensor:
        """Each row's last k inputs among those that it keeps, older ones from its window."""
        inputs_bel = torch.cat([window_bek, x_ble.transpose(1, 2).to(window_bek.dtype)], 2)
        columns_k = torch.arange(window_bek.shape[2], device=inputs_bel.device)
        columns_bk = self.counts_b[:, None] + columns_k
        return inputs_bel.gather(2, columns_bk[:, None].expand_as(window_bek))

    def states_after(self, state_b: Tensor, last_b: Tensor) -> Tensor:
        """Each row's state: steps of size zero have kept it."""
        return last_b

    def next_tokens(self, labels_bl: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
        """What each position should predict: the label at the next kept one, else -100."""
        ahead_bl = torch.roll(_along_rows(labels_bl, self.order_bl), -1, 1)
        is_last_bl = ~torch.nn.functional.pad(self.is_kept_bl[:, 1:], (0, 1))
        return _along_rows(ahead_bl.masked_fill(is_last_bl, -100), self.place_bl)


def pad_batch(is_kept_bl: Bool[Tensor, "b l"]) -> PaddedBatch:
    """Order a batch by its mask.

    Example:
        >>> batch = pad_batch(torch.tensor([[False, True, False, True]]))
        >>> batch.pack(torch.tensor([[5, 6, 7, 8]])).tolist()
        [[6, 8, 0, 0]]
        >>> batch.next_tokens(torch.tensor([[5, 6, 7, 8]])).tolist()
        [[-100, 8, -100, -100]]
    """
    order_bl = torch.argsort((~is_kept_bl).to(torch.uint8), dim=1, stable=True)
    place_bl = torch.argsort(order_bl, dim=1)
    return PaddedBatch(order_bl, place_bl, is_kept_bl.gather(1, order_bl))


def _along_rows(x_bl: Tensor, order_bl: Tensor) -> Tensor:
    rows_b1 = torch.arange(x_bl.shape[0], device=x_bl.device)[:, None]
    return x_bl[rows_b1, order_bl]


def _or_zero(is_kept_bl: Tensor, x_bl: Tensor) -> Tensor:
    axes = (1,) * (x_bl.ndim - 2)
    return torch.where(is_kept_bl.view(*is_kept_bl.shape, *axes), x_bl, torch.zeros_like(x_bl))

"""Masked and packed batches as one row of tokens.

A masked position counts as deleted, and packed documents do not see each other. Both become the
same thing here: the positions that remain are laid in one row, with the offsets at which a
sequence begins. Kernels see only that row and know nothing of masks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from anymamba.errors import InputError
from anymamba.modeling.packing.padding import PaddedBatch, pad_batch
from anymamba.ops.tracing import values_are_known


@dataclass(frozen=True)
class PackedBatch:
    """How a (b, l) batch lies in one row of t tokens that holds s sequences.

    Layers on other devices use it as it is: each method follows the tensor that it is given.

    Attributes:
        batch, length: b and l.
        position_t: where each token stands in the flattened batch.
        cu_seqlens: (s + 1,) offsets of the sequences in the row.
        row_s: the batch row that each sequence belongs to.
        is_first_s, is_last_s: whether it is the first, and the last, of its batch row.
    """

    batch: int
    length: int
    position_t: Int[Tensor, " t"]
    cu_seqlens: Int[Tensor, " s1"]
    row_s: Int[Tensor, " s"]
    is_first_s: Tensor
    is_last_s: Tensor

    def pack(self, x_bl: Float[Tensor, "b l ..."]) -> Float[Tensor, "1 t ..."]:
        """The remaining positions of a batch, in one row."""
        return x_bl.flatten(0, 1)[self.position_t.to(x_bl.device)][None]

    def unpack(self, x_1t: Float[Tensor, "1 t ..."]) -> Float[Tensor, "b l ..."]:
        """A row laid back into the batch, zeros at the deleted positions."""
        flat = x_1t.new_zeros(self.batch * self.length, *x_1t.shape[2:])
        flat = flat.index_copy(0, self.position_t.to(x_1t.device), x_1t[0])
        return flat.view(self.batch, self.length, *x_1t.shape[2:])

    def states_before(self, state_b: Float[Tensor, "b ..."]) -> Float[Tensor, "s ..."]:
        """Each sequence's initial state: its row's for the first of a row, else zeros."""
        state_s = state_b[self.row_s.to(state_b.device)]
        is_first_s = self.is_first_s.to(state_b.device).view(-1, *[1] * (state_b.ndim - 1))
        return torch.where(is_first_s, state_s, torch.zeros_like(state_s))

    @property
    def counts_b(self) -> Int[Tensor, " b"]:
        """How many positions of each batch row remain."""
        return torch.bincount(self.position_t // max(self.length, 1), minlength=self.batch)

    def steps(self, delta_1te: Float[Tensor, "1 t e"]) -> Float[Tensor, "1 t e"]:
        """Step sizes as they are: nothing is masked any more."""
        return delta_1te

    def windows_after(self, window_bek: Tensor, x_1te: Tensor, last_sek: Tensor) -> Tensor:
        """Each row's window afterwards, as `states_after`."""
        return self.states_after(window_bek, last_sek)

    def states_after(
        self, state_b: Float[Tensor, "b ..."], last_s: Float[Tensor, "s ..."]
    ) -> Float[Tensor, "b ..."]:
        """Each row's state afterwards: its last sequence's, or the old one where it had none."""
        rows = self.row_s[self.is_last_s].to(state_b.device)
        last = last_s[self.is_last_s.to(last_s.device)]
        return state_b.index_copy(0, rows, last.to(state_b.device, state_b.dtype))

    def next_tokens(self, labels_bl: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
        """What each position should predict: the next label of its own document, else -100."""
        labels_t = self.pack(labels_bl)[0]
        next_t = torch.full_like(labels_t, -100)
        next_t[:-1] = labels_t[1:]
        next_t[self.cu_seqlens[1:].to(labels_t.device) - 1] = -100
        flat = labels_bl.new_full((self.batch * self.length,), -100)
        return flat.index_copy(0, self.position_t.to(flat.device), next_t).view(labels_bl.shape)


Layout = PackedBatch | PaddedBatch
"""How a batch lies in the rows that the kernels see."""


def pack_batch(
    batch: int,
    length: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Layout | None:
    """Read all ways of marking a batch; None where every row is one whole sequence.

    Args:
        batch, length, device: of the input.
        attention_mask: (b, l or more) of 0 and 1; the last l columns count.
        seq_idx: (b, l); a document begins where the number changes.
        cu_seq_lens_q: (s + 1,) offsets into the only row. Used where seq_idx is not given.
        position_ids: (b, l); a document begins at each 0. Used where the others are not given.

    Raises:
        InputError: one of them has the wrong shape or values.
    """
    unmarked = seq_idx is None and cu_seq_lens_q is None and position_ids is None
    if attention_mask is None and unmarked:
        return None
    if attention_mask is not None and unmarked:
        check_mask(batch, length, attention_mask)
        if not values_are_known(attention_mask):
            now_bl = attention_mask[:, attention_mask.shape[1] - length :]
            return pad_batch((now_bl != 0).to(device))
    kept_bl = _kept(batch, length, attention_mask)
    if kept_bl is None:
        position_t = torch.arange(batch * length, device=device)
    else:
        position_t = torch.nonzero(kept_bl.to(device).flatten()).flatten()
    new_document_t = _new_documents(batch, length, position_t, seq_idx, cu_seq_lens_q, position_ids)
    if kept_bl is None and new_document_t is None:
        return None
    row_t = position_t // max(length, 1)
    new_row_t = torch.ones_like(row_t, dtype=torch.bool)
    new_row_t[1:] = row_t[1:] != row_t[:-1]
    new_t = new_row_t if new_document_t is None else new_row_t | new_document_t
    starts_s = torch.nonzero(new_t).flatten()
    row_s = row_t[starts_s]
    is_last_s = torch.ones_like(row_s, dtype=torch.bool)
    is_last_s[:-1] = row_s[1:] != row_s[:-1]
    return PackedBatch(
        batch=batch,
        length=length,
        position_t=position_t,
        cu_seqlens=pad(starts_s.cpu(), (0, 1), value=position_t.numel()),
        row_s=row_s,
        is_first_s=new_row_t[starts_s],
        is_last_s=is_last_s,
    )


def next_tokens(labels_bl: Int[Tensor, "b l"], packed: Layout | None) -> Int[Tensor, "b l"]:
    """What each position should predict: the next label of its own document, else -100.

    Deleted positions are skipped: the shift happens between the positions that remain.
    """
    if packed is None:
        return pad(labels_bl, (0, 1), value=-100)[:, 1:]
    return packed.next_tokens(labels_bl)


def check_mask(batch: int, length: int, attention_mask: Tensor) -> None:
    """Refuse a mask that does not cover a (b, l) batch.

    Raises:
        InputError: naming the shape found and the one expected.
    """
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected ({batch}, {length}) "
            "or more columns, one 0 or 1 a position"
        )
    if attention_mask.shape[1] < length:
        raise InputError(
            f"attention_mask has {attention_mask.shape[1]} columns for {length} positions"
        )


def _kept(batch: int, length: int, attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    check_mask(batch, length, attention_mask)
    kept_bl = attention_mask[:, attention_mask.shape[1] - length :] != 0
    return None if bool(kept_bl.all()) else kept_bl


def _new_documents(
    batch: int,
    length: int,
    position_t: Tensor,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """True at each remaining token that begins a document; None where no row holds a second one.

    Neighbours are compared after the deletion, so that what stands at masked positions (padding
    has arbitrary indices) never counts.
    """
    if seq_idx is not None:
        mark_t = _at_positions("seq_idx", seq_idx, batch, length, position_t)
        differs = mark_t[1:] != mark_t[:-1]
    elif cu_seq_lens_q is not None:
        offsets = _checked_offsets(batch, length, cu_seq_lens_q).to(position_t.device)
        mark_t = torch.searchsorted(offsets, position_t, right=True)
        differs = mark_t[1:] != mark_t[:-1]
    elif position_ids is not None:
        mark_t = _at_positions("position_ids", position_ids, batch, length, position_t)
        differs = (mark_t[1:] <= mark_t[:-1]) | (mark_t[1:] == 0)
    else:
        return None
    new_t = torch.zeros_like(position_t, dtype=torch.bool)
    new_t[1:] = differs
    row_t = position_t // max(length, 1)
    inside_a_row = torch.zeros_like(new_t)
    inside_a_row[1:] = row_t[1:] == row_t[:-1]
    return new_t if bool((new_t & inside_a_row).any()) else None


def _at_positions(name: str, tensor: Tensor, batch: int, length: int, position_t: Tensor) -> Tensor:
    if tuple(tensor.shape) not in ((batch, length), (1, length)) or tensor.is_floating_point():
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)} of {tensor.dtype}, expected one integer a "
            f"position: {(batch, length)}"
        )
    return tensor.to(position_t.device).expand(batch, length).flatten()[position_t]


def _checked_offsets(batch: int, length: int, cu_seq_lens_q: Tensor) -> Tensor:
    offsets: list[int] = cu_seq_lens_q.flatten().tolist()
    rising = all(a <= b for a, b in itertools.pairwise(offsets))
    if batch != 1 or not offsets or offsets[0] != 0 or offsets[-1] != length or not rising:
        raise InputError(
            f"cu_seq_lens_q must rise from 0 to the length {length} of the only row; the batch has "
            f"{batch} rows, and the offsets begin {offsets[:4]} and end {offsets[-2:]}"
        )
    return torch.tensor(offsets, device="cpu")

"""Packed sequences: where each begins and ends in its row, and which state belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from anymamba.errors import InputError


@dataclass(frozen=True)
class Segments:
    """The parts of a packed (b, l) batch over which a recurrence runs by itself.

    Each list has one entry a segment. `state_in` is the index of the state that the segment
    starts from and `state_out` of the state that it leaves, -1 for none (zeros, or not kept).
    """

    rows: list[int]
    starts: list[int]
    stops: list[int]
    state_in: list[int]
    state_out: list[int]
    n_states: int

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        return zip(self.rows, self.starts, self.stops, self.state_in, self.state_out, strict=True)


def count_states(segments: Segments | None, batch: int) -> int:
    """How many states go into a recurrence over a batch and come out."""
    return batch if segments is None else segments.n_states


def segments_of(
    shape: tuple[int, ...], seq_idx: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> Segments | None:
    """Read the two ways of marking packed sequences into one; None where nothing is packed.

    Args:
        shape: (b, l) of the packed tensor.
        seq_idx: (b, l) integers; a new sequence starts where the number changes. States belong to
            rows: the first sequence that is walked starts from the row's initial state, and the
            last one leaves the row's last state.
        cu_seqlens: (s + 1,) offsets 0 = o_0 <= o_1 <= ... <= o_s = l into the only row. States
            belong to sequences: s of them go in and come out.
        reverse: whether the row is walked from its end.

    Raises:
        InputError: both are given, or one has the wrong shape or values.
    """
    if seq_idx is not None and cu_seqlens is not None:
        raise InputError("seq_idx and cu_seqlens both mark packed sequences: give only one")
    if cu_seqlens is not None:
        return _from_offsets(shape[0], shape[1], cu_seqlens)
    if seq_idx is not None:
        return _from_indices(shape[0], shape[1], seq_idx, reverse)
    return None


def walk_segments(
    walk: Callable[[slice, slice, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    states: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence over each segment, from the state that belongs to it.

    Args:
        walk: called with rows, steps and their states, (rows, ...); returns the outputs,
            (rows, steps, ...), and the states after the last step.
        x: (b, l, ...), like the outputs.
        states: one a row, or as many as the segments have.
        segments: None where each row is one.

    Returns:
        The outputs of all, (b, l, ...), and the last states, like `states`.
    """
    if segments is None:
        return walk(slice(None), slice(None), states)
    rows: list[list[Tensor]] = [[] for _ in range(x.shape[0])]
    last = list(states)
    zeros = states.new_zeros(1, *states.shape[1:])
    for row, start, stop, state_in, state_out in segments:
        state = states[state_in, None] if state_in >= 0 else zeros
        y, state = walk(slice(row, row + 1), slice(start, stop), state)
        rows[row].append(y)
        if state_out >= 0:
            last[state_out] = state[0]
    y = torch.cat([torch.cat(parts, 1) if parts else x[:1] for parts in rows]) if rows else x
    return y, (torch.stack(last) if last else states)


def segments_from_table(table: Tensor | None, n_states: int) -> Segments | None:
    """Segments from the (5, s) table that the core reads; None where there is none."""
    if table is None:
        return None
    rows, starts, stops, state_in, state_out = table.tolist()
    return Segments(rows, starts, stops, state_in, state_out, n_states)


def _from_offsets(batch: int, length: int, cu_seqlens: Tensor) -> Segments:
    if batch != 1:
        raise InputError(f"cu_seqlens marks sequences in one row, but the batch has {batch} rows")
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or cu_seqlens.numel() < 1:
        raise InputError(
            f"cu_seqlens must hold s + 1 integer offsets, got shape {tuple(cu_seqlens.shape)} "
            f"of {cu_seqlens.dtype}"
        )
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length or any(b < a for a, b in pairwise(offsets)):
        raise InputError(
            f"cu_seqlens must rise from 0 to the row's length {length}, got {_shorten(offsets)}"
        )
    count = len(offsets) - 1
    own = list(range(count))
    return Segments([0] * count, offsets[:-1], offsets[1:], own, own, count)


def _from_indices(batch: int, length: int, seq_idx: Tensor, reverse: bool) -> Segments:
    if seq_idx.shape != (batch, length) or seq_idx.is_floating_point():
        raise InputError(
            f"seq_idx must hold one integer a position, shape {(batch, length)}, "
            f"got {tuple(seq_idx.shape)} of {seq_idx.dtype}"
        )
    found = Segments([], [], [], [], [], batch)
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    for row in range(batch):
        borders = [0, *(torch.nonzero(changes[row]).flatten() + 1).tolist(), length]
        count = len(borders) - 1
        first, last = (count - 1, 0) if reverse else (0, count - 1)
        for index, (start, stop) in enumerate(pairwise(borders)):
            found.rows.append(row)
            found.starts.append(start)
            found.stops.append(stop)
            found.state_in.append(row if index == first else -1)
            found.state_out.append(row if index == last else -1)
    return found


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"

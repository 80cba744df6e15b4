"""How well a model predicts a text that it was not trained on, in nats per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from anymamba.training.data import TokenRow, collate, cut, windows_side_by_side


@dataclass(frozen=True)
class Loss:
    """A sum of losses, in nats, and how many predictions it is of."""

    total: float
    count: int

    @property
    def mean(self) -> float:
        """Nats per prediction."""
        return self.total / max(self.count, 1)


@torch.inference_mode()
def loss_of_windows(
    model: torch.nn.Module,
    row: TokenRow,
    window: int,
    *,
    most: int | None = None,
    batch: int = 16,
    share: tuple[int, int] = (0, 1),
) -> Loss:
    """The loss over windows side by side, each read from an empty state.

    A window of 256 makes 256 predictions, the first of them from a single token.

    Args:
        model: called with `input_ids` (b, l), and `seq_idx` where documents are packed.
        row: the text.
        window: l.
        most: read at most so many windows, spread evenly.
        batch: how many windows are read at once.
        share: (i, n): the i-th of n processes, which share the windows.
    """
    starts = windows_side_by_side(row, window, most)[share[0] :: share[1]]
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for first in range(0, len(starts), batch):
        rows = collate([cut(row, start, window) for start in starts[first : first + batch]])
        targets = rows.pop("labels").to(device)
        del rows["shift_labels"]
        inputs = {name: tensor.to(device) for name, tensor in rows.items()}
        total += float(summed_loss(model(**inputs, use_cache=False).logits, targets))
        count += int((targets != -100).sum())
    return Loss(total, count)


@torch.inference_mode()
def loss_of_stream(model: torch.nn.Module, row: TokenRow, chunk: int = 1024) -> Loss:
    """The loss over the whole text, read once: the state is carried from beginning to end.

    Args:
        model: an AnyMamba model, which takes and gives a `cache`.
        row: the text; the state restarts where a document begins.
        chunk: tokens a call.
    """
    device = next(model.parameters()).device
    cache = None
    total, count = 0.0, 0
    for start in range(0, len(row) - 1, chunk):
        piece = cut(row, start, min(chunk, len(row) - 1 - start))
        if cache is not None and start in row.starts:
            cache.reset()
        inputs = {name: piece[name][None].to(device) for name in ("input_ids", "seq_idx")}
        targets = piece["shift_labels"][None].to(device)
        output = model(**inputs, cache=cache, use_cache=True)
        cache = output.cache
        total += float(summed_loss(output.logits, targets))
        count += int((targets != -100).sum())
    return Loss(total, count)


def summed_loss(logits_blv: Tensor, targets_bl: Tensor) -> Tensor:
    """The cross entropy of all predictions, added up; targets of -100 do not count."""
    flat = logits_blv.flatten(0, 1).float()
    return cross_entropy(flat, targets_bl.flatten(), ignore_index=-100, reduction="sum")

"""Which positions get logits, and what each of them should predict."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from anymamba.errors import InputError
from anymamba.modeling.packing.packing import next_tokens, pack_batch


def check_kept(logits_to_keep: int | Tensor) -> None:
    """Refuse what names no positions.

    Args:
        logits_to_keep: as in `MambaForCausalLM.forward`.

    Raises:
        InputError: it is negative, or neither a number nor a tensor of indices or booleans.

    Example:
        >>> check_kept(torch.tensor([0, 2]))
    """
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise InputError(f"logits_to_keep is {logits_to_keep}, expected 0 (all) or more")
    elif not isinstance(logits_to_keep, Tensor):
        raise InputError(
            f"logits_to_keep is a {type(logits_to_keep).__name__}, expected a whole number or a "
            "tensor"
        )
    elif logits_to_keep.ndim not in (1, 2) or logits_to_keep.is_floating_point():
        raise InputError(
            f"logits_to_keep has shape {tuple(logits_to_keep.shape)} of {logits_to_keep.dtype}, "
            "expected indices (m,) or (batch, m), or booleans (batch, length)"
        )


def at_kept(x_blc: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Take the positions that get logits.

    Args:
        x_blc: hidden states, or anything else with rows and positions.
        logits_to_keep: as in `MambaForCausalLM.forward`.

    Returns:
        (b, m, c), or (positions, c) for booleans (b, l).

    Raises:
        InputError: it is for a batch of another shape.

    Example:
        >>> at_kept(torch.tensor([[[5], [6], [7]]]), 2).tolist()
        [[[6], [7]]]
    """
    kept = logits_to_keep if isinstance(logits_to_keep, int) else logits_to_keep.to(x_blc.device)
    if isinstance(kept, Tensor) and kept.ndim == 2:
        needed = x_blc.shape[: 2 if kept.dtype == torch.bool else 1]
        if kept.shape[: len(needed)] != needed:
            raise InputError(
                f"logits_to_keep has shape {tuple(kept.shape)} of {kept.dtype} for a batch of "
                f"{tuple(x_blc.shape[:2])}: expected indices (batch, m) or booleans (batch, length)"
            )
    return slice_logits_to_keep(x_blc, kept)


def targets_of(
    labels: Tensor | None,
    shift_labels: Tensor | None,
    shape_bl: torch.Size,
    marks: tuple[Tensor | None, ...],
) -> Tensor:
    """What each position should predict.

    Args:
        labels, shift_labels: as in `MambaForCausalLM.forward`; one of them is given.
        shape_bl: the batch's.
        marks: the attention mask and the marks of packed documents, as `pack_batch` takes them.

    Returns:
        (b, l) tokens; -100 where a position predicts nothing.

    Raises:
        InputError: the labels are not one a position.

    Example:
        >>> targets_of(torch.tensor([[5, 6, 7]]), None, torch.Size([1, 3]), ()).tolist()
        [[6, 7, -100]]
    """
    name = "labels" if shift_labels is None else "shift_labels"
    given = labels if shift_labels is None else shift_labels
    assert given is not None
    if given.shape != shape_bl:
        raise InputError(
            f"{name} has shape {tuple(given.shape)}, expected one a position: {tuple(shape_bl)}"
        )
    batch, length = shape_bl
    packed = pack_batch(batch, length, given.device, *marks)
    if shift_labels is None:
        return next_tokens(given, packed)
    if packed is None:
        return given
    kept_bl = packed.unpack(packed.pack(torch.ones_like(given))) != 0
    return given.masked_fill(~kept_bl, -100)

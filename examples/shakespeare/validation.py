"""How well a model predicts a text, in nats per byte, measured in two ways."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from anymamba import MambaForCausalLM


@torch.inference_mode()
def loss_of_windows(
    model: MambaForCausalLM, text: Tensor, window: int, *, every: int = 1, batch: int = 16
) -> float:
    """The mean loss over windows side by side, each read from an empty state.

    A window of 256 makes 256 predictions, the first of them from a single byte. `every` takes
    only each so-manieth window, which is how to look often and cheaply. A rest at the end that
    fills no window is left out.
    """
    # A step of `window` and a length of one more: a window's last target begins the next one.
    windows = text.unfold(0, window + 1, window)[::every]
    total = 0.0
    for rows in windows.split(batch):
        logits = model(rows[:, :-1], use_cache=False).logits
        total += summed_loss(logits, rows[:, 1:])
    return total / (windows.shape[0] * window)


@torch.inference_mode()
def loss_of_stream(model: MambaForCausalLM, text: Tensor, stretch: int = 1024) -> float:
    """The mean loss over the whole text, read once from its beginning to its end.

    The text is read in stretches, and the state is carried from each into the next: no
    prediction but the first few lacks its past.
    """
    inputs, targets = text[:-1], text[1:]
    cache = None
    total = 0.0
    for input_part, target_part in zip(inputs.split(stretch), targets.split(stretch), strict=True):
        output = model(input_part[None], cache=cache, use_cache=True)
        cache = output.cache
        total += summed_loss(output.logits, target_part[None])
    return total / targets.numel()


def summed_loss(logits: Tensor, targets: Tensor) -> float:
    """The cross entropy of all predictions, added up."""
    flat = logits.flatten(0, 1).float()
    return float(cross_entropy(flat, targets.flatten(), reduction="sum"))

"""What the machine allows at most: matrix products alone, and weights read once."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LayerProducts",
    "ModelProducts",
    "core_or_none",
    "read_bandwidth",
    "seconds_to_read",
    "stored_bytes",
]


def core_or_none() -> Any:
    """The native core with as many threads as PyTorch has, or None where it was not built."""
    try:
        core = importlib.import_module("anymamba._core")
    except ImportError:
        return None
    core.set_threads(torch.get_num_threads())
    return core


def read_bandwidth(size: int, repeats: int = 3) -> tuple[float, str]:
    """Bytes a second that all threads read together, and what read them.

    PyTorch's sum, in the core's place, reads 10 to 30 % less than the machine can.
    """
    core = core_or_none()
    if core is not None:
        return float(core.read_bandwidth(size, repeats)), "native loop"
    data = torch.ones(size // 4)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = max(best, size / (time.perf_counter() - start))
    return best, "torch.sum"


def stored_bytes(model: Any) -> int:
    """The bytes of all weights that a step reads: all but an embedding table that is no head."""
    weights = {id(weight): weight for weight in model.parameters()}  # a tied one counts once
    if not model.config.tie_word_embeddings:
        del weights[id(model.get_input_embeddings().weight)]
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def seconds_to_read(size: int) -> float:
    """The time to read so many bytes of weights once, from a buffer as large as they are.

    What the caches keep of the weights between two steps, they keep of the buffer.
    """
    return size / read_bandwidth(size)[0]


class LayerProducts:
    """The four matrix products of one layer, on its own weights.

    Args:
        mixer: the layer's.
        inputs: random rows by width; made where a width is missing, so that layers can share them.
        rows: how many.
    """

    def __init__(self, mixer: Any, rows: int, inputs: dict[int, Tensor] | None = None) -> None:
        inputs = {} if inputs is None else inputs
        self._pairs = []
        for projection in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
            weight = projection.weight.detach()
            width = weight.shape[1]
            if width not in inputs:
                inputs[width] = torch.randn(rows, width)
            self._pairs.append((inputs[width], weight))

    def __call__(self) -> None:
        """Multiply."""
        for x, weight in self._pairs:
            F.linear(x, weight)


class ModelProducts:
    """The matrix products of one forward pass of a whole model.

    Args:
        model: a float32 language model.
        rows: batch times length.
        head_rows: how many of the rows get logits.
    """

    def __init__(self, model: Any, rows: int, head_rows: int) -> None:
        inputs: dict[int, Tensor] = {}
        blocks = model.backbone.layers
        self._layers = [LayerProducts(block.mixer, rows, inputs) for block in blocks]
        self._head: Tensor = model.lm_head.weight.detach()
        self._last = torch.randn(head_rows, self._head.shape[1])

    @torch.no_grad()
    def __call__(self) -> None:
        """Multiply."""
        for layer in self._layers:
            layer()
        F.linear(self._last, self._head)

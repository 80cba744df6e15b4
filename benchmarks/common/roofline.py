"""What the machine allows at most: its arithmetic at the peak, and weights read once."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LayerProducts",
    "ModelProducts",
    "core_or_none",
    "peak_operations",
    "read_bandwidth",
    "seconds_at_peak",
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


def peak_operations(bytes: bool = False, repeats: int = 3) -> float:
    """Multiplications and additions a second that all threads do together at most.

    A loop of the core's does nothing else: fused multiply-adds of floats, or products of bytes
    that are summed in fours, as for weights of 8 and 4 bits. Without the core, PyTorch multiplies
    matrices of floats in its place, which is less.
    """
    core = core_or_none()
    if core is not None:
        peak = core.peak_byte_operations if bytes else core.peak_float_operations
        return float(peak(repeats))
    x = torch.ones(1024, 1024)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        x @ x
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def seconds_at_peak(operations: int, bytes: bool = False) -> float:
    """The time that so many operations take at the peak of the moment."""
    return operations / peak_operations(bytes)


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


def scan_operations(mixer: Any) -> int:
    """Of the chunked algorithm of Mamba-2, a token: scores, within a chunk, states, and output.

    In chunks of 64, about where the sum is least; only the lower half of a chunk's blocks counts.
    """
    if not hasattr(mixer, "num_heads"):
        return 0
    inner, maps = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    return 64 * (maps + inner) + 4 * inner * int(mixer.ssm_state_size)


class LayerProducts:
    """The matrix products of one layer: its projections, and those inside Mamba-2's scan.

    Args:
        mixer: the layer's.
        inputs: random rows by width; made where a width is missing, so that layers can share them.
        rows: how many.
    """

    def __init__(self, mixer: Any, rows: int, inputs: dict[int, Tensor] | None = None) -> None:
        inputs = {} if inputs is None else inputs
        self._of_scan = rows * scan_operations(mixer)
        self._pairs = []
        for projection in (m for m in mixer.children() if isinstance(m, nn.Linear)):
            weight = projection.weight.detach()
            width = weight.shape[1]
            if width not in inputs:
                inputs[width] = torch.randn(rows, width)
            self._pairs.append((inputs[width], weight))

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return self._of_scan + sum(2 * x.numel() * weight.shape[0] for x, weight in self._pairs)

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

    @property
    def operations(self) -> int:
        """Multiplications and additions of one pass."""
        head = 2 * self._last.numel() * self._head.shape[0]
        return head + sum(layer.operations for layer in self._layers)

    @torch.no_grad()
    def __call__(self) -> None:
        """Multiply."""
        for layer in self._layers:
            layer()
        F.linear(self._last, self._head)

"""Layers with weights of 8 or 4 bits, and a model made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from anymamba.ops import quantized_linear
from anymamba.ops.fusable import fusable
from anymamba.ops.quantized_linear.reference import dequantize

PARTS = ("weight_q", "weight_scales", "weight_minima")


class _Quantized(nn.Module):
    """A weight (n, k) in whole numbers, as buffers: nothing here is trained."""

    weight_q: Tensor
    weight_scales: Tensor
    weight_minima: Tensor | None

    def __init__(self, n: int, k: int, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.n, self.k = n, k
        for name in PARTS:
            self.register_buffer(name, parts.get(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to(dtype)` moves the weight and leaves its format alone."""
        super()._apply(fn, recurse)
        for name in PARTS[1:]:
            part = getattr(self, name)
            if part is not None and part.dtype != torch.bfloat16:
                setattr(self, name, part.to(torch.bfloat16))
        return self

    def parts(self) -> dict[str, Tensor | None]:
        """The weight as the native core takes it."""
        return {"q": self.weight_q, "scales": self.weight_scales, "minima": self.weight_minima}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        bits = 8 * self.weight_q.shape[1] // self.k
        return f"{self.k}, {self.n}, bits={bits}, group={self.k // self.weight_scales.shape[1]}"


@fusable
class QuantizedLinear(_Quantized):
    """y = x W^T + bias through `anymamba.ops.quantized_linear`.

    Args:
        n: rows of the weight, outputs.
        k: columns, inputs.
        parts: `weight_q`, `weight_scales` and, with an offset, `weight_minima`.
        bias: (n,) or None.

    Example:
        >>> parts = {
        ...     "weight_q": torch.full((1, 32), 129, dtype=torch.uint8),
        ...     "weight_scales": torch.ones(1, 1, dtype=torch.bfloat16),
        ... }
        >>> QuantizedLinear(1, 32, parts)(torch.ones(1, 32)).round().tolist()
        [[32.0]]
    """

    def __init__(
        self, n: int, k: int, parts: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> None:
        super().__init__(n, k, parts)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        return quantized_linear(x, self.weight_q, self.weight_scales, self.weight_minima, self.bias)


@fusable
class QuantizedEmbedding(_Quantized):
    """Rows of a quantized table, in float32.

    Args:
        n: tokens.
        k: width.
        parts: as `QuantizedLinear` takes them.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., k)."""
        flat = ids.reshape(-1)
        minima = None if self.weight_minima is None else self.weight_minima[flat]
        rows = dequantize(self.weight_q[flat], self.weight_scales[flat], minima, self.k)
        return rows.view(*ids.shape, self.k)


def put_quantized_layers(model: Any, weights: dict[str, Tensor]) -> None:
    """Replace the layers whose weights are quantized, and take those weights out of the dict.

    Args:
        model: a Mamba whose layers may be on the meta device.
        weights: tensors by name; what is left is for `load_state_dict`.
    """
    for name in [key for key in weights if key.endswith(".weight_q")]:
        path = name.removesuffix(".weight_q")
        parts = {
            part: weights.pop(f"{path}.{part}") for part in PARTS if f"{path}.{part}" in weights
        }
        parent, _, child = path.rpartition(".")
        owner = model.get_submodule(parent)
        old = getattr(owner, child)
        n, k = old.weight.shape
        if isinstance(old, nn.Embedding):
            setattr(owner, child, QuantizedEmbedding(n, k, parts))
        else:
            setattr(owner, child, QuantizedLinear(n, k, parts, weights.pop(f"{path}.bias", None)))

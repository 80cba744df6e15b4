"""Random inputs for the operators, and the ways in which a tensor may lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
TYPES = (torch.float32, *HALVES)


def _inside(tensor: Tensor, *margins: tuple[int, int]) -> Tensor:
    """The same numbers in the middle of a bigger tensor, NaN around them."""
    shape = [
        before + size + after for size, (before, after) in zip(tensor.shape, margins, strict=True)
    ]
    bigger = torch.full(shape, float("nan"), dtype=tensor.dtype)
    spans = zip(tensor.shape, margins, strict=True)
    view = bigger[tuple(slice(before, before + size) for size, (before, _) in spans)]
    return view.copy_(tensor)


def _turned(tensor: Tensor) -> Tensor:
    """The last two axes stored the other way round: (b, l, e) with time contiguous."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _every_second(tensor: Tensor) -> Tensor:
    doubled = tensor.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return doubled[..., ::2, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "time contiguous": _turned,
    "half of a projection": lambda tensor: torch.cat([tensor, tensor], -1).chunk(2, -1)[1],
    "time contiguous, cut out": lambda tensor: _inside(tensor.mT, *[(1, 2)] * tensor.ndim).mT,
    "odd offset": lambda tensor: torch.cat(
        [tensor.new_zeros(3), tensor.flatten(), tensor.new_zeros(1)]
    )[3:-1].view(tensor.shape),
    "cut out": lambda tensor: _inside(tensor, *[(1, 2)] * tensor.ndim),
    "every second number": _every_second,
}
"""Ways to store the same numbers; the last two axes are (steps, channels)."""


def leaves(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same arguments, each floating tensor a leaf of its own that requires a gradient."""
    return {
        name: value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def gradients(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """The gradient of each input by its name, for the given gradients of the outputs."""
    names = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        [inputs[name] for name in names],
        [cotangent.to(output.dtype) for output, cotangent in pairs],
        materialize_grads=True,
    )
    return dict(zip(names, found, strict=True))


def scan_inputs(
    b: int,
    l: int,
    e: int,
    n: int,
    *,
    groups: int | None = None,
    extras: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """All arguments of `selective_scan` as a dict; with `extras` D, z, bias and softplus too."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    shape_of_B = (b, l, n) if groups is None else (b, l, groups, n)
    inputs: dict[str, Any] = {
        "x_ble": normal(b, l, e).to(dtype),
        "delta_ble": (normal(b, l, e) - (1 if extras else -3)).to(dtype),
        "A_en": -torch.rand(e, n, generator=g) * n,
        "B_bln": normal(*shape_of_B).to(dtype),
        "C_bln": normal(*shape_of_B).to(dtype),
    }
    if dtype == torch.float64:
        inputs["A_en"] = inputs["A_en"].double()
    if extras:
        wide = torch.promote_types(dtype, torch.float32)
        inputs |= {
            "D_e": normal(e).to(wide),
            "z_ble": normal(b, l, e).to(dtype),
            "delta_bias_e": normal(e).to(wide),
            "delta_softplus": True,
        }
    else:
        inputs["delta_ble"] = inputs["delta_ble"].abs() * 0.1
    return inputs

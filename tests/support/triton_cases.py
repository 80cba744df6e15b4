"""Calls of the operators at the sizes of real models, which the compiler's tests go through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymamba import ops


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def _back(outputs: Any) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


def _scan(
    b: int, l: int, e: int, n: int, dtype: torch.dtype, packed: bool = False, **options: Any
) -> None:
    xz = _leaf(b, l, 2 * e, dtype=dtype)
    x, z = xz.chunk(2, -1)
    maps = _leaf(b, l, 2 * n, dtype=dtype)
    B, C = maps.split(n, -1)
    f32 = torch.float32
    rates, vectors = _leaf(e, n, dtype=f32), [_leaf(e, dtype=f32) for _ in range(2)]
    states = 2 if packed else b
    _back(
        ops.selective_scan(
            x,
            _leaf(b, l, e, dtype=dtype),
            rates,
            B,
            C,
            vectors[0],
            z,
            vectors[1],
            True,
            initial_state=_leaf(states, e, n, dtype=f32),
            return_last_state=True,
            cu_seqlens=torch.tensor([0, l // 2, l]) if packed else None,
            **options,
        )
    )


def _scan_step(b: int, e: int, n: int, dtype: torch.dtype) -> None:
    x, vector, maps = torch.zeros(b, e, dtype=dtype), torch.zeros(e), torch.zeros(b, n, dtype=dtype)
    state, rates = torch.zeros(b, e, n), torch.zeros(e, n)
    ops.selective_state_update(state, x, x, rates, maps, maps, vector, x, vector, True)


CASES: dict[str, Callable[[], None]] = {
    "selective_scan, bfloat16": partial(_scan, 1, 256, 1536, 16, torch.bfloat16),
    "selective_scan, other length": partial(_scan, 3, 517, 1536, 16, torch.bfloat16),
    "selective_scan, float32": partial(_scan, 1, 256, 1536, 16, torch.float32),
    "selective_scan, packed": partial(_scan, 1, 256, 1536, 16, torch.bfloat16, True),
    "selective_scan, reverse": partial(_scan, 1, 256, 1536, 16, torch.bfloat16, reverse=True),
    "selective_scan, many states": partial(_scan, 1, 64, 96, 256, torch.float16),
    "selective_state_update, bfloat16": partial(_scan_step, 1, 1536, 16, torch.bfloat16),
    "selective_state_update, float32": partial(_scan_step, 8, 1536, 16, torch.float32),
}

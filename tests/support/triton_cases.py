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


def _ssd(b: int, l: int, h: int, p: int, n: int, dtype: torch.dtype, packed: bool = False) -> None:
    f32 = torch.float32
    x, z = (_leaf(b, l, h, p, dtype=dtype) for _ in range(2))
    B, C = (_leaf(b, l, 1, n, dtype=dtype) for _ in range(2))
    vectors = [_leaf(h, dtype=f32) for _ in range(3)]
    states = 2 if packed else b
    _back(
        ops.ssd(
            x,
            _leaf(b, l, h, dtype=dtype),
            vectors[0],
            B,
            C,
            vectors[1],
            z,
            vectors[2],
            True,
            initial_state=_leaf(states, h, p, n, dtype=f32),
            return_last_state=True,
            cu_seqlens=torch.tensor([0, l // 2, l]) if packed else None,
        )
    )


def _ssd_step(b: int, h: int, p: int, n: int, dtype: torch.dtype) -> None:
    x, vector, maps = torch.zeros(b, h, p, dtype=dtype), torch.zeros(h), torch.zeros(b, 1, n)
    maps, state = maps.to(dtype), torch.zeros(b, h, p, n)
    dt = torch.zeros(b, h, dtype=dtype)
    ops.ssd_state_update(state, x, dt, vector, maps, maps, vector, x, vector, True)


def _conv(
    b: int, l: int, e: int, k: int, dtype: torch.dtype, packed: bool = False, **options: Any
) -> None:
    _back(
        ops.causal_conv1d(
            _leaf(b, l, 2 * e, dtype=dtype).chunk(2, -1)[0],
            _leaf(e, k, dtype=dtype),
            _leaf(e, dtype=dtype),
            "silu",
            initial_window=_leaf(2 if packed else b, e, k, dtype=dtype),
            return_final_window=True,
            cu_seqlens=torch.tensor([0, l // 2, l]) if packed else None,
            **options,
        )
    )


def _conv_step(b: int, e: int, k: int, dtype: torch.dtype) -> None:
    x, window = torch.zeros(b, e, dtype=dtype), torch.zeros(b, e, k, dtype=dtype)
    weight, bias = torch.zeros(e, k, dtype=dtype), torch.zeros(e, dtype=dtype)
    ops.causal_conv1d_update(x, window, weight, bias, "silu")


def _norm(
    *shape: int, dtype: torch.dtype = torch.bfloat16, residual: bool = False, gated: bool = False
) -> None:
    x, weight = _leaf(*shape, dtype=dtype), _leaf(shape[-1], dtype=torch.float32)
    options: dict[str, Any] = {"gate": _leaf(*shape, dtype=dtype)} if gated else {}
    if residual:
        total = _leaf(*shape, dtype=torch.float32)
        options |= {"residual": total, "residual_in_fp32": True, "return_sum": True}
    _back(ops.rms_norm(x, weight, **options))


def _norm_step(b: int, d: int) -> None:
    x, weight = torch.zeros(b, d, dtype=torch.bfloat16), torch.zeros(d)
    ops.rms_norm(x, weight, residual=torch.zeros(b, d), residual_in_fp32=True, return_sum=True)


CASES: dict[str, Callable[[], None]] = {
    "selective_scan, bfloat16": partial(_scan, 1, 256, 1536, 16, torch.bfloat16),
    "selective_scan, other length": partial(_scan, 3, 517, 1536, 16, torch.bfloat16),
    "selective_scan, float32": partial(_scan, 1, 256, 1536, 16, torch.float32),
    "selective_scan, packed": partial(_scan, 1, 256, 1536, 16, torch.bfloat16, True),
    "selective_scan, reverse": partial(_scan, 1, 256, 1536, 16, torch.bfloat16, reverse=True),
    "selective_scan, many states": partial(_scan, 1, 64, 96, 256, torch.float16),
    "selective_state_update, bfloat16": partial(_scan_step, 1, 1536, 16, torch.bfloat16),
    "selective_state_update, float32": partial(_scan_step, 8, 1536, 16, torch.float32),
    "causal_conv1d, bfloat16": partial(_conv, 1, 256, 1536, 4, torch.bfloat16),
    "causal_conv1d, other length": partial(_conv, 3, 517, 1536, 4, torch.bfloat16),
    "causal_conv1d, float32": partial(_conv, 1, 256, 1536, 4, torch.float32),
    "causal_conv1d, packed": partial(_conv, 1, 256, 1536, 4, torch.bfloat16, True),
    "causal_conv1d, packed, other length": partial(_conv, 1, 517, 1536, 4, torch.bfloat16, True),
    "causal_conv1d, reverse": partial(_conv, 1, 256, 1536, 4, torch.bfloat16, reverse=True),
    "causal_conv1d_update, bfloat16": partial(_conv_step, 1, 1536, 4, torch.bfloat16),
    "causal_conv1d_update, other length": partial(_conv_step, 3, 1536, 4, torch.bfloat16),
    "rms_norm, bfloat16": partial(_norm, 1, 256, 1536),
    "rms_norm, other length": partial(_norm, 3, 517, 1536),
    "rms_norm, float32": partial(_norm, 1, 256, 1536, dtype=torch.float32),
    "rms_norm, residual": partial(_norm, 1, 256, 1536, residual=True),
    "rms_norm, residual, other length": partial(_norm, 3, 517, 1536, residual=True),
    "rms_norm, gated": partial(_norm, 1, 256, 8, 192, gated=True),
    "rms_norm, gated, other length": partial(_norm, 3, 517, 8, 192, gated=True),
    "rms_norm, step": partial(_norm_step, 1, 1536),
    "rms_norm, step, other length": partial(_norm_step, 3, 1536),
    "ssd, bfloat16": partial(_ssd, 1, 256, 24, 64, 128, torch.bfloat16),
    "ssd, other length": partial(_ssd, 3, 1000, 24, 64, 128, torch.bfloat16),
    "ssd, float32": partial(_ssd, 1, 256, 24, 64, 128, torch.float32),
    "ssd, packed": partial(_ssd, 1, 256, 24, 64, 128, torch.bfloat16, True),
    "ssd, odd sizes": partial(_ssd, 1, 9, 3, 5, 7, torch.bfloat16),
    "ssd_state_update, bfloat16": partial(_ssd_step, 1, 24, 64, 128, torch.bfloat16),
    "ssd_state_update, float32": partial(_ssd_step, 8, 24, 64, 128, torch.float32),
}

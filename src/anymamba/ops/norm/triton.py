"""RMSNorm through Triton, as PyTorch operators."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anymamba.ops.norm.operator import GradientInputs, NormInputs, Outputs, define_norm, norm_inputs
from anymamba.ops.norm.triton_kernels import norm_backward, norm_forward
from anymamba.ops.triton import launch_options, on_device_of, strides, tile_side, warps_for

_TILE = 2048  # numbers of a tile of short rows
_MOST_PROGRAMS = 512  # of the backward pass, each with a row of partial sums


def rms_norm(
    x: Tensor,
    weight_d: Tensor,
    eps: float,
    residual: Tensor | None,
    residual_in_fp32: bool,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normed rows and the sum; arguments as in `anymamba.ops.rms_norm`."""
    tensors = (None if tensor is None else _in_three(tensor) for tensor in (x, residual, gate))
    x_in_three, *others = tensors
    inputs = norm_inputs(x, weight_d, eps, residual, residual_in_fp32, gate)
    normed, total, _ = _norm(x_in_three, weight_d, *others, *inputs[4:])
    return normed.view(x.shape), x if inputs.sum_type is None else total.view(x.shape)


def _in_three(x: Tensor) -> Tensor:
    """(..., d) as (outer, inner, d), which a view wherever the first axes are one in memory."""
    leading = x.shape[:-1]
    inner = leading[-1] if leading else 1
    # No size is -1, which an empty tensor would leave open.
    return x.reshape(math.prod(leading[:-1]), inner, x.shape[-1])


class _Tiles(NamedTuple):
    """How rows are cut into tiles."""

    rows: int
    block_rows: int
    block_d: int

    @property
    def n_tiles(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def warps(self) -> int:
        return warps_for(self.block_rows * self.block_d)


def _tiles(x: Tensor) -> _Tiles:
    outer, inner, d = x.shape
    block_d = tile_side(d, at_most=1 << 20)
    rows = outer * inner
    return _Tiles(rows, tile_side(rows, at_most=max(1, _TILE // block_d)), block_d)


def _fill(inputs: NormInputs, outputs: Outputs) -> None:
    x, weight, residual, gate, eps, _, sum_type = inputs
    normed, total, scale = outputs
    tiles = _tiles(x)
    if x.numel() == 0:
        return
    with on_device_of(x):
        norm_forward[(tiles.n_tiles,)](
            x,
            residual,
            gate,
            weight,
            normed,
            None if sum_type is None else total,
            scale,
            tiles.rows,
            *x.shape[1:],
            eps,
            *x.stride(),
            *strides(residual, 3),
            *strides(gate, 3),
            *weight.stride(),
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_D=tiles.block_d,
            **launch_options(tiles.warps),
        )


def _fill_gradients(inputs: GradientInputs, gradients: Outputs) -> None:
    total, weight, gate, scale, dnormed, dtotal, *_ = inputs
    dx, dweight, dgate = gradients
    if total.numel() == 0:
        dweight.zero_()
        return
    tiles = _tiles(total)
    # Some tiles a program, so that the partial sums are few beside the rows.
    repeats = max(4, -(-tiles.n_tiles // _MOST_PROGRAMS))
    programs = -(-tiles.n_tiles // repeats)
    partial = torch.empty(programs, weight.shape[0], dtype=torch.float32, device=total.device)
    with on_device_of(total):
        norm_backward[(programs,)](
            total,
            gate,
            weight,
            scale,
            dnormed,
            dtotal,
            dx,
            None if gate is None else dgate,
            partial,
            tiles.rows,
            *total.shape[1:],
            repeats,
            *total.stride(),
            *strides(gate, 3),
            *dnormed.stride(),
            *strides(dtotal, 3),
            *weight.stride(),
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_D=tiles.block_d,
            **launch_options(tiles.warps),
        )
    dweight.copy_(partial.sum(0))


_norm = define_norm("rms_norm_triton", _fill, _fill_gradients, in_float32=False, device_types=None)

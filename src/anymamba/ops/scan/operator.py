"""What the native and the Triton operator of the selective scan share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.native import in_float32, segment_table
from anymamba.ops.scan import reference
from anymamba.ops.scan.arguments import ScanArguments, in_groups
from anymamba.ops.segments import count_states, segments_from_table


class ScanInputs(NamedTuple):
    """The operator's arguments, from which its schema is read."""

    x: Tensor  # (b, l, e)
    delta: Tensor  # (b, l, e)
    A: Tensor  # (e, n)
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)
    D: Tensor | None  # (e,)
    z: Tensor | None  # (b, l, e)
    delta_bias: Tensor | None  # (e,)
    initial: Tensor | None  # (n_states, e, n)
    segments: Tensor | None  # (5, s)
    n_states: int
    softplus: bool
    reverse: bool
    will_go_back: bool = True


def call(operator: Any, arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Call an operator of `ScanInputs`; returns as in `anymamba.ops.selective_scan`."""
    x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, delta_bias_e, softplus = arguments[:9]
    tensors = (
        x_ble,
        delta_ble,
        in_float32(A_en),
        *in_groups(B_bln, C_bln, x_ble.ndim),
        in_float32(D_e),
        z_ble,
        in_float32(delta_bias_e),
        in_float32(arguments.initial_state),
    )
    will_go_back = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    y_ble, last, _ = operator(
        *tensors,
        segment_table(arguments.segments),
        count_states(arguments.segments, x_ble.shape[0]),
        softplus,
        arguments.reverse,
        will_go_back,
    )
    return y_ble, last


def by_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y and the last states from differentiable operators."""
    x, delta, A, B, C, D, z, delta_bias, initial, table, n_states, softplus, reverse, _ = inputs
    segments = segments_from_table(table, n_states)
    options = (delta_bias, softplus, initial, True, segments, reverse)
    return reference.selective_scan(ScanArguments(x, delta, A, B, C, D, z, *options))

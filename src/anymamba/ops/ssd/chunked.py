"""The state space duality in chunks of some steps, so that matrix products do the work.

Within a chunk of q steps that starts from the state S, with a_t the sum of dt A up to step t,

    y_t = sum over s <= t of (C_t B_s) exp(a_t - a_s) dt_s x_s  +  exp(a_t) C_t S
    S'  = exp(a_q) S  +  sum over s of exp(a_q - a_s) B_s dt_s x_s

Source: "Transformers are SSMs" (arXiv 2405.21060), section 6. Each sum over steps or states is a
matrix product; heads of a group share B and C, so that products with states take all of them at
once. States lie as (n, heads times p) for that. Exponents are never positive for negative A, and
no decay is divided by. They are summed in float64: the difference of two large sums must still be
good to the last bits. Backward walks the chunks in reverse and recomputes what is inside each.
It is one operator of PyTorch, so that compilers need not unroll the chunks of one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.custom_operator import Recurrence
from anymamba.ops.native import segment_table
from anymamba.ops.segments import count_states, segments_from_table
from anymamba.ops.ssd import gradients
from anymamba.ops.ssd.arguments import SsdArguments, step_sizes
from anymamba.ops.ssd.chunk import Chunk, Inputs, laid_out, later_steps, walked_segments
from anymamba.ops.ssd.reference import ssd_sequential
from anymamba.ops.tracing import is_transformed
from anymamba.renamed import old_names

__getattr__ = old_names(__name__)

# Measured at 24 heads of 64 with 128 states: with 32 steps passing states takes long, with 128
# the decays within a chunk do.
CHUNK_STEPS = 64


def ssd(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.ssd`, on any device."""
    x, dt, A, B, C, D, z, dt_bias, softplus, limit, initial, _, segments, chunk_size = arguments
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = step_sizes(dt.to(wide), dt_bias, softplus, limit)
    D = D[:, None] if D is not None and D.ndim == 1 else D
    D, initial = (None if tensor is None else tensor.to(wide) for tensor in (D, initial))
    tensors = (x, dt, A.to(wide), B, C, D, initial)
    if is_transformed():
        y, last = ssd_sequential(*tensors, segments)
    else:
        n_states = count_states(segments, x.shape[0])
        y, last = _ssd(*tensors, segment_table(segments), n_states, chunk_size or CHUNK_STEPS)
    return y if z is None else (y * F.silu(z.to(wide))).to(x.dtype), last


def _allocate(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x = inputs.x
    last = inputs.dt.new_empty(inputs.n_states, *x.shape[2:], inputs.B.shape[-1])
    return x.new_empty(x.shape), last


def run_forward(inputs: Inputs, outputs: tuple[Tensor, Tensor]) -> None:
    """Fill y and the last states."""
    y, last = outputs
    last.zero_()
    later = later_steps(inputs)
    with torch.autocast(y.device.type, enabled=False):  # the types are chosen by the caller
        for segment in walked_segments(inputs):
            state_knm = segment.initial_state(inputs)
            for at in segment.chunks:
                chunk = Chunk(inputs, at, later)
                y_rgqjp = chunk.outputs_rgqjp(state_knm)
                if inputs.D is not None:
                    y_rgqjp.addcmul_(chunk.x_rgqjp, inputs.D.unflatten(0, (chunk.g, 1, -1)))
                chunk.in_groups(y[at]).copy_(y_rgqjp)
                state_knm = chunk.last_state(state_knm)
            if segment.state_out is not None:
                last[segment.state_out] = state_knm.mT.reshape(-1, *last.shape[1:])


def run_backward(
    inputs: Inputs, _: Sequence[Tensor], dy: Tensor, dlast: Tensor | None, found: Sequence[Any]
) -> None:
    """Fill the gradients of the inputs."""
    filled = gradients.Gradients(inputs, found)
    later, g = later_steps(inputs), inputs.B.shape[2]
    with torch.autocast(dy.device.type, enabled=False):
        for segment in walked_segments(inputs):
            states = [segment.initial_state(inputs)]
            for at in segment.chunks:
                states.append(Chunk(inputs, at, later).last_state(states[-1]))
            dstate_knm = laid_out(dlast, segment.state_out, states.pop(), g)
            for at in reversed(segment.chunks):
                chunk = Chunk(inputs, at, later)
                dy_rqhp = dy[at].to(inputs.dt.dtype)
                dstate_knm = filled.of_chunk(at, chunk, dy_rqhp, states.pop(), dstate_knm)
            if filled.dinitial is not None and segment.state_in is not None:
                shape = filled.dinitial.shape[1:]
                filled.dinitial[segment.state_in] = dstate_knm.mT.reshape(-1, *shape)
    filled.finish()


def _reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, initial, table, n_states, _ = inputs
    segments = segments_from_table(table, n_states)
    return ssd_sequential(x, dt, A, B, C, D, initial, segments)


_ssd = Recurrence(
    "ssd_chunked",
    Inputs,
    allocate=_allocate,
    forward=run_forward,
    backward=run_backward,
    reference=_reference,
    device_types=None,
).operator

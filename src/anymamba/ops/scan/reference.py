"""The selective scan in plain PyTorch: a sequential one to check by, a parallel one to use.

`selective_scan_sequential` is the definition, one step after the other. `selective_scan` gives
the same numbers with far fewer PyTorch calls: a time block is cut into chunks that walk side by
side, each from a zero state, and the states at the chunks' borders are carried through
afterwards. Between blocks only the state is kept; gradients recompute a block from it.

A may be complex. Its states then stand for pairs of conjugates, of which one is computed: the
other adds its own conjugate to the output, so that y is twice the real part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anymamba.ops.scan.arguments import ScanArguments, StepArguments
from anymamba.ops.segments import count_states, walk_segments
from anymamba.ops.tracing import in_chosen_types, is_transformed

Recurrence = Callable[[Tensor, Tensor, Tensor], Tensor]
Walk = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

BLOCK_STEPS = 64
# Below this many state entries a step, PyTorch's cost a call outweighs the arithmetic.
_WIDE_STEP = 1 << 15
_NARROW_CHUNKS = 8


def selective_scan(
    arguments: ScanArguments, recurrence: Recurrence | None = None
) -> tuple[Tensor, Tensor]:
    """The parallel reference; arguments and returns as in `anymamba.ops.selective_scan`.

    `recurrence(a_blen, b_blen, h_ben)` solves h_t = a_t h_{t-1} + b_t for all t.
    """
    recurrence = recurrence or linear_recurrence
    A_en = arguments.A_en

    def in_blocks(
        x_ble: Tensor, delta_ble: Tensor, B_blen: Tensor, C_blen: Tensor, state_ben: Tensor
    ) -> tuple[Tensor, Tensor]:
        blocks = []
        for start in range(0, x_ble.shape[1], BLOCK_STEPS):
            now = slice(start, start + BLOCK_STEPS)
            block = (x_ble[:, now], delta_ble[:, now], B_blen[:, now], C_blen[:, now])
            y_ble, state_ben = _recomputed(_block, *block, A_en, state_ben, recurrence)
            blocks.append(y_ble)
        return (torch.cat(blocks, 1) if blocks else x_ble), state_ben

    return _scan(in_blocks, arguments)


def selective_scan_sequential(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time; arguments and returns as in the parallel one."""

    def in_steps(
        x_ble: Tensor, delta_ble: Tensor, B_blen: Tensor, C_blen: Tensor, state_ben: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x_ble.shape[1]):
            decay_ben = torch.exp(delta_ble[:, t, :, None] * arguments.A_en)
            drive_ben = (delta_ble[:, t] * x_ble[:, t])[..., None] * B_blen[:, t]
            state_ben = decay_ben * state_ben + drive_ben
            outputs.append(_real((state_ben * C_blen[:, t]).sum(-1)))
        return (torch.stack(outputs, 1) if outputs else x_ble), state_ben

    return _scan(in_steps, arguments)


@torch.no_grad()
def selective_state_update(arguments: StepArguments) -> Tensor:
    """One step, in place; arguments as in `anymamba.ops.selective_state_update`."""
    x, delta, A, B, C, D, z, delta_bias, softplus, state = arguments
    inputs = (x[:, None], delta[:, None], A, B[:, None], C[:, None], D)
    gate = None if z is None else z[:, None]
    y_ble, last_ben = selective_scan_sequential(
        ScanArguments(*inputs, gate, delta_bias, softplus, state)
    )
    state.copy_(last_ben)
    return y_ble[:, 0]


def _scan(walk: Walk, arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """What surrounds the recurrence: types, step size, direction, packing, skip and gate."""
    x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, delta_bias_e, softplus = arguments[:9]
    wide = torch.promote_types(x_ble.dtype, torch.float32)
    b, _, e = x_ble.shape
    x = x_ble.to(wide)
    delta = delta_ble.to(wide)
    if delta_bias_e is not None:
        delta = delta + delta_bias_e.to(wide)
    if softplus:
        delta = F.softplus(delta)
    wide_A = torch.promote_types(A_en.dtype, wide)
    inputs = (x, delta, _by_channel(B_bln.to(wide_A), e), _by_channel(C_bln.to(wide_A), e))

    def walk_segment(row: slice, steps: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        segment = [tensor[row, steps] for tensor in inputs]
        if arguments.reverse:
            segment = [tensor.flip(1) for tensor in segment]
        x, delta, B, C = segment
        y, last = walk(x, delta, B, C, state)
        return (y.flip(1) if arguments.reverse else y), last

    segments, states = arguments.segments, arguments.initial_state
    if states is None:
        states = x.new_zeros(count_states(segments, b), e, A_en.shape[1])
    with in_chosen_types(x.device):
        y, last = walk_segments(walk_segment, x, states.to(wide_A), segments)
    if D_e is not None:
        y = y + D_e.to(wide) * x
    if z_ble is not None:
        y = y * F.silu(z_ble.to(wide))
    return y.to(x_ble.dtype), last


def _by_channel(B_bln: Tensor, e: int) -> Tensor:
    """(b, l, n) as (b, l, 1, n); (b, l, g, n) as (b, l, e, n): what a channel sees."""
    if B_bln.ndim == 3:
        return B_bln[:, :, None]
    return B_bln.repeat_interleave(e // B_bln.shape[2], dim=2)


def _recomputed(
    block: Callable[..., tuple[Tensor, Tensor]], *arguments: object
) -> tuple[Tensor, Tensor]:
    # Function transforms know nothing of the hooks by which a checkpoint recomputes.
    if torch.is_grad_enabled() and not is_transformed():
        y, state = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return y, state
    return block(*arguments)


def _block(
    x_ble: Tensor,
    delta_ble: Tensor,
    B_blen: Tensor,
    C_blen: Tensor,
    A_en: Tensor,
    state_ben: Tensor,
    recurrence: Recurrence,
) -> tuple[Tensor, Tensor]:
    decay_blen = torch.exp(delta_ble[..., None] * A_en)
    drive_blen = (delta_ble * x_ble)[..., None] * B_blen
    state_blen = recurrence(decay_blen, drive_blen, state_ben)
    if C_blen.shape[2] == 1:
        y_ble = (state_blen @ C_blen.transpose(2, 3)).squeeze(-1)
    else:
        y_ble = (state_blen * C_blen).sum(-1)
    return _real(y_ble), state_blen[:, -1]


def _real(y: Tensor) -> Tensor:
    """What a state and its conjugate add up to; real numbers stay as they are."""
    return 2 * y.real if y.is_complex() else y


def linear_recurrence(a_blen: Tensor, b_blen: Tensor, h_ben: Tensor) -> Tensor:
    """All states of h_t = a_t h_{t-1} + b_t, t = 1..l, from h_0. Differentiable.

    Args:
        a_blen, b_blen: (b, l, e, n).
        h_ben: h_0, (b, e, n).

    Returns:
        h_1 to h_l, (b, l, e, n).

    Example:
        >>> import torch
        >>> a, b = torch.full((1, 3, 1, 1), 2.0), torch.ones(1, 3, 1, 1)
        >>> linear_recurrence(a, b, torch.zeros(1, 1, 1)).flatten().tolist()
        [1.0, 3.0, 7.0]
    """
    states: Tensor = _LinearRecurrence.apply(a_blen, b_blen, h_ben)
    return states


class _LinearRecurrence(torch.autograd.Function):
    """Every derivative of a linear recurrence is one too, so that each is written with it."""

    @staticmethod
    def forward(a_blen: Tensor, b_blen: Tensor, h_ben: Tensor) -> Tensor:
        # A compiler follows every step, and may fuse them.
        recur = _recur if torch.compiler.is_compiling() else _recur_unseen
        states: Tensor = recur(a_blen, b_blen, h_ben)
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a_blen, _, h_ben = inputs
        ctx.save_for_backward(a_blen, output, h_ben)
        ctx.save_for_forward(a_blen, output, h_ben)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, ...]:
        """With g_t the gradient of h_t: g_t = given_t + a_{t+1} g_{t+1}, the same walk backward.

        Factors that are complex count as their conjugates, as everywhere in PyTorch's gradients.
        """
        a_blen, states, h_ben = (tensor.conj() for tensor in ctx.saved_tensors)
        next_a = torch.cat([a_blen[:, 1:], torch.zeros_like(a_blen[:, :1])], 1)
        g = linear_recurrence(next_a.flip(1), given.flip(1), torch.zeros_like(h_ben)).flip(1)
        return g * _before(states, h_ben), g, a_blen[:, 0] * g[:, 0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """The tangents walk as the states do, driven by da_t h_{t-1} + db_t."""
        a_blen, states, h_ben = ctx.saved_tensors
        da, db, dh = tangents
        drive = torch.zeros_like(states) if db is None else db
        if da is not None:
            drive = drive + da * _before(states, h_ben)
        return linear_recurrence(a_blen, drive, torch.zeros_like(h_ben) if dh is None else dh)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        """Examples are more rows of the batch."""
        count = info.batch_size
        rows = [
            tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims, strict=True)
        ]
        states = linear_recurrence(*(tensor.flatten(0, 1) for tensor in rows))
        return states.unflatten(0, (count, -1)), 0


def _before(states_blen: Tensor, h_ben: Tensor) -> Tensor:
    """The state that each step starts from."""
    return torch.cat([h_ben[:, None], states_blen[:, :-1]], 1)


def _recur(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    batch, length, *width = b.shape
    chunks = 1 if batch * width[0] * width[1] >= _WIDE_STEP else min(_NARROW_CHUNKS, length)
    steps = -(-length // chunks)
    spare = steps * chunks - length
    # a = 1 and b = 0 hold the state still, so that every chunk has the same number of steps.
    a = F.pad(a, (0, 0, 0, 0, 0, spare), value=1.0).view(batch, chunks, steps, *width)
    b = F.pad(b, (0, 0, 0, 0, 0, spare)).view(batch, chunks, steps, *width)
    states = torch.empty_like(b)
    states[:, :, 0] = b[:, :, 0]
    states[:, 0, 0].addcmul_(a[:, 0, 0], h)
    for t in range(1, steps):
        torch.addcmul(b[:, :, t], a[:, :, t], states[:, :, t - 1], out=states[:, :, t])
    if chunks > 1:
        decay_so_far = torch.cumprod(a, dim=2)
        for chunk in range(1, chunks):
            carried = states[:, chunk - 1, -1, None]
            states[:, chunk].addcmul_(decay_so_far[:, chunk], carried)
    return states.view(batch, steps * chunks, *width)[:, :length]


# One operator to `make_fx` and `torch.func.linearize`, which lose writes to parts of a tensor.
_recur_unseen = torch.library.custom_op("anymamba::linear_recurrence", _recur, mutates_args=())


@_recur_unseen.register_fake
def _(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return torch.empty_like(b)

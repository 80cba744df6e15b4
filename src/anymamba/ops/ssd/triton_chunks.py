"""A call cut into chunks for Triton's kernels: sizes, buffers, and states at the borders."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anymamba.ops.ssd import triton_kernels as kernels
from anymamba.ops.triton import launch_options, strides, tile_side

# Longer chunks of the forward pass halve the states that are kept at their borders; in the backward
# pass all pairs of a chunk's steps are in registers at once.
FORWARD_STEPS, BACKWARD_STEPS = 128, 64
# With larger tiles the kernels of the backward pass spill registers, by ptxas for sm_90.
_BACKWARD_SIDE = 32
# Tiles of matrix products have sides of 16 at least.
_SMALLEST, _LARGEST = 16, 64
MOST_HEADS, _MOST_STATES = 16, 512


class Inputs(NamedTuple):
    """What the operator `anymamba::ssd_triton` takes."""

    x: Tensor  # (b, l, h, p)
    dt: Tensor  # (b, l, h)
    A: Tensor  # (h,), float32 without gaps
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)
    D: Tensor | None  # (h, p)
    z: Tensor | None  # (b, l, h, p)
    dt_bias: Tensor | None  # (h,), float32 without gaps
    initial: Tensor | None  # (n_states, h, p, n)
    segments: Tensor | None  # (5, s)
    n_states: int
    softplus: bool
    low: float
    high: float


class Chunks:
    """A call's sizes, its cut into chunks, and the buffers that all passes need.

    Args:
        inputs: the operator's.
        most_steps: how many steps a chunk has, where there are so many.

    Attributes:
        Q: the steps of a chunk.
        count, per_row: how many chunks there are, and in each row where nothing is packed.
        table: (count, 3) for packed sequences: a chunk's row, first step, step behind its last.
        T, P, N: the sides of tiles of steps, channels and states.
        options: how kernels that multiply matrices are compiled.
        steps, scores: what the kernels of these names write.
    """

    def __init__(self, inputs: Inputs, most_steps: int) -> None:
        x, B = inputs.x, inputs.B
        self.inputs = inputs
        (self.b, self.l, self.h, self.p), (self.g, self.n) = x.shape, B.shape[2:]
        self.heads_per_group = self.h // self.g
        self.Q = _side(self.l, most_steps)
        self.per_row = -(-self.l // self.Q)
        self.count, self._n_segments = self.b * self.per_row, self.b
        self.table: Tensor | None = None
        self._segments: Tensor | None = None
        if inputs.segments is not None:
            self._cut_segments(inputs.segments)
        self.T = min(self.Q, _LARGEST)
        halves = all(t.dtype.itemsize == 2 for t in (x, B, inputs.C))
        # Three parts of each number take more registers than two.
        most = _LARGEST if halves else _LARGEST // 2
        self.P, self.N = (_side(size, most) for size in (self.p, self.n))
        # A loop has one or two rounds, too few to load ahead.
        self.options = launch_options(8 if self.T == _LARGEST else 4) | {"num_stages": 1}
        self.options |= {"Q": self.Q, "PARTS": 2 if halves else 3}
        self.steps = self.buffer(self.count, self.h, 3, self.Q)
        self.scores = self.buffer(self.count, self.g, self.Q, self.Q)
        self._fill_steps()
        self._fill_scores()

    def buffer(self, *shape: int) -> Tensor:
        """Numbers on their way from one kernel to the next."""
        return self.inputs.x.new_empty(shape, dtype=torch.float32)

    def backward_sides(self) -> dict[str, int]:
        """P and N of the backward pass's own kernels."""
        return {"P": min(self.P, _BACKWARD_SIDE), "N": min(self.N, _BACKWARD_SIDE)}

    def _cut_segments(self, table: Tensor) -> None:
        rows, starts, stops, state_in, state_out = table
        counts = (stops - starts + self.Q - 1) // self.Q
        firsts = counts.cumsum(0) - counts
        self.count, self._n_segments = int(counts.sum()), len(rows)
        segment = torch.arange(len(rows), device="cpu").repeat_interleave(counts)
        index = torch.arange(self.count, device="cpu") - firsts[segment]
        first_step = starts[segment] + index * self.Q
        behind = torch.minimum(first_step + self.Q, stops[segment])
        device = self.inputs.x.device
        self.table = torch.stack([rows[segment], first_step, behind], 1).to(device)
        self._segments = torch.stack([firsts, counts, state_in, state_out], 1).to(device)

    def _fill_steps(self) -> None:
        dt, A, bias = self.inputs.dt, self.inputs.A, self.inputs.dt_bias
        softplus, low, high = self.inputs[-3:]
        H = tile_side(self.h, MOST_HEADS)
        kernels.steps_kernel[self.count, -(-self.h // H)](
            dt, *dt.stride(), A, bias, self.table, self.steps,
            self.per_row, self.l, self.h, low, high,
            SOFTPLUS=softplus, Q=self.Q, H=H, enable_fp_fusion=False,
        )  # fmt: skip

    def _fill_scores(self) -> None:
        B, C = self.inputs.B, self.inputs.C
        kernels.scores_kernel[self.count, self.g, (self.Q // self.T) ** 2](
            B, *B.stride(), C, *C.stride(), self.table, self.scores,
            self.per_row, self.l, self.g, self.n,
            T=self.T, N=self.N, **self.options,
        )  # fmt: skip

    def states_before(self, initial: Tensor | None, last: Tensor | None) -> Tensor:
        """The states that chunks start from, (c, h, p, n); fills the last ones."""
        return self._states(self.inputs.x, None, self.inputs.B, initial, last, backward=False)

    def gradients_behind(self, dy: Tensor, dlast: Tensor | None, dinitial: Tensor | None) -> Tensor:
        """The gradients of the states that chunks hand on; fills those of the initial states."""
        return self._states(dy, self.inputs.z, self.inputs.C, dlast, dinitial, backward=True)

    def _states(
        self,
        x: Tensor,
        z: Tensor | None,
        B: Tensor,
        first: Tensor | None,
        last: Tensor | None,
        backward: bool,
    ) -> Tensor:
        if last is not None and self._segments is not None:
            last.zero_()  # where no segment writes to
        states, size = self.buffer(self.count, self.h, self.p, self.n), self.p * self.n
        tiles = -(-self.p // self.P) * -(-self.n // self.N)
        kernels.additions_kernel[self.count, self.h, tiles](
            x, *x.stride(), z, *strides(z, 4), B, *B.stride(), self.steps, self.table, states,
            self.per_row, self.l, self.h, self.p, self.n, self.heads_per_group,
            BACKWARD=backward, T=self.T, P=self.P, N=self.N, **self.options,
        )  # fmt: skip
        S = tile_side(size, _MOST_STATES)
        kernels.states_kernel[self._n_segments, self.h, -(-size // S)](
            states, first, last, self.steps, self._segments, self.per_row, self.h, size,
            BACKWARD=backward, Q=self.Q, S=S,
        )  # fmt: skip
        return states


def _side(size: int, at_most: int) -> int:
    return max(_SMALLEST, tile_side(size, at_most))

"""A Mamba layer: projections, convolution and selective state space.

A name ends in its tensor's shape: b batch, l length, d model width, e inner width, n state size,
r rank of the step size, k convolution width. Source: "Mamba: Linear-Time Sequence Modeling with
Selective State Spaces" (arXiv 2312.00752), section 3.4 and algorithm 2. `anymamba.minimal` is the
specification.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymamba import ops
from anymamba.layers.convolution import convolve, convolve_step, last_inputs
from anymamba.layers.initialization import at_least_float32
from anymamba.ops.direct import scan_step
from anymamba.ops.fusable import project, project_halves, why_not_fusable

States = tuple[Tensor, Tensor]


class MambaLayer(nn.Module):
    """What a Mamba layer computes; a subclass makes the modules and has the public interface.

    A subclass whose layers continue from something else than `States` replaces `_convolve` and
    `_scan`, which get what was passed to `_mix` as they are.

    Attributes:
        in_proj, x_proj, dt_proj, out_proj: (d) to (2 e), (e) to (r + 2 n), (r) to (e), (e) to (d).
        conv1d, act: the causal convolution over e channels, and its activation.
        A_log, D: (e, n) and (e,).
    """

    in_proj: nn.Linear
    conv1d: nn.Conv1d
    act: nn.Module
    x_proj: nn.Linear
    dt_proj: nn.Linear
    out_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter

    @property
    def _fallback(self) -> str:
        """What the scan takes where no kernel serves the call."""
        return "reference"

    def _mix(self, hidden_bld: Tensor, *context: Any) -> Tensor:
        """The layer over whole sequences.

        Args:
            hidden_bld: (b, l, d).
            context: what `_convolve` and `_scan` take beside their input.

        Returns:
            (b, l, d).
        """
        return self._compute(
            hidden_bld,
            lambda x_ble: self._convolve(x_ble, *context),
            lambda *inputs: self._scan(inputs, *context),
        )

    def _step(self, hidden_bd: Tensor, states: States) -> Tensor:
        """The layer over one position, (b, d) to (b, d); the states advance in place."""
        window_bek, state_ben = states
        convolution = partial(convolve_step, self.conv1d, self.act, window_bek=window_bek)

        def scan(*inputs: Any) -> Tensor:
            arguments = (state_ben, *inputs, True)
            y_be = scan_step(*arguments)
            return ops.selective_state_update(*arguments) if y_be is None else y_be

        # For a few rows PyTorch's product takes less time to call.
        return self._compute(hidden_bd, convolution, scan, F.linear)

    def _compute(
        self,
        hidden: Tensor,
        convolve: Callable[[Tensor], Tensor],
        scan: Callable[..., Tensor],
        multiply: Callable[[Tensor, Tensor], Tensor] = ops.linear,
    ) -> Tensor:
        """The layer around its convolution and its scan."""
        x, z = project_halves(self.in_proj, hidden)
        x = convolve(x)
        n = self.A_log.shape[1]
        projected = project(self.x_proj, x)
        delta, B, C = self._normed(*projected.split([projected.shape[-1] - 2 * n, n, n], dim=-1))
        bias_e = None
        if why_not_fusable(self.dt_proj, nn.Linear) is None:
            # The bias stays apart, so that it is added in float32.
            delta, bias_e = multiply(delta, self.dt_proj.weight), self.dt_proj.bias
        else:
            delta = self.dt_proj(delta)
        return project(self.out_proj, scan(x, delta, self._A(), B, C, self.D, z, bias_e))

    def _normed(self, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What x_proj gave, as dt_proj and the scan take it: a place for norms."""
        return delta, B, C

    def norm_weights(self) -> dict[str, Tensor]:
        """The gains of these norms, by the core's names."""
        return {}

    def core_settings(self) -> dict[str, Any]:
        """What the core must know of the layer beside its tensors, as it names them."""
        return {}

    def _A(self) -> Tensor:
        return -torch.exp(at_least_float32(self.A_log))

    def _convolve(self, x_ble: Tensor, states: States | None = None) -> Tensor:
        """From zeros; the window of `states` is overwritten with the last inputs."""
        if states is not None:
            states[0].copy_(last_inputs(x_ble, states[0].shape[2]))
        return convolve(self.conv1d, self.act, x_ble)[0]

    def _scan(self, inputs: tuple[Any, ...], states: States | None = None) -> Tensor:
        """From zeros; the state of `states` is overwritten with the last one."""
        y_ble, last_ben = self._scan_from(inputs, None, states is not None)
        if states is not None and last_ben is not None:
            states[1].copy_(last_ben.detach())
        return y_ble

    def _scan_from(
        self,
        inputs: tuple[Any, ...],
        initial_state: Tensor | None,
        return_last_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        softplus = True
        scanned = ops.selective_scan(
            *(*inputs, softplus),
            initial_state=initial_state,
            return_last_state=return_last_state,
            cu_seqlens=cu_seqlens,
            fallback=self._fallback,
        )
        return scanned if isinstance(scanned, tuple) else (scanned, None)

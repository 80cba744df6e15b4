"""The Mamba layer, as `mamba_ssm.modules.mamba_simple` has it.

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
sections 3.4 to 3.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymamba.dropin.causal_conv1d.causal_conv1d_interface import (  # noqa: F401
    causal_conv1d_fn,
    causal_conv1d_update,
)
from anymamba.dropin.common.borrowed import rearrange, repeat  # noqa: F401
from anymamba.dropin.common.layers import (
    CachedStates,
    all_plain,
    check_sizes,
    depthwise,
    inner_width,
    not_decayed,
    one_token,
)
from anymamba.dropin.forks import explained
from anymamba.dropin.mamba_ssm.modules.block import Block as BlockWithMLP
from anymamba.dropin.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    selective_scan_fn,  # noqa: F401
)
from anymamba.dropin.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn  # noqa: F401
from anymamba.dropin.mamba_ssm.ops.triton.selective_state_update import selective_state_update  # noqa: F401
from anymamba.errors import ConfigError
from anymamba.layers import MambaLayer, at_least_float32, draw_step_bias, s4d_real
from anymamba.ops.fusable import project

if TYPE_CHECKING:
    from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams

__all__ = ["Block", "Mamba"]


class Mamba(CachedStates, MambaLayer):
    """The selective state space layer with its projections, convolution and gate.

    Args:
        d_model: the width of input and output.
        d_state: the size of each channel's state.
        d_conv: the width of the convolution.
        expand: the inner width, in multiples of d_model.
        dt_rank: the rank of the step size; "auto" is d_model / 16, rounded up.
        dt_min, dt_max, dt_init_floor: the range of step sizes at initialization.
        dt_init: "random" or "constant", how dt_proj's weight starts.
        dt_scale: scales that weight.
        conv_bias, bias: whether the convolution, and the outer projections, have a bias.
        use_fast_path: whether `forward` may run as one operator. It does so only while every
            projection is untouched, so adapters and hooks count in either case.
        layer_idx: this layer's key in an inference cache.
        device, dtype: of the weights; `A_log` and `D` are float32.

    Raises:
        ConfigError: dt_init is unknown.

    Example:
        >>> layer = Mamba(d_model=16, d_state=4)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    @explained
    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = e = inner_width(d_model, expand)
        self.dt_rank = r = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        check_sizes(d_state=d_state, d_conv=d_conv, dt_rank=r)
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        # The order of what is drawn is the original's: one seed gives the same weights in both.
        self.in_proj = nn.Linear(d_model, 2 * e, bias=bias, **factory)
        self.conv1d = depthwise(e, d_conv, conv_bias, None, factory)
        self.activation = "silu"
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(e, r + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(r, e, bias=True, **factory)
        _initialize_step(self.dt_proj.weight, dt_init, r**-0.5 * dt_scale)
        with torch.no_grad():
            self.dt_proj.bias.copy_(draw_step_bias(e, dt_min, dt_max, dt_init_floor, **factory))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.A_log = not_decayed(s4d_real(e, d_state, device))
        self.D = not_decayed(torch.ones(e, device=device))
        self.out_proj = nn.Linear(e, d_model, bias=bias, **factory)

    def forward(
        self, hidden_states: Tensor, inference_params: InferenceParams | None = None
    ) -> Tensor:
        """Run the layer over sequences.

        Args:
            hidden_states: (b, l, d); one token a row once inference_params has seen a prompt.
            inference_params: the cache of a generation; its states are changed in place.

        Returns:
            (b, l, d).

        Raises:
            InputError: more than one token follows a prompt, or the cache is another batch's.
        """
        states = None
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        plain = all_plain(self.conv1d, self.x_proj, self.dt_proj, self.out_proj)
        if states is None and self.use_fast_path and plain:
            return self._as_one_operator(project(self.in_proj, hidden_states))
        return self._mix(hidden_states, states)

    def _as_one_operator(self, xz_ble: Tensor) -> Tensor:
        out: Tensor = mamba_inner_fn(
            xz_ble.transpose(1, 2),
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            self._A(),
            None,
            None,
            at_least_float32(self.D),
            delta_bias=at_least_float32(self.dt_proj.bias),
            delta_softplus=True,
        )
        return out

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer over one more token. Has no gradient.

        Args:
            hidden_states: (b, 1, d).
            conv_state: the convolution's last inputs, (b, e, k); changed in place.
            ssm_state: (b, e, n); changed in place.

        Returns:
            The output, (b, 1, d), and the two states.

        Raises:
            InputError: there is not exactly one token a row.
        """
        y_bd = self._step(one_token(hidden_states), (conv_state, ssm_state))
        return y_bd.unsqueeze(1), conv_state, ssm_state


class Block(BlockWithMLP):
    """The block of version 1, which stood in this module: a mixer with its norm, and no MLP.

    Args:
        dim, mixer_cls, norm_cls, fused_add_norm, residual_in_fp32: as in the block of version 2,
            `mamba_ssm.modules.block.Block`.

    Raises:
        ConfigError: another norm than LayerNorm or RMSNorm was to be fused.

    Example:
        >>> output, residual = Block(16, Mamba)(torch.randn(2, 5, 16))
        >>> output.shape, residual.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 16]))
    """

    @explained
    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


def _initialize_step(weight: Tensor, how: str, size: float) -> None:
    """Start dt_proj so that it keeps the variance."""
    if how == "constant":
        nn.init.constant_(weight, size)
    elif how == "random":
        nn.init.uniform_(weight, -size, size)
    else:
        raise ConfigError(f"dt_init is {how!r}, expected 'random' or 'constant'")

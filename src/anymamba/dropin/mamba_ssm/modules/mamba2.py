"""The Mamba-2 layer, as `mamba_ssm.modules.mamba2` has it.

Source: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality" (arXiv 2405.21060), section 7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from anymamba.dropin.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
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
from anymamba.dropin.mamba_ssm.ops.triton.layernorm_gated import RMSNorm
from anymamba.dropin.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from anymamba.dropin.mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)
from anymamba.errors import ConfigError, InputError, NotIncludedError
from anymamba.layers import (
    HeadSizes,
    at_least_float32,
    convolve,
    convolve_step,
    draw_step_bias,
    last_inputs,
    mix_heads,
)
from anymamba.ops.fusable import project

if TYPE_CHECKING:
    from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams

__all__ = ["Mamba2"]

NO_LIMIT = (0.0, float("inf"))


class HeadsLayer(nn.Module):
    """A layer with the modules and settings of `Mamba2`, by the names that they have there."""

    def __init__(
        self,
        d_model: int,
        d_state: int,
        d_conv: int,
        conv_init: float | None,
        expand: float,
        headdim: int,
        ngroups: int,
        A_init_range: tuple[float, float],
        step_range: tuple[float, float, float],
        dt_limit: tuple[float, float],
        bias: bool,
        conv_bias: bool,
        chunk_size: int,
        use_mem_eff_path: bool,
        layer_idx: int | None,
        factory: dict[str, Any],
        *,
        activation: str = "silu",
        d_ssm: int | None = None,
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        learnable_init_states: bool = False,
    ) -> None:
        super().__init__()
        self.d_inner = e = inner_width(d_model, expand)
        self.d_ssm = s = e if d_ssm is None else d_ssm
        check_sizes(d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups)
        check_sizes(chunk_size=chunk_size, d_ssm=s)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.conv_init, self.headdim, self.ngroups = conv_init, headdim, ngroups
        check_heads(s, headdim, ngroups)
        self.nheads = h = s // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        # config.json has a list in the tuple's place.
        self.dt_limit: tuple[float, float] = (dt_limit[0], dt_limit[1])
        self.activation, self.chunk_size = activation, chunk_size
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx
        # The order of what is drawn is the original's: one seed gives the same weights in both.
        width = s + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * e - s + width + h, bias=bias, **factory)
        self.conv1d = depthwise(width, d_conv, conv_bias, conv_init, factory)
        if learnable_init_states:
            self.init_states = not_decayed(torch.zeros(h, headdim, d_state, **factory))
        self.act = nn.SiLU()
        self.dt_bias = not_decayed(draw_step_bias(h, *step_range, **factory))
        device, dtype = factory["device"], factory["dtype"]
        self.A_log = not_decayed(log_rates(h, A_init_range, device).to(dtype=dtype))
        self.D = not_decayed(torch.ones(s if D_has_hdim else h, device=device))
        if rmsnorm:
            # The original's Mamba2Simple norms whole rows on one of its paths and groups on the
            # other; the second is its default, and what Mamba2 does.
            self.norm = RMSNorm(s, 1e-5, s // ngroups, norm_before_gate, **factory)
        self.out_proj = nn.Linear(e, d_model, bias=bias, **factory)

    def _A(self) -> Tensor:
        return -torch.exp(at_least_float32(self.A_log))

    def _D(self) -> Tensor:
        return self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D

    def _is_one_operator(self) -> bool:
        return self.use_mem_eff_path and all_plain(self.conv1d, self.out_proj)

    def _as_one_operator(
        self, zxbcdt: Tensor, seq_idx: Tensor | None, initial_states: Tensor | None = None
    ) -> Tensor:
        out = mamba_split_conv1d_scan_combined(
            zxbcdt,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self._A(),
            D=self._D(),
            chunk_size=self.chunk_size,
            initial_states=initial_states,
            seq_idx=seq_idx,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=None if self.D_has_hdim else self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
            dt_limit=self.dt_limit,
        )
        return cast(Tensor, out)

    def _by_modules(
        self,
        zxbcdt: Tensor,
        convolve: Callable[[Tensor], Tensor],
        scan: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """As `mix_heads`, which says what convolution and scan are, with the output projection."""
        sizes = HeadSizes(self.nheads, self.headdim, self.ngroups, self.d_state)
        norm = self.norm if self.rmsnorm else None
        return project(self.out_proj, mix_heads(zxbcdt, sizes, convolve, scan, norm))

    def _chunk_scan(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, gate: Tensor | None, **options: Any
    ) -> Any:
        return mamba_chunk_scan_combined(
            x,
            dt,
            self._A(),
            B,
            C,
            chunk_size=self.chunk_size,
            D=self._D(),
            z=gate,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            **options,
        )


class Mamba2(CachedStates, HeadsLayer, PyTorchModelHubMixin):
    """The state space layer whose heads each decay at one rate, computed by matrix products.

    Args:
        d_model, d_conv, expand, dt_min, dt_max, dt_init_floor, bias, conv_bias, layer_idx, device,
            dtype: as in `Mamba`.
        d_state: the size of the state, of each of a head's channels.
        conv_init: the convolution's weights start between -conv_init and conv_init.
        headdim: the channels of a head.
        d_ssm: how many inner channels go through the state space; the rest is a gated MLP. By
            default all.
        ngroups: how many groups of heads have B and C of their own.
        A_init_range: the range of the heads' rates at initialization.
        D_has_hdim: whether D has a value for each channel rather than for each head.
        rmsnorm: whether gate and RMSNorm stand before the output; else the gate alone.
        norm_before_gate: which of the two comes first.
        dt_limit: the least and the largest step size ever used.
        chunk_size: how the scan is cut; changes speed, not results.
        use_mem_eff_path: whether `forward` may run as one operator. It does so only while every
            projection is untouched, so adapters and hooks count in either case.
        process_group: must be None: one process runs the whole layer.
        sequence_parallel: without a process_group it does nothing.

    Raises:
        ConfigError: the sizes do not divide, or the range of A makes no sense.
        NotIncludedError: a process_group is given.

    Example:
        >>> layer = Mamba2(d_model=16, d_state=8, headdim=8)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    @explained
    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if process_group is not None:
            raise NotIncludedError(
                "Mamba2(process_group=...): tensor-parallel layers are not part of the drop-in, "
                "whose list is docs/drop-in.md; leave process_group out"
            )
        super().__init__(
            *(d_model, d_state, d_conv, conv_init, expand, headdim, ngroups, A_init_range),
            *((dt_min, dt_max, dt_init_floor), dt_limit, bias, conv_bias, chunk_size),
            *(use_mem_eff_path, layer_idx, {"device": device, "dtype": dtype}),
            d_ssm=d_ssm,
            D_has_hdim=D_has_hdim,
            rmsnorm=rmsnorm,
            norm_before_gate=norm_before_gate,
        )
        self.process_group, self.sequence_parallel = None, sequence_parallel
        self.world_size, self.local_rank = 1, 0

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Run the layer over sequences.

        Args:
            u: (b, l, d), or (b * l, d) where seqlen tells l.
            seqlen: the l of an input of two dimensions.
            seq_idx: (b, l) integers, which sequence each position belongs to; state and
                convolution begin anew where they change.
            cu_seqlens: (s + 1,) offsets of s sequences packed in one row; also where seq_idx is
                not given, state and convolution begin anew at each.
            inference_params: the cache of a generation; its states are changed in place. With
                cu_seqlens it holds one row for each sequence.

        Returns:
            The same shape as u.

        Raises:
            InputError: more than one token follows a prompt, sequences are packed in more than
                one row, or the cache is another batch's.
        """
        if seqlen is not None:
            rows = u.unflatten(0, (-1, seqlen))
            return self.forward(rows, None, seq_idx, cu_seqlens, inference_params).flatten(0, 1)
        if cu_seqlens is not None:
            if u.shape[0] != 1:
                raise InputError(f"cu_seqlens packs sequences in one row, the input has {len(u)}")
            seq_idx = _numbered(cu_seqlens, u.shape[1]) if seq_idx is None else seq_idx
        states = None
        if inference_params is not None:
            rows_in_cache = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            states = self._get_states_from_cache(inference_params, rows_in_cache)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0]
        zxbcdt = project(self.in_proj, u)
        if states is None and self._is_one_operator():
            return self._as_one_operator(zxbcdt, seq_idx)

        def convolution(xBC: Tensor) -> Tensor:
            if states is not None:
                states[0].copy_(self._window(xBC, seq_idx, cu_seqlens))
            return convolve(self.conv1d, self.act, xBC, seq_idx=seq_idx)[0]

        def scan(*inputs: Any) -> Tensor:
            y, last_states, *varlen_states = self._chunk_scan(
                *inputs,
                seq_idx=seq_idx,
                cu_seqlens=cu_seqlens,
                return_final_states=True,
                return_varlen_states=cu_seqlens is not None and states is not None,
            )
            if states is not None:
                states[1].copy_((varlen_states or [last_states])[0].detach())
            return cast(Tensor, y)

        return self._by_modules(zxbcdt, convolution, scan)

    def _window(self, xBC: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return last_inputs(xBC, self.d_conv, seq_idx)
        window: Tensor = causal_conv1d_varlen_states(
            xBC.detach().squeeze(0), cu_seqlens, state_len=self.d_conv
        )
        return window

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer over one more token, as `Mamba.step` does.

        Its states, which change in place, are (b, c, k) and (b, h, p, n).
        """
        h, p, n = self.nheads, self.headdim, self.d_state

        def scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, gate: Tensor | None) -> Tensor:
            # The update knows no limits, so the step size comes to it ready.
            dt = F.softplus(at_least_float32(dt) + at_least_float32(self.dt_bias))
            return selective_state_update(
                ssm_state,
                x,
                dt.clamp(*self.dt_limit).unsqueeze(-1).expand(-1, h, p),
                self._A().view(h, 1, 1).expand(h, p, n),
                B,
                C,
                self._D().view(h, -1).expand(h, p),
                z=gate,
            )

        convolution = partial(convolve_step, self.conv1d, self.act, window_bek=conv_state)
        zxbcdt = project(self.in_proj, one_token(hidden_states))
        out = self._by_modules(zxbcdt, convolution, scan)
        return out.unsqueeze(1), conv_state, ssm_state

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        return self.nheads, self.headdim, self.d_state

    def _empty_window(self, weight: Tensor, b: int, dtype: torch.dtype | None) -> Tensor:
        # In this layer channels are contiguous, as in the original.
        return weight.new_zeros(b, self.d_conv, weight.shape[0], dtype=dtype).transpose(1, 2)


def check_heads(width: int, headdim: int, ngroups: int) -> None:
    """Check that heads fill the width, and groups the heads."""
    if width % headdim or (width // headdim) % ngroups:
        raise ConfigError(
            f"{width} inner channels cannot be split into heads of headdim={headdim} in "
            f"ngroups={ngroups}; choose a headdim that divides them and ngroups that divides the "
            "number of heads"
        )


def log_rates(nheads: int, init_range: tuple[float, float], device: Any) -> Tensor:
    """Draw the logarithms of the heads' rates of decay, in float32."""
    low, high = init_range
    if not 0 < low <= high:
        raise ConfigError(f"A_init_range is {init_range}, expected 0 < low <= high")
    rates = torch.empty(nheads, dtype=torch.float32, device=device).uniform_(low, high)
    return torch.log(rates)


def _numbered(cu_seqlens: Tensor, l: int) -> Tensor:
    """Which sequence each of l positions belongs to, (1, l)."""
    positions = torch.arange(l, device=cu_seqlens.device)
    index = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
    return index.to(torch.int32).unsqueeze(0)

"""Multi-head attention, the other mixer of hybrid models, as `mamba_ssm.modules.mha` has it.

Source: "Attention Is All You Need" (arXiv 1706.03762), section 3.2, with heads that share keys and
values as in "GQA" (arXiv 2305.13245).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymamba.dropin.common.layers import depthwise, one_token
from anymamba.dropin.forks import explained
from anymamba.errors import ConfigError, InputError
from anymamba.layers import convolve, convolve_step, last_inputs
from anymamba.ops.fusable import project

if TYPE_CHECKING:
    from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams

__all__ = ["MHA"]


class MHA(nn.Module):
    """Self-attention with a cache, optionally beside a gated MLP, behind a convolution.

    Args:
        embed_dim: the width of input and output.
        num_heads: the heads of queries.
        num_heads_kv: the heads of keys and values, which divide those of queries; by default as
            many.
        head_dim: a head's channels, by default embed_dim / num_heads.
        mlp_dim: the width of both halves of a gated MLP beside the attention, rounded up to a
            multiple of 256; 0 for none.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        softmax_scale: scales the products of queries and keys; by default 1 / sqrt(head_dim).
        causal: whether a position sees only itself and what is before it.
        layer_idx: this layer's key in an inference cache.
        d_conv: the width of a causal convolution over queries, keys and values; 0 for none.
        rotary_emb_dim: how many of a head's channels carry the position; 0 for none.
        rotary_emb_base, rotary_emb_interleaved: see `RotaryEmbedding`.
        device, dtype: of the weights.

    Raises:
        ConfigError: the heads do not divide.

    Example:
        >>> layer = MHA(16, num_heads=4, num_heads_kv=2, causal=True)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    @explained
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.layer_idx, self.d_conv = embed_dim, layer_idx, d_conv
        self.rotary_emb_dim, self.softmax_scale, self.causal = rotary_emb_dim, softmax_scale, causal
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv or (head_dim is None and embed_dim % num_heads):
            raise ConfigError(
                f"embed_dim={embed_dim}, num_heads={num_heads} and num_heads_kv="
                f"{self.num_heads_kv} do not divide; num_heads must divide embed_dim (or give "
                "head_dim), and num_heads_kv must divide num_heads"
            )
        self.head_dim = p = embed_dim // num_heads if head_dim is None else head_dim
        self.mlp_dim = math.ceil(mlp_dim / 256) * 256
        qkv_dim = p * (num_heads + 2 * self.num_heads_kv)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved
            )
        # The order of what is drawn is the original's: one seed gives the same weights in both.
        self.in_proj = nn.Linear(embed_dim, qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **factory)
        if d_conv > 0:
            self.conv1d = depthwise(qkv_dim, d_conv, True, None, factory)
        width = p * num_heads + self.mlp_dim // 2
        self.out_proj = nn.Linear(width, embed_dim, bias=out_proj_bias, **factory)

    def forward(self, x: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """Run the layer over sequences.

        Args:
            x: (b, l, d).
            inference_params: the cache of a generation: keys and values are added to it, at
                `lengths_per_sample` where the rows differ in length, else at `seqlen_offset`.

        Returns:
            (b, l, d).

        Raises:
            InputError: the cache is too small, or more than one token follows a prompt where
                there is a convolution.
        """
        if inference_params is not None:
            self._allocate_in(inference_params, x)
        qkv, mlp = project(self.in_proj, x).split(
            [self.in_proj_width - self.mlp_dim, self.mlp_dim], dim=-1
        )
        if self.d_conv > 0:
            qkv = self._convolve(qkv, inference_params)
        q_blhp, k_blhp, v_blhp = self._heads(qkv)
        offsets = _offsets(inference_params, x)
        if self.rotary_emb_dim > 0:
            positions = offsets.unsqueeze(-1) + torch.arange(x.shape[1], device=x.device)
            q_blhp, k_blhp = (self.rotary_emb(heads, positions) for heads in (q_blhp, k_blhp))
        mask = None
        if inference_params is not None:
            cache = self._rows_of(inference_params, x.shape[0])
            k_blhp, v_blhp = _remember(cache, k_blhp, v_blhp, offsets)
            mask = _visible(offsets, x.shape[1], k_blhp.shape[1], self.causal)
        out = self._attend(q_blhp, k_blhp, v_blhp, mask).flatten(-2)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            out = torch.cat([out, up * F.silu(gate)], dim=-1)
        return project(self.out_proj, out)

    @property
    def in_proj_width(self) -> int:
        """The width of queries, keys, values and MLP together."""
        return self.head_dim * (self.num_heads + 2 * self.num_heads_kv) + self.mlp_dim

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, kv = self.head_dim, self.num_heads_kv * self.head_dim
        q, k, v = qkv.split([self.num_heads * p, kv, kv], dim=-1)
        return q.unflatten(-1, (-1, p)), k.unflatten(-1, (-1, p)), v.unflatten(-1, (-1, p))

    def _convolve(self, qkv: Tensor, inference_params: InferenceParams | None) -> Tensor:
        if inference_params is None:
            return convolve(self.conv1d, None, qkv)[0]
        conv_state = inference_params.key_value_memory_dict[self.layer_idx][1]
        start = inference_params.batch_size_offset
        conv_state = conv_state[start : start + qkv.shape[0]]
        if inference_params.seqlen_offset > 0:
            return convolve_step(self.conv1d, None, one_token(qkv), conv_state).unsqueeze(1)
        # What the step needs is the convolution's input, not its output.
        conv_state.copy_(last_inputs(qkv, self.d_conv))
        return convolve(self.conv1d, None, qkv)[0]

    def _attend(
        self, q_blhp: Tensor, k_blhp: Tensor, v_blhp: Tensor, mask: Tensor | None
    ) -> Tensor:
        y_bhlp = F.scaled_dot_product_attention(
            q_blhp.transpose(1, 2),
            k_blhp.transpose(1, 2),
            v_blhp.transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal and mask is None and q_blhp.shape[1] > 1,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads != self.num_heads_kv,
        )
        return y_bhlp.transpose(1, 2)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Room for the keys and values of a generation.

        Args:
            batch_size: the number of rows.
            max_seqlen: the most tokens a row will ever have.
            dtype: by default the weights'.

        Returns:
            The keys and values, (b, max_seqlen, 2, kv heads, head_dim), and the convolution's
            last inputs, (b, c, k), or None without a convolution.
        """
        weight = self.out_proj.weight
        conv_state = None
        if self.d_conv > 0:
            width = self.conv1d.weight.shape[0]
            conv_state = weight.new_zeros(batch_size, width, self.d_conv, dtype=dtype)
        sizes = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return weight.new_zeros(sizes, dtype=dtype), conv_state

    def _allocate_in(self, inference_params: InferenceParams, x: Tensor) -> None:
        if self.layer_idx is None:
            raise InputError("MHA with inference_params needs a layer_idx; pass layer_idx=0")
        if self.layer_idx not in inference_params.key_value_memory_dict:
            inference_params.key_value_memory_dict[self.layer_idx] = self.allocate_inference_cache(
                inference_params.batch_size_offset + x.shape[0],
                inference_params.max_seqlen,
                dtype=x.dtype,
            )

    def _rows_of(self, inference_params: InferenceParams, b: int) -> Tensor:
        cache: Tensor = inference_params.key_value_memory_dict[self.layer_idx][0]
        start = inference_params.batch_size_offset
        if start + b > cache.shape[0]:
            raise InputError(
                f"the cache of layer {self.layer_idx} holds {cache.shape[0]} rows, and rows "
                f"{start} to {start + b - 1} are asked for; use InferenceParams for this batch"
            )
        return cache[start : start + b]


class RotaryEmbedding(nn.Module):
    """Turn pairs of channels by an angle that grows with the position, as flash_attn does.

    Args:
        dim: how many of a head's first channels turn; even.
        base: the slowest pair turns about base times slower than the fastest.
        interleaved: whether a pair is two neighbours, rather than a channel of the first half and
            its counterpart in the second.

    Raises:
        ConfigError: dim is odd.

    Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864),
    section 3.4.2.

    Example:
        >>> turn = RotaryEmbedding(2)
        >>> turned = turn(torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]]), torch.tensor([[0, 1]]))
        >>> [round(value, 4) for value in turned.flatten().tolist()]
        [1.0, 0.0, 0.5403, 0.8415]
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim % 2:
            raise ConfigError(f"rotary_emb_dim is {dim}, expected an even number")
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def forward(self, x_blhp: Tensor, positions_bl: Tensor) -> Tensor:
        """Turn the heads' first channels.

        Args:
            x_blhp: queries or keys, (b, l, h, p) with p at least `dim`.
            positions_bl: (b, l), or (1, l) where all rows have the same.

        Returns:
            (b, l, h, p).
        """
        # In float32 whatever the type: half precision cannot tell positions beyond some hundreds.
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=x_blhp.device)
        angles = positions_bl.float()[..., None, None] * self.base ** -(exponents / self.dim)
        cos, sin = angles.cos(), angles.sin()
        turning, rest = x_blhp.split([self.dim, x_blhp.shape[-1] - self.dim], dim=-1)
        halves = (-1, 2) if self.interleaved else (2, -1)
        pair_axis = -1 if self.interleaved else -2
        first, second = turning.unflatten(-1, halves).unbind(pair_axis)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], pair_axis)
        return torch.cat([turned.flatten(-2).to(x_blhp.dtype), rest], dim=-1)


def _offsets(inference_params: InferenceParams | None, x: Tensor) -> Tensor:
    """How many tokens stand in the cache: (b,), or (1,) where that is the same for all rows."""
    if inference_params is None:
        return torch.zeros(1, dtype=torch.long, device=x.device)
    start, lengths = inference_params.batch_size_offset, inference_params.lengths_per_sample
    if lengths is not None and inference_params.seqlen_offset > 0:
        return lengths[start : start + x.shape[0]].to(torch.long)
    return torch.tensor([inference_params.seqlen_offset], device=x.device)


def _remember(
    cache: Tensor, k_blhp: Tensor, v_blhp: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Write keys and values behind those in the cache; all of them so far, in k's type."""
    b, l = k_blhp.shape[:2]
    total = int(offsets.max()) + l if len(offsets) else l
    if total > cache.shape[1]:
        raise InputError(
            f"the cache has room for {cache.shape[1]} tokens, and {total} are needed; use "
            "InferenceParams with a larger max_seqlen (generate: a larger max_length)"
        )
    positions = offsets.unsqueeze(-1) + torch.arange(l, device=offsets.device)
    rows = torch.arange(b, device=offsets.device).unsqueeze(-1)
    cache[rows, positions.expand(b, l)] = torch.stack([k_blhp, v_blhp], dim=2).to(cache.dtype)
    keys, values = cache[:, :total].to(k_blhp.dtype).unbind(dim=2)
    return keys, values


def _visible(offsets: Tensor, l: int, total: int, causal: bool) -> Tensor | None:
    """(b, 1, l, total): which keys each of l queries sees; None where all see all, or the usual."""
    prompt, same = total == l, len(offsets) == 1
    if same and (prompt or l == 1 or not causal):
        return None
    last = offsets.unsqueeze(-1) + (torch.arange(l, device=offsets.device) if causal else l - 1)
    keys = torch.arange(total, device=offsets.device)
    return (keys <= last.unsqueeze(-1)).unsqueeze(1)

"""LayerNorm and RMSNorm with a gate, over all channels or over groups of them: Mamba-2's norm.

    out = norm(x) * silu(z)     (norm_before_gate)        out = norm(x * silu(z))     (otherwise)

Computed in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.dropin.common.gradients import filled, gradients
from anymamba.dropin.dispatch import by_device
from anymamba.layers import gated_norm
from anymamba.layers.gated_norm import check_gated_norm, in_groups

__all__ = ["LayerNorm", "LayerNormFn", "RMSNorm", "layernorm_fn", "rms_norm_ref", "rmsnorm_fn"]


@by_device
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Norm rows, or groups of channels in them, with a gate. Differentiable in every tensor.

    Args:
        x: (..., d).
        weight, bias: gain and offset of each channel, (d,).
        z: the gate, like x.
        eps: added to the variance, or to the mean square.
        group_size: how many neighbouring channels are normed together; all when None.
        norm_before_gate: whether the gate comes after the norm.
        is_rms_norm: RMSNorm in place of LayerNorm.

    Returns:
        (..., d) in the type of x.

    Raises:
        InputError: a shape does not fit the others, or groups do not divide d.

    Source: "Transformers are SSMs" (arXiv 2405.21060), section 7.1.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 10.0, 30.0]])
        >>> layernorm_fn(x, torch.ones(4), None, eps=0.0, group_size=2).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm)


@by_device
def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` with `is_rms_norm`: all else is said there.

    Example:
        >>> x = torch.tensor([[1.0, -1.0, 10.0, -10.0]])
        >>> rmsnorm_fn(x, torch.ones(4), None, eps=0.0, group_size=2).tolist()
        [[1.0, -1.0, 1.0, -1.0]]
    """
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNormFn:
    """`layernorm_fn` for programs that call the original's autograd function by its name."""

    apply = staticmethod(layernorm_fn)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`rmsnorm_fn` step by step.

    Args:
        upcast: whether x and z are computed with in float32, not in their own type.
    """
    d = check_gated_norm(x, weight, bias, z, group_size)
    rows, gate = (x.float(), None if z is None else z.float()) if upcast else (x, z)
    if gate is not None and not norm_before_gate:
        rows = rows * F.silu(gate)
    groups = in_groups(rows, group_size or d)
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    out = groups.reshape(x.shape) * weight.float()
    if bias is not None:
        out = out + bias.float()
    if gate is not None and norm_before_gate:
        out = out * F.silu(gate)
    return out.to(x.dtype)


class _Gated(nn.Module):
    """What both norms share."""

    is_rms_norm: bool
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        if not self.is_rms_norm:
            self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all gains to one and all offsets to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The normed and gated rows, (..., d): see `layernorm_fn`."""
        return layernorm_fn(
            x,
            self.weight,
            self.bias,
            z,
            self.eps,
            self.group_size,
            self.norm_before_gate,
            self.is_rms_norm,
        )


class LayerNorm(_Gated):
    """LayerNorm with a gate.

    Args:
        hidden_size: d, the number of channels.
        eps, group_size, norm_before_gate: as in `layernorm_fn`.
        device, dtype: of weight and bias.

    Example:
        >>> LayerNorm(2, eps=0.0)(torch.tensor([[2.0, 4.0]])).tolist()
        [[-1.0, 1.0]]
    """

    is_rms_norm = False


class RMSNorm(_Gated):
    """RMSNorm with a gate; arguments as in `LayerNorm`, without a bias.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([[2.0, -2.0]])).tolist()
        [[1.0, -1.0]]
    """

    is_rms_norm = True


@by_device
@torch.no_grad()
def _layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    z: Tensor | None = None,
    out: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The forward pass: x and z are (rows, d); mean and 1 / deviation of each group follow, with
    all rows of the first group before those of the second. Some programs import this name."""
    normed = layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    if z is not None and not norm_before_gate:
        rows = rows * F.silu(z.to(wide))
    groups = in_groups(rows, group_size or x.shape[-1])
    mean = None if is_rms_norm else groups.mean(-1)
    centred = groups if mean is None else groups - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    place = normed if out is None else out.copy_(normed)
    return place, None if mean is None else mean.mT.flatten(), rstd.mT.flatten()


@by_device
def _layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor,
    z: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    recompute_output: bool = False,
    dz: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The backward pass: gradients of x, weight, bias and z, with recompute_output the output."""
    options = (eps, group_size, norm_before_gate, is_rms_norm)
    (y,), (dx, dw, db, of_z) = gradients(
        lambda x, weight, bias, z: layernorm_fn(x, weight, bias, z, *options),
        (x, weight, bias, z),
        [dy],
    )
    returned = (dx, dw, db, filled(dz, of_z))
    return (*returned, filled(out, y)) if recompute_output else returned

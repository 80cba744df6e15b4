"""`layer_norm` under the name, and with the order of arguments, that it had in version 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anymamba.dropin.dispatch import by_device
from anymamba.dropin.mamba_ssm.ops.triton import layer_norm as of_version_2
from anymamba.dropin.mamba_ssm.ops.triton.layer_norm import (
    LayerNormLinearFn,
    Output,
    RMSNorm,
    layer_norm_linear_fn,
)

__all__ = [
    "LayerNormFn",
    "LayerNormLinearFn",
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]


@by_device
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    **later: Any,
) -> Output:
    """`layer_norm.layer_norm_fn` with the older order of arguments; `later` are those that version
    2 added, by their names.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> layer_norm_fn(x, torch.ones(2), torch.zeros(2), None, 0.0).tolist()
        [[-1.0, 1.0]]
    """
    options = {"prenorm": prenorm, "residual_in_fp32": residual_in_fp32, **later}
    return of_version_2.layer_norm_fn(
        x, weight, bias, residual, eps=eps, is_rms_norm=is_rms_norm, **options
    )


@by_device
def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
    **later: Any,
) -> Output:
    """`layer_norm_fn` with `is_rms_norm`. Note where eps stands.

    Example:
        >>> import torch
        >>> rms_norm_fn(torch.tensor([[1.0, -1.0]]), 3 * torch.ones(2), None, eps=0.0).tolist()
        [[3.0, -3.0]]
    """
    options = {"prenorm": prenorm, "residual_in_fp32": residual_in_fp32, **later}
    return of_version_2.rms_norm_fn(x, weight, bias, residual, eps=eps, **options)


class LayerNormFn:
    """`layer_norm_fn` for programs that call the original's autograd function by its name."""

    apply = staticmethod(layer_norm_fn)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Output:
    """`layer_norm_fn` step by step in the type of x, or with `upcast` in float32."""
    options: dict[str, Any] = {"eps": eps, "prenorm": prenorm, "upcast": upcast}
    return of_version_2.layer_norm_ref(x, weight, bias, residual, **options)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Output:
    """`rms_norm_fn` step by step; arguments as in `layer_norm_ref`."""
    options: dict[str, Any] = {"eps": eps, "prenorm": prenorm, "upcast": upcast}
    return of_version_2.rms_norm_ref(x, weight, bias, residual, **options)

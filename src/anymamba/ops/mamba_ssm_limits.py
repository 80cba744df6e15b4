"""What the CUDA packages cannot do, in words: the reference then runs on the GPU instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["reason_against"]

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def reason_against(operator: str, tensor: Tensor, arguments: dict[str, Any]) -> str | None:
    """Why mamba_ssm's or causal_conv1d's kernels cannot serve a call, or None."""
    if tensor.dtype not in _TYPES:
        return f"its kernels do not offer {tensor.dtype}"
    if arguments.get("segments") is not None:
        return "its kernels know no packed sequences"
    if arguments.get("reverse"):
        return "its kernels know no reverse direction"
    if tensor.numel() == 0:
        return "its kernels refuse empty tensors"
    if operator == "selective_scan":
        return _against_scan(arguments)
    if operator.startswith("causal_conv1d"):
        return _against_conv(tensor, arguments)
    return None


def _against_scan(arguments: dict[str, Any]) -> str | None:
    if arguments["initial_state"] is not None:
        return "its scan takes no initial state"
    if arguments["return_last_state"] and torch.is_grad_enabled():
        return "its scan gives no gradient through the last state"
    if arguments["A_en"].is_complex():
        return "its scan takes complex B and C in another form"
    if arguments["A_en"].shape[1] > 256:
        return "its scan ends at a state size of 256"
    return None


def _against_conv(tensor: Tensor, arguments: dict[str, Any]) -> str | None:
    width = arguments["weight_ek"].shape[1]
    if not 2 <= width <= 4:
        return f"its convolution offers widths 2 to 4, not {width}"
    if arguments.get("initial_window") is not None or arguments.get("return_final_window"):
        return "its convolution offers windows only for some layouts"
    if tensor.shape[-1] % 8:
        return "its channel-last convolution wants a multiple of 8 channels"
    return None

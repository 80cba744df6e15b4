"""What the CUDA packages cannot do, in words: the reference then runs on the GPU instead."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from anymamba.ops import triton
from anymamba.ops.conv.arguments import ConvArguments
from anymamba.ops.scan.arguments import ScanArguments
from anymamba.ops.ssd.arguments import SsdArguments, SsdStepArguments, is_limited
from anymamba.renamed import old_names

__getattr__ = old_names(__name__)

# Looked up once, not at each call.
_HAS_TRITON = find_spec("triton") is not None
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
SLOWER_THAN_TRITON: dict[str, str] = {}
"""The operators that our Triton kernels were measured to be faster at, each with the result that
shows it. Empty: nothing has been measured on a GPU, so the packages go first where they are
installed."""


def unsupported_reason(operator: str, arguments: Any) -> str | None:
    """Why mamba_ssm's or causal_conv1d's kernels cannot serve a call, or None."""
    x = arguments[0]
    if x.dtype not in _TYPES:
        return f"its kernels do not offer {x.dtype}"
    if getattr(arguments, "segments", None) is not None:
        return "its kernels know no packed sequences"
    if getattr(arguments, "reverse", False):
        return "its kernels know no reverse direction"
    if x.numel() == 0:
        return "its kernels refuse empty tensors"
    if isinstance(arguments, ScanArguments):
        return _unsupported_scan(arguments)
    if isinstance(arguments, SsdArguments):
        return _unsupported_ssd(arguments)
    if isinstance(arguments, SsdStepArguments):
        limited = is_limited(arguments.dt_softplus, arguments.dt_limit)
        return "its step knows no limits of step sizes" if limited else None
    if operator.startswith("causal_conv1d"):
        return _unsupported_convolution(arguments)
    return None


def prefers_other(operator: str, arguments: Any) -> bool:
    """Whether our Triton kernels can run a call, and were measured to be faster at it."""
    if operator not in SLOWER_THAN_TRITON or not _HAS_TRITON:
        return False
    return triton.unsupported_reason(operator, arguments) is None


def description() -> str:
    """Where these packages go before our Triton kernels."""
    if not SLOWER_THAN_TRITON:
        return "goes before triton: which of them is faster was not measured on hardware"
    return f"goes before triton, except for {', '.join(SLOWER_THAN_TRITON)} (measured)"


def _unsupported_scan(arguments: ScanArguments) -> str | None:
    if arguments.initial_state is not None:
        return "its scan takes no initial state"
    if arguments.return_last_state and torch.is_grad_enabled():
        return "its scan gives no gradient through the last state"
    if arguments.A_en.is_complex():
        return "its scan takes complex B and C in another form"
    if arguments.A_en.shape[1] > 256:
        return "its scan ends at a state size of 256"
    return None


def _unsupported_ssd(arguments: SsdArguments) -> str | None:
    x, z = arguments.x_blhp, arguments.z_blhp
    if x.dtype == torch.float32:
        return "its products round float32 numbers to TF32"
    if any(t is not None and t.dtype != x.dtype for t in (arguments.B_blgn, arguments.C_blgn, z)):
        return "its kernels want x, B, C and z in one type"
    if arguments.B_blgn.shape[-1] == 0:
        return "its kernels need a state"
    return None


def _unsupported_convolution(arguments: Any) -> str | None:
    width = arguments.weight_ek.shape[1]
    if not 2 <= width <= 4:
        return f"its convolution offers widths 2 to 4, not {width}"
    if isinstance(arguments, ConvArguments) and (
        arguments.initial_window is not None or arguments.return_final_window
    ):
        return "its convolution offers windows only for some layouts"
    if arguments[0].shape[-1] % 8:
        return "its channel-last convolution wants a multiple of 8 channels"
    return None

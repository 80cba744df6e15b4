"""Mamba's operators on PyTorch tensors, each with its reference and its faster backends.

Sequences are channel-last, (b, l, e); other layouts come in as transposed views. A name ends in
its tensor's shape: b batch, l length, e inner width, n state size, k convolution width.
"""

from anymamba.ops.backends import available_backends, backend
from anymamba.ops.conv import causal_conv1d, causal_conv1d_update
from anymamba.ops.flops import register_flops
from anymamba.ops.linear import linear
from anymamba.ops.matmul_dtype import matmul_dtype
from anymamba.ops.norm import rms_norm
from anymamba.ops.quantized_linear import quantized_linear
from anymamba.ops.scan import selective_scan, selective_state_update
from anymamba.ops.ssd import ssd, ssd_state_update

register_flops()

__all__ = [
    "available_backends",
    "backend",
    "causal_conv1d",
    "causal_conv1d_update",
    "linear",
    "matmul_dtype",
    "quantized_linear",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
]

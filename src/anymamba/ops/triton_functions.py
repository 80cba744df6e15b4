"""Functions that several Triton kernels call."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_derivative(x):
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to rounding on every device.

    A GPU's fast logarithm loses most digits near 1, where small step sizes lie. So log(1 + y) is
    2 atanh(s) with s = y / (2 + y), at most 1/3, as a series.
    """
    y = tl.exp(-tl.abs(x))
    s = y / (2.0 + y)
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15 + q * (1.0 / 17))
    series = 1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * series))
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * series))
    return tl.maximum(x, 0.0) + 2.0 * s * series

"""What PyTorch's FLOP counter counts for native operators.

As the counter does for its own, products and convolutions are counted, a multiplication and an
addition each as one, and norms are not. A scan counts what its recurrence takes for each step,
channel and state: 2 for exp(delta A), 1 for the input times B, 2 for the state, 2 for the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Sequence[int]
_SCAN = 7
# The input times B, the decay, the sum and the output: a head's decay is one exponential.
_SSD_STEP = 6
# Steps of a chunk in the core. Triton's kernels cut other chunks and are counted like the core, so
# that counts can be compared.
_SSD_STEPS = 64
# Backward passes walk forward again from the states that were kept, then back, with two products
# for every one of the forward pass.
_BACKWARD = 3


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _linear_backward(
    dy: Shape, x: Shape, weight: Shape, needs_x: bool, needs_weight: bool, **_: Any
) -> int:
    return 2 * math.prod(dy) * weight[1] * (needs_x + needs_weight)


def _conv(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[-1]


def _conv_step(x: Shape, window: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _conv(x, weight)


def _scan(x: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    return _SCAN * math.prod(x) * A[-1]


def _scan_step(state: Shape, *_: Any, **__: Any) -> int:
    return _SCAN * math.prod(state)


def _ssd(x: Shape, dt: Shape, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    return _ssd_chunked(_in_heads(x, A), dt, A, B, _SSD_STEPS)


def _ssd_backward(x: Shape, dt: Shape, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    return _ssd_chunked_backward(_in_heads(x, A), dt, A, B, _SSD_STEPS)


def _in_heads(x: Shape, A: Shape) -> Shape:
    """(b, l, h, p), of which the core gets (b, l, h p)."""
    (b, l, *channels), h = x, A[0]
    return b, l, h, math.prod(channels) // max(1, h)


def _ssd_step(state: Shape, *_: Any, **__: Any) -> int:
    return _SSD_STEP * math.prod(state)


def _ssd_chunked(x: Shape, dt: Shape, A: Shape, B: Shape, *rest: Any, **__: Any) -> int:
    (b, l, h, p), (g, n), q = x, B[2:], min(int(rest[-1]), max(1, x[1]))
    return 2 * b * l * (q * n * g + q * p * h + 2 * n * p * h)


def _ssd_chunked_backward(x: Shape, dt: Shape, A: Shape, B: Shape, *rest: Any, **__: Any) -> int:
    (b, l, h, p), (g, n), q = x, B[2:], min(int(rest[-1]), max(1, x[1]))
    return 2 * b * l * (3 * q * n * g + 2 * q * p * h + 6 * n * p * h)


def register_flops(suffix: str = "") -> None:
    """Tell `torch.utils.flop_counter` of the operators that are defined by now.

    Args:
        suffix: what a backend adds to the operators' names.
    """
    formulas: dict[str, Callable[..., int]] = {
        "linear": _linear,
        "linear_backward": _linear_backward,
        "quantized_linear": _linear,
        "causal_conv1d": _conv,
        "causal_conv1d_backward": lambda *shapes, **_: 2 * _conv(*shapes),
        "causal_conv1d_update": _conv_step,
        "selective_scan": _scan,
        "selective_scan_backward": lambda *shapes, **_: _BACKWARD * _scan(*shapes),
        "selective_state_update": _scan_step,
        "ssd": _ssd,
        "ssd_backward": _ssd_backward,
        "ssd_state_update": _ssd_step,
        "ssd_chunked": _ssd_chunked,
        "ssd_chunked_backward": _ssd_chunked_backward,
    }
    for name, formula in formulas.items():
        stem, backward, _ = name.partition("_backward")
        operator = getattr(torch.ops.anymamba, f"{stem}{suffix}{backward}", None)
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator)(formula)

"""A Mamba layer's tensors by the names that the native core has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["PROJECTIONS", "core_tensors"]

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def core_tensors(
    mixer: Any, matrix_of: Callable[[Any], Any] = lambda linear: linear.weight.detach()
) -> dict[str, Any]:
    """The tensors of a layer without its norms, the model's own memory every one of them.

    Args:
        mixer: a `MambaLayer`, or another module with the same parts.
        matrix_of: gives the matrix of a projection, as the core takes it.
    """
    vectors: dict[str, Tensor | None] = {
        "in_proj_bias": mixer.in_proj.bias,
        "conv_weight": mixer.conv1d.weight[:, 0],
        "conv_bias": mixer.conv1d.bias,
        "dt_bias": mixer.dt_proj.bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "out_proj_bias": mixer.out_proj.bias,
    }
    small = {name: None if tensor is None else tensor.detach() for name, tensor in vectors.items()}
    return small | {name: matrix_of(getattr(mixer, name)) for name in PROJECTIONS}

"""Shape checks with messages that a person can act on."""

from __future__ import annotations

from torch import Tensor

from anymamba.errors import InputError

ACTIVATIONS = (None, "silu", "swish")
"""What the convolution can apply to its output."""


def check_axes(operator: str, *named: tuple[str, Tensor, str]) -> None:
    """Refuse tensors that have not as many axes as the letters of their shapes.

    Args:
        operator: for the message.
        named: what it calls each tensor, the tensor, and the letters, such as "b, l, e".

    Raises:
        InputError: naming operator, the shapes expected and those found.
    """
    if any(tensor.ndim != letters.count(",") + 1 for _, tensor, letters in named):
        expected = " and ".join(f"{name} of shape ({letters})" for name, _, letters in named)
        found = " and ".join(str(tuple(tensor.shape)) for _, tensor, _ in named)
        raise InputError(f"{operator}: expected {expected}, got {found}")


def check_shape(operator: str, name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Refuse a tensor that has none of the allowed shapes; None passes.

    Raises:
        InputError: naming operator, argument, the shape found and those expected.
    """
    if tensor is not None and tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise InputError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_activation(operator: str, activation: str | None) -> None:
    """Refuse an activation that the convolution does not fuse.

    Raises:
        InputError: it is neither None, "silu" nor "swish".
    """
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{operator}: activation is {activation!r}, expected None, 'silu' or 'swish'"
        )

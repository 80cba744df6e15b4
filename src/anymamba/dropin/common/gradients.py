"""Gradients of the drop-in's functions, for programs that call the originals' backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    output_gradients: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Run a function again, and its backward pass.

    Args:
        function: called with the inputs; returns a tensor, or a tuple of them.
        inputs: tensors, or None.
        output_gradients: one for each output that has one; the first outputs are meant.

    Returns:
        The outputs, and a gradient for each input: zeros where it has no influence, None where the
        input is None.

    Example:
        >>> x = torch.tensor([3.0])
        >>> gradients(torch.square, [x], [torch.tensor([10.0])])[1]
        [tensor([60.])]
    """
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        returned = function(*leaves)
    outputs = (returned,) if isinstance(returned, Tensor) else returned
    pairs = [
        (out, gradient.to(out.dtype))
        for out, gradient in zip(outputs, output_gradients, strict=False)
        if gradient is not None
    ]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [gradient for _, gradient in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    detached = tuple(out.detach() for out in outputs)
    return detached, [None if leaf is None else next(found) for leaf in leaves]


def filled(place: Tensor | None, value: Tensor | None) -> Tensor | None:
    """A value in the place that a caller has provided for it, if any.

    Example:
        >>> place = torch.zeros(1)
        >>> filled(place, torch.ones(1)) is place, place
        (True, tensor([1.]))
    """
    if place is None or value is None:
        return value
    return place.copy_(value)

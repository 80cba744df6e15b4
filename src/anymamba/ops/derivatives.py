"""Derivatives of derivatives of native operators.

The core has a kernel for an operator and one for its gradients. The gradients' own gradients are
computed through the reference. (`torch.func` and forward mode run on the reference from the start,
by the choice of backends.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
_vjp: Any = torch.func.vjp  # whose annotation has a third result


def register_second_derivatives(
    backward: Any, inputs: int, outputs: slice, forward: Callable[..., Outputs]
) -> None:
    """Give the operator that computes gradients a gradient of its own, through a reference.

    Args:
        backward: the custom operator. Its first arguments are the inputs of the forward pass and
            it returns one gradient for each of these, empty where the input is None.
        inputs: how many of its arguments those are.
        outputs: which of its arguments are gradients of the forward pass's outputs.
        forward: called with the arguments of `backward`; computes the outputs again from
            differentiable operators.

    Source: with g(x, v) = J(x)^T v, what `backward` computes, its own gradients are the
    vector-Jacobian product of g, which is taken of a g written with `torch.func.vjp`.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]

    def go_back(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        pairs = zip(ctx.is_tensor, ctx.rest, strict=True)
        arguments = [next(tensors) if is_tensor else value for is_tensor, value in pairs]
        places = [
            place
            for place in (*range(inputs), *range(len(arguments))[outputs])
            if arguments[place] is not None
        ]
        given = gradients[0] if isinstance(gradients[0], (list, tuple)) else gradients
        wanted = [given[place] for place in places if place < inputs]

        def first(*values: Tensor) -> Outputs:
            now = list(arguments)
            for place, value in zip(places, values, strict=True):
                now[place] = value
            return _gradients(forward, now, inputs, outputs)

        results, pull = _vjp(first, *(arguments[place] for place in places))
        found = pull(tuple(_like(g, r) for g, r in zip(wanted, results, strict=True)))
        by_place = dict(zip(places, found, strict=True))
        return tuple(by_place.get(place) for place in range(len(arguments)))

    backward.register_autograd(go_back, setup_context=keep)


def _gradients(
    forward: Callable[..., Outputs], arguments: Sequence[Any], inputs: int, outputs: slice
) -> Outputs:
    """The gradients of the inputs that are given, in their order."""
    places = [place for place in range(inputs) if arguments[place] is not None]

    def run(*values: Tensor) -> Outputs:
        now = list(arguments[:inputs])
        for place, value in zip(places, values, strict=True):
            now[place] = value
        results = forward(*now, *arguments[inputs:])
        # An output without a gradient adds nothing.
        kept = zip(results, arguments[outputs], strict=True)
        return tuple(result for result, gradient in kept if gradient is not None)

    results, pull = _vjp(run, *(arguments[place] for place in places))
    given = [gradient for gradient in arguments[outputs] if gradient is not None]
    return tuple(pull(tuple(_like(g, r) for g, r in zip(given, results, strict=True))))


def _like(gradient: Tensor | None, result: Tensor) -> Tensor:
    return torch.zeros_like(result) if gradient is None else gradient.to(result.dtype)

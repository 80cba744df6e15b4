"""The numerical contract: how far a result may be from its reference."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# float32 accumulates rounding of about 6e-8 a step over at most some hundred steps. float64 only
# serves to check formulas. bfloat16 keeps 8 bits of each input and output.
SHARE_OF_LARGEST = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHARE_OF_LARGEST[torch.float16] = SHARE_OF_LARGEST[torch.bfloat16]
# The same for layers, which are several operators in a row.
SHARE_OF_LAYER = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2}
SHARE_OF_LAYER[torch.float16] = SHARE_OF_LAYER[torch.bfloat16]
# Whole models in float32, for logits of about 1 to 10.
WHOLE_MODEL = 1e-4


def assert_same(actual: Any, expected: Any, share: float = WHOLE_MODEL) -> None:
    """Hold tensors or arrays to a share of the largest number expected, or of 1."""
    assert tuple(actual.shape) == tuple(expected.shape)
    found, wanted = _doubles(actual), _doubles(expected)
    if wanted.size:
        error, bound = np.abs(found - wanted).max(), share * max(1.0, np.abs(wanted).max())
        assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def _doubles(numbers: Any) -> Any:
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().double().numpy()
    return np.asarray(numbers, np.float64)


def assert_contract(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Hold a result to the contract; `factor` 10 for gradients, which sum over more terms."""
    assert_same(actual, expected, SHARE_OF_LARGEST[actual.dtype] * factor)


def assert_layer(actual: Tensor, expected: Tensor) -> None:
    """Hold a layer's or a model's result to the contract."""
    assert_same(actual, expected, SHARE_OF_LAYER[actual.dtype])


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    """Hold a gradient to the contract: 1e-4 in float32, half precision's own tolerance there."""
    assert_contract(actual, expected, factor=10 if actual.dtype == torch.float32 else 1)


def assert_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Hold all gradients to the contract, and name the one that fails."""
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        with naming(f"the gradient of {name}"):
            assert_gradient(gradient, expected[name])


def assert_each(
    check: Callable[..., object], found: Iterable[Any], expected: Iterable[Any], **options: Any
) -> None:
    """Hold each of several results to its own; `check` asserts, as those above, or compares."""
    for one, other in zip(found, expected, strict=True):
        assert check(one, other, **options) in (None, True)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in a failed assertion what it was about."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


def assert_layer_gradients(
    module: nn.Module, x: Tensor, slow: Callable[[Any, Tensor], Tensor]
) -> None:
    """The gradients of input and weights are those of a loop."""
    results = []
    for run in (module, lambda u: slow(module, u)):
        u = x.detach().clone().requires_grad_()
        module.zero_grad()
        y = run(u)
        # A fixed weighting, so that no gradient cancels.
        (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
        named = {
            name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
        }
        results.append({"input": u.grad, **named})
    fast, loop = results
    assert fast.keys() == loop.keys()
    for name in fast:
        with naming(f"the gradient of {name}"):
            assert_layer(fast[name], loop[name])

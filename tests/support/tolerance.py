"""The numerical contract: how far an operator may be from its reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# float32 accumulates rounding of about 6e-8 a step over at most some hundred steps. float64 only
# serves to check formulas. bfloat16 keeps 8 bits of each input and output.
SHARE_OF_LARGEST = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHARE_OF_LARGEST[torch.float16] = SHARE_OF_LARGEST[torch.bfloat16]


def assert_contract(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Hold a result to the contract; `factor` 10 for gradients, which sum over more terms."""
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    share = SHARE_OF_LARGEST[actual.dtype] * factor
    actual, expected = actual.detach(), expected.detach().double()
    bound = share * max(1.0, float(expected.abs().max()))
    error = float((actual.double() - expected).abs().max())
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    """Hold a gradient to the contract: 1e-4 in float32, half precision's own tolerance there."""
    assert_contract(actual, expected, factor=10 if actual.dtype == torch.float32 else 1)


def assert_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Hold all gradients to the contract, and name the one that fails."""
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        try:
            assert_gradient(gradient, expected[name])
        except AssertionError as error:
            raise AssertionError(f"the gradient of {name}: {error}") from error

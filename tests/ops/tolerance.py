"""The numerical contract: how far an operator may be from its reference."""

from __future__ import annotations

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
    expected = expected.double()
    bound = share * max(1.0, float(expected.abs().max()))
    error = float((actual.double() - expected).abs().max())
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"

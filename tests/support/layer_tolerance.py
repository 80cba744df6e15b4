"""The contract's tolerance for layers and models, and models whose weights hide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# A layer is several operators in a row, so it gets the tolerance of whole models: 1e-4 in float32.
# bfloat16 keeps 8 bits of every weight and every value between operators.
SHARE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Hold a result to the contract: a share of the largest value, or of 1."""
    assert actual.shape == expected.shape
    if actual.numel():
        error = float((actual.double() - expected.double()).abs().max().detach())
        bound = SHARE[actual.dtype] * max(1.0, float(expected.abs().max().detach()))
        assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def unhidden(module: nn.Module, seed: int = 0) -> Any:
    """Every weight that starts at zero or one, or the same for all, becomes random."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        with torch.no_grad():
            noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            if name.endswith(("D", "norm.weight", "bias", "A_log", "init_states")):
                weight.add_(0.3 * noise)
            elif name.endswith("conv1d.weight"):
                weight.copy_(0.5 * noise)
    return module


def assert_gradients_close(
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
        try:
            assert_close(fast[name], loop[name])
        except AssertionError as error:
            raise AssertionError(f"the gradient of {name}: {error}") from error

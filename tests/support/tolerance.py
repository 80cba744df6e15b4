"""The numerical contract: how far a result may be from its reference.

PyTorch is not imported here: the tests of the runtime run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# float32 accumulates rounding of about 6e-8 a step over at most some hundred steps. float64 only
# serves to check formulas. bfloat16 keeps 8 bits of each input and output.
SHARE_OF_LARGEST = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
# The same for layers, which are several operators in a row.
SHARE_OF_LAYER = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
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
    if hasattr(numbers, "detach"):  # a tensor
        numbers = numbers.detach().double().numpy()
    return np.asarray(numbers, np.float64)


def _share(shares: Mapping[str, float], dtype: torch.dtype) -> float:
    return shares[str(dtype).removeprefix("torch.")]


def share_of_layer(dtype: torch.dtype) -> float:
    """How far a layer may be off, as a share of the largest number expected, or of 1."""
    return _share(SHARE_OF_LAYER, dtype)


def assert_contract(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Hold a result to the contract; `factor` 10 for gradients, which sum over more terms."""
    assert_same(actual, expected, _share(SHARE_OF_LARGEST, actual.dtype) * factor)


def assert_layer(actual: Tensor, expected: Tensor) -> None:
    """Hold a layer's or a model's result to the contract."""
    assert_same(actual, expected, share_of_layer(actual.dtype))


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    """Hold a gradient to the contract: 1e-4 in float32, half precision's own tolerance there."""
    assert_contract(actual, expected, factor=10 if str(actual.dtype) == "torch.float32" else 1)


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

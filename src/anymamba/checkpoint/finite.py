"""Finding NaN and infinity among weights.

A model's weights are not looked through when it is loaded: they are mapped, and a look at all of
them would read gigabytes first. What is broken shows in what the model says, and then the tensor is
named. Who copies or trains all weights anyway checks each of them on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.architecture import role_of
from anymamba.checkpoint.dtypes import dtype_of
from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    from anymamba.checkpoint.quantization import Tensor

_EXPONENT = np.uint16(0x7F80)  # of bfloat16; all ones for NaN and infinity
_BLOCK = 1 << 20


def count_nonfinite(name: str, tensor: Tensor) -> int:
    """How many numbers of a tensor are NaN or infinite; of one in 8 or 4 bits, of its scales.

    An A_log of minus infinity is a number here: A is zero then.

    Example:
        >>> count_nonfinite("mixer.D", np.float32([1, np.nan, np.inf]))
        2
        >>> count_nonfinite("mixer.A_log", np.float32([-np.inf]))
        0
    """
    if not isinstance(tensor, np.ndarray):
        parts = (tensor.scales, tensor.minima)
        return sum(count_nonfinite(name, part) for part in parts if part is not None)
    flat = tensor.reshape(-1)
    blocks = (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))
    return sum(_count(name, block) for block in blocks)


def _count(name: str, block: NDArray[Any]) -> int:
    if dtype_of(block) == "BF16":
        broken = (block & _EXPONENT) == _EXPONENT
        allowed = block == np.uint16(0xFF80)
    else:
        broken, allowed = ~np.isfinite(block), block == -np.inf
    if role_of(name) == "decay":
        broken &= ~allowed
    return int(np.count_nonzero(broken))


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or infinity.

    Raises:
        CheckpointError: it has such numbers; the message names it and counts them.

    Example:
        >>> check_finite("mixer.D", np.float32([1, np.nan]))
        Traceback (most recent call last):
            ...
        anymamba.errors.CheckpointError: tensor mixer.D holds NaN or infinity (1 number): the \
model's weights are broken; fetch or make them again
    """
    count = count_nonfinite(name, tensor)
    if count:
        raise broken_tensor(name, count)


def broken_tensor(name: str, count: int) -> CheckpointError:
    """The error for a tensor of which `count` numbers are NaN or infinite.

    Example:
        >>> print(broken_tensor("mixer.D", 2))
        tensor mixer.D holds NaN or infinity (2 numbers): the model's weights are broken; fetch or \
make them again
    """
    return CheckpointError(
        f"tensor {name} holds NaN or infinity ({count} number{'s' * (count > 1)}): the model's "
        "weights are broken; fetch or make them again"
    )


def say_what_is_broken(said: float, tensors: Mapping[str, Tensor]) -> CheckpointError:
    """The error for a model that computes `said` for a number. All weights are looked through.

    Example:
        >>> print(say_what_is_broken(np.nan, {"mixer.D": np.float32([1])}))
        the model computes nan where numbers are expected, and none of its weights is NaN or \
infinite: they lead beyond float32; the model's weights are broken
    """
    for name, tensor in tensors.items():
        try:
            check_finite(name, tensor)
        except CheckpointError as error:
            return error
    return CheckpointError(
        f"the model computes {said} where numbers are expected, and none of its weights is NaN or "
        "infinite: they lead beyond float32; the model's weights are broken"
    )

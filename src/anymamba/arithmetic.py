"""What the native core computes with: its instruction set, and the type of its matrix products."""

from __future__ import annotations

import importlib
import os
from functools import cache

from anymamba.errors import BackendError

# As typing has it, whose import takes longer than all else here.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

MATMUL_DTYPES = ("float32", "bfloat16")
"""What activations are when they are multiplied with bfloat16 weights."""

_VARIABLE = "ANYMAMBA_MATMUL_DTYPE"
_WITH_BFLOAT16 = {"avx512_bf16", "neon_i8mm"}  # instruction sets that multiply such numbers


@cache
def load_core() -> Any:
    """The native core, on the instruction set that `ANYMAMBA_ISA` names or the fastest one.

    Raises:
        ModuleNotFoundError: the package was installed without it.
        BackendError: this machine does not have that instruction set.

    Example:
        >>> load_core().isa() in load_core().isas()
        True
    """
    core = importlib.import_module("anymamba._core")
    try:
        core.isa()
    except RuntimeError as error:
        raise BackendError(f"{error}; unset it to take the fastest") from error
    return core


@cache
def check_matmul_dtype(name: str, where: str) -> str:
    """The name of a type of matrix products, if it exists and this machine has it.

    Args:
        name: one of `MATMUL_DTYPES`.
        where: what the message calls the place that the name comes from.

    Raises:
        BackendError: it is neither, or the processor does not multiply bfloat16.

    Example:
        >>> check_matmul_dtype("float32", "matmul_dtype")
        'float32'
    """
    if name not in MATMUL_DTYPES:
        known = " or ".join(MATMUL_DTYPES)
        raise BackendError(f"{where} is {name[:80]!r}, expected {known}")
    if name == "bfloat16" and not _multiplies_bfloat16():
        raise BackendError(
            f"{where} is 'bfloat16', and this processor has no instructions (AVX512-BF16 or Arm's "
            "BF16) that multiply bfloat16 numbers; use 'float32'"
        )
    return name


def matmul_dtype_from_environment() -> str:
    """What `ANYMAMBA_MATMUL_DTYPE` says, or float32.

    Raises:
        BackendError: as `check_matmul_dtype` has it.

    Example:
        >>> matmul_dtype_from_environment()
        'float32'
    """
    return check_matmul_dtype(os.environ.get(_VARIABLE) or "float32", _VARIABLE)


def _multiplies_bfloat16() -> bool:
    try:
        return not _WITH_BFLOAT16.isdisjoint(load_core().isas())
    except ModuleNotFoundError:
        return False

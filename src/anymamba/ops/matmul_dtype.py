"""The type of the native core's matrix products: a choice for all models in PyTorch."""

from __future__ import annotations

from contextvars import ContextVar

from anymamba.arithmetic import check_matmul_dtype, matmul_dtype_from_environment
from anymamba.ops.backends import Chosen

_choice: ContextVar[str | None] = ContextVar("anymamba_matmul_dtype", default=None)


def matmul_dtype(name: str | None = None) -> str | Chosen:
    """Choose what activations are when they are multiplied with bfloat16 weights, or ask.

    It concerns forwards without gradients that run as one native call (docs/native.md), and in
    them the matrices that are stored in bfloat16. Operators multiply what they are given.

    Args:
        name: "float32", or "bfloat16" to round activations to it, which is coarser and on AMD's
            processors faster. None asks.

    Returns:
        Without a name the current choice: the last one made here, else the environment variable
        `ANYMAMBA_MATMUL_DTYPE`, else "float32". With a name, a handle that may be used as a
        context manager; without `with`, the choice stays.

    Raises:
        BackendError: the name is unknown, or this processor does not multiply bfloat16.

    Example:
        >>> from anymamba import ops
        >>> with ops.matmul_dtype("float32"):
        ...     ops.matmul_dtype()
        'float32'
    """
    if name is None:
        return _choice.get() or matmul_dtype_from_environment()
    return Chosen(_choice, check_matmul_dtype(name, "anymamba.ops.matmul_dtype"))

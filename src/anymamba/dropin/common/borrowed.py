"""Names of einops that programs take from `mamba_ssm`'s modules, which import them.

AnyMamba does without einops, so it is imported when one of them is called.
"""

from __future__ import annotations

import importlib
from typing import Any

from anymamba.errors import MissingDependencyError


def rearrange(*args: Any, **kwargs: Any) -> Any:
    """`einops.rearrange`."""
    return _einops().rearrange(*args, **kwargs)


def repeat(*args: Any, **kwargs: Any) -> Any:
    """`einops.repeat`."""
    return _einops().repeat(*args, **kwargs)


def _einops() -> Any:
    try:
        return importlib.import_module("einops")
    except ImportError:
        raise MissingDependencyError(
            "the program calls a function of einops that mamba_ssm's modules import, for which "
            "AnyMamba stands here, and einops is not installed: pip install einops"
        ) from None

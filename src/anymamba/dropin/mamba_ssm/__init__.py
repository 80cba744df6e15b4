"""`mamba_ssm`, answered by AnyMamba."""

from typing import NoReturn

from anymamba.dropin.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from anymamba.dropin.mamba_ssm.modules.mamba2 import Mamba2
from anymamba.dropin.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.dropin.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    selective_scan_fn,
)
from anymamba.errors import MissingModuleError

__all__ = ["Mamba", "Mamba2", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]

# The original's version that this package answers for.
__version__ = "2.3.2.post1"


def __getattr__(name: str) -> NoReturn:
    if name == "Mamba3":
        raise MissingModuleError(
            "mamba_ssm.Mamba3 is not in AnyMamba's drop-in: docs/drop-in.md lists what is",
            name="mamba_ssm.modules.mamba3",
        )
    raise AttributeError(f"module 'mamba_ssm' has no attribute {name!r}")

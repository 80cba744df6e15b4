"""`mamba_ssm`, answered by AnyMamba."""

from anymamba.dropin.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from anymamba.dropin.mamba_ssm.modules.mamba2 import Mamba2
from anymamba.dropin.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.dropin.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__all__ = ["Mamba", "Mamba2", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]

# The original's version that this package answers for.
__version__ = "2.3.2.post1"

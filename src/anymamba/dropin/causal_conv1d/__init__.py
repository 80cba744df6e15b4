"""The `causal_conv1d` package, answered by AnyMamba."""

from anymamba.dropin.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
)

# The version of the original whose surface this is.
__version__ = "1.7.0"

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

"""`generate` in a loop of our own, with Transformers' results."""

from anymamba.modeling.generation.direct import records_methods, why_not_direct
from anymamba.modeling.generation.graph import captured_steps, why_not_graph
from anymamba.modeling.generation.loop import (
    NativeLoop,
    is_captured,
    why_not_loop,
    why_not_native_loop,
)

__all__ = [
    "NativeLoop",
    "captured_steps",
    "is_captured",
    "records_methods",
    "why_not_direct",
    "why_not_graph",
    "why_not_loop",
    "why_not_native_loop",
]

"""`generate` in a loop of our own, with Transformers' results."""

from anymamba.modeling.generation.loop import (
    NativeLoop,
    records_methods,
    why_not_direct,
    why_not_loop,
    why_not_native_loop,
)

__all__ = ["NativeLoop", "records_methods", "why_not_direct", "why_not_loop", "why_not_native_loop"]

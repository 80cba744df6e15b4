"""A model's weights as the core reads them, in the type that was asked for."""

from anymamba.runtime.weights.gguf import load_gguf_weights
from anymamba.runtime.weights.weight_types import bytes_of, check_weight_type, to_weight_type
from anymamba.runtime.weights.weights import Weights, load_weights

__all__ = [
    "Weights",
    "bytes_of",
    "check_weight_type",
    "load_gguf_weights",
    "load_weights",
    "to_weight_type",
]

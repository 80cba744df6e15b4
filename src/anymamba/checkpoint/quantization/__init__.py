"""Weights in 8 or 4 bits: the format, and rounding to it."""

from anymamba.checkpoint.quantization.arithmetic import (
    Bits,
    QuantizedArray,
    Tensor,
    check_format,
    check_weight,
    dequantize,
    pack,
    quantize,
    ranges,
    round_to,
    row_blocks,
    scales_of,
    values_of,
)

__all__ = [
    "Bits",
    "QuantizedArray",
    "Tensor",
    "check_format",
    "check_weight",
    "dequantize",
    "pack",
    "quantize",
    "ranges",
    "round_to",
    "row_blocks",
    "scales_of",
    "values_of",
]

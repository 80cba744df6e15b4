"""Weights in 8 or 4 bits: the format, and rounding to it."""

from anymamba.checkpoint.quantization.arithmetic import (
    dequantize,
    quantize,
    quantize_rows,
    quantized_product,
    ranges,
    round_to,
    scales_of,
    squared_errors,
    values_of,
)
from anymamba.checkpoint.quantization.format import (
    Bits,
    QuantizedArray,
    Tensor,
    check_format,
    check_weight,
    pack,
    row_blocks,
    unpack,
)
from anymamba.checkpoint.quantized_folder import GROUPS

__all__ = [
    "GROUPS",
    "Bits",
    "QuantizedArray",
    "Tensor",
    "check_format",
    "check_weight",
    "dequantize",
    "pack",
    "quantize",
    "quantize_rows",
    "quantized_product",
    "ranges",
    "round_to",
    "row_blocks",
    "scales_of",
    "squared_errors",
    "unpack",
    "values_of",
]

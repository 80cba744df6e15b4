"""The safetensors format: headers, and writing in one pass."""

from anymamba.checkpoint.safetensors.header import (
    SafetensorsHeader,
    TensorRecord,
    header_of,
    read_header,
)
from anymamba.checkpoint.safetensors.writer import (
    SafetensorsStream,
    TensorBytes,
    TensorPlan,
    write_safetensors,
)

__all__ = [
    "SafetensorsHeader",
    "SafetensorsStream",
    "TensorBytes",
    "TensorPlan",
    "TensorRecord",
    "header_of",
    "read_header",
    "write_safetensors",
]

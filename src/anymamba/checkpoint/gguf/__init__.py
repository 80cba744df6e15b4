"""The GGUF format of llama.cpp: reading and writing models with it."""

from anymamba.checkpoint.gguf.files import find_gguf
from anymamba.checkpoint.gguf.header import read_gguf_header
from anymamba.checkpoint.gguf.names import is_gguf
from anymamba.checkpoint.gguf.parts import read_gguf_files
from anymamba.checkpoint.gguf.reader import GgufModel, GgufTensors, read_gguf
from anymamba.checkpoint.gguf.writer import GGUF_WEIGHTS, write_gguf

__all__ = [
    "GGUF_WEIGHTS",
    "GgufModel",
    "GgufTensors",
    "find_gguf",
    "is_gguf",
    "read_gguf",
    "read_gguf_files",
    "read_gguf_header",
    "write_gguf",
]

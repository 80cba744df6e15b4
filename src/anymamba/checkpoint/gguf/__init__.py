"""The GGUF format of llama.cpp. Its modules `reader` and `writer` import NumPy; this does not."""

from anymamba.checkpoint.gguf.files import find_gguf
from anymamba.checkpoint.gguf.names import is_gguf

__all__ = ["find_gguf", "is_gguf"]

"""Models from one form on disk to another: layouts, GGUF, 8 and 4 bits, adapters merged."""

"""The safetensors format: headers, and writing in one pass."""

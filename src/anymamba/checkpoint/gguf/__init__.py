"""The GGUF format of llama.cpp: reading and writing models with it."""

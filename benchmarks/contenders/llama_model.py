"""llama.cpp, through the C interface that llama-cpp-python carries.

Not through its `Llama` class, which copies and converts logits between the calls: the engine is
what is compared.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from contenders.interface import Contender

__all__ = ["Llama"]

# It keeps nothing a position; this only bounds how many it lets through at once.
_CONTEXT = 8192
_BATCH = 512


class Llama(Contender):
    """A GGUF file in llama.cpp, with as many threads as PyTorch has.

    Args:
        path: the file.

    Raises:
        RuntimeError: llama.cpp cannot read it.
    """

    def __init__(self, path: Path) -> None:
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = _CONTEXT
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        parameters.no_perf = True
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot read {path.name}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def prefill(self, ids_bl: Tensor) -> Tensor:
        """In its largest batches."""
        return self._read(ids_bl, _BATCH)

    def decode(self, ids_bl: Tensor) -> Tensor:
        """In batches of one."""
        return self._read(ids_bl, 1)

    def _read(self, ids_bl: Tensor, at_once: int) -> Tensor:
        (ids,) = ids_bl.tolist()  # one row
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        for start in range(0, len(ids), at_once):
            now = ids[start : start + at_once]
            tokens = (ctypes.c_int32 * len(now))(*now)  # a batch only points to it
            batch = llama_cpp.llama_batch_get_one(tokens, len(now))
            status = llama_cpp.llama_decode(self._context, batch)
            if status != 0:
                raise RuntimeError(f"llama.cpp stopped with status {status}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        copied = np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).copy()
        return torch.from_numpy(copied)[None]

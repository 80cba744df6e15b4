"""Arrays whose memory ends, or begins, at a page that nobody may touch.

A read or a write beyond such an array ends the process, as a bounds checker would, and needs no
build of its own.
"""

import ctypes
import mmap
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0

Side = Literal["begin", "end"]


def fenced_memory(size: int, side: Side) -> np.ndarray:
    """`size` bytes beside a forbidden page."""
    page = mmap.PAGESIZE
    inner = max(-(-size // page), 1) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for place in (start, start + page + inner):
        if _LIBC.mprotect(ctypes.c_void_p(place), ctypes.c_size_t(page), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if side == "begin" else page + inner - size
    return np.frombuffer(memory, dtype=np.uint8, count=size, offset=offset)


def fenced(tensor: Tensor, side: Side = "end") -> Tensor:
    """The same numbers with the same strides, in memory that holds them and nothing more."""
    if not tensor.numel():
        return tensor
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    raw = torch.from_numpy(fenced_memory((reach + 1) * tensor.element_size(), side))
    alone = raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    # Stride 0 shares one number among many places, which may not be written at once.
    if 0 not in tensor.stride():
        alone.copy_(tensor)
    else:
        for index in np.ndindex(*tensor.shape):
            alone[index].copy_(tensor[index])
    return alone

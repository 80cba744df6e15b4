"""The native core as PyTorch sees it: is it there, and how many threads does it use?"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from anymamba.arithmetic import load_core
from anymamba.errors import BackendError
from anymamba.ops.segments import Segments
from anymamba.processors import quota_of_processors
from anymamba.renamed import old_names

__getattr__ = old_names(__name__)

_FOUND = torch.cpu.get_capabilities()
_MULTIPLIES_BFLOAT16 = bool(_FOUND.get("avx512_bf16") or _FOUND.get("amx_tile"))
TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types of numbers that the kernels read."""
_OF_HEADS = ("ssd", "ssd_state_update")
_STATES = {"selective_state_update": "state_ben", "ssd_state_update": "state_bhpn"}


def is_built() -> bool:
    """Whether the native core was built when the package was installed."""
    return find_spec("anymamba._core") is not None


def core() -> Any:
    """The native core, set to as many threads as PyTorch uses (or `ANYMAMBA_NUM_THREADS`)."""
    module = load_core()
    threads = _wanted_threads()
    if module.threads() != threads:
        module.set_threads(threads)
    return module


def handed(tensor: Tensor | None) -> Any:
    """A tensor as the core takes it, without autograd's claim on it; None stays None.

    A capsule of DLPack, which is made in a tenth of the time of `Tensor.__dlpack__`.
    """
    return None if tensor is None else torch._C._to_dlpack(tensor.resolve_neg())


def in_float32(tensor: Any) -> Any:
    """A tensor as float32 without gaps; None stays None."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def as_rows(x: Tensor) -> Tensor:
    """(..., k) as (rows, k)."""
    # Not Size.numel(), which would turn symbolic sizes into constants.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def description() -> str:
    """What the core runs with here: its instruction set, and how many threads."""
    native = core()
    return f"native code for {native.isa()}, {native.threads()} threads"


def unsupported_reason(operator: str, arguments: Sequence[Any]) -> str | None:
    """Why the core cannot serve a call, or None."""
    # A step's state is converted and written back, whatever its type.
    converted = getattr(arguments, _STATES.get(operator, ""), None)
    for value in arguments:
        if not isinstance(value, Tensor) or value is converted:
            continue
        if value.device.type not in ("cpu", "meta"):
            return f"one of the tensors is on {value.device}"
        if value.is_complex() or (value.is_floating_point() and value.dtype not in TYPES):
            return f"its kernels do not offer {value.dtype}"
    if operator in _OF_HEADS and 0 in (*arguments[0].shape[-2:], arguments[3].shape[-1]):
        return "its kernels need a head, a channel and a state"
    return None


def prefers_other(operator: str, arguments: Sequence[Any]) -> bool:
    """Whether PyTorch is faster: where the processor multiplies bfloat16 itself.

    The arithmetic is the same: operands are as they are stored, sums float32, and each result is
    rounded once.
    """
    return operator == "linear" and _MULTIPLIES_BFLOAT16 and arguments[0].dtype == torch.bfloat16


def segment_table(segments: Segments | None) -> Tensor | None:
    """Segments as the core reads them: (5, s) int64."""
    if segments is None:
        return None
    lists = [
        getattr(segments, name) for name in ("rows", "starts", "stops", "state_in", "state_out")
    ]
    return torch.tensor(lists, dtype=torch.int64, device="cpu")


@cache
def _quota() -> float | None:
    return quota_of_processors()


def _wanted_threads() -> int:
    text = os.environ.get("ANYMAMBA_NUM_THREADS")
    if not text:
        # PyTorch knows of the processors that this process is allowed on, not of its quota.
        quota = _quota()
        threads = torch.get_num_threads()
        return threads if quota is None else max(1, min(threads, round(quota)))
    if not text.isdecimal() or int(text) < 1:
        raise BackendError(
            f"ANYMAMBA_NUM_THREADS is {text!r}, expected a whole number of threads, 1 or more"
        )
    return int(text)

"""Which of PyTorch's devices computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.errors import BackendError

if TYPE_CHECKING:
    import torch


def find_device(name: str | None = None) -> torch.device:
    """The device of a name, once it has shown that it works.

    Args:
        name: as PyTorch has it, such as "cpu" or "cuda:1", or the number of a GPU; None or "auto"
            for a GPU if there is one.

    Raises:
        BackendError: there is no such device here.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name is None or name == "auto":
        name = next(known for known, found in there.items() if found)
    if there.get(name):
        # Without a tensor on it: each process of a launcher has a GPU of its own.
        return torch.device(name)
    try:
        device = torch.device(int(name) if name.isdecimal() else name)
        torch.zeros(1, device=device).tolist()
    # PyTorch reports a device that it was not built for by the first two of these.
    except (AssertionError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BackendError(f"there is no device {name!r} here: {reason}") from None
    return device

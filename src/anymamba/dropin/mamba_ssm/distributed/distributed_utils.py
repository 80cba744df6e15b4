"""Sums and concatenations over several processes: names to import, none to use."""

from __future__ import annotations

from typing import Any, NoReturn

from anymamba.errors import NotIncludedError

__all__ = ["all_gather", "all_reduce", "reduce_scatter"]


def all_gather(*args: Any) -> NoReturn:
    """Concatenate over processes.

    Raises:
        NotIncludedError: always.
    """
    raise _refusal("all_gather")


def all_reduce(*args: Any) -> NoReturn:
    """Sum over processes.

    Raises:
        NotIncludedError: always.
    """
    raise _refusal("all_reduce")


def reduce_scatter(*args: Any) -> NoReturn:
    """Sum over processes, and split.

    Raises:
        NotIncludedError: always.
    """
    raise _refusal("reduce_scatter")


def _refusal(name: str) -> NotIncludedError:
    return NotIncludedError(
        f"mamba_ssm.distributed.distributed_utils.{name} serves layers split over several "
        "processes, which AnyMamba's drop-in does not have: leave process_group out, or call "
        f"torch.distributed.nn.functional.{name}"
    )

"""Sums and concatenations over several processes: names to import, none to use."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from anymamba.errors import NotIncludedError

__all__ = ["all_gather", "all_reduce", "reduce_scatter"]


def _refuse(name: str, *args: Any) -> NoReturn:
    raise NotIncludedError(
        f"mamba_ssm.distributed.distributed_utils.{name} serves layers split over several "
        "processes, which AnyMamba's drop-in does not have: leave process_group out, or call "
        f"torch.distributed.nn.functional.{name}"
    )


all_gather = partial(_refuse, "all_gather")
all_reduce = partial(_refuse, "all_reduce")
reduce_scatter = partial(_refuse, "reduce_scatter")

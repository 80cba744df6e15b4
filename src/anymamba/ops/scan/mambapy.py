"""The selective scan over the parallel scan of the `mambapy` package."""

from __future__ import annotations

import torch
from mambapy.pscan import pscan
from torch import Tensor

from anymamba.ops.scan import reference
from anymamba.ops.scan.arguments import ScanArguments


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """`anymamba.ops.selective_scan` with mambapy's recurrence in the reference's place."""
    return reference.selective_scan(arguments, _recurrence)


def _recurrence(a_blen: Tensor, b_blen: Tensor, h_ben: Tensor) -> Tensor:
    first = b_blen[:, :1] + a_blen[:, :1] * h_ben[:, None]
    # pscan writes into its inputs, so it gets copies that nothing else reads.
    states: Tensor = pscan(a_blen.clone(), torch.cat([first, b_blen[:, 1:]], 1))
    return states

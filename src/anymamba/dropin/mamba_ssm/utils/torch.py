"""Decorators of autograd functions for mixed precision."""

from __future__ import annotations

from functools import partial

import torch.amp

__all__ = ["custom_bwd", "custom_fwd"]

custom_fwd = partial(torch.amp.custom_fwd, device_type="cuda")
custom_bwd = partial(torch.amp.custom_bwd, device_type="cuda")

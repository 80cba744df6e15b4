"""Is a module still what the model put there?

A fused path reads a module's weights and never calls its forward. That is right only while the
module is untouched: no adapter, quantized weight, hook or parametrization stands in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.nn.parameter import Parameter

from anymamba.ops.linear import linear as multiply

__all__ = ["project", "why_not_plain"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """x through a linear layer: by its weights where that says it all, else by its forward.

    Args:
        linear: the `nn.Linear` that the model put there, or what has taken its place.
        x: (..., k).

    Returns:
        (..., n).
    """
    # Autocast rewrites torch's own product and knows nothing of ours.
    ours = not torch.is_autocast_enabled(x.device.type)
    if ours and type(linear) is nn.Linear and why_not_plain(linear, nn.Linear) is None:
        return multiply(x, linear.weight, linear.bias)
    projected: Tensor = linear(x)
    return projected


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """The reason why a module's forward must be called, or None if its weights say it all.

    Args:
        module: what stands in the model now.
        kind: the class that the model put there.

    Example:
        >>> from torch import nn
        >>> why_not_plain(nn.Linear(2, 2), nn.Linear) is None
        True
        >>> why_not_plain(nn.Sequential(nn.Linear(2, 2)), nn.Linear)
        'replaced by Sequential'
    """
    if type(module) is not kind:
        return f"replaced by {type(module).__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if any(getattr(module, name, None) for name in _HOOKS):
        return "it has hooks"
    if any(getattr(module_globals, name, None) for name in _GLOBAL_HOOKS):
        return "hooks are set for all modules"
    if isinstance(module, nn.Conv1d):
        usual = (module.weight.shape[0], (1,), (1,), "zeros")
        if (module.groups, module.stride, module.dilation, module.padding_mode) != usual:
            return "it is not a depthwise convolution of neighbours"
    for name, tensor in module._parameters.items():
        if tensor is not None and type(tensor) not in (Parameter, Tensor):
            return f"its {name} is a {type(tensor).__name__}"
    return None

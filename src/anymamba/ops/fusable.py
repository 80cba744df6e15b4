"""Is a module still what the model put there?

A fused path reads a module's weights and never calls its forward. That is right only while the
module is untouched: no adapter, quantized weight, hook or parametrization stands in its place, and
its class computes what it computed when it was defined.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import BuiltinFunctionType
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_globals

from anymamba.ops.linear import linear as multiply
from anymamba.ops.tracing import PLAIN_TYPES, autocast_is_on
from anymamba.renamed import old_names

__getattr__ = old_names(__name__)

_Kind = TypeVar("_Kind", bound=type[nn.Module])

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where PyTorch keeps a module's hooks, by attribute."""

GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
"""Where it keeps those of all modules, in `torch.nn.modules.module`."""

# What Python looks up on a class to call a module, in this order.
_CALL = ("__call__", "_call_impl", "forward")
# What the forward of PyTorch's layers looks up in its turn.
_FUNCTIONS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Embedding: "embedding",
    nn.SiLU: "silu",
}

_ORIGINALS: dict[type[nn.Module], tuple[Any, ...]] = {}


def fusable(kind: _Kind, function: str | None = None) -> _Kind:
    """Record what calling a class's modules runs, so that a later replacement is noticed.

    Args:
        kind: a class whose modules a fused path may stand in for; used as a decorator.
        function: what its forward calls of `torch.nn.functional`, if that says all of it.

    Example:
        >>> from torch import nn
        >>> @fusable
        ... class Double(nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> why_not_fusable(Double(), Double) is None
        True
        >>> Double.forward = lambda self, x: 3 * x
        >>> why_not_fusable(Double(), Double)
        'the forward of Double was replaced'
    """
    _ORIGINALS[kind] = tuple(getattr(kind, name) for name in _CALL)
    if function is not None:
        _FUNCTIONS[kind] = function
    return kind


def call_attributes(kind: type[nn.Module]) -> Iterator[tuple[Any, str]]:
    """What decides, beside a module itself, what a call of it computes: owners and attributes."""
    for name in _CALL:
        yield kind, name
    if kind in _FUNCTIONS:
        yield functional, _FUNCTIONS[kind]


def _why_not_original(kind: type[nn.Module]) -> str | None:
    """Which function that a module's call runs was replaced on its class, or None."""
    for name, original in zip(_CALL, _ORIGINALS[kind], strict=True):
        if getattr(kind, name) is not original:
            return f"the {name} of {kind.__name__} was replaced"
    function = _FUNCTIONS.get(kind)
    if function and getattr(functional, function) is not _TORCH_FUNCTIONS[function]:
        return f"torch.nn.functional.{function} was replaced"
    return None


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """x (..., k) through a linear layer: by its weights if they say it all, else by its forward.

    Args:
        linear: the `nn.Linear` that the model put there, or what has taken its place.
    """
    if _is_ours(linear, x):
        return multiply(x, linear.weight, linear.bias)
    projected: Tensor = linear(x)
    return projected


def project_halves(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of `project`'s result.

    With gradients each half is a product of its own. As halves of one tensor, autograd would copy
    their gradients into one tensor first.
    """
    if not (torch.is_grad_enabled() and _is_ours(linear, x)):
        first, second = project(linear, x).chunk(2, dim=-1)
        return first, second
    weights = linear.weight.chunk(2)
    biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
    return multiply(x, weights[0], biases[0]), multiply(x, weights[1], biases[1])


def _is_ours(linear: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether the layer is a product with its weights, and the product ours to choose."""
    # Autocast rewrites torch's own product and knows nothing of ours.
    ours = not autocast_is_on(x.device)
    return ours and type(linear) is nn.Linear and why_not_fusable(linear, nn.Linear) is None


def computes(module: nn.Module, function: str) -> bool:
    """Whether a module is a function of `torch.nn.functional`, and nothing was done to it.

    Example:
        >>> from torch import nn
        >>> computes(nn.SiLU(), "silu"), computes(nn.ReLU(), "silu")
        (True, False)
    """
    kind = type(module)
    return _FUNCTIONS.get(kind) == function and why_not_fusable(module, kind) is None


def why_not_fusable(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """The reason why a module's forward must be called, or None if its weights say it all.

    Args:
        module: what stands in the model now.
        kind: the class that the model put there, a `fusable` one.

    Example:
        >>> from torch import nn
        >>> why_not_fusable(nn.Linear(2, 2), nn.Linear) is None
        True
        >>> why_not_fusable(nn.Sequential(nn.Linear(2, 2)), nn.Linear)
        'replaced by Sequential'
    """
    if type(module) is not kind:
        return f"replaced by {type(module).__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    replaced = _why_not_original(kind)
    if replaced is not None:
        return replaced
    if any(getattr(module, name, None) for name in HOOKS):
        return "it has hooks"
    if any(getattr(module_globals, name, None) for name in GLOBAL_HOOKS):
        return "hooks are set for all modules"
    if isinstance(module, nn.Conv1d):
        usual = (module.weight.shape[0], (1,), (1,), "zeros")
        if (module.groups, module.stride, module.dilation, module.padding_mode) != usual:
            return "it is not a depthwise convolution of neighbours"
    for name, tensor in module._parameters.items():
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return f"its {name} is a {type(tensor).__name__}"
    return None


def _untouched(function: Any, module_name: str) -> Any:
    """A function of PyTorch's; None where a program replaced it before this import."""
    if isinstance(function, BuiltinFunctionType):
        return function
    code = getattr(function, "__code__", None)
    defined_in = sys.modules[module_name].__file__
    return function if code is not None and code.co_filename == defined_in else None


def _untouched_method(kind: type[nn.Module], name: str) -> Any:
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return _untouched(getattr(kind, name), owner.__module__)


for _kind in _FUNCTIONS:
    _ORIGINALS[_kind] = tuple(_untouched_method(_kind, name) for name in _CALL)
_TORCH_FUNCTIONS = {
    name: _untouched(getattr(functional, name), functional.__name__) for name in _FUNCTIONS.values()
}

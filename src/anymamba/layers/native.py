"""A Mamba layer as the native core runs it: its modules, their sizes, and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

from torch import nn

from anymamba.ops.fusable import why_not_fusable

if TYPE_CHECKING:
    from anymamba.checkpoint.architecture import Architecture

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True)
class Part:
    """A module that the core stands in for, and what it must be for that."""

    name: str
    module: Any
    """What stands there now."""
    usual: type[nn.Module]
    """The class that belongs there."""
    shape: tuple[int, int] | None = None
    """Of its weight; None where it has none that is a matrix."""
    may_have_bias: bool = True
    settings: Mapping[str, object] = field(default_factory=dict)
    """Attributes that decide its result, and the values that the core assumes."""

    def why_not_usual(self) -> str | None:
        """Why the module computes something else than the core would, or None."""
        reason = why_not_fusable(self.module, self.usual)
        if reason is not None:
            return reason
        if not self.may_have_bias and self.module.bias is not None:
            return "it has a bias"
        for setting, expected in self.settings.items():
            found = getattr(self.module, setting, expected)
            if found != expected:
                return f"its {setting} is {found}, expected {expected}"
        if self.shape is not None and self._shape() != self.shape:
            return f"its weight is {self._shape()}, expected {self.shape}"
        return None

    def _shape(self) -> tuple[int, ...]:
        quantized = not hasattr(self.module, "weight")
        return (self.module.n, self.module.k) if quantized else tuple(self.module.weight.shape)


def mixer_parts(
    mixer: Any,
    sizes: tuple[int, int, int, int],
    class_of: Callable[[nn.Module], type[nn.Module]] = lambda _module: nn.Linear,
    prefix: str = "",
) -> Iterator[Part]:
    """The convolution and the projections of a layer.

    Args:
        mixer: a `MambaLayer`, or another module with the same parts.
        sizes: d, e, n and r.
        class_of: which class belongs where a projection stands.
        prefix: what the names of the parts begin with.
    """
    d, e, n, r = sizes
    yield Part(f"{prefix}conv1d", mixer.conv1d, nn.Conv1d)
    shapes = ((2 * e, d), (r + 2 * n, e), (e, r), (d, e))
    for name, shape in zip(PROJECTIONS, shapes, strict=True):
        linear = getattr(mixer, name)
        yield Part(f"{prefix}{name}", linear, class_of(linear), shape, name != "x_proj")


def core_tensors(
    mixer: Any,
    architecture: Architecture,
    matrix_of: Callable[[Any], Any] = lambda linear: linear.weight.detach(),
) -> dict[str, Any]:
    """A layer's tensors by the core's names: the model's own memory.

    Args:
        mixer: a module whose parts have Transformers' names.
        architecture: whose mixer it is.
        matrix_of: gives the matrix of a projection, as the core takes it.

    Returns:
        The tensors, None for those that it lacks; without the norm before the mixer.
    """
    matrices = {row.name for row in architecture.layer if row.role.endswith("matrix")}

    def tensor(name: str) -> Any:
        owner, *path = name.split(".")
        if owner != "mixer":
            return None
        module = reduce(getattr, path[:-1], mixer)
        if module is None:
            return None
        if name in matrices:
            return matrix_of(module)
        # What is missing, the core misses by name.
        found = getattr(module, path[-1], None)
        return None if found is None else found.detach()

    tensors = architecture.core_layer(tensor)
    del tensors["norm"]
    return tensors

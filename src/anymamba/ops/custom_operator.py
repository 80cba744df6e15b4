"""Custom operators of PyTorch: schema, fake implementation and derivatives, declared once.

The inputs of an operator are a NamedTuple, whose fields are its schema. One function allocates the
outputs, which is all that a fake implementation does, and another fills them.

An operator of this kind has no forward-mode derivatives and no `torch.func` transforms: the choice
of backends (`anymamba.ops.backends`) keeps both on the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any, Generic, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from anymamba.ops.derivatives import register_second_derivatives
from anymamba.ops.tracing import runs_now

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
Outputs = TypeVar("Outputs")


def define_operator(
    name: str,
    signature: Callable[..., Inputs],
    allocate: Callable[[Inputs], Outputs],
    fill: Callable[[Inputs, Outputs], None],
    device_types: str | None = "cpu",
) -> Any:
    """Define an operator that returns new tensors.

    Args:
        name: its name in `torch.ops.anymamba`.
        signature: a NamedTuple class; its fields are the operator's arguments.
        allocate: called with the inputs, returns outputs of the right shapes and types; its return
            annotation is the operator's.
        fill: called with the inputs and these outputs, computes the numbers.
        device_types: the devices that it runs on, None for all.

    Returns:
        The operator, to which `register_autograd` may add a gradient.
    """

    schema = get_type_hints(signature) | {"return": get_type_hints(allocate)["return"]}
    return _define(name, schema, signature, allocate, fill, device_types)


def define_update(
    name: str, step: Callable[..., Tensor], state: int, x: int, device_types: str | None = "cpu"
) -> Any:
    """Define an operator that changes a state in place and returns a tensor like x.

    Args:
        name: its name in `torch.ops.anymamba`.
        step: computes it; its annotations are the operator's schema.
        state, x: the places of the two among its arguments.

    Returns:
        A function of the same arguments, which calls past PyTorch's dispatcher where nothing
        watches the call.
    """

    def now(*arguments: Any) -> Tensor:
        y = step(*arguments)
        torch.autograd.graph.increment_version(arguments[state])
        return y

    def fake(*arguments: Any) -> Tensor:
        return torch.empty_like(arguments[x])

    schema = get_type_hints(step)
    operator = _register(name, schema, now, fake, device_types, mutates=(list(schema)[state],))

    def run(*arguments: Any) -> Any:
        return now(*arguments) if runs_now(arguments[x]) else operator(*arguments)

    return run


class Recurrence(Generic[Inputs]):
    """An operator over segments, and the operator `name_backward` that computes its gradients.

    Args:
        name: its name in `torch.ops.anymamba`.
        signature: a NamedTuple class of first the differentiable tensors, then `segments` (as
            `segment_table` writes them), then options. Where the last one is `will_go_back`,
            which must have a default, the outputs have a third one for the backward pass.
        allocate: called with the inputs, returns y, last states and what is kept.
        forward: called with the inputs and the outputs, fills these.
        backward: called with the inputs, what was kept, the gradients of y and of the last states
            (None where they have none), and tensors for the gradients of the inputs (None for an
            input of None); fills these.
        reference: called with the inputs, computes y and last states from differentiable
            operators: the gradients' own gradients go through it.
        in_float32: tensors whose gradients are summed in float32 whatever they are stored in.
        device_types: the devices that it runs on, None for all.

    Attributes:
        operator: what computes the outputs.
    """

    def __init__(
        self,
        name: str,
        signature: Callable[..., Inputs],
        *,
        allocate: Callable[[Inputs], tuple[Tensor, ...]],
        forward: Callable[[Inputs, Any], None],
        backward: Callable[[Inputs, Sequence[Tensor], Tensor, Tensor | None, Any], None],
        reference: Callable[[Inputs], tuple[Tensor, Tensor]],
        in_float32: Sequence[str] = (),
        device_types: str | None = "cpu",
    ) -> None:
        self._signature, self._backward, self._in_float32 = signature, backward, in_float32
        schema = get_type_hints(signature)
        names = list(schema)
        self._tensors = names[: names.index("segments")]
        keeps = "will_go_back" in schema
        options = names[len(self._tensors) + 1 : len(names) - keeps]
        self._n_inputs, self._n_options = len(names), len(options)
        given: dict[str, Any] = {"kept": Tensor} if keeps else {}
        given |= {"dy": Tensor, "dlast": Tensor | None}
        backward_schema = {name: schema[name] for name in (*self._tensors, "segments")} | given
        backward_schema |= {name: schema[name] for name in options} | {"return": list[Tensor]}

        self.operator = define_operator(name, signature, allocate, forward, device_types)
        self.operator.register_autograd(self._go_back, setup_context=self._save)
        self._operator_backward = _define(
            f"{name}_backward",
            backward_schema,
            lambda *arguments: arguments,
            self._allocate_gradients,
            self._fill_gradients,
            device_types,
        )
        after_tensors = len(self._tensors) + 1 + keeps
        register_second_derivatives(
            self._operator_backward,
            len(self._tensors),
            slice(after_tensors, after_tensors + 2),
            lambda *arguments: reference(self._parts(arguments)[0]),
        )

    def _parts(self, arguments: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
        """The forward pass's inputs, and what was kept and given, from the backward one's."""
        given = slice(len(self._tensors) + 1, len(arguments) - self._n_options)
        return self._signature(*arguments[: given.start], *arguments[given.stop :]), arguments[
            given
        ]

    def _allocate_gradients(self, arguments: Sequence[Any]) -> list[Tensor]:
        def like(name: str, tensor: Tensor | None) -> Tensor:
            if tensor is None:
                return cast(Tensor, arguments[0].new_empty(0))
            dtype = torch.float32 if name in self._in_float32 else tensor.dtype
            return tensor.new_empty(tensor.shape, dtype=dtype)

        pairs = zip(self._tensors, arguments, strict=False)
        return [like(name, tensor) for name, tensor in pairs]

    def _fill_gradients(self, arguments: Sequence[Any], gradients: list[Tensor]) -> None:
        inputs, (*kept, dy, dlast) = self._parts(arguments)
        pairs = zip(arguments, gradients, strict=False)
        wanted = [None if tensor is None else gradient for tensor, gradient in pairs]
        self._backward(inputs, kept, dy, dlast, wanted)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        n_saved = len(self._tensors) + 1
        ctx.save_for_backward(*inputs[:n_saved], *output[2:])
        ctx.options = inputs[n_saved : n_saved + self._n_options]
        ctx.set_materialize_grads(False)

    def _go_back(
        self, ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dy = torch.zeros_like(saved[0]) if dy is None else dy
        found = self._operator_backward(*saved, dy, dlast, *ctx.options)
        pairs = zip(saved, found, strict=False)
        gradients = [None if t is None else gradient.to(t.dtype) for t, gradient in pairs]
        return (*gradients, *[None] * (self._n_inputs - len(gradients)))


def _define(
    name: str,
    schema: dict[str, Any],
    signature: Callable[..., Inputs],
    allocate: Callable[[Inputs], Outputs],
    fill: Callable[[Inputs, Outputs], None],
    device_types: str | None,
) -> Any:
    def run(*arguments: Any) -> Outputs:
        inputs = signature(*arguments)
        outputs = allocate(inputs)
        fill(inputs, outputs)
        return outputs

    return _register(name, schema, run, lambda *inputs: allocate(signature(*inputs)), device_types)


def _register(
    name: str,
    schema: dict[str, Any],
    run: Any,
    fake: Callable[..., Any],
    device_types: str | None,
    mutates: Sequence[str] = (),
) -> Any:
    """An operator with the types of a schema, whose entry "return" is that of its results."""
    parameters = [
        Parameter(field, Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for field, annotation in schema.items()
        if field != "return"
    ]
    run.__signature__ = Signature(parameters, return_annotation=schema["return"])
    operator = torch.library.custom_op(
        f"anymamba::{name}", run, mutates_args=mutates, device_types=device_types
    )
    operator.register_fake(fake)
    return operator

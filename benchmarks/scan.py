"""What do the scan, the convolution and the norm take of a layer, beside its matrix products?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from anymamba import ops
from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.roofline import LayerProducts
from common.shapes import MAMBA_130M, QUICK, Shape
from common.tables import MILLISECONDS, NAME, NOTE, SPREAD, Column, Row, Table, not_measured, timed
from common.timing import Case, Timing, interleave
from contenders.anymamba_model import random_model
from contenders.registry import MAMBAPY, PEERS

LAYER = "a layer's prefill"
PRODUCTS = "its matrix products"
OPERATORS = ("scan", "convolution", "norm")
REST = "the layer minus these four"
PSCAN, REFERENCE = "scan, mambapy's pscan", "scan, the reference's loop"
OF_LAYER = Column("of_layer", "of the layer", "{:.3f}")
OF_PRODUCTS = Column("of_products", "of its products", "{:.3f}")
# Enough layers for the embedding and the final norm to vanish beside them, and for the caches to
# be as cold as they are in a whole model.
LAYERS = 8


class Operators:
    """The operators of one layer, on tensors laid out as the model hands them over.

    x and z are two halves of one projection's rows, B and C slices of another's.

    Args:
        shape: the model's.
        length: of the sequence.
    """

    def __init__(self, shape: Shape, length: int) -> None:
        e, n, r, d = shape.inner, shape.state_size, shape.rank, shape.hidden_size
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        self.x_ble, self.z_ble = random(1, length, 2 * e).chunk(2, dim=-1)
        _, self.B_bln, self.C_bln = torch.split(random(1, length, r + 2 * n), [r, n, n], dim=-1)
        self.conv_ble, self.delta_ble = random(1, length, e), random(1, length, e)
        self.A_en = -torch.arange(1.0, n + 1).repeat(e, 1)
        self.D_e, self.delta_bias_e = torch.ones(e), random(e) - 4
        self.weight_ek, self.bias_e = random(e, shape.conv_kernel), random(e)
        self.hidden_bld, self.gain_d = random(1, length, d), torch.ones(d)

    def scan(self, backend: str | None = None) -> Tensor:
        """With softplus, D and the gate."""
        y_ble = ops.selective_scan(
            self.conv_ble,
            self.delta_ble,
            self.A_en,
            self.B_bln,
            self.C_bln,
            self.D_e,
            self.z_ble,
            self.delta_bias_e,
            delta_softplus=True,
            backend=backend,
        )
        assert isinstance(y_ble, Tensor)
        return y_ble

    def convolution(self) -> Tensor:
        """With bias and silu."""
        y_ble = ops.causal_conv1d(self.x_ble, self.weight_ek, self.bias_e, "silu")
        assert isinstance(y_ble, Tensor)
        return y_ble

    def norm(self) -> Tensor:
        """The residual stream's."""
        normed = ops.rms_norm(self.hidden_bld, self.gain_d, 1e-5)
        assert isinstance(normed, Tensor)
        return normed

    def require_gradients(self) -> None:
        """Make all tensors leaves that want gradients."""
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.detach().requires_grad_())


def main() -> None:
    """Measure forward in a layer's company, then backward, then print and write."""
    options = options_from(parser("scan", __doc__ or "").parse_args())
    shape, length = (QUICK, 32) if options.quick else (MAMBA_130M, 512)
    machine = describe(options.quick)
    tables = [forward(shape, length, options), backward(shape, length, options)]
    finish("scan", options, machine, tables)


@torch.no_grad()
def forward(shape: Shape, length: int, options: Options) -> Table:
    """The operators beside a layer of a model that reads as many tokens."""
    model = random_model(replace(shape, num_hidden_layers=LAYERS, vocab_size=64))
    ids_bl = torch.randint(64, (1, length))
    inputs: dict[int, Tensor] = {}
    products = [LayerProducts(block.mixer, length, inputs) for block in model.backbone.layers]
    operators = Operators(shape, length)
    cases = [
        Case(LAYER, partial(model.backbone, ids_bl)),
        Case(PRODUCTS, partial(all_of, products)),
        Case("scan", operators.scan, repeats=10),
        Case("convolution", operators.convolution, repeats=10),
        Case("norm", operators.norm, repeats=10),
    ]
    more, missing = peer_cases(options, lambda backend: partial(operators.scan, backend))
    timings = interleave(cases + more, options.rounds or 15)
    for name in (LAYER, PRODUCTS):
        timings[name] = timings[name].times(1 / LAYERS)
    timings[REST] = remaining(timings)
    table = Table(
        f"Forward, one layer, {size(shape, length)}",
        columns=(NAME, MILLISECONDS, SPREAD, OF_LAYER, OF_PRODUCTS, NOTE),
    )
    inside = [LAYER, PRODUCTS, *OPERATORS, REST]
    others = [name for name in timings if name not in inside]
    table.rows = [row(name, timings) for name in inside + others] + missing
    return table


def remaining(timings: dict[str, Timing]) -> Timing:
    """What a layer takes beyond its parts. Measured apart, they can add up to more than it."""
    parts = [timings[name].seconds for name in (PRODUCTS, *OPERATORS)]
    layer = timings[LAYER].seconds
    return Timing({at: layer[at] - sum(part[at] for part in parts) for at in layer})


def backward(shape: Shape, length: int, options: Options) -> Table:
    """The operators' backward passes alone, with gradients for all inputs."""
    operators = Operators(shape, length)
    operators.require_gradients()
    cases = [
        Case("scan", gradients(operators.scan, operators), repeats=5),
        Case("convolution", gradients(operators.convolution, operators), repeats=5),
        Case("norm", gradients(operators.norm, operators), repeats=5),
    ]
    more, missing = peer_cases(
        options, lambda backend: gradients(partial(operators.scan, backend), operators)
    )
    timings = interleave(cases + more, options.rounds or 15)
    table = Table(
        f"Backward alone, one layer, {size(shape, length)}",
        columns=(NAME, MILLISECONDS, SPREAD, NOTE),
    )
    table.rows = [timed(name, timing) for name, timing in timings.items()] + missing
    return table


def all_of(products: list[LayerProducts]) -> None:
    """One layer after another."""
    for multiply in products:
        multiply()


def peer_cases(
    options: Options, make: Callable[[str], Callable[[], object]]
) -> tuple[list[Case], list[Row]]:
    """The scans of others, in few rounds, and rows that tell why some are not measured."""
    if not options.peers:
        return [], [not_measured(name, "not measured: --no-peers") for name in (REFERENCE, PSCAN)]
    cases = [Case(REFERENCE, make("reference"), rounds=3)]
    if reason := PEERS[MAMBAPY].missing():
        return cases, [not_measured(PSCAN, reason)]
    return [*cases, Case(PSCAN, make("mambapy"), rounds=3)], []


def gradients(forward: Callable[[], Tensor], operators: Operators) -> Callable[[], object]:
    """A backward pass that can be run again and again."""
    y = forward()
    leaves = [tensor for tensor in vars(operators).values() if isinstance(tensor, Tensor)]
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)


def row(name: str, timings: dict[str, Timing]) -> Row:
    """A case beside the layer and its products."""
    shares = {
        column.key: timings[whole].speed_beside(timings[name])
        for column, whole in ((OF_LAYER, LAYER), (OF_PRODUCTS, PRODUCTS))
    }
    return timed(name, timings[name]) | shares


def size(shape: Shape, length: int) -> str:
    """Length, inner width, state size."""
    return f"{length} tokens x {shape.inner} channels x {shape.state_size} states, float32"


if __name__ == "__main__":
    main()

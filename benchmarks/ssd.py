"""How fast is a Mamba-2 layer, compared with its matrix products alone and with Transformers'?

Products are timed as PyTorch computes them, and counted at the peak of the arithmetic.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anymamba import ops
from anymamba.dropin.mamba_ssm.modules.mamba2 import Mamba2
from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.roofline import seconds_at_peak
from common.tables import (
    MILLISECONDS,
    NAME,
    NOTE,
    SHARE,
    SPEED,
    SPREAD,
    Column,
    Row,
    Table,
    not_measured,
    timed,
)
from common.timing import Case, Timing, interleave

LAYER, OPERATOR = "AnyMamba, Mamba2", "AnyMamba, ops.ssd alone"
REFERENCE = "AnyMamba, ops.ssd in PyTorch (backend 'reference')"
PEAK, PEAK_PRODUCTS = "limit: the layer's products at the peak", "limit: the operator's at the peak"
LIMIT, PRODUCTS = "limit: the layer's products", "limit: the operator's products"
TRANSFORMERS = "Transformers, Mamba2Mixer"
TIMES = Column("times_transformers", "x Transformers", "{:.1f}")
# The products of the operator depend on it; AnyMamba uses it too.
CHUNK = 64


@dataclass(frozen=True)
class Layer:
    """A Mamba-2 layer's sizes, in the paper's letters."""

    d: int
    h: int
    p: int
    n: int

    @property
    def inner(self) -> int:
        """Width inside the layer."""
        return self.h * self.p


MAMBA2_130M = Layer(d=768, h=24, p=64, n=128)
QUICK_LAYER = Layer(d=16, h=4, p=8, n=8)


def main() -> None:
    """Measure forward, then forward and backward, then print and write."""
    options = options_from(parser("ssd", __doc__ or "").parse_args())
    layer, length = (QUICK_LAYER, 32) if options.quick else (MAMBA2_130M, 2048)
    machine = describe(options.quick)
    tables = [forward(layer, length, options), step(layer, length, options)]
    finish("ssd", options, machine, tables)


@torch.no_grad()
def forward(layer: Layer, length: int, options: Options) -> Table:
    """Layer and operator beside their products."""
    ours, hidden_bld = Mamba2(layer.d, layer.n, headdim=layer.p), torch.randn(1, length, layer.d)
    inputs = operator_inputs(layer, length)
    cases = [
        Case(LIMIT, LayerProducts(ours, layer, length)),
        Case(LAYER, lambda: ours(hidden_bld)),
        Case(PRODUCTS, OperatorProducts(layer, length)),
        Case(OPERATOR, lambda: ops.ssd(*inputs)),
        Case(REFERENCE, lambda: ops.ssd(*inputs, backend="reference")),
        *peaks(ours, layer, length),
    ]
    more, missing = transformers_case(
        layer, ours, options, lambda theirs: lambda: theirs(hidden_bld)
    )
    timings = interleave(cases + more, options.rounds or 15)
    rows = rows_of(timings, length)
    return table("Forward", layer, length, rows + missing)


def step(layer: Layer, length: int, options: Options) -> Table:
    """Forward and backward with gradients for inputs and weights."""
    ours = Mamba2(layer.d, layer.n, headdim=layer.p)
    hidden_bld = torch.randn(1, length, layer.d, requires_grad=True)
    inputs = [tensor.requires_grad_() for tensor in operator_inputs(layer, length)]

    def learn(run: Callable[[], Any], leaves: list[Tensor]) -> object:
        y = run()
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    def through(module: Any) -> Callable[[], object]:
        return lambda: learn(lambda: module(hidden_bld), [hidden_bld, *module.parameters()])

    products, operator = LayerProducts(ours, layer, length), OperatorProducts(layer, length)
    cases = [
        Case(LIMIT, torch.no_grad()(products)),
        Case(LAYER, through(ours)),
        Case(PRODUCTS, torch.no_grad()(operator)),
        Case(OPERATOR, lambda: learn(lambda: ops.ssd(*inputs), inputs)),
        Case(REFERENCE, lambda: learn(lambda: ops.ssd(*inputs, backend="reference"), inputs)),
        *peaks(ours, layer, length),
    ]
    more, missing = transformers_case(layer, ours, options, through)
    timings = interleave(cases + more, options.rounds or 9)
    # The backward pass has two products for each one of the forward pass.
    for name in (LIMIT, PRODUCTS, PEAK, PEAK_PRODUCTS):
        timings[name] = timings[name].times(3)
    return table("Forward and backward", layer, length, rows_of(timings, length) + missing)


def rows_of(timings: dict[str, Timing], tokens: int) -> list[Row]:
    """Each case beside its own limit, and the layers beside Transformers'."""
    rows = []
    for name, timing in timings.items():
        limit = PEAK_PRODUCTS if name in (PRODUCTS, OPERATOR, REFERENCE, PEAK_PRODUCTS) else PEAK
        row = timed(name, timing, tokens, timings[limit])
        if TRANSFORMERS in timings and limit == PEAK:
            row["times_transformers"] = timing.speed_beside(timings[TRANSFORMERS])
        rows.append(row)
    return rows


def peaks(module: Mamba2, layer: Layer, length: int) -> list[Case]:
    """What the products would take at the peak."""
    cases = []
    for name, products in (
        (PEAK, LayerProducts(module, layer, length)),
        (PEAK_PRODUCTS, OperatorProducts(layer, length)),
    ):
        seconds = partial(seconds_at_peak, operations_of(products))
        cases.append(Case(name, seconds, own_clock=True))
    return cases


def operations_of(products: Callable[[], None]) -> int:
    """Multiplications and additions, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        products()
    return int(counter.get_total_flops())


def table(what: str, layer: Layer, length: int, rows: list[Row]) -> Table:
    """Under a title that tells the sizes."""
    size = f"{length} tokens, width {layer.d}, {layer.h} heads of {layer.p}, {layer.n} states"
    columns = (NAME, MILLISECONDS, SPREAD, SPEED, SHARE, TIMES, NOTE)
    return Table(f"{what}, one layer, {size}, float32", columns, rows)


def operator_inputs(layer: Layer, length: int) -> list[Tensor]:
    """x, dt, A, B, C and D, decaying as at the initialization of a layer."""
    random = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random)

    steps = 0.001 * 100 ** torch.rand(1, length, layer.h, generator=random)
    rates = -torch.linspace(1, 16, layer.h)
    x_blhp = normal(1, length, layer.h, layer.p)
    B_blgn, C_blgn = normal(1, length, 1, layer.n), normal(1, length, 1, layer.n)
    return [x_blhp, steps, rates, B_blgn, C_blgn, torch.ones(layer.h)]


class OperatorProducts:
    """What the duality must multiply in chunks, without decays.

    C with B, the result with x in each head, B with x, and C with the states.
    """

    def __init__(self, layer: Layer, length: int) -> None:
        q = min(CHUNK, length)
        chunks = length // q
        self._C_cqn, self._B_cqn = torch.randn(chunks, q, layer.n), torch.randn(chunks, q, layer.n)
        self._weights = torch.randn(chunks * layer.h, q, q)
        self._x_in_heads = torch.randn(chunks * layer.h, q, layer.p)
        self._x_cqm = torch.randn(chunks, q, layer.inner)
        self._states_cnm = torch.randn(chunks, layer.n, layer.inner)

    def __call__(self) -> None:
        """Multiply."""
        torch.bmm(self._C_cqn, self._B_cqn.mT)
        torch.bmm(self._weights, self._x_in_heads)
        torch.bmm(self._B_cqn.mT, self._x_cqm)
        torch.bmm(self._C_cqn, self._states_cnm)


class LayerProducts:
    """A layer's two projections and its operator's products."""

    def __init__(self, module: Mamba2, layer: Layer, length: int) -> None:
        self._pairs = [
            (torch.randn(length, layer.d), module.in_proj.weight.detach()),
            (torch.randn(length, layer.inner), module.out_proj.weight.detach()),
        ]
        self._operator = OperatorProducts(layer, length)

    def __call__(self) -> None:
        """Multiply."""
        for x, weight in self._pairs:
            F.linear(x, weight)
        self._operator()


def transformers_case(
    layer: Layer, ours: Mamba2, options: Options, run: Callable[[Any], Callable[[], object]]
) -> tuple[list[Case], list[Row]]:
    """Transformers' layer with the same weights, or why it is not measured."""
    if not options.peers:
        return [], [not_measured(TRANSFORMERS, "not measured: --no-peers")]
    if find_spec("transformers") is None:
        return [], [not_measured(TRANSFORMERS, "not installed: pip install 'anymamba[torch]'")]
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    config = transformers.Mamba2Config(
        hidden_size=layer.d,
        num_heads=layer.h,
        head_dim=layer.p,
        state_size=layer.n,
        n_groups=1,
        num_hidden_layers=1,
    )
    place = "transformers.models.mamba2.modeling_mamba2"
    theirs = importlib.import_module(place).Mamba2Mixer(config, 0)
    theirs.load_state_dict(ours.state_dict())
    return [Case(TRANSFORMERS, run(theirs), rounds=3)], []


if __name__ == "__main__":
    main()

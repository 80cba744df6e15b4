"""How fast is a training step, forward and backward, compared with its matrix products alone?"""

from __future__ import annotations

from functools import partial

from anymamba.cli.openmp import let_waiting_threads_sleep

let_waiting_threads_sleep()  # as `anymamba train` does, before PyTorch is there

import torch
from torch import Tensor

from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.roofline import ModelProducts, seconds_at_peak
from common.shapes import MAMBA_130M, QUICK, SMALL, Shape
from common.tables import (
    MILLISECONDS,
    NAME,
    NOTE,
    SPEED,
    SPREAD,
    Column,
    Table,
    not_measured,
    timed,
)
from common.timing import Case, Timing, interleave
from contenders.anymamba_model import AnyMamba, random_model
from contenders.interface import TorchContender
from contenders.registry import LLAMA_TYPES, MINIMAL, PEERS, TRANSFORMERS, Peers

OURS = "AnyMamba"
LIMIT = "limit: 3 x the forward products at the peak"
PRODUCTS = "PyTorch, 3 x the forward products alone"
TRAINABLE = tuple(name for name in PEERS if name not in LLAMA_TYPES)
TIMES = Column("times_transformers", "x Transformers", "{:.1f}")


def main() -> None:
    """Measure three shapes, then print and write."""
    options = options_from(parser("train", __doc__ or "").parse_args())
    machine = describe(options.quick)
    big, small = (QUICK, QUICK) if options.quick else (MAMBA_130M, SMALL)
    few, many = ((1, 16), (2, 16)) if options.quick else ((1, 256), (4, 512))
    tables = [
        beside_limit(big, few, options.rounds or 5, options.peers),
        beside_limit(big, many, options.rounds or 3, None),
        beside_transformers(small, (2, 16) if options.quick else (8, 256), options),
    ]
    tables[1].rows += [
        not_measured(name, f"measured at {few[0]} x {few[1]} only") for name in TRAINABLE
    ]
    finish("train", options, machine, tables)


def beside_limit(
    shape: Shape, batch_and_length: tuple[int, int], rounds: int, with_peers: bool | None
) -> Table:
    """AnyMamba and the limit; and the peers, unless `with_peers` is None."""
    source = random_model(shape)
    ids_bl = torch.randint(shape.vocab_size, batch_and_length)
    rows = ids_bl.numel()
    peers = Peers(shape, source, bool(with_peers))
    cases = [
        *limits(ModelProducts(source, rows=rows, head_rows=rows)),
        step_case(OURS, AnyMamba(source), ids_bl),
    ]
    missing = []
    for name in TRAINABLE if with_peers is not None else ():
        if row := peers.missing(name):
            missing.append(row)
        elif name == MINIMAL:
            missing.append(not_measured(name, "as slow as Transformers: measured below only"))
        else:
            # Transformers takes a minute for a step, so once must do.
            turns = 1 if name == TRANSFORMERS else 2
            cases.append(step_case(name, built(peers, name), ids_bl, turns))
    timings = interleave(cases, rounds)
    whole_steps(timings)
    table = Table(title("Training step", shape, ids_bl))
    table.rows = [timed(name, t, rows, timings[LIMIT]) for name, t in timings.items()] + missing
    return table


def limits(products: ModelProducts) -> list[Case]:
    """The forward pass's products at the peak of the arithmetic, and by PyTorch."""
    at_peak = partial(seconds_at_peak, products.operations)
    return [Case(LIMIT, at_peak, own_clock=True), Case(PRODUCTS, products)]


def whole_steps(timings: dict[str, Timing]) -> None:
    """Make timings of forward products timings of a step, which has two more for each of them."""
    for name in (LIMIT, PRODUCTS):
        timings[name] = timings[name].times(3)


def beside_transformers(shape: Shape, batch_and_length: tuple[int, int], options: Options) -> Table:
    """A small model, where overhead counts and not the products."""
    source = random_model(shape)
    ids_bl = torch.randint(shape.vocab_size, batch_and_length)
    peers = Peers(shape, source, options.peers)
    cases = [step_case(OURS, AnyMamba(source), ids_bl)]
    missing = []
    for name in TRAINABLE:
        if row := peers.missing(name):
            missing.append(row)
        else:
            cases.append(step_case(name, built(peers, name), ids_bl, turns=5))
    timings = interleave(cases, options.rounds or 15)
    table = Table(
        title("Training step of a small model", shape, ids_bl),
        columns=(NAME, MILLISECONDS, SPREAD, SPEED, TIMES, NOTE),
    )
    for name, timing in timings.items():
        row = timed(name, timing, ids_bl.numel())
        if TRANSFORMERS in timings:
            row["times_transformers"] = timing.speed_beside(timings[TRANSFORMERS])
        table.rows.append(row)
    table.rows += missing
    return table


def built(peers: Peers, name: str) -> TorchContender:
    """A peer that can be trained."""
    peer = peers.build(name)
    assert isinstance(peer, TorchContender)
    return peer


def step_case(
    name: str, contender: TorchContender, ids_bl: Tensor, turns: int | None = None
) -> Case:
    """Forward and backward, from forgotten gradients; the optimizer is not part of it."""
    contender.model.train()
    return Case(
        name,
        partial(contender.train_step, ids_bl),
        rounds=turns,
        prepare=contender.forget_gradients,
        warm_up=partial(contender.train_step, ids_bl[:, :8]),
    )


def title(what: str, shape: Shape, ids_bl: Tensor) -> str:
    """Says what learned what."""
    batch, length = ids_bl.shape
    return (
        f"{what}, {batch} x {length} tokens ({shape.num_hidden_layers} layers, "
        f"width {shape.hidden_size}, vocabulary {shape.vocab_size}, float32)"
    )


if __name__ == "__main__":
    main()

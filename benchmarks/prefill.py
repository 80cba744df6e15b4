"""How fast is a text read, compared with its matrix products at the machine's peak?"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.roofline import ModelProducts, seconds_at_peak
from common.shapes import MAMBA_130M, QUICK
from common.tables import Table, not_measured, timed
from common.timing import Case, interleave
from contenders.anymamba_model import AnyMamba, random_model
from contenders.interface import Contender
from contenders.registry import PEERS, Peers

LIMIT = "limit: matrix products at the peak, f32"
PRODUCTS = "PyTorch, matrix products alone, f32"
OURS = {"AnyMamba f32": torch.float32, "AnyMamba bf16": torch.bfloat16}
PEER_ROUNDS = 3


def main() -> None:
    """Measure both lengths, then print and write."""
    options = options_from(parser("prefill", __doc__ or "").parse_args())
    shape = QUICK if options.quick else MAMBA_130M
    short, long = (16, 32) if options.quick else (512, 4096)
    machine = describe(options.quick)
    source = random_model(shape)
    ours: dict[str, Contender] = {name: AnyMamba(source, dtype) for name, dtype in OURS.items()}
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers(shape, source, options.peers, Path(folder))
        tables = [
            measure(source, ours, peers, short, options.rounds or 9),
            measure(source, ours, None, long, options.rounds or 3),
        ]
        tables[1].rows += [not_measured(name, f"measured at {short} tokens only") for name in PEERS]
    finish("prefill", options, machine, tables)


def measure(
    source: Any, ours: dict[str, Contender], peers: Peers | None, length: int, rounds: int
) -> Table:
    """All contenders on one text.

    Args:
        source: the float32 model, whose products at the machine's peak are the limit.
        ours: AnyMamba's contenders.
        peers: the others, or None to leave them out.
        length: of the text.
        rounds: for AnyMamba; the others take fewer turns.
    """
    ids_bl = torch.randint(source.config.vocab_size, (1, length))
    products = ModelProducts(source, rows=length, head_rows=1)
    at_peak = partial(seconds_at_peak, products.operations)
    cases = [Case(LIMIT, at_peak, own_clock=True), Case(PRODUCTS, products)]
    cases += [Case(name, reading(one, ids_bl)) for name, one in ours.items()]
    missing = []
    for name in PEERS if peers else ():
        assert peers is not None
        if row := peers.missing(name):
            missing.append(row)
            continue
        peer = peers.build(name)
        warm_up = reading(peer, ids_bl[:, :8])
        cases.append(Case(name, reading(peer, ids_bl), rounds=PEER_ROUNDS, warm_up=warm_up))
    timings = interleave(cases, rounds)
    rows = [timed(name, timing, length, timings[LIMIT]) for name, timing in timings.items()]
    return Table(title(source, length), rows=rows + missing)


def reading(contender: Contender, ids_bl: Tensor) -> Any:
    """What is timed."""
    return lambda: contender.prefill(ids_bl)


def title(source: Any, length: int) -> str:
    """Says what was read by what."""
    config = source.config
    return (
        f"Prefill of {length} tokens, batch 1, last logits only "
        f"({config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"vocabulary {config.vocab_size})"
    )


if __name__ == "__main__":
    main()

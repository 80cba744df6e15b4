"""How fast does text come token by token, compared with reading the weights once a token?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.roofline import seconds_to_read, stored_bytes
from common.shapes import MAMBA_130M, QUICK
from common.tables import Table, not_measured, timed
from common.timing import Case, Timing, interleave
from contenders.anymamba_model import AnyMamba, random_model
from contenders.registry import MINIMAL, PEERS, Peers

OURS = {"f32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {kind: f"limit: weights read once, {kind}" for kind in OURS}
BATCHES = (1, 16, 64)
PEER_ROUNDS = 3
# Half the bytes: what a peer in 16 bits could reach.
SIXTEEN_BITS = ("bf16", "f16")


def main() -> None:
    """Measure AnyMamba at all batches and the peers at batch 1, then print and write."""
    options = options_from(parser("decode", __doc__ or "").parse_args())
    shape, steps = (QUICK, 4) if options.quick else (MAMBA_130M, 64)
    machine = describe(options.quick)
    source = random_model(shape)
    ours = {kind: AnyMamba(source, dtype) for kind, dtype in OURS.items()}
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in BATCHES:
            ids_bl = torch.randint(shape.vocab_size, (batch, steps))
            cases = limit_cases(ours, steps) + our_cases(ours, ids_bl)
            table = Table(f"Decoding, batch {batch}, {steps} tokens a row from an empty state")
            if batch == 1:
                peers = Peers(shape, source, options.peers, Path(folder))
                more, table.rows = peer_cases(peers, ids_bl)
                cases += more
            timings = interleave(cases, options.rounds or 7)
            table.rows = rows_of(timings, ids_bl) + table.rows
            tables.append(table)
    finish("decode", options, machine, tables)


def limit_cases(ours: dict[str, AnyMamba], steps: int) -> list[Case]:
    """The time that reading the weights takes at the bandwidth of the moment."""

    def once_a_step(contender: AnyMamba) -> float:
        return steps * seconds_to_read(stored_bytes(contender.model))

    return [
        Case(LIMITS[kind], partial(once_a_step, contender), own_clock=True)
        for kind, contender in ours.items()
    ]


def our_cases(ours: dict[str, AnyMamba], ids_bl: Tensor) -> list[Case]:
    """Through `forward`, and through `generate` after a first token."""
    steps = ids_bl.shape[1]
    cases = []
    for kind, one in ours.items():
        cases.append(Case(f"AnyMamba {kind}", partial(one.decode, ids_bl)))
        generate: Callable[[], object] = partial(one.generate, ids_bl[:, :1], steps)
        cases.append(Case(f"AnyMamba {kind}, generate", generate))
    return cases


def peer_cases(peers: Peers, ids_bl: Tensor) -> tuple[list[Case], list[dict[str, object]]]:
    """The peers that are installed, and rows that tell why others are not measured."""
    cases, rows = [], []
    for name in PEERS:
        if row := peers.missing(name):
            rows.append(row)
        elif name == MINIMAL:
            rows.append(not_measured(name, "not measured: has no state, reads all again each time"))
        elif name == "Transformers + mambapy":
            rows.append(not_measured(name, "single tokens take the same code as Transformers"))
        else:
            peer = peers.build(name)
            warm_up = partial(peer.decode, ids_bl[:, :2])
            run = partial(peer.decode, ids_bl)
            cases.append(Case(name, run, rounds=PEER_ROUNDS, warm_up=warm_up))
    return cases, rows


def rows_of(timings: dict[str, Timing], ids_bl: Tensor) -> list[dict[str, object]]:
    """Each beside the limit of its own type; milliseconds are those of one step."""
    batch, steps = ids_bl.shape
    rows = []
    for name, timing in timings.items():
        kind = "bf16" if any(word in name for word in SIXTEEN_BITS) else "f32"
        limit = timings[LIMITS[kind]].times(1 / steps)
        rows.append(timed(name, timing.times(1 / steps), batch, limit))
    return rows


if __name__ == "__main__":
    main()

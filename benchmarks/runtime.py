"""How fast is the torch-free runtime by weight type, beside its limits and llama.cpp?

Decoding is `engine.generate`, greedy, sampling included; its limit is reading the weights' own
bytes once a token. The limit of a prefill is its matrix products at the peak of the arithmetic:
of floats, or of bytes where weights have 8 or 4 bits.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

import anymamba
from anymamba import Engine
from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.roofline import ModelProducts, seconds_at_peak, seconds_to_read
from common.shapes import MAMBA_130M, QUICK
from common.tables import Table, timed
from common.timing import Case, interleave
from contenders.anymamba_model import random_model
from contenders.registry import LLAMA_QUANTIZED, LLAMA_TYPES, Peers

KINDS = ("f32", "bf16", "int8", "int4")
PEAKS = {False: "limit: float products at the peak", True: "limit: byte products at the peak"}
PRODUCTS = "PyTorch, matrix products alone, f32"
PEER_ROUNDS = 3
BATCH = 16
# llama.cpp at the same bits.
BESIDE = {"f32": "f32", "bf16": "f16", "int8": "q8_0", "int4": "q4_0"}


def main() -> None:
    """Measure decoding, a batch, and a prefill, then print and write."""
    options = options_from(parser("runtime", __doc__ or "").parse_args())
    shape, steps, length = (QUICK, 4, 16) if options.quick else (MAMBA_130M, 64, 512)
    machine = describe(options.quick)
    torch.manual_seed(0)
    source = random_model(shape)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source.save_pretrained(folder / "model")
        threads = torch.get_num_threads()
        engines = {
            kind: anymamba.load(folder / "model", weights=kind, threads=threads) for kind in KINDS
        }
        peers = Peers(shape, source, options.peers, folder)
        rounds = options.rounds or 7
        tables = [
            decoding(engines, peers, steps, rounds),
            batches(engines, steps, rounds),
            prefill(engines, peers, source, length, rounds),
        ]
    finish("runtime", options, machine, tables)


def limit_of(kind: str) -> str:
    """The name of a type's row."""
    return f"limit: weights read once, {kind}"


def decoding(engines: dict[str, Engine], peers: Peers, steps: int, rounds: int) -> Table:
    """One text, token by token."""
    cases = []
    for kind, engine in engines.items():
        seconds = partial(seconds_of_reading, engine, steps)
        cases.append(Case(limit_of(kind), seconds, own_clock=True))
        run = partial(engine.generate, [5], steps, do_sample=False, stop_ids=())
        cases.append(Case(f"AnyMamba {kind}", run))
    ids_bl = torch.randint(50, (1, steps))
    more, missing = llamas(peers, lambda peer: partial(peer.decode, ids_bl))
    timings = interleave(cases + more, rounds)
    rows = []
    for name, timing in timings.items():
        kind = name.rpartition(" ")[2]
        kind = next((ours for ours, theirs in BESIDE.items() if kind in (ours, theirs)), kind)
        limit = timings[limit_of(kind)].times(1 / steps)
        rows.append(timed(name, timing.times(1 / steps), 1, limit))
    return Table(f"Runtime: decoding, batch 1, {steps} tokens", rows=rows + missing)


def seconds_of_reading(engine: Engine, steps: int) -> float:
    """The time that reading the weights once a step takes at the bandwidth of the moment."""
    return steps * seconds_to_read(engine.weight_bytes)


def batches(engines: dict[str, Engine], steps: int, rounds: int) -> Table:
    """16 texts at once."""
    cases = []
    for kind, engine in engines.items():
        prompts = [[5 + row] for row in range(BATCH)]
        run = partial(engine.generate_batch, prompts, steps, do_sample=False, stop_ids=())
        cases.append(Case(f"AnyMamba {kind}", run))
    timings = interleave(cases, rounds)
    rows = [timed(name, timing.times(1 / steps), BATCH) for name, timing in timings.items()]
    return Table(f"Runtime: decoding, batch {BATCH}, {steps} tokens a row", rows=rows)


def prefill(
    engines: dict[str, Engine], peers: Peers, source: object, length: int, rounds: int
) -> Table:
    """One prompt; the last logits."""
    ids_bl = torch.randint(50, (1, length))
    ids = ids_bl[0].tolist()
    products = ModelProducts(source, rows=length, head_rows=1)
    cases = [Case(PRODUCTS, products)]
    for in_bytes, name in PEAKS.items():
        at_peak = partial(seconds_at_peak, products.operations, in_bytes)
        cases.append(Case(name, at_peak, own_clock=True))
    for kind, engine in engines.items():
        cases.append(Case(f"AnyMamba {kind}", partial(read_prompt, engine, ids)))
    more, missing = llamas(peers, lambda peer: partial(peer.prefill, ids_bl))
    timings = interleave(cases + more, rounds)
    rows = []
    for name, timing in timings.items():
        limit = timings[PEAKS[name.endswith(("int8", "int4")) or name == PEAKS[True]]]
        rows.append(timed(name, timing, length, limit))
    return Table(f"Runtime: prefill of {length} tokens, last logits only", rows=rows + missing)


def read_prompt(engine: Engine, ids: list[int]) -> None:
    """From an empty state."""
    engine.prefill(engine.state(), ids)


def llamas(peers: Peers, run_of: object) -> tuple[list[Case], list[dict[str, object]]]:
    """llama.cpp's cases, and rows that tell why it is not measured."""
    cases, missing = [], []
    for name in (*LLAMA_TYPES, *LLAMA_QUANTIZED):
        if row := peers.missing(name):
            missing.append(row)
            continue
        assert callable(run_of)
        run = run_of(peers.build(name))
        cases.append(Case(name, run, rounds=PEER_ROUNDS))
    return cases, missing


if __name__ == "__main__":
    main()

"""How fast is each instruction set of this machine, beside its limits?

Decoding of one text, whose limit is reading the weights' own bytes once a token, and a prompt,
whose limit is its products at the peak of that instruction set's arithmetic. A processor that has
AVX-512 with VNNI, but not AVX-VNNI, runs `avx2_vnni` where the core was installed with
`--config-settings=cmake.define.ANYMAMBA_EVEX_VNNI=ON`.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

import anymamba
from anymamba import Engine, _core
from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.roofline import ModelProducts, seconds_at_peak, seconds_to_read
from common.shapes import MAMBA_130M, QUICK
from common.tables import Table, timed
from common.timing import Case, interleave
from contenders.anymamba_model import random_model

KINDS = ("f32", "bf16", "int8", "int4")
ROUNDS = {"portable": 1}  # which is ten times as slow


def main() -> None:
    """Measure decoding and a prefill, then print and write."""
    options = options_from(parser("instruction_sets", __doc__ or "").parse_args())
    shape, steps, length = (QUICK, 4, 16) if options.quick else (MAMBA_130M, 32, 512)
    machine = describe(options.quick)
    chosen = _core.isa()
    torch.manual_seed(0)
    source = random_model(shape)
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        engines = {kind: anymamba.load(Path(folder), weights=kind) for kind in KINDS}
        operations = ModelProducts(source, rows=length, head_rows=1).operations
        rounds = options.rounds or 7
        tables = [decoding(engines, steps, rounds), prefill(engines, operations, length, rounds)]
    _core.use_isa(chosen)
    finish("instruction_sets", options, machine, tables)


def decoding(engines: dict[str, Engine], steps: int, rounds: int) -> Table:
    """One text, token by token, with all instruction sets in turn."""
    cases = []
    for kind, engine in engines.items():
        read = partial(seconds_to_read, engine.weight_bytes)
        cases.append(Case(limit_of(kind), lambda read=read: steps * read(), own_clock=True))
        for isa in _core.isas():
            run = partial(engine.generate, [5], steps, do_sample=False, stop_ids=())
            use = partial(_core.use_isa, isa)
            cases.append(Case(f"{isa} {kind}", run, rounds=ROUNDS.get(isa), prepare=use))
    timings = interleave(cases, rounds)
    rows = []
    for name, timing in timings.items():
        limit = timings[limit_of(name.rpartition(" ")[2])].times(1 / steps)
        rows.append(timed(name, timing.times(1 / steps), 1, limit))
    return Table(f"Instruction sets: decoding, batch 1, {steps} tokens", rows=rows)


def limit_of(kind: str) -> str:
    """The name of a type's row."""
    return f"limit: weights read once, {kind}"


def prefill(engines: dict[str, Engine], operations: int, length: int, rounds: int) -> Table:
    """One prompt; the last logits."""
    ids = torch.randint(50, (length,)).tolist()
    cases = []
    for isa in _core.isas():
        use = partial(_core.use_isa, isa)
        for in_bytes in (False, True):
            at_peak = partial(seconds_at_peak, operations, in_bytes)
            cases.append(Case(peak_of(isa, in_bytes), at_peak, prepare=use, own_clock=True))
        for kind, engine in engines.items():
            read = partial(read_prompt, engine, ids)
            cases.append(Case(f"{isa} {kind}", read, rounds=ROUNDS.get(isa), prepare=use))
    timings = interleave(cases, rounds)
    rows = []
    for name, timing in timings.items():
        is_limit, isa = name.startswith("limit"), name.split()[0]
        limit = timing if is_limit else timings[peak_of(isa, name.endswith(("int8", "int4")))]
        rows.append(timed(name, timing, length, limit))
    return Table(f"Instruction sets: prefill of {length} tokens, last logits only", rows=rows)


def peak_of(isa: str, in_bytes: bool) -> str:
    """The name of a limit's row."""
    return f"limit: products of {'bytes' if in_bytes else 'floats'} at the peak, {isa}"


def read_prompt(engine: Engine, ids: list[int]) -> None:
    """From an empty state."""
    engine.prefill(engine.state(), ids)


if __name__ == "__main__":
    main()

"""What does `generate` cost beside the bare step, and decoding beside other busy processes?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.roofline import seconds_to_read, stored_bytes
from common.shapes import MAMBA_130M, QUICK
from common.tables import MILLISECONDS, NAME, NOTE, SHARE, SPEED, SPREAD, Column, Row, Table, timed
from common.timing import Case, Timing, interleave
from contenders.anymamba_model import AnyMamba, random_model
from contenders.registry import LLAMA_TYPES, TRANSFORMERS, Peers

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
LIMIT = "limit: weights read once"
PEER_ROUNDS = 3
OVER_BARE = Column("over_bare", "of the bare step", "{:.2f}")
COLUMNS = (NAME, MILLISECONDS, SPREAD, SPEED, SHARE, OVER_BARE, NOTE)


def main() -> None:
    """Measure the loop around the step, then a small model on a full machine; print and write."""
    options = options_from(parser("generate", __doc__ or "").parse_args())
    machine = describe(options.quick)
    finish("generate", options, machine, [loops(options), *beside_busy_loops(options)])


def loops(options: Options) -> Table:
    """Each way to write text, in milliseconds a token."""
    shape, steps = (QUICK, 4) if options.quick else (MAMBA_130M, 64)
    source = random_model(shape)
    ids_bl = torch.randint(shape.vocab_size, (1, steps))
    table = Table(f"One token of {steps}, batch 1; sampled: {words(SAMPLED)}", COLUMNS)
    cases = []
    for kind, dtype in DTYPES.items():
        cases += our_cases(kind, AnyMamba(source, dtype), ids_bl)
    with tempfile.TemporaryDirectory() as folder:
        more, missing = peer_cases(Peers(shape, source, options.peers, Path(folder)), ids_bl)
        timings = interleave(cases + more, options.rounds or 7)
    table.rows = [row_of(name, timing, timings, steps) for name, timing in timings.items()]
    table.rows += missing
    return table


def our_cases(kind: str, ours: AnyMamba, ids_bl: Tensor) -> list[Case]:
    """The limit, the bare step, our loop, and Transformers' loop over the same step."""
    steps = ids_bl.shape[1]
    size = stored_bytes(ours.model)

    def read() -> float:
        return steps * seconds_to_read(size)

    cases = [
        Case(f"{LIMIT}, {kind}", read, own_clock=True),
        Case(f"AnyMamba {kind}, bare step", partial(ours.decode, ids_bl)),
    ]
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        write = partial(generate, ours.model, ids_bl[:, :1], steps, **sampling)
        theirs = partial(write, custom_generate=GenerationMixin._sample)
        cases.append(Case(f"AnyMamba {kind}, {name}", write))
        cases.append(Case(f"AnyMamba {kind}, {name} in Transformers' loop", theirs))
    return cases


def peer_cases(peers: Peers, ids_bl: Tensor) -> tuple[list[Case], list[Row]]:
    """The peers that are installed, and rows that name the others."""
    cases: list[Case] = []
    missing: list[Row] = []
    for name in (TRANSFORMERS, *LLAMA_TYPES):
        if row := peers.missing(name):
            missing.append(row)
            continue
        peer: Any = peers.build(name)
        warm_up = partial(peer.decode, ids_bl[:, :2])
        bare = partial(peer.decode, ids_bl)
        cases.append(Case(f"{name}, bare step", bare, rounds=PEER_ROUNDS, warm_up=warm_up))
        if name == TRANSFORMERS:
            peer.model.generation_config.eos_token_id = None
            for how, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
                write = partial(generate, peer.model, ids_bl[:, :1], ids_bl.shape[1], **sampling)
                cases.append(Case(f"{name}, {how}", write, rounds=PEER_ROUNDS, warm_up=warm_up))
    return cases, missing


def generate(model: Any, ids_bl: Tensor, steps: int, **options: Any) -> Tensor:
    """Continue a text by so many tokens."""
    mask = torch.ones_like(ids_bl)
    written: Tensor = model.generate(
        ids_bl, attention_mask=mask, max_new_tokens=steps, pad_token_id=0, **options
    )
    return written


def row_of(name: str, timing: Timing, timings: dict[str, Timing], steps: int) -> Row:
    """A case beside the limit of its weights' type and beside its own bare step."""
    kind = "bf16" if "f16" in name else "f32"
    limit = timings[f"{LIMIT}, {kind}"].times(1 / steps)
    row = timed(name, timing.times(1 / steps), 1, limit)
    bare = timings.get(f"{name.split(',')[0]}, bare step")
    row["over_bare"] = None if bare is None else 1 / timing.speed_beside(bare)
    return row


# Loads the bundled model, then writes a number for each line that it reads: seconds a token.
PROGRAM = """
import sys, time, anymamba
engine = anymamba.load(threads=int(sys.argv[1]) or None)
state = engine.prefill(engine.state(), "ROMEO:")
def write(count):
    start = time.perf_counter()
    engine.generate("", max_new_tokens=count, state=state.copy(), stop_ids=())
    return (time.perf_counter() - start) / count
write(8)
for line in sys.stdin:
    print(write(int(line)), flush=True)
"""
SHARE_OF_ONE = Column("share_of_limit", "of one thread", "{:.2f}")
THREADS = {"one thread": 1, "default threads": 0}


def beside_busy_loops(options: Options) -> list[Table]:
    """The bundled model alone, and beside as many busy loops as there are processors."""
    count, rounds = (4, 1) if options.quick else (150, options.rounds or 7)
    environment = {key: value for key, value in os.environ.items() if key != "ANYMAMBA_NUM_THREADS"}
    tables = []
    with programs(environment) as writers:
        for busy in (0, len(os.sched_getaffinity(0))):
            cases = [
                Case(name, partial(seconds_a_token, writers[name], count), own_clock=True)
                for name in THREADS
            ]
            with busy_loops(busy):
                timings = interleave(cases, rounds)
            table = Table(f"The bundled model beside {busy} busy loops, a token")
            one = timings["one thread"]
            table.rows = [timed(name, timing, 1, one) for name, timing in timings.items()]
            table.columns = (NAME, MILLISECONDS, SPREAD, SPEED, SHARE_OF_ONE)
            tables.append(table)
    return tables


@contextmanager
def programs(environment: dict[str, str]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each number of threads."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, threads in THREADS.items()
    }
    try:
        yield started
    finally:
        for process in started.values():
            process.communicate()


def seconds_a_token(writer: subprocess.Popen[str], count: int) -> float:
    """What one of the processes measures."""
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write(f"{count}\n")
    writer.stdin.flush()
    return float(writer.stdout.readline())


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that do nothing but use a processor."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def words(options: dict[str, Any]) -> str:
    """Options as a reader would write them."""
    return ", ".join(f"{name}={value}" for name, value in options.items() if name != "do_sample")


if __name__ == "__main__":
    main()

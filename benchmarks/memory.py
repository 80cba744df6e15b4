"""How much memory, above the weights, do long prompts and training steps need at most?

Each number comes from a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from common.machine import describe
from common.options import Options, options_from, parser
from common.peak import peak_above
from common.results import finish
from common.shapes import DEEP_5M, MAMBA_130M, QUICK, Shape
from common.tables import NAME, NOTE, Column, Row, Table, not_measured
from contenders.anymamba_model import AnyMamba, random_model
from contenders.interface import TorchContender
from contenders.registry import MAMBAPY, PEERS, Peers

MEGABYTES = Column("megabytes", "MB", "{:.1f}")
TIMES = Column("times", "x the first", "{:.2f}")
FORWARD, GENERATE = "forward, logits_to_keep=1", "generate, max_new_tokens=1"
STEP, CHECKPOINTED = "training step", "training step, gradient checkpointing"


def main() -> int:
    """Measure in other processes; or be one of them."""
    arguments_of = parser("memory", __doc__ or "")
    arguments_of.add_argument("--only", nargs=2, metavar=("WHAT", "LENGTH"), help=argparse.SUPPRESS)
    arguments = arguments_of.parse_args()
    options = options_from(arguments)
    if arguments.only:
        what, length = arguments.only
        print(measure(what, int(length), options))
        return 0
    machine = describe(options.quick)
    short, long, trained = (64, 2048, 32) if options.quick else (1024, 65536, 1024)
    tables = [
        table(f"Prefill, batch 1: {what}", [("AnyMamba", what, n) for n in (short, long)], options)
        for what in (FORWARD, GENERATE)
    ]
    training = [(name, name, trained) for name in ("AnyMamba", MAMBAPY)]
    tables.append(table("Training step (forward and backward), batch 1", training, options))
    lengths = (64, 2048) if options.quick else (8192, 65536)
    tables += [
        table(
            f"A {what}, 5 million weights of width 256, batch 1",
            [("AnyMamba", what, length) for length in lengths],
            options,
        )
        for what in (STEP, CHECKPOINTED)
    ]
    finish("memory", options, machine, tables)
    return 0


def table(title: str, cases: list[tuple[str, str, int]], options: Options) -> Table:
    """One row a case, (name, what, length), and each beside the first."""
    rows: list[Row] = []
    for name, what, length in cases:
        label = f"{name}, {length} tokens"
        reason = PEERS[MAMBAPY].missing() if options.peers else "not measured: --no-peers"
        if name == MAMBAPY and reason:
            rows.append(not_measured(label, reason))
            continue
        used = in_a_process(what, length, options)
        first = rows[0]["bytes"] if rows else used
        rows.append(
            {"name": label, "bytes": used, "megabytes": used / 1e6, "times": used / max(first, 1)}
        )
    return Table(f"{title}: peak above the weights", (NAME, MEGABYTES, TIMES, NOTE), rows)


def in_a_process(what: str, length: int, options: Options) -> int:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--only", what, str(length)]
    command += ["--threads", str(torch.get_num_threads())]
    command += ["--quick"] if options.quick else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or ["no message"]
        raise SystemExit(f"measuring {what!r} at {length} tokens failed: {reason[-1]}")
    return int(done.stdout.split()[-1])


def measure(what: str, length: int, options: Options) -> int:
    """Peak bytes of one run in this process."""
    run_at = running(what, options)
    ids_bl = torch.randint(shape_of(what, options).vocab_size, (1, length))
    # Short, so that what the allocator keeps from it is small.
    return peak_above(partial(run_at, ids_bl[:, :4]), partial(run_at, ids_bl))


def shape_of(what: str, options: Options) -> Shape:
    """The model that something is measured on."""
    if options.quick:
        return QUICK
    return DEEP_5M if what in (STEP, CHECKPOINTED) else MAMBA_130M


def running(what: str, options: Options) -> Callable[[torch.Tensor], object]:
    """What is measured, as a function of the tokens."""
    shape = shape_of(what, options)
    source = random_model(shape)
    ours = AnyMamba(source)
    if what == FORWARD:
        return ours.prefill
    if what == GENERATE:
        return lambda ids_bl: ours.generate(ids_bl, 1)
    if what == CHECKPOINTED:
        source.gradient_checkpointing_enable()
    is_ours = what in ("AnyMamba", STEP, CHECKPOINTED)
    contender = ours if is_ours else Peers(shape, source, True).build(what)
    assert isinstance(contender, TorchContender)
    contender.model.train()
    return partial(trained, contender)


def trained(contender: TorchContender, ids_bl: torch.Tensor) -> None:
    """A step, from forgotten gradients, whose memory counts."""
    contender.forget_gradients()
    contender.train_step(ids_bl)


if __name__ == "__main__":
    sys.exit(main())

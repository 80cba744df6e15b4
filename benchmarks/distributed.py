"""What do two processes cost each other: DDP and FSDP2 in a step, states along one sequence?"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anymamba import MambaForCausalLM
from anymamba.ops import selective_scan
from anymamba.training.distributed import sequence_loss, sequence_parallel, shard, sum_gradients
from anymamba.training.distributed.states import gradient_after, state_before, window_before
from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.shapes import DEEP_5M, QUICK, Shape
from common.tables import MILLISECONDS, NAME, NOTE, SPEED, SPREAD, Column, Table, timed
from common.timing import Timing
from contenders.anymamba_model import random_model

PROCESSES = 2
TIMES = Column("times_one", "x one process", "{:.2f}")
COLUMNS = (NAME, MILLISECONDS, SPREAD, SPEED, TIMES, NOTE)

ALONE, BESIDE = "one process, the other idle", "two processes, each for itself"
DDP, FSDP = "two processes, DDP", "two processes, FSDP2"
WHOLE, HALVES = "one process, the whole sequence", "two processes, a half each"
PASSING, SCANNING = "of that: handing on states", "of that: scanning a second time"
ADDING = "of that: adding up gradients"
Seconds = dict[str, list[float]]


def main() -> int:
    """Start the processes and print what they measured; or be one of them."""
    arguments_of = parser("distributed", __doc__ or "")
    arguments_of.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments_of.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    arguments = arguments_of.parse_args()
    options = options_from(arguments)
    rounds = options.rounds or 5
    if arguments.meeting:
        serve(arguments.serve, arguments.meeting, options.quick, rounds)
        return 0
    machine = describe(options.quick)
    seconds = measured(options.quick, rounds)
    finish("distributed", options, machine, tables(seconds, options.quick))
    return 0


def measured(quick: bool, rounds: int) -> Seconds:
    """Each case's seconds by round, from two processes that share this one's threads."""
    threads = max(torch.get_num_threads() // PROCESSES, 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--meeting", str(Path(folder) / "meeting")]
        command += ["--threads", str(threads), "--rounds", str(rounds)]
        command += ["--quick"] if quick else []
        workers = [
            subprocess.Popen([*command, "--serve", str(rank)], stdout=subprocess.PIPE, text=True)
            for rank in range(PROCESSES)
        ]
        answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):  # a traceback is on the screen
        raise SystemExit("one of the processes failed")
    found: Seconds = json.loads(answers[0])
    return found


def serve(rank: int, meeting: Path, quick: bool, rounds: int) -> None:
    """Measure as one of the processes; the first prints what all of them took."""
    store = dist.FileStore(str(meeting), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    cases = cases_of(*sizes(quick))
    found: Seconds = {name: [] for name in cases}
    for at in range(-1, rounds):
        for name, work in cases.items():
            took = clocked(work, idle=rank > 0 and name in (ALONE, WHOLE))
            if at >= 0:
                found[name].append(took)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def clocked(work: Callable[[], object], idle: bool) -> float:
    """Seconds until the slowest process is done."""
    dist.barrier()
    start = time.perf_counter()
    if not idle:
        work()
    took = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def sizes(quick: bool) -> tuple[Shape, tuple[int, int], int]:
    """The model, each process's batch, and the length of the sequence that they share."""
    return (QUICK, (2, 16), 32) if quick else (DEEP_5M, (4, 256), 4096)


def cases_of(shape: Shape, batch: tuple[int, int], length: int) -> dict[str, Callable[[], object]]:
    """What is timed: whole training steps, and parts of those along a sequence."""
    ids_bl = torch.randint(shape.vocab_size, batch)
    torch.manual_seed(1)
    long_bl = torch.randint(shape.vocab_size, (1, length))
    single = step_of(random_model(shape).train(), ids_bl)
    cases = {ALONE: single, BESIDE: single}
    cases[DDP] = step_of(DistributedDataParallel(random_model(shape).train()), ids_bl)
    cases[FSDP] = step_of(shard(random_model(shape).train()), ids_bl)
    cases[WHOLE] = step_of(random_model(shape).train(), long_bl)
    halves = random_model(shape).train()
    cases[HALVES] = step_along(halves, long_bl)
    cases[PASSING] = passing(shape)
    cases[SCANNING] = scanning(shape, length // PROCESSES)
    cases[ADDING] = lambda: sum_gradients(halves)
    return cases


def step_of(model: nn.Module, ids_bl: Tensor) -> Callable[[], object]:
    """Forward, backward and the optimizer's step."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids_bl, labels=ids_bl).loss.backward()
        optimizer.step()

    return step


def step_along(model: MambaForCausalLM, ids_bl: Tensor) -> Callable[[], object]:
    """The same, each process with its chunk."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with sequence_parallel(model):
            sequence_loss(model, ids_bl).backward()
        sum_gradients(model)
        optimizer.step()

    return step


def passing(shape: Shape) -> Callable[[], object]:
    """The messages of a step and nothing else: every layer's window and state, there and back."""
    state_ben = torch.rand(1, shape.inner, shape.state_size)
    tail_bwe = torch.rand(1, shape.conv_kernel - 1, shape.inner, requires_grad=True)

    def pass_all() -> None:
        for _ in range(shape.num_hidden_layers):
            window_before(tail_bwe).sum().backward()
            _, decay_pben = state_before(state_ben, state_ben)
            gradient_after(decay_pben, state_ben)

    return pass_all


def scanning(shape: Shape, length: int) -> Callable[[], object]:
    """What one process need not do: two scans forward and one backward, in every layer."""
    e, n = shape.inner, shape.state_size
    x_ble, delta_ble, dy_ble = (torch.randn(1, length, e) for _ in range(3))
    B_bln, C_bln = (torch.randn(1, length, n) for _ in range(2))
    A_en = (-torch.arange(1.0, n + 1)).repeat(e, 1).requires_grad_()
    delta_ble -= 4.0  # steps of about 0.02, as a model begins with

    def scan() -> Tensor:
        y_ble = selective_scan(x_ble, delta_ble, A_en, B_bln, C_bln, delta_softplus=True)
        assert isinstance(y_ble, Tensor)
        return y_ble

    def scan_all() -> None:
        for _ in range(shape.num_hidden_layers):
            with torch.no_grad():
                scan()
            scan().backward(dy_ble)

    return scan_all


def tables(seconds: Seconds, quick: bool) -> list[Table]:
    """One for batches, one for a sequence."""
    shape, (rows, columns), length = sizes(quick)
    timings = {name: Timing(dict(enumerate(by_round))) for name, by_round in seconds.items()}
    about = f"{shape.num_hidden_layers} layers, width {shape.hidden_size}, AdamW, float32, gloo"
    steps = Table(f"Training step, {rows} x {columns} tokens a process ({about})", COLUMNS)
    for name in (ALONE, BESIDE, DDP, FSDP):
        count = 1 if name == ALONE else PROCESSES
        row = timed(name, timings[name], count * rows * columns)
        row["times_one"] = count * timings[name].speed_beside(timings[ALONE])
        if name in (DDP, FSDP):
            row["note"] = f"{overhead(timings[name], timings[BESIDE]):+.3g} ms on {BESIDE!r}"
        steps.rows.append(row)
    along = Table(f"Training step on one sequence of {length} tokens ({about})", COLUMNS)
    for name in (WHOLE, HALVES):
        row = timed(name, timings[name], length)
        row["times_one"] = timings[name].speed_beside(timings[WHOLE])
        along.rows.append(row)
    for name in (PASSING, SCANNING, ADDING):
        share = 1 / timings[name].speed_beside(timings[HALVES])
        along.rows.append(timed(name, timings[name], note=f"{share:.1%} of the step"))
    return [steps, along]


def overhead(longer: Timing, shorter: Timing) -> float:
    """Milliseconds between two cases: the median over the rounds."""
    differences = sorted(longer.seconds[at] - shorter.seconds[at] for at in longer.seconds)
    return 1e3 * differences[len(differences) // 2]


if __name__ == "__main__":
    sys.exit(main())

"""Runs a function in several processes, with a limit on the time: a hang is a failure."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Each process gives up waiting for the others before the test gives up waiting for it.
WAIT, LIMIT = timedelta(seconds=60), 120.0


def launch(work: Callable[..., Any], processes: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of the processes.

    Args:
        work: a function of a module, so that other processes find it.
        processes: how many.
        folder: an empty one.
        arguments: for `work`.
    """
    folder.mkdir()
    # A server that has imported everything forks them, so that it is imported once.
    mp.get_context("forkserver").set_forkserver_preload([__name__, "anymamba.training.distributed"])
    context = mp.start_processes(
        _run,
        (processes, folder, work, arguments),
        nprocs=processes,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + LIMIT
    while not context.join(max(deadline - time.monotonic(), 0.1)):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{work.__name__} with {processes} processes hangs")
    files = [folder / f"{rank}.pt" for rank in range(processes)]
    return [torch.load(file, weights_only=False) for file in files]


def _run(
    rank: int, processes: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "meeting"), processes)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=processes, timeout=WAIT)
    try:
        torch.save(work(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()

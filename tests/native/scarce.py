"""Calls the core and the engine while there is no memory: python -m tests.native.scarce

The address space is limited and what is left of it filled with blocks, which are freed one by one
until a call succeeds. Until then it must raise MemoryError and change nothing that can be read
afterwards: at the end everything is as one call makes it. Prints how often MemoryError was raised.
"""

import contextlib
import resource
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import anymamba
from anymamba import _core
from tests.native.calls import CALLS, Array, make

BLOCKS = tuple(1 << power for power in range(20, 9, -1))


class Memory:
    """No more memory than is used, until blocks of it are freed."""

    def __init__(self) -> None:
        self._blocks: list[bytearray] = []

    def __enter__(self) -> Self:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        for size in BLOCKS:
            with contextlib.suppress(MemoryError):
                while True:
                    self._blocks.append(bytearray(size))
        return self

    def free_some(self) -> None:
        """Free the smallest blocks, and when there are none, let the process grow."""
        if self._blocks:
            del self._blocks[-max(1, len(self._blocks) // 8) :]
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (soft + (1 << 18), hard))

    def __exit__(self, *_: object) -> None:
        self._blocks.clear()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


def refusals(call: Callable[[], object]) -> int:
    """How often a call raised MemoryError before it succeeded, in a thread that keeps no memory."""
    told, ended = 0, False
    ready = threading.Event()

    def work() -> None:
        nonlocal told, ended
        # Other libraries' memory of a thread, and the C library's, is taken at first use.
        with contextlib.suppress(ValueError):
            _core.norm(*[torch.zeros(3, 3)] * 3, 1.0, *[torch.zeros(4, 4)] * 3)
        ready.wait()
        with Memory() as memory:
            while not ended:
                try:
                    call()
                    ended = True
                except MemoryError:
                    told += 1
                    memory.free_some()

    thread = threading.Thread(target=work)
    thread.start()
    ready.set()
    thread.join()
    if not ended:
        raise AssertionError("the call raised something else than MemoryError")
    return told


def of_operators() -> None:
    for name in sorted(CALLS.keys() - {"scan_checkpoint_floats", "apply"}):
        function, told = getattr(_core, name), 0
        for seed in range(6):
            rng = Random(seed)
            torch.manual_seed(seed)
            call = CALLS[name](rng)
            once = {key: made(value, rng) for key, value in call.items()}
            scarce = {key: copied(value) for key, value in once.items()}
            function(**once)
            told += refusals(partial(function, **scarce))
            for key, value in once.items():
                same = not isinstance(value, Tensor) or torch.equal(
                    value.view(torch.uint8) if value.dtype == torch.uint8 else value.nan_to_num(),
                    scarce[key] if value.dtype == torch.uint8 else scarce[key].nan_to_num(),
                )
                if not same:
                    raise AssertionError(f"{name}: {key} is another after a lack of memory")
        print(f"{name}: {told}")


def made(value: Any, rng: Random) -> Any:
    return make(value, rng, None) if isinstance(value, Array) else value


def copied(value: Any) -> Any:
    """With the same strides."""
    if not isinstance(value, Tensor):
        return value
    memory = value.untyped_storage().clone()
    return torch.empty(0, dtype=value.dtype).set_(
        memory, value.storage_offset(), value.shape, value.stride()
    )


def of_the_engine() -> None:
    ids = list(b"To be, or not to be: that is the question. " * 60)
    for weights in ("f32", "int8", "int4"):
        engine = anymamba.load(weights=weights, threads=3)
        state = engine.prefill(engine.state(), ids[:50])
        calls: dict[str, Callable[[anymamba.State], object]] = {
            "feed": lambda s: engine.prefill(s, ids),  # noqa: B023
            "logits": lambda s: engine.logits(ids[:300], s),  # noqa: B023
            "generate": lambda s: engine.generate("", max_new_tokens=1, state=s),  # noqa: B023
            "generate_batch": lambda s: engine.generate_batch([""] * 64, 2, state=s),  # noqa: B023
        }
        for name, call in calls.items():
            once, scarce = state.copy(), state.copy()
            call(once)
            told = refusals(partial(call, scarce))
            equal = once.token_count == scarce.token_count
            for part in ("ssm_states", "conv_states", "logits"):
                equal = equal and np.array_equal(getattr(once, part), getattr(scarce, part))
            if not equal:
                raise AssertionError(f"{weights} {name}: the state was advanced half")
            print(f"{weights} {name}: {told}")


if __name__ == "__main__":
    {"operators": of_operators, "engine": of_the_engine}[sys.argv[1]]()

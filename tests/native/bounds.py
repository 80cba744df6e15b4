"""Runs every function of the core on arrays beside forbidden pages: python -m tests.native.bounds

Prints what was called; dies where a kernel reads or writes outside of what it was given.
"""

import sys
from random import Random
from typing import Any

import torch

from anymamba import _core
from tests.native.calls import CALLS, Array, make
from tests.native.fence import Side
from tests.native.model_calls import mixer, model


def behind_fences(call: dict[str, Any], rng: Random) -> dict[str, Any]:
    side: Side = "end" if rng.random() < 0.7 else "begin"
    return {name: _behind_fence(value, rng, side) for name, value in call.items()}


def _behind_fence(value: Any, rng: Random, side: Side) -> Any:
    if isinstance(value, dict):
        return behind_fences(value, rng)
    return make(value, rng, side) if isinstance(value, Array) else value


def run_model(rng: Random) -> None:
    call = model(rng)
    step, read = call.pop("step"), call.pop("read")
    layers = [behind_fences(layer, rng) for layer in call.pop("layers")]
    native = _core.Model(**behind_fences(call, rng), layers=layers)
    # The arrays' only owner is the model from here on.
    del layers, call
    native.step(**behind_fences(step, rng))
    native.read(**behind_fences(read, rng))


def run_mixer(rng: Random) -> None:
    call = mixer(rng)
    step = call.pop("step")
    native = _core.Mixer(**behind_fences(call, rng))
    del call
    native.step(**behind_fences(step, rng))


def main(calls: int) -> None:
    torch.manual_seed(0)
    _core.set_threads(3)
    for isa in _core.isas():
        _core.use_isa(isa)
        for name, valid in CALLS.items():
            for seed in range(calls):
                rng = Random(f"{name} {seed}")
                print(isa, name, seed, flush=True)
                getattr(_core, name)(**behind_fences(valid(rng), rng))
        for seed in range(calls):
            print(isa, "Model", seed, flush=True)
            run_model(Random(seed))
            print(isa, "Mixer", seed, flush=True)
            run_mixer(Random(seed))


if __name__ == "__main__":
    main(int(sys.argv[1]))

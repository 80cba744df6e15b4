"""Calls the core with wrong arguments of every kind: python -m tests.native.fuzz

Prints each call before it is made, so that the last line names the one that ended the process.
A call must work or raise one of `ALLOWED`.
"""

import resource
import sys
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import _core
from tests.native.calls import CALLS, Array, make
from tests.native.model_calls import mixer as valid_mixer
from tests.native.model_calls import model as valid_model

ALLOWED = (TypeError, ValueError, BufferError)
# A call that asks for this much more memory than a test needs is a failure, not a slow machine.
MEMORY = 6 << 30
HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70)

Mutation = Callable[[Any, Random], Any]


def another_shape(value: Tensor, rng: Random) -> Tensor:
    shape = list(value.shape)
    what = rng.randrange(6)
    if what == 0:
        shape.insert(rng.randint(0, len(shape)), rng.choice([0, 1, 2]))
    elif what == 1 and shape:
        del shape[rng.randrange(len(shape))]
    elif what == 2 and shape:
        shape[rng.randrange(len(shape))] = 0
    elif shape:
        axis = rng.randrange(len(shape))
        shape[axis] = max(shape[axis] + rng.choice([-1, 1, 7]), 0)
    return torch.zeros(shape, dtype=value.dtype)


def another_type(value: Tensor, rng: Random) -> Tensor:
    types = [torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
    types += [torch.complex64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
    return torch.zeros(value.shape, dtype=rng.choice(types))


def other_strides(value: Tensor, rng: Random) -> Any:
    if not value.ndim:
        return value
    bigger = torch.zeros([2 * n + 1 for n in value.shape], dtype=value.dtype)
    strided = bigger[tuple(slice(1, 2 * n + 1, 2) for n in value.shape)]
    if rng.random() < 0.5:
        return strided.mT if value.ndim > 1 and rng.random() < 0.5 else strided
    if value.dtype not in (torch.float32, torch.int64) or value.is_meta:
        return strided
    return np.zeros(tuple(value.shape), value.detach().numpy().dtype)[::-1]


def one_number_for_all(value: Tensor, rng: Random) -> Tensor:
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def endless(value: Tensor, rng: Random) -> Tensor:
    """An extent that only stride 0 can have."""
    shape = list(value.shape) or [1]
    shape[rng.randrange(len(shape))] = rng.choice([2**31, 2**40, 2**50])
    return torch.zeros((), dtype=value.dtype).expand(shape)


def read_only(value: Tensor, rng: Random) -> Any:
    if value.dtype not in (torch.float32, torch.int64):
        return bytes(8)
    array = np.zeros(tuple(value.shape), value.numpy().dtype)
    array.flags.writeable = False
    return array


def odd_numpy(value: Tensor, rng: Random) -> Any:
    shape = tuple(value.shape)
    count = int(np.prod(shape))
    unaligned = np.frombuffer(bytearray(4 * count + 1), np.float32, count, 1).reshape(shape)
    return rng.choice(
        [
            unaligned,
            np.zeros(shape, ">f4"),
            np.zeros(shape, "f4,i4"),
            np.zeros(shape, object),
            np.zeros(shape, "S4"),
            np.zeros(shape, "M8[s]"),
            np.asfortranarray(np.zeros(shape, np.float32)),
            np.ma.masked_array(np.zeros(shape, np.float32)),
            np.float32(1),
        ]
    )


def no_array(value: Any, rng: Random) -> Any:
    return rng.choice(
        [
            None,
            0,
            -1,
            1.5,
            "x",
            b"xxxx",
            bytearray(16),
            [],
            [[1.0]],
            {},
            object,
            object(),
            (),
            torch.float32,
            torch.empty(3, device="meta"),
            torch.zeros(2).to_sparse(),
            range(3),
            torch.zeros(2, requires_grad=True),
            memoryview(b"abcd"),
            float("nan"),
            *HUGE,
        ]
    )


def another_number(value: Any, rng: Random) -> Any:
    return rng.choice([-1, 0, 1, 2, 7, -(2**31), -(2**63), *HUGE, True, 0.5, None, "silu", b""])


def wild_segments(value: Any, rng: Random) -> Tensor:
    columns = rng.randint(0, 5)
    values = [rng.choice([-(2**62), -2, -1, 0, 1, 2, 5, 80, 2**62]) for _ in range(5 * columns)]
    return torch.tensor(values, dtype=torch.int64).view(5, columns)


ON_ARRAYS: list[Mutation] = [
    another_shape,
    another_shape,
    another_type,
    other_strides,
    one_number_for_all,
    endless,
    read_only,
    odd_numpy,
    no_array,
]


def mutate(call: dict[str, Any], rng: Random) -> None:
    """Changes one argument, or makes two of them the same memory."""
    if not call:
        return
    name = rng.choice(sorted(call))
    value = call[name]
    if name == "segments":
        call[name] = rng.choice([wild_segments, no_array])(value, rng)
    elif isinstance(value, Tensor) and max(value.shape, default=0) > 1 << 20:
        call[name] = no_array(value, rng)
    elif isinstance(value, Tensor):
        others = [v for v in call.values() if isinstance(v, Tensor) and v.shape == value.shape]
        if rng.random() < 0.15:
            call[name] = rng.choice(others)
        else:
            call[name] = rng.choice(ON_ARRAYS)(value, rng)
    elif value is None:
        call[name] = rng.choice([no_array(value, rng), torch.zeros(rng.randint(0, 3))])
    elif rng.random() < 0.1:
        del call[name]
    else:
        call[name] = another_number(value, rng)


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype}{value.shape}/{value.strides}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {described(v)}' for k, v in value.items())}}}"
    return repr(value)


class Tries:
    """Counts what the calls came to."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, name: str, function: Callable[..., Any], call: dict[str, Any]) -> Any:
        print(name, described(call), flush=True)
        try:
            result = function(**call)
        except ALLOWED as error:
            self.counts[type(error).__name__] += 1
            return None
        self.counts["worked"] += 1
        return result


def materialized(call: dict[str, Any], rng: Random) -> dict[str, Any]:
    return {name: _made(value, rng) for name, value in call.items()}


def _made(value: Any, rng: Random) -> Any:
    if isinstance(value, dict):
        return materialized(value, rng)
    return make(value, rng, None) if isinstance(value, Array) else value


def fuzz_function(name: str, rng: Random, tries: Tries) -> None:
    call = materialized(CALLS[name](rng), rng)
    for _ in range(rng.randint(1, 3)):
        mutate(call, rng)
    tries(name, getattr(_core, name), call)


def fuzz_model(rng: Random, tries: Tries) -> None:
    call = valid_model(rng)
    step = materialized(call.pop("step"), rng)
    read = materialized(call.pop("read"), rng)
    layers: list[Any] = [materialized(layer, rng) for layer in call.pop("layers")]
    call = materialized(call, rng)
    weights = [part for owner in (call, *layers) for part in owner.values() if type(part) is dict]
    for _ in range(rng.randint(0, 2)):
        where = rng.choice([call, step, step, read, read, *layers, *weights])
        if isinstance(where, dict):
            mutate(where, rng)
        if rng.random() < 0.1:
            layers[rng.randrange(len(layers))] = no_array(None, rng)
    model = tries("Model", _core.Model, {**call, "layers": layers})
    del layers
    if model is not None:
        tries("Model.step", model.step, step)
        tries("Model.read", model.read, read)


def fuzz_mixer(rng: Random, tries: Tries) -> None:
    call = materialized(valid_mixer(rng), rng)
    step = call.pop("step")
    weights = [part for part in call["layer"].values() if type(part) is dict]
    for _ in range(rng.randint(0, 2)):
        mutate(rng.choice([call, step, step, call["layer"], *weights]), rng)
        if not isinstance(call.get("layer"), dict):
            break
    mixer = tries("Mixer", _core.Mixer, call)
    del call, weights
    if mixer is not None:
        tries("Mixer.step", mixer.step, step)


def fuzz_settings(rng: Random, tries: Tries) -> None:
    """The functions that take no arrays; what would only be slow is left out."""
    wild = [-1, 0, 1, 3, -(2**31), *HUGE, None, "2", 1.5, b"", [], float("inf")]
    isa = _core.isa()
    tries("use_isa", _core.use_isa, {"isa": rng.choice([*wild, "mmx", "", "avx512\0", "é"])})
    assert _core.isa() == isa
    tries("set_threads", _core.set_threads, {"threads": rng.choice([-1, 0, 1, 3, *wild[6:]])})
    _core.set_threads(2)
    sizes = {name: rng.choice([0, 1, 5, -1, *HUGE]) for name in ("b", "l", "e", "n")}
    tries("scan_checkpoint_floats", _core.scan_checkpoint_floats, sizes)
    bandwidth = {"bytes": rng.choice([-1, 0, 1, 9, 4096, 2**63 - 1, 2**70]), "repeats": 1}
    tries("read_bandwidth", _core.read_bandwidth, bandwidth)
    peak = rng.choice(["peak_float_operations", "peak_byte_operations"])
    tries(peak, getattr(_core, peak), {"repeats": rng.choice([-1, 0, 1, None, "2", 2**70])})


def main(examples: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _core.set_threads(2)
    tries = Tries()
    names = sorted([*CALLS, "Mixer", "Model", "Model", "settings"])

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(name=st.sampled_from(names), seed=st.integers(0, 2**32), isa=st.integers(0, 9))
    def one(name: str, seed: int, isa: int) -> None:
        isas = _core.isas()
        _core.use_isa(isas[isa % len(isas)])
        rng = Random(seed)
        if name == "Model":
            fuzz_model(rng, tries)
        elif name == "Mixer":
            fuzz_mixer(rng, tries)
        elif name == "settings":
            fuzz_settings(rng, tries)
        else:
            fuzz_function(name, rng, tries)

    one()
    print(dict(tries.counts))


if __name__ == "__main__":
    main(int(sys.argv[1]))

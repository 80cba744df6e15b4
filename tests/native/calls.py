"""Valid calls of every function of the core, with random sizes, types and strides."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from anymamba import _core
from tests.native.fence import Side, fenced

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float32,)


@dataclass
class Array:
    """What a parameter takes: a shape, types, and how it may lie in memory.

    `order` is "any", "rows" (the last axis without gaps), "tail" (all but the first axis without
    gaps) or "dense". `at_most` bounds what integers it holds.
    """

    shape: tuple[int, ...]
    types: tuple[torch.dtype, ...] = TYPES
    order: str = "any"
    values: Tensor | None = None


def dense(*shape: int) -> Array:
    return Array(shape, WIDE, "dense")


Call = dict[str, Any]


def make(array: Array, rng: Random, side: Side | None) -> Tensor:
    """A tensor as described, behind a fence where a side is given."""
    dtype = rng.choice(array.types)
    tensor = _laid_out(array, dtype, rng)
    if array.values is not None:
        tensor.copy_(array.values)
    else:
        tensor.copy_(torch.rand(array.shape) - 0.5)
    return tensor if side is None else fenced(tensor, side)


def _laid_out(array: Array, dtype: torch.dtype, rng: Random) -> Tensor:
    shape = array.shape
    fixed = {"any": 0, "rows": 1, "tail": len(shape) - 1, "dense": len(shape)}[array.order]
    free = list(range(len(shape) - fixed))
    rng.shuffle(free)
    strides, step = [0] * len(shape), 1
    for axis in [*reversed(range(len(shape) - fixed, len(shape))), *free]:
        gap = rng.choice([0, 0, 1, 3]) if axis in free else 0
        strides[axis] = step + gap if axis in free else step
        step = strides[axis] * max(shape[axis], 1)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    return torch.empty(max(reach, 0), dtype=dtype).as_strided(shape, strides)


def segments(rng: Random, b: int, l: int) -> tuple[Array | None, int]:
    """Rows cut into pieces, each state entered and left at most once."""
    if rng.random() < 0.5:
        return None, b
    lists: list[list[int]] = [[] for _ in range(5)]
    states = list(range(rng.randint(0, 6)))
    entered, left = list(states), list(states)
    for row in range(b):
        borders = sorted(rng.choices(range(l + 1), k=rng.randint(0, 4)))
        for start, stop in zip([0, *borders], [*borders, l], strict=True):
            into = entered.pop() if entered and rng.random() < 0.5 else -1
            out = left.pop() if left and rng.random() < 0.5 else -1
            for values, value in zip(lists, (row, start, stop, into, out), strict=True):
                values.append(value)
    table = torch.tensor(lists, dtype=torch.int64)
    return Array(tuple(table.shape), (torch.int64,), "any", table), len(states)


def maybe(rng: Random, value: Any) -> Any:
    return value if rng.random() < 0.6 else None


def scan(rng: Random) -> Call:
    b, l, groups, n = rng.randint(0, 3), rng.randint(0, 70), rng.randint(1, 3), rng.randint(1, 20)
    n = rng.choice([n, n, 16, 33])
    e = groups * rng.randint(1, 12)
    table, n_states = segments(rng, b, l)
    return {
        "x": Array((b, l, e)),
        "delta": Array((b, l, e)),
        "A": dense(e, n),
        "B": Array((b, l, groups, n)),
        "C": Array((b, l, groups, n)),
        "D": maybe(rng, dense(e)),
        "z": maybe(rng, Array((b, l, e))),
        "delta_bias": maybe(rng, dense(e)),
        "softplus": rng.random() < 0.5,
        "initial": maybe(rng, dense(n_states, e, n)),
        "segments": table,
        "n_states": n_states,
        "reverse": rng.random() < 0.5,
        "y": Array((b, l, e)),
        "last": maybe(rng, dense(n_states, e, n)),
        "checkpoints": maybe(rng, dense(_floats(b, l, e, n, table, n_states))),
    }


def _floats(b: int, l: int, e: int, n: int, table: Array | None, n_states: int) -> int:
    values = None if table is None else table.values
    floats: int = _core.scan_checkpoint_floats(b, l, e, n, values, n_states)
    return floats


def scan_backward(rng: Random) -> Call:
    call = scan(rng)
    del call["y"], call["last"], call["checkpoints"]
    (b, l, e), n, n_states = call["x"].shape, call["A"].shape[1], call["n_states"]
    groups = call["B"].shape[2]
    return call | {
        "checkpoints": dense(_floats(b, l, e, n, call["segments"], n_states)),
        "dy": Array((b, l, e)),
        "dlast": maybe(rng, dense(n_states, e, n)),
        "dx": Array((b, l, e)),
        "ddelta": Array((b, l, e)),
        "dA": dense(e, n),
        "dB": dense(b, l, groups, n),
        "dC": dense(b, l, groups, n),
        "dD": None if call["D"] is None else dense(e),
        "dz": None if call["z"] is None else Array((b, l, e)),
        "ddelta_bias": None if call["delta_bias"] is None else dense(e),
        "dinitial": None if call["initial"] is None else dense(n_states, e, n),
    }


def scan_step(rng: Random) -> Call:
    b, groups, n = rng.randint(0, 5), rng.randint(1, 3), rng.choice([1, 3, 8, 16, 17, 40])
    e = groups * rng.choice([1, 5, 16, 33, 100])
    return {
        "state": Array((b, e, n), WIDE, "tail"),
        "x": Array((b, e)),
        "delta": Array((b, e)),
        "A": dense(e, n),
        "B": Array((b, groups, n)),
        "C": Array((b, groups, n)),
        "D": maybe(rng, dense(e)),
        "z": maybe(rng, Array((b, e))),
        "delta_bias": maybe(rng, dense(e)),
        "softplus": rng.random() < 0.5,
        "y": Array((b, e)),
    }


def ssd(rng: Random) -> Call:
    b, l, groups, n = (
        rng.randint(0, 3),
        rng.choice([0, 1, 7, 64, 70]),
        rng.randint(1, 3),
        rng.randint(1, 20),
    )
    h, p, n = groups * rng.randint(1, 3), rng.choice([1, 5, 16, 70]), rng.choice([n, n, 16, 33])
    table, n_states = segments(rng, b, l)
    return {
        "x": Array((b, l, h * p)),
        "dt": Array((b, l, h)),
        **_of_heads(rng, h, p),
        "B": Array((b, l, groups, n)),
        "C": Array((b, l, groups, n)),
        "z": maybe(rng, Array((b, l, h * p))),
        "initial": maybe(rng, dense(n_states, h, p, n)),
        "segments": table,
        "n_states": n_states,
        "reverse": rng.random() < 0.5,
        "y": Array((b, l, h * p)),
        "last": maybe(rng, dense(n_states, h, p, n)),
    }


def ssd_backward(rng: Random) -> Call:
    call = ssd(rng)
    del call["y"], call["last"]
    heads, n_states = call["A"].shape[0], call["n_states"]
    states = dense(n_states, heads, call["x"].shape[2] // heads, call["B"].shape[3])
    return call | {
        "dy": Array(call["x"].shape),
        "dlast": maybe(rng, states),
        "dx": Array(call["x"].shape),
        "ddt": Array(call["dt"].shape),
        "dA": dense(heads),
        "dB": dense(*call["B"].shape),
        "dC": dense(*call["C"].shape),
        "dD": None if call["D"] is None else dense(*call["D"].shape),
        "dz": None if call["z"] is None else Array(call["z"].shape),
        "ddt_bias": None if call["dt_bias"] is None else dense(heads),
        "dinitial": maybe(rng, states),
    }


def ssd_step(rng: Random) -> Call:
    b, groups, n = rng.randint(0, 5), rng.randint(1, 3), rng.choice([1, 3, 8, 16, 17, 40])
    h, p = groups * rng.randint(1, 3), rng.choice([1, 5, 16, 33, 100])
    return {
        "state": Array((b, h, p, n), WIDE, "tail"),
        "x": Array((b, h * p)),
        "dt": Array((b, h)),
        **_of_heads(rng, h, p),
        "B": Array((b, groups, n)),
        "C": Array((b, groups, n)),
        "z": maybe(rng, Array((b, h * p))),
        "y": Array((b, h * p)),
    }


def _of_heads(rng: Random, h: int, p: int) -> Call:
    return {
        "A": dense(h),
        "D": maybe(rng, dense(h) if rng.random() < 0.5 else dense(h, p)),
        "dt_bias": maybe(rng, dense(h)),
        "softplus": rng.random() < 0.5,
        "dt_limit": rng.choice([(0.0, float("inf")), (0.1, 0.4)]),
    }


def conv(rng: Random) -> Call:
    b, l, e, k = rng.randint(0, 3), rng.randint(0, 70), rng.randint(1, 40), rng.randint(1, 7)
    table, n_states = segments(rng, b, l)
    columns = k - 1 + rng.randint(0, 3)
    return {
        "x": Array((b, l, e)),
        "weight": dense(e, k),
        "bias": maybe(rng, dense(e)),
        "silu": rng.random() < 0.5,
        "initial": maybe(rng, Array((n_states, e, columns))),
        "segments": table,
        "n_states": n_states,
        "reverse": rng.random() < 0.5,
        "y": Array((b, l, e)),
        "final": maybe(rng, Array((n_states, e, columns))),
    }


def conv_backward(rng: Random) -> Call:
    call = conv(rng)
    final = call.pop("final")
    del call["y"]
    (b, l, e), k = call["x"].shape, call["weight"].shape[1]
    return call | {
        "dy": Array((b, l, e)),
        "dfinal": None if final is None else Array(final.shape, WIDE),
        "dx": Array((b, l, e)),
        "dweight": dense(e, k),
        "dbias": maybe(rng, dense(e)),
        "dinitial": None if call["initial"] is None else Array(call["initial"].shape, WIDE),
    }


def conv_step(rng: Random) -> Call:
    b, e, k = rng.randint(0, 5), rng.choice([1, 5, 16, 33, 100]), rng.randint(1, 7)
    return {
        "x": Array((b, e)),
        "window": Array((b, e, k)),
        "weight": dense(e, k),
        "bias": maybe(rng, dense(e)),
        "silu": rng.random() < 0.5,
        "y": Array((b, e)),
    }


def norm(rng: Random) -> Call:
    rows, d = rng.randint(0, 20), rng.randint(1, 70)
    return {
        "x": Array((rows, d), order="rows"),
        "residual": maybe(rng, Array((rows, d), order="rows")),
        "weight": dense(d),
        "eps": 1e-5,
        "normed": Array((rows, d), order="rows"),
        "total": maybe(rng, Array((rows, d), order="rows")),
        "scale": maybe(rng, dense(rows)),
        "gate": maybe(rng, Array((rows, d), order="rows")),
    }


def norm_backward(rng: Random) -> Call:
    rows, d = rng.randint(0, 20), rng.randint(1, 70)
    gated = rng.random() < 0.5
    return {
        "sum": Array((rows, d), order="rows"),
        "weight": dense(d),
        "eps": 1e-5,
        "scale": dense(rows),
        "dnormed": Array((rows, d), order="rows"),
        "dtotal": maybe(rng, Array((rows, d), order="rows")),
        "dx": Array((rows, d), order="rows"),
        "dweight": dense(d),
        "gate": Array((rows, d), order="rows") if gated else None,
        "dgate": Array((rows, d), order="rows") if gated else None,
    }


def product(rng: Random) -> Call:
    m, n, k = (rng.choice([0, 1, 2, 3, 15, 16, 17, 33, 70]) for _ in range(3))
    return {
        "a": Array((m, k)),
        "b": Array((k, n)),
        "bias": maybe(rng, dense(n)),
        "c": Array((m, n)),
        "accumulate": rng.random() < 0.3,
    }


def few_rows(rng: Random) -> Call:
    m, n, k = rng.randint(0, 16), rng.choice([0, 1, 15, 16, 17, 70]), rng.choice([0, 1, 7, 33, 64])
    return {
        "x": dense(m, k),
        "weight": Array((n, k), order="rows"),
        "bias": maybe(rng, dense(n)),
        "y": dense(m, n),
    }


def quantized_weight(rng: Random, n: int, k: int) -> Call:
    """Of any group that divides k; there must be one."""
    group = rng.choice([size for size in (32, 64, 128) if k % size == 0])
    width = rng.choice([k, k // 2])
    scales = Array((n, k // group), (torch.bfloat16,), "dense")
    q = Array((n, width), (torch.uint8,), "dense", torch.randint(256, (n, width)))
    return {"q": q, "scales": scales, "minima": maybe(rng, scales)}


def quantized_product(rng: Random) -> Call:
    m, n, k = (
        rng.randint(0, 40),
        rng.choice([0, 1, 16, 17, 70]),
        rng.choice([32, 64, 96, 128, 2176]),
    )
    return {
        "x": dense(m, k),
        **quantized_weight(rng, n, k),
        "bias": maybe(rng, dense(n)),
        "y": dense(m, n),
        "few": rng.random() < 0.5,
    }


def apply(rng: Random) -> Call:
    count = rng.randint(0, 70)
    return {
        "function": rng.choice(["exp", "silu", "softplus"]),
        "x": dense(count),
        "y": dense(count),
    }


def scan_checkpoint_floats(rng: Random) -> Call:
    b, l = rng.randint(0, 3), rng.randint(0, 70)
    table, n_states = segments(rng, b, l)
    return {"b": b, "l": l, "e": 5, "n": 3, "segments": table, "n_states": n_states}


CALLS: dict[str, Callable[[Random], Call]] = {
    function.__name__: function
    for function in (
        scan,
        scan_backward,
        scan_step,
        ssd,
        ssd_backward,
        ssd_step,
        conv,
        conv_backward,
        conv_step,
        norm,
        norm_backward,
        product,
        few_rows,
        quantized_product,
        apply,
        scan_checkpoint_floats,
    )
}

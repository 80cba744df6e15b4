"""Valid calls of the core's models, of both architectures, with random sizes, types and strides."""

import itertools
from dataclasses import dataclass
from random import Random

import torch

from tests.native.calls import Array, Call, dense, maybe, quantized_weight


@dataclass
class _Sizes:
    """Those of a model's layers, some of which may be quantized."""

    rng: Random

    def __post_init__(self) -> None:
        rng = self.rng
        self.d, self.e, self.n = rng.randint(1, 20), rng.randint(1, 40), rng.randint(1, 17)
        self.quantized = rng.random() < 0.4
        if self.quantized:
            self.d, self.e = rng.choice([32, 64]), rng.choice([32, 96, 128])
        self.r, self.k, self.b = rng.randint(1, 5), rng.randint(1, 5), rng.randint(0, 20)
        # With heads it is a Mamba-2.
        self.h = (
            rng.choice([h for h in (1, 2, 4, 5) if self.e % h == 0]) if rng.random() < 0.5 else 0
        )
        self.g = rng.choice([g for g in (1, 2, 4) if self.h % g == 0])
        self.m = self.g * self.n if self.h else 0

    def weight(self, rows: int, columns: int) -> Array | Call:
        if self.quantized and columns % 32 == 0 and self.rng.random() < 0.8:
            return quantized_weight(self.rng, rows, columns)
        return Array((rows, columns), order="rows")

    def mixer(self) -> Call:
        rng, d, e, n, r = self.rng, self.d, self.e, self.n, self.r
        channels, rates = e + 2 * self.m, self.h or e
        shared = {
            "in_proj": self.weight(e + channels + self.h, d),
            "in_proj_bias": maybe(rng, dense(e + channels + self.h)),
            "in_proj_scale": maybe(rng, dense(e + channels + self.h)),
            "conv_weight": dense(channels, self.k),
            "conv_bias": maybe(rng, dense(channels)),
            "dt_bias": maybe(rng, dense(rates)),
            "D": dense(rates),
            "out_proj": self.weight(d, e),
            "out_proj_bias": maybe(rng, dense(d)),
        }
        if self.h:
            return shared | {"A_log": dense(self.h), "gated_norm": maybe(rng, dense(e))}
        return shared | {
            "x_proj": self.weight(r + 2 * n, e),
            "dt_proj": Array((e, r), order="rows"),
            "A_log": dense(e, n),
        }

    def settings(self) -> Call:
        return {"groups": self.g, "dt_limit": (0.0, float("inf"))} if self.h else {}

    def states(self, *rows: int) -> Call:
        state = (self.h, self.e // self.h, self.n) if self.h else (self.e, self.n)
        window = Array((*rows, self.e + 2 * self.m, self.k), order="dense")
        return {"conv": window, "ssm": dense(*rows, *state)}


def mixer(rng: Random) -> Call:
    """The arguments of `Mixer`, in "step" those of one step."""
    sizes = _Sizes(rng)
    b, d, n, r = sizes.b, sizes.d, sizes.n, sizes.r
    layer = sizes.mixer()
    if not sizes.h and rng.random() < 0.5:
        layer |= {"dt_norm": dense(r), "B_norm": dense(n), "C_norm": dense(n)}
    return {
        "layer": layer,
        "d": d,
        "eps": 1e-5,
        **sizes.settings(),
        "step": {
            "x": Array((b, d), order="rows"),
            **sizes.states(b),
            "y": Array((b, d), order="rows"),
            "bf16_products": rng.random() < 0.3,
        },
    }


def model(rng: Random) -> Call:
    """The arguments of `Model`, in "step" those of one step, in "read" those of a prompt."""
    sizes = _Sizes(rng)
    b, d = sizes.b, sizes.d
    v, n_layer = rng.randint(1, 40), rng.randint(1, 3)
    tokens = _whole(rng.choices(range(v), k=b))
    hidden = rng.random() < 0.3
    return {
        "embeddings": sizes.weight(v, d),
        "head": sizes.weight(v, d),
        "norm": dense(d),
        "eps": 1e-5,
        "layers": [{"norm": dense(d), **sizes.mixer()} for _ in range(n_layer)],
        **sizes.settings(),
        "step": {
            "tokens": None if hidden else tokens,
            "hidden": dense(b, d) if hidden else None,
            **sizes.states(n_layer, b),
            "logits": dense(b, v),
        },
        "read": _prompt(sizes, v, n_layer),
    }


def _prompt(sizes: _Sizes, v: int, n_layer: int) -> Call:
    rng, b, d = sizes.rng, sizes.rng.randint(0, 4), sizes.d
    lengths = [rng.choice([0, 1, 2, 5, 20]) for _ in range(b)]
    total, wanted = sum(lengths), rng.randint(0, 5)
    positions = [rng.randrange(total) for _ in range(wanted)] if total else []
    hidden = rng.random() < 0.3
    return {
        "tokens": None if hidden else _whole([rng.randrange(v) for _ in range(total)]),
        "hidden": dense(total, d) if hidden else None,
        "offsets": _whole([0, *itertools.accumulate(lengths)]),
        "positions": _whole(positions),
        **sizes.states(n_layer, b),
        "logits": dense(len(positions), v),
    }


def _whole(numbers: list[int]) -> Array:
    values = torch.tensor(numbers, dtype=torch.int64)
    return Array((len(numbers),), (torch.int64,), "dense", values)

"""What do 8- and 4-bit weights cost in perplexity, by format, way of rounding and tensor?

The bundled model reads the last tenth of a text in windows of 256 tokens, each from an empty state,
through the native kernels. What is calibrated is so on the first nine tenths.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba import load
from anymamba.assets import bundled_model
from anymamba.checkpoint import open_checkpoint, state_identity
from anymamba.checkpoint.quantization import QuantizedArray, dequantize
from anymamba.runtime.convert import Recipe, calibrate, windows_of
from anymamba.runtime.network import Network
from anymamba.runtime.state import BatchState
from anymamba.runtime.weights import Weights, load_weights
from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.tables import Column, Row, Table

WINDOW = 256
NAME = Column("name", "")
COLUMNS = (
    NAME,
    Column("bytes", "weights, kB", "{}"),
    Column("nats", "nats a token", "{:.5f}"),
    Column("perplexity", "perplexity", "{:.4f}"),
    Column("more", "over float32", "{:+.2%}"),
    Column("divergence", "divergence, 10⁻³ nats", "{:.2f}"),
)
SMALL = ("x_proj.weight", "dt_proj.weight")
LARGE = ("embeddings.weight", "in_proj.weight", "out_proj.weight")
PARTS = tuple((name,) for name in (*LARGE, *SMALL))
TEXT_TOKENS = (256, 1024, 4096, 32768)


def main() -> None:
    """Read the command line, measure, print and write."""
    made = parser("quantization", __doc__ or "")
    made.epilog = "example: python benchmarks/quantization.py tinyshakespeare.txt"
    made.add_argument("text", nargs="?", type=Path, help="the text, whose first 90 %% trained")
    arguments = made.parse_args()
    options = options_from(arguments)
    if arguments.text is None and not options.quick:
        made.error("give the text that the bundled model was trained on, tinyshakespeare.txt")
    ids = tokens_of(arguments, options.quick)
    cut = int(0.9 * ids.size)
    trial = Trial.on(ids[cut:], options.quick)
    recipes = FORMATS[:2] if options.quick else FORMATS
    machine = describe(options.quick)
    tables = [
        formats(trial, windows_of(ids[:cut]), recipes),
        tensors(trial),
        texts(trial, ids[:cut], TEXT_TOKENS[:1] if options.quick else TEXT_TOKENS),
    ]
    finish("quantization", options, machine, tables)


FORMATS = [
    (bits, group, symmetric)
    for bits in (8, 4)
    for symmetric in (True, False)
    for group in (128, 64, 32)
]


def tokens_of(arguments: argparse.Namespace, quick: bool) -> NDArray[np.int64]:
    """A token of the bundled model is a byte. A smoke run reads this script."""
    text = (arguments.text or Path(__file__)).read_bytes()
    return np.frombuffer(text[:20_000] if quick else text, np.uint8).astype(np.int64)


@dataclass
class Trial:
    """The bundled model in float32, windows of a text, and what it says of them."""

    weights: Weights
    windows: NDArray[np.int64]
    expected: NDArray[np.float32]

    @classmethod
    def on(cls, ids: NDArray[np.int64], quick: bool) -> Trial:
        """A trial on windows side by side; a smoke run takes one of them and one layer."""
        count = 1 if quick else (ids.size - 1) // WINDOW  # a rest that fills none is left out
        windows = np.stack([ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)])
        weights = load_weights(open_checkpoint(bundled_model()), "f32")
        if quick:
            weights = replace(weights, config={**weights.config, "num_hidden_layers": 1})
        trial = cls(weights, windows, np.empty(0))
        trial.expected = trial.says({})
        return trial

    def says(self, changes: Mapping[str, Any]) -> NDArray[np.float32]:
        """The log-probabilities of every next token, (windows, 256, v)."""
        tensors = {**self.weights.tensors, **changes}
        network = Network(replace(self.weights, tensors=tensors))
        empty = BatchState.empty(state_identity(self.weights.config), 1)
        logits = np.stack([network.read_all(empty.take([0]), ids[:-1]) for ids in self.windows])
        highest = logits.max(axis=-1, keepdims=True)
        summed = np.exp(logits - highest, dtype=np.float64).sum(axis=-1, keepdims=True)
        return (logits - highest - np.log(summed)).astype(np.float32)

    def row(self, name: str, changes: Mapping[str, Any]) -> Row:
        """How the model predicts with some of its tensors changed."""
        found = self.says(changes)
        nats, before = (nats_of(said, self.windows) for said in (found, self.expected))
        lost = np.exp(self.expected, dtype=np.float64) * (self.expected - found)
        tensors: dict[str, Any] = {**self.weights.tensors, **changes}
        return {
            "name": name,
            "bytes": round(sum(tensor.nbytes for tensor in tensors.values()) / 1000),
            "nats": nats,
            "perplexity": math.exp(nats),
            "more": math.expm1(nats - before),
            "divergence": 1e3 * float(lost.sum(axis=-1).mean()),
        }

    def folder(self, matrices: Mapping[str, Any]) -> dict[str, Any]:
        """What a folder with these large matrices holds: the small ones are bfloat16 there."""
        stored = load_weights(open_checkpoint(bundled_model()), "bf16").tensors
        return {name: stored[name] for name in stored if name.endswith(SMALL)} | dict(matrices)

    def rounded(self, recipe: Recipe, endings: tuple[str, ...] = LARGE) -> dict[str, Any]:
        """Tensors of some names, quantized without a text."""
        tensors: dict[str, Any] = dict(self.weights.tensors)
        return {n: quantized(t, recipe, n) for n, t in tensors.items() if n.endswith(endings)}


def nats_of(said: NDArray[np.float32], windows: NDArray[np.int64]) -> float:
    """The mean loss."""
    return -float(np.take_along_axis(said, windows[:, 1:, None], -1).mean(dtype=np.float64))


def quantized(weight: NDArray[np.float32], recipe: Recipe, name: str) -> QuantizedArray:
    """By itself; rows that are shorter than a group are filled up with zeros."""
    missing = -weight.shape[1] % recipe.group
    return recipe.rounded(np.pad(weight, ((0, 0), (0, missing))), name)


def formats(trial: Trial, text_bl: NDArray[np.int64], chosen: list[tuple[int, int, bool]]) -> Table:
    """Bits, groups and offsets, rounded in four ways."""
    table = Table("Formats, and ways of rounding", COLUMNS)
    stored = load_weights(open_checkpoint(bundled_model()), "bf16").tensors
    table.rows = [trial.row("float32", {}), trial.row("bfloat16", stored)]
    for bits, group, symmetric in chosen:
        kind = f"int{bits}, groups of {group}{'' if symmetric else ', offset'}"
        for search in (False, True) if bits == 4 else (False,):
            recipe = Recipe(bits, group, symmetric, search)  # type: ignore[arg-type]
            way = ", range search" if search else ""
            table.rows.append(trial.row(kind + way, trial.folder(trial.rounded(recipe))))
            fed_back = dict(calibrate(float32_of(trial), trial.weights.config, text_bl, recipe))
            table.rows.append(trial.row(f"{kind}{way}, error feedback", trial.folder(fed_back)))
    return table


def tensors(trial: Trial) -> Table:
    """One kind of tensor alone, to the nearest, in groups of 128, activations not rounded."""
    columns = [column for column in COLUMNS if column.key != "bytes"]
    table = Table("One kind of tensor alone, activations left in float32", columns)
    for bits in (8, 4):
        recipe = Recipe(bits, 128, search=False)  # type: ignore[arg-type]
        for endings in (*PARTS, LARGE):
            name = " and ".join(ending.removesuffix(".weight") for ending in endings)
            changes = {n: widened(trial, n, t) for n, t in trial.rounded(recipe, endings).items()}
            table.rows.append(trial.row(f"int{bits} {name}", changes))
    return table


def widened(trial: Trial, name: str, weight: QuantizedArray) -> NDArray[np.float32]:
    """The numbers that a quantized weight stands for, without what it was filled up with."""
    columns = trial.weights.tensors[name].shape[1]
    return np.ascontiguousarray(dequantize(weight)[:, :columns])


def texts(trial: Trial, ids: NDArray[np.int64], lengths: tuple[int, ...]) -> Table:
    """How much text the error feedback needs, and whether it may be the model's own."""
    table = Table("int4, groups of 128, range search and error feedback: by the text", COLUMNS)
    recipe = Recipe(4, 128)
    for length in lengths:
        text_bl = windows_of(ids, WINDOW, length // WINDOW)
        changes = dict(calibrate(float32_of(trial), trial.weights.config, text_bl, recipe))
        table.rows.append(
            trial.row(f"{text_bl.size:,} tokens of the training text", trial.folder(changes))
        )
    count = max(lengths) // WINDOW
    own = load(weights="f32").generate_batch([[10]] * count, WINDOW, temperature=1.0, seed=1)
    own_bl = np.array([text.ids for text in own])
    changes = dict(calibrate(float32_of(trial), trial.weights.config, own_bl, recipe))
    table.rows.append(
        trial.row(f"{own_bl.size:,} tokens that the model wrote", trial.folder(changes))
    )
    return table


def float32_of(trial: Trial) -> Any:
    """Tensors by name."""
    return trial.weights.tensors.get


if __name__ == "__main__":
    main()

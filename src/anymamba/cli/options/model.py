"""The options that name a model and say how its weights are held."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from anymamba.arithmetic import MATMUL_DTYPES
from anymamba.cli.options.fields import integer_option, offline_flag, option
from anymamba.runtime.native import MOST_THREADS

WEIGHTS = ("auto", "f32", "bf16", "int8", "int4")
MODEL = ("the model",)
COMPUTING = ("computing",)
of_model = partial(option, group=MODEL)
of_computing = partial(option, group=COMPUTING)


def threads_option(**facts: Any) -> Any:
    """A field for `--threads` (`-t`)."""
    return integer_option(
        *("--threads", "-t"),
        high=MOST_THREADS,
        help="how many threads compute (default: ANYMAMBA_NUM_THREADS, else one a core)",
        **facts,
    )


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: str | None = of_model(
        *("--model", "-m"),
        metavar="FOLDER",
        help="a folder, a GGUF file, or a name on the hub (default: the bundled one)",
    )
    tokenizer: str | None = of_model(
        "--tokenizer",
        metavar="FOLDER",
        help="a folder with a tokenizer.json, or that file, if the model comes without one",
    )
    offline: bool = offline_flag(group=MODEL)


@dataclass(frozen=True)
class AdapterOptions(ModelOptions):
    """Which model, with an adapter."""

    adapter: str | None = of_model(
        "--adapter",
        metavar="FOLDER",
        help="a LoRA or DoRA adapter, merged on loading; without --model its own model is used",
    )


@dataclass(frozen=True)
class EngineOptions(ModelOptions):
    """Which model, and how the runtime computes."""

    weights: str = of_computing(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="the type of the weights in memory; int8 and int4 quantize on loading; auto: as "
        "stored",
    )
    matmul_dtype: str | None = of_computing(
        "--matmul-dtype",
        choices=MATMUL_DTYPES,
        help="the type of activations that are multiplied with bfloat16 weights; bfloat16 is "
        "coarser, and faster on some processors (default: ANYMAMBA_MATMUL_DTYPE, else float32)",
    )
    deterministic: bool = of_computing(
        "--deterministic",
        action="store_true",
        help="compute the same bits for a text whatever is computed beside it; 8- and 4-bit "
        "weights always do, with others a token takes up to a fifth longer",
    )
    threads: int | None = threads_option(group=COMPUTING)

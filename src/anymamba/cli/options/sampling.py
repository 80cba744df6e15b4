"""The options that say how the next token is chosen, and when a text ends."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from anymamba.cli.options.argument_types import integer, number
from anymamba.cli.options.fields import integer_option, option
from anymamba.cli.terminal.output import tell

# Of these, options and settings have the same names.
SETTINGS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)

# What is used where neither the command line nor the model's generation_config.json says more.
DEFAULTS: dict[str, float] = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}

HIGHEST_ID = 2**31 - 1

END = ("the end of the text",)
CHOICE = (
    "choosing the next token",
    "What is not given here is taken from the model's generation_config.json, if it sets it.",
)
of_choice = partial(option, group=CHOICE)


def stop_string(text: str) -> str:
    """An argument that is not empty: an empty one would stop before the first token."""
    if not text:
        raise argparse.ArgumentTypeError("a stop string cannot be empty")
    return text


def logit_bias(text: str) -> tuple[int, float]:
    """A token and what is added to its logit, as in `50=-100`."""
    token, sign, bias = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is no ID=X, such as 50=-100")
    return integer(0, HIGHEST_ID)(token), number(-1e6, 1e6)(bias)


@dataclass(frozen=True)
class SamplingOptions:
    """When a text ends, and how its tokens are chosen; None where nothing was given."""

    max_new_tokens: int = integer_option(
        *("--max-new-tokens", "-n"), default=200, help="default 200", group=END
    )
    stop: Sequence[str] = option(
        "--stop",
        action="append",
        default=[],
        type=stop_string,
        metavar="TEXT",
        help="end before this text; may be given several times",
        group=END,
    )
    stop_id: Sequence[int] = option(
        "--stop-id",
        action="append",
        default=[],
        type=integer(0, HIGHEST_ID),
        metavar="ID",
        help="end at this token; may be given several times",
        group=END,
    )
    temperature: float | None = of_choice(
        "--temperature",
        type=number(0, 1e6),
        metavar="T",
        help="0 always takes the most likely token; default 0.8",
    )
    top_k: int | None = integer_option(
        "--top-k",
        low=0,
        metavar="K",
        help="sample from the K most likely tokens; 0: from all",
        group=CHOICE,
    )
    top_p: float | None = of_choice(
        "--top-p",
        type=number(0, 1, above_low=True),
        metavar="P",
        help="sample from the most likely tokens that together have probability P",
    )
    min_p: float | None = of_choice(
        "--min-p",
        type=number(0, 1),
        metavar="P",
        help="sample from tokens at least P times as likely as the most likely",
    )
    typical_p: float | None = of_choice(
        "--typical-p",
        type=number(0, 1, above_low=True),
        metavar="P",
        help="sample from the most typical tokens that together have probability P",
    )
    repetition_penalty: float | None = of_choice(
        "--repetition-penalty",
        type=number(1e-6, 1e6),
        metavar="X",
        help="above 1 makes tokens that occurred before less likely",
    )
    presence_penalty: float = of_choice(
        "--presence-penalty",
        type=number(-1000, 1000),
        default=0.0,
        metavar="X",
        help="subtracted from the logit of each token that occurred before",
    )
    frequency_penalty: float = of_choice(
        "--frequency-penalty",
        type=number(-1000, 1000),
        default=0.0,
        metavar="X",
        help="subtracted from a token's logit once for each time it occurred",
    )
    logit_bias: Sequence[tuple[int, float]] = of_choice(
        "--logit-bias",
        action="append",
        default=[],
        type=logit_bias,
        metavar="ID=X",
        help="add X to a token's logit; may be given several times",
    )
    seed: int | None = integer_option(
        "--seed", low=0, help="the same number gives the same text", group=CHOICE
    )


def sampling_settings(options: SamplingOptions, suggested: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the runtime names them, with what was not given filled in, and told.

    Where no seed was given, one is drawn.

    Args:
        options: what was given.
        suggested: what the model's generation_config.json sets.
    """
    settings = {name: getattr(options, name) for name in SETTINGS}
    if options.seed is None:
        settings["seed"] = random.getrandbits(32)
    used = {name: value for name, value in suggested.items() if settings.get(name) is None}
    if used:
        words = ", ".join(f"{name} {value:g}" for name, value in used.items())
        tell(f"anymamba: as the model's generation_config.json says: {words}")
    for name, default in DEFAULTS.items():
        if settings[name] is None:
            settings[name] = used.get(name, default)
    return settings | {
        "logit_bias": dict(options.logit_bias),
        "stop": tuple(options.stop),
        "stop_ids": tuple(options.stop_id),
    }

"""The options that say how the next token is chosen, and when a text ends."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from typing import Any

from anymamba.cli.options.argument_types import integer, number
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

__all__ = ["add_length_arguments", "add_sampling_arguments", "sampling_settings"]


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare when the text ends."""
    group = parser.add_argument_group("the end of the text")
    group.add_argument(
        "--max-new-tokens", "-n", type=integer(1), default=200, metavar="N", help="default 200"
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        type=stop_string,
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    group.add_argument(
        "--stop-id",
        action="append",
        default=[],
        type=integer(0, 2**31 - 1),
        metavar="ID",
        help="end at this token; may be given several times",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how the next token is chosen."""
    group = parser.add_argument_group(
        "choosing the next token",
        "What is not given here is taken from the model's generation_config.json, if it sets it.",
    )
    option = group.add_argument
    probability = number(0, 1, above_low=True)
    option(
        "--temperature",
        type=number(0, 1e6),
        metavar="T",
        help="0 always takes the likeliest token; default 0.8",
    )
    option("--top-k", type=integer(0), metavar="K", help="among the K likeliest; 0: all")
    option(
        "--top-p",
        type=probability,
        metavar="P",
        help="among the likeliest that together have probability P",
    )
    option(
        "--min-p",
        type=number(0, 1),
        metavar="P",
        help="among those at least P times as likely as the likeliest",
    )
    option(
        "--typical-p",
        type=probability,
        metavar="P",
        help="among the most typical that together have probability P",
    )
    add_penalty_arguments(group)
    option("--seed", type=integer(0), metavar="N", help="the same number gives the same text")


def add_penalty_arguments(group: argparse._ActionsContainer) -> None:
    """Declare what makes tokens more or less likely before one is chosen."""
    group.add_argument(
        "--repetition-penalty",
        type=number(1e-6, 1e6),
        metavar="X",
        help="above 1 makes tokens that were there before less likely",
    )
    group.add_argument(
        "--presence-penalty",
        type=number(-1000, 1000),
        default=0.0,
        metavar="X",
        help="taken from the logit of each token that was there before",
    )
    group.add_argument(
        "--frequency-penalty",
        type=number(-1000, 1000),
        default=0.0,
        metavar="X",
        help="taken from a token's logit as many times as it was there",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        type=logit_bias,
        metavar="ID=X",
        help="add X to a token's logit; may be given several times",
    )


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
    return integer(0, 2**31 - 1)(token), number(-1e6, 1e6)(bias)


def sampling_settings(
    arguments: argparse.Namespace, suggested: Mapping[str, Any]
) -> dict[str, Any]:
    """The options as the runtime names them, with what was not given filled in, and told.

    Args:
        arguments: the options; changed, so that they hold what is used. Where no seed was given
            one is drawn.
        suggested: what the model's generation_config.json sets.
    """
    if arguments.seed is None:
        arguments.seed = random.getrandbits(32)
    given = {name: getattr(arguments, name) for name in DEFAULTS}
    used = {name: value for name, value in suggested.items() if given.get(name) is None}
    if used:
        words = ", ".join(f"{name} {value:g}" for name, value in used.items())
        tell(f"anymamba: as the model's generation_config.json says: {words}")
    for name, value in given.items():
        chosen = used.get(name, DEFAULTS[name]) if value is None else value
        setattr(arguments, name, chosen)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings["logit_bias"] = dict(arguments.logit_bias)
    settings["stop"] = tuple(arguments.stop)
    settings["stop_ids"] = tuple(arguments.stop_id)
    return settings

"""`anymamba generate`: continue a text with a model, showing it as it comes."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anymamba.cli.figures import figures_line, figures_of
from anymamba.cli.generation import Continuation, continue_text
from anymamba.cli.loading import load_model, load_tokenizer
from anymamba.cli.prompt import prompt_from
from anymamba.cli.quiet import quiet
from anymamba.cli.text_stream import TextStream
from anymamba.cli.values import integer, number
from anymamba.errors import InputError

if TYPE_CHECKING:
    from anymamba import MambaForCausalLM

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Continue a text. What the model writes goes to standard output as it comes, without the prompt;
figures go to standard error when it is done.

Without PROMPT the prompt is read from standard input. One line end at its end is dropped there,
as `echo` adds it. An empty prompt is continued where the model knows a token for the beginning
of a text; the bundled model has none and asks for a prompt.
"""
EXAMPLES = """\
examples:
  anymamba generate "ROMEO:" --max-new-tokens 300
  echo "Mamba is" | anymamba generate --model state-spaces/mamba-130m-hf --temperature 0
  anymamba generate "ROMEO:" --stop "JULIET:" --json
"""
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba generate`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue")
    parser.add_argument("--model", help="a folder, or a name on the hub (default: the bundled one)")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="a folder with a tokenizer.json, or that file, if the model comes without one",
    )
    parser.add_argument(
        "--max-new-tokens", type=integer(1), default=200, metavar="N", help="default 200"
    )
    parser.add_argument(
        "--echo", action="store_true", help="print the prompt before what continues it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        type=stop_string,
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    add_sampling_arguments(parser)
    add_machine_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how the next token is chosen."""
    group = parser.add_argument_group("choosing the next token")
    group.add_argument(
        "--temperature",
        type=number(0),
        default=0.8,
        metavar="T",
        help="0 always takes the likeliest token; default 0.8",
    )
    group.add_argument(
        "--top-k", type=integer(0), default=0, metavar="K", help="among the K likeliest (0: all)"
    )
    group.add_argument(
        "--top-p",
        type=number(0, 1, above_low=True),
        default=1.0,
        metavar="P",
        help="among the likeliest that together have probability P",
    )
    group.add_argument(
        "--min-p",
        type=number(0, 1),
        default=0.0,
        metavar="P",
        help="among those at least P times as likely as the likeliest",
    )
    group.add_argument(
        "--repetition-penalty",
        type=number(0, above_low=True),
        default=1.0,
        metavar="X",
        help="above 1 makes tokens that were there before less likely",
    )
    group.add_argument(
        "--seed", type=integer(0), metavar="N", help="the same number gives the same text"
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where and how the model is computed."""
    group = parser.add_argument_group("computing")
    group.add_argument("--device", default="cpu", help="where PyTorch computes; default cpu")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type of the weights; auto: as stored, but float32 on a CPU",
    )


def stop_string(text: str) -> str:
    """An argument that is not empty: an empty one would stop before the first token."""
    if not text:
        raise argparse.ArgumentTypeError("a stop string cannot be empty")
    return text


def run(arguments: argparse.Namespace) -> None:
    """Load the model, continue the prompt, and print."""
    from anymamba.assets import bundled_model
    from anymamba.checkpoint import resolve

    prompt = prompt_from(arguments.prompt)
    if arguments.seed is None:
        arguments.seed = random.getrandbits(32)
    with quiet():
        folder = resolve(bundled_model() if arguments.model is None else arguments.model)
        tokenizer = load_tokenizer(Path(arguments.tokenizer or folder))
        prompt_tokens = tokenizer.encode(prompt).ids
        model = load_model(folder, arguments.device, arguments.dtype)
        prompt_tokens = prompt_tokens or [first_token(model)]
        check_vocabulary(model, prompt_tokens)
        stream = TextStream(tokenizer.decode, ignore if arguments.json else write, arguments.stop)
        if arguments.echo and not arguments.json:
            write(prompt)
        continuation = write_continuation(model, prompt_tokens, stream, arguments)
    figures = figures_of(len(prompt_tokens), continuation)
    if arguments.json:
        result = {
            "model": "bundled" if arguments.model is None else arguments.model,
            "prompt": prompt,
            "text": stream.text,
            "prompt_tokens": prompt_tokens,
            "new_tokens": continuation.tokens,
            "ended_by": continuation.ended_by,
            "seed": arguments.seed,
            "figures": figures,
        }
        print(json.dumps(result))
    else:
        print(figures_line(figures), file=sys.stderr)


def write_continuation(
    model: MambaForCausalLM,
    prompt_tokens: list[int],
    stream: TextStream,
    arguments: argparse.Namespace,
) -> Continuation:
    """Let the model write, and see that the last line is ended, after Ctrl-C too."""
    try:
        return continue_text(model, prompt_tokens, stream, arguments)
    finally:
        if not arguments.json and not stream.text.endswith("\n"):
            write("\n")


def first_token(model: MambaForCausalLM) -> int:
    """The token to begin a text with when the prompt is empty."""
    token = model.config.bos_token_id
    if token is None:
        raise InputError(
            "the prompt is empty, and this model has no token for the beginning of a text: "
            "give at least one character"
        )
    return int(token)


def check_vocabulary(model: MambaForCausalLM, prompt_tokens: list[int]) -> None:
    """Refuse tokens that the model does not have."""
    if max(prompt_tokens) >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer does not belong to the model: it makes token {max(prompt_tokens)} of "
            f"the prompt, and the model has {model.config.vocab_size} tokens"
        )


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def ignore(text: str) -> None:
    """Write nothing."""

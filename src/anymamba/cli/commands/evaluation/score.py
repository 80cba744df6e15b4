"""`anymamba score`: how well a model predicts a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anymamba.cli.by_position import PositionOptions, refuse_alone, run_by_position
from anymamba.cli.load_engine import model_name, open_engine
from anymamba.cli.options.fields import option
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence
from anymamba.errors import InputError

if TYPE_CHECKING:
    from anymamba.runtime.engine import Engine

DESCRIPTION = """\
Tell how well a model predicts a text: each token from all tokens before it. The first token is
predicted only where the tokenizer puts one before it, and does not count otherwise. Perplexity
depends on the tokenizer; bits per byte compare models with different ones.
"""
EXAMPLES = """\
examples:
  anymamba score book.txt
  anymamba score book.txt --weights int4 --json
  tail -c 100000 book.txt | anymamba score - --model ./my-model
  anymamba score book.txt --by-position --window 2048 --stride 256 --plot losses.png
"""


@dataclass(frozen=True)
class Options(PositionOptions):
    """What `anymamba score` is asked for."""

    file: str = option(metavar="FILE", help="UTF-8 text; - is standard input")


def run(options: Options) -> None:
    """Score, and print."""
    from anymamba.cli.terminal.table import table
    from anymamba.cli.text.files import read_text

    if not options.by_position:
        refuse_alone(options)
    text = read_text(options.file)
    if options.by_position:
        run_by_position(options, text)
        return
    with silence():
        engine = open_engine(options)
        figures = score_text(engine, text)
    if options.json:
        facts = {"model": model_name(options), "weights": engine.weight_type}
        print(json_line(facts | figures))
        return
    per_byte = figures["bits_per_byte"]
    rows = [
        ("perplexity", f"{figures['perplexity']:.4f}"),
        ("nats per token", f"{figures['nats_per_token']:.4f}"),
        ("bits per token", f"{figures['bits_per_token']:.4f}"),
        ("bits per byte", "no bytes to count" if per_byte is None else f"{per_byte:.4f}"),
        ("tokens", f"{figures['tokens']:,} predicted, {figures['bytes']:,} bytes"),
    ]
    say(table(rows))


def score_text(engine: Engine, text: str) -> dict[str, Any]:
    """A model's figures for a text."""
    score = engine.score(text)
    predicted = len(score.logprobs)
    if not predicted:
        raise InputError("the text is too short to be scored: nothing predicts its first token")
    count = predicted_bytes(engine, text, score.ids, predicted)
    return {
        "perplexity": score.perplexity,
        "nats": score.nats,
        "nats_per_token": score.nats / predicted,
        "bits_per_token": score.nats / predicted / math.log(2),
        "bits_per_byte": score.nats / count / math.log(2) if count > 0 else None,
        "tokens": predicted,
        "bytes": count,
    }


def predicted_bytes(engine: Engine, text: str, ids: list[int], predicted: int) -> int:
    """How many bytes of a text its last tokens stand for: what comes before them was given.

    Where the cut is within a character, the bytes left of it, three at most, are shown as
    U+FFFD, one each.
    """
    data = text.encode("utf-8")
    for skip_special in (False, True):
        end = engine.detokenize(ids[len(ids) - predicted :], skip_special)
        for strays in range(4):
            count = len(end[strays:].encode("utf-8")) + strays
            if count <= len(data) and data[len(data) - count :].decode(errors="replace") == end:
                return count
    # The tokenizer rewrites texts, as by dropping accents.
    given = engine.detokenize(ids[: len(ids) - predicted])
    return max(0, len(data) - len(given.encode("utf-8")))

"""`anymamba lambada`: how often a model knows the last word of a passage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from anymamba.cli.load_engine import beginning_tokens, model_name, open_engine
from anymamba.cli.options.fields import flag, integer_option, option
from anymamba.cli.options.model import EngineOptions
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence
from anymamba.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from anymamba.cli.text.passages import Passage
    from anymamba.runtime.engine import Engine

DESCRIPTION = """\
Test a model on the last words of passages, as the LAMBADA benchmark does (Paperno et al. 2016).
FILE has a JSON object with a "text" a line. A word counts as known if each of its tokens is the
likeliest after those before it. Perplexity is that of whole words.
"""
EXAMPLES = """\
examples:
  anymamba lambada lambada_test.jsonl --model state-spaces/mamba-130m-hf
  anymamba lambada lambada_test.jsonl --model ./my-model --weights int4 --limit 500 --json
"""


@dataclass(frozen=True)
class Options(EngineOptions):
    """What `anymamba lambada` is asked for."""

    file: str = option(metavar="FILE", help="JSON lines; - is standard input")
    limit: int | None = integer_option("--limit", help="take the first N passages only")
    json: bool = flag("--json", "print one JSON object")
    quiet: bool = flag("--quiet", "show no progress")


def run(options: Options) -> None:
    """Test, and print."""
    from anymamba.cli.terminal.progress import Progress
    from anymamba.cli.terminal.table import table
    from anymamba.cli.text.files import read_blocks, size_of
    from anymamba.cli.text.passages import passages_in

    total = size_of([options.file]) if options.limit is None else None
    sizes: list[int] = []
    blocks = read_blocks(options.file, sizes.append)
    passages = islice(passages_in(blocks, options.file), options.limit)
    with silence():
        engine = open_engine(options)
        with Progress(total, visible=not options.quiet) as progress:
            result = test(engine, passages, lambda tokens: progress.show(sum(sizes), tokens))
    facts = {"model": model_name(options), "weights": engine.weight_type} | result.as_json()
    if options.json:
        print(json_line(facts))
        return
    right = f"{facts['accuracy']:.4f} ({result.right:,} of {result.passages:,})"
    rows = [("accuracy", right), ("perplexity", f"{result.perplexity:.2f}")]
    say(table(rows))


@dataclass
class Result:
    """What came of the passages so far."""

    passages: int = 0
    right: int = 0
    nats: float = 0.0

    @property
    def perplexity(self) -> float:
        """Among how many equally likely words the model would have chosen."""
        from anymamba.runtime.scoring import perplexity_of

        return perplexity_of(self.nats / self.passages)

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            "passages": self.passages,
            "right": self.right,
            "accuracy": self.right / self.passages,
            "perplexity": self.perplexity,
        }


def test(engine: Engine, passages: Iterable[Passage], show: Callable[[int], object]) -> Result:
    """Let the model predict the last word of each passage; tell how many tokens it has read."""
    result = Result()
    tokens = 0
    for passage in passages:
        known, nats, length = predict(engine, passage)
        result.passages += 1
        result.right += known
        result.nats += nats
        tokens += length
        show(tokens)
    if not result.passages:
        raise InputError("there are no passages to test on")
    return result


def predict(engine: Engine, passage: Passage) -> tuple[bool, float, int]:
    """Whether the model knows a last word, its surprise in nats, and how many tokens it read.

    The word's tokens are those that the whole passage has beyond the context's.
    """
    before = beginning_tokens(engine)
    whole = engine.tokenize(passage.context + passage.last_word, special=False)
    length = min(len(engine.tokenize(passage.context, special=False)), len(whole) - 1)
    context, word = before + whole[:length], whole[length:]
    state = engine.prefill(engine.state(), context)
    assert state.logits is not None
    first_v = state.logits.copy()
    known, nats = True, 0.0
    for logits_v, token in zip([first_v, *engine.logits(word[:-1], state)], word, strict=True):
        known = known and int(logits_v.argmax()) == token
        nats += log_of_sum(logits_v) - float(logits_v[token])
    return known, nats, len(context) + len(word)


def log_of_sum(logits_v: NDArray[np.float32]) -> float:
    """What is taken from logits to make log-probabilities of them."""
    import numpy as np

    from anymamba.runtime.generation import check_numbers

    largest = logits_v.max()
    check_numbers(largest)
    return float(largest) + math.log(np.exp(logits_v - largest).sum(dtype=np.float64))

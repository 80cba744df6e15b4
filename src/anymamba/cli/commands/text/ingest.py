"""`anymamba ingest`: read texts of any length into a state, once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from anymamba.checkpoint.io import check_writable
from anymamba.cli.load_engine import beginning_state, beginning_tokens, model_name, open_engine
from anymamba.cli.options.fields import flag, option
from anymamba.cli.options.model import EngineOptions
from anymamba.cli.peak_memory import peak_memory
from anymamba.cli.summary import rate
from anymamba.cli.terminal.output import json_line, tell
from anymamba.cli.terminal.silence import silence
from anymamba.errors import StateError

if TYPE_CHECKING:
    from anymamba.cli.terminal.progress import Progress
    from anymamba.runtime.engine import Engine
    from anymamba.runtime.state import State

DESCRIPTION = """\
Read texts into a state and store it. The state has the same size however long the texts are, and
so has the memory that reading takes. `generate --state` and `chat --state` continue from it at
once. Files are read one after another with nothing between them; - is standard input.
"""
EXAMPLES = """\
examples:
  anymamba ingest book.txt --save-state book.state
  anymamba ingest part1.txt part2.txt --save-state both.state --model ./my-model
  tail -n 1000 log.txt | anymamba ingest - --state book.state --save-state more.state
"""

CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Options(EngineOptions):
    """What `anymamba ingest` is asked for."""

    files: Sequence[str] = option(nargs="+", metavar="FILE", help="UTF-8 text, or -")
    save_state: str = option(
        "--save-state", required=True, metavar="FILE", help="where the state goes"
    )
    state: str | None = option("--state", metavar="FILE", help="the state to go on from")
    json: bool = flag("--json", "print one JSON object at the end")
    quiet: bool = flag("--quiet", "show no progress")


def run(options: Options) -> None:
    """Read, store, and tell how it went."""
    from anymamba.cli.terminal.progress import Progress
    from anymamba.cli.text.files import read_once, size_of

    check_writable(options.save_state, StateError)
    read_once(options.files)
    total = size_of(options.files)
    with silence():
        engine = open_engine(options)
        state = beginning_state(engine, options.state)
        start = time.perf_counter()
        with Progress(total, visible=not options.quiet) as progress:
            reader = Reader(engine, state, progress)
            for name in options.files:
                reader.read(name)
        seconds = time.perf_counter() - start
        state.save(options.save_state)
    figures = {
        "tokens": reader.tokens,
        "bytes": reader.bytes,
        "tokens_per_second": rate(reader.tokens, seconds),
        "peak_memory_bytes": peak_memory(),
    }
    report(options, figures)


class Reader:
    """Feeds files to a state, and counts.

    Args:
        engine: the model.
        state: advanced in place.
        progress: told after each chunk of tokens.
    """

    def __init__(self, engine: Engine, state: State, progress: Progress) -> None:
        self.bytes = 0
        self.tokens = 0
        self._fed_bytes = 0
        self._engine = engine
        self._state = state
        self._progress = progress

    def read(self, name: str) -> None:
        """Feed one file."""
        from anymamba.cli.text.files import read_blocks
        from anymamba.cli.text.streaming_tokenizer import texts_of_blocks

        if self._state.token_count == 0:
            self._feed(beginning_tokens(self._engine), 0)
        encode = partial(self._engine.tokenize, special=False)
        for text in texts_of_blocks(read_blocks(name, self._count), encode):
            self._feed(encode(text), len(text.encode("utf-8")))

    def _feed(self, tokens: Sequence[int], size: int) -> None:
        # In chunks, between which progress is shown: that of the model, as the file itself is
        # read far ahead of it.
        for start in range(0, len(tokens), CHUNK_TOKENS):
            chunk = tokens[start : start + CHUNK_TOKENS]
            self._engine.prefill(self._state, chunk)
            self.tokens += len(chunk)
            share = (start + len(chunk)) / len(tokens)
            self._progress.show(self._fed_bytes + int(size * share), self.tokens)
        self._fed_bytes += size

    def _count(self, size: int) -> None:
        self.bytes += size


def report(options: Options, figures: dict[str, float | int | None]) -> None:
    """Tell what was read and where it is."""
    if options.json:
        result = {"model": model_name(options), "state": options.save_state}
        print(json_line(result | {"figures": figures}))
        return
    speed, memory = figures["tokens_per_second"], figures["peak_memory_bytes"]
    parts = [f"read: {figures['tokens']} tokens" + (f", {speed:.1f} tokens/s" if speed else "")]
    if memory is not None:
        parts.append(f"peak memory: {memory / 1e6:.0f} MB")
    tell("; ".join([*parts, f"state: {options.save_state}"]))

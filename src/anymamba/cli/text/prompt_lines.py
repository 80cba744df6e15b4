"""`anymamba generate --prompts FILE`: continue many prompts side by side, JSON lines in and out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

from anymamba.checkpoint.io import parse_json_lines
from anymamba.cli.load_engine import beginning_state, open_engine
from anymamba.cli.options.sampling import sampling_settings
from anymamba.cli.summary import ended_by
from anymamba.cli.terminal.output import tell, write
from anymamba.cli.text.files import read_blocks
from anymamba.errors import BackendError, InputError

if TYPE_CHECKING:
    from anymamba.cli.commands.text.generate import Options
    from anymamba.runtime.engine import Engine

ROWS = 16
ANSWER = {"text", "new_tokens", "ended_by"}


def continue_prompts(options: Options, weights: str) -> None:
    """Write one JSON line for each prompt, in their order, as soon as its batch is done.

    All prompts are read and checked first, so that a mistake in the last line costs no work.
    """
    refuse_others(options)
    assert options.prompts is not None
    records = list(records_in(options.prompts))
    engine = open_engine(replace(options, weights=weights))
    settings = sampling_settings(options, engine.suggested_sampling)
    state = beginning_state(engine, options.state)
    seed = settings["seed"]
    start, new_tokens = time.perf_counter(), 0
    pending = iter(enumerate(records))
    while batch := list(islice(pending, options.batch or ROWS)):
        # Prompt i draws with the seed of the options plus i, in whichever batch it is.
        settings["seed"] = seed + batch[0][0]
        prompts = [record["prompt"] for _, record in batch]
        results = engine.generate_batch(prompts, state=state, **settings)
        for (_, record), result in zip(batch, results, strict=True):
            new_tokens += len(result.ids)
            answer = {
                "text": result.text,
                "new_tokens": result.ids,
                "ended_by": ended_by(result.finish_reason),
            }
            write(json.dumps(record | answer) + "\n")
    report(engine, len(records), new_tokens, time.perf_counter() - start)


def refuse_others(options: Options) -> None:
    """Refuse options that say something about a single prompt, or need PyTorch."""
    if options.device != "cpu":
        raise BackendError("--prompts needs the native core and --device cpu")
    for name, nothing in (("prompt", None), ("echo", False), ("save_state", None), ("json", False)):
        if getattr(options, name) != nothing:
            shown = "PROMPT" if name == "prompt" else "--" + name.replace("_", "-")
            raise InputError(f"{shown} and --prompts exclude each other: give one of them")


def records_in(name: str) -> Iterator[dict[str, Any]]:
    """Each line's object with its prompt; a line that is a JSON string is a prompt too."""
    for value, where in parse_json_lines(read_blocks(name), repr(name), _refuse_constant):
        record = {"prompt": value} if isinstance(value, str) else value
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise InputError(
                f'{where} is neither a text nor an object with a "prompt", which must not be empty'
            )
        if taken := sorted(ANSWER & record.keys()):
            raise InputError(f"{where} has a field {taken[0]!r}, which the answer has: rename it")
        yield record


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity, which Python reads, and which would come out as no JSON."""
    raise ValueError(f"{name} is no number there")


def report(engine: Engine, prompts: int, new_tokens: int, seconds: float) -> None:
    """Tell the figures."""
    speed = f", {new_tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
    tell(f"{prompts} prompts; new: {new_tokens} tokens{speed}; {engine.weight_type} weights")

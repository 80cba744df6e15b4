"""`anymamba info`: describe a model or a state on disk, or what this machine offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anymamba.cli.options.fields import flag, offline_flag, option
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence

DESCRIPTION = """\
With MODEL, describe a model: what it is built of, how large it and its state are, and its files.
With the file of a state, tell how much it has read, and of which model it is. No weights are
loaded, and PyTorch is not needed. Without MODEL, describe this installation.
"""
EXAMPLES = """\
examples:
  anymamba info
  anymamba info ./my-model
  anymamba info book.state
  anymamba info state-spaces/mamba-130m-hf --json
"""


@dataclass(frozen=True)
class Options:
    """What `anymamba info` is asked for."""

    model: str | None = option(
        nargs="?", metavar="MODEL", help="a folder, a GGUF file, a state file, or a name on the hub"
    )
    offline: bool = offline_flag()
    json: bool = flag("--json", "print one JSON object")


def run(options: Options) -> None:
    """Describe, and print."""
    with silence():
        facts, as_text = describe(options.model, options.offline)
    say(json_line(facts) if options.json else as_text(facts))


def describe(
    model: str | None, offline: bool
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], str]]:
    """What there is to say, and how to say it to people."""
    if model is None:
        from anymamba.cli.describe import machine as about_machine

        return about_machine.describe(), about_machine.as_text
    from anymamba.checkpoint.gguf import find_gguf
    from anymamba.checkpoint.io import user_path

    file = user_path(model)
    gguf = find_gguf(file)
    if gguf is not None and gguf.is_file():
        from anymamba.cli.describe import gguf as about_gguf

        return about_gguf.describe(gguf), about_gguf.as_text
    if file.is_file():
        from anymamba.cli.describe import state as about_state

        return about_state.describe(file), about_state.as_text
    from anymamba.cli.describe import model as about_model

    return about_model.describe(model, offline=offline), about_model.as_text

"""`anymamba download`: fetch a model from the hub, once."""

from __future__ import annotations

import os
from dataclasses import dataclass

from anymamba.cli.options.fields import flag, offline_flag, option
from anymamba.cli.terminal.silence import silence

DESCRIPTION = """\
Download a model from the Hugging Face hub, with a progress bar, to where all commands and Python
look for it by its name. Only the files that AnyMamba reads are fetched, and pickled weights only
where there are no others. What was downloaded before is not fetched again, and a download that was
interrupted goes on. `anymamba models` lists models to begin with.
"""
EXAMPLES = """\
examples:
  anymamba download state-spaces/mamba-130m-hf
  anymamba generate "Mamba is" -m state-spaces/mamba-130m-hf --offline

HF_HUB_CACHE moves the place, HF_TOKEN opens private models, HF_ENDPOINT names another hub.
"""


@dataclass(frozen=True)
class Options:
    """What `anymamba download` is asked for."""

    model: str = option(metavar="ID", help="a name on the hub, such as owner/model")
    revision: str | None = option("--revision", metavar="NAME", help="a branch, tag or commit")
    offline: bool = offline_flag()
    json: bool = flag("--json", "print one JSON object")


def run(options: Options) -> None:
    """Download, and say where it is."""
    from anymamba.checkpoint import open_checkpoint, resolve
    from anymamba.cli.terminal.output import json_line, say, tell
    from anymamba.cli.terminal.sizes import bytes_in, size

    if not options.json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    with silence():
        folder = resolve(options.model, revision=options.revision, offline=options.offline)
        checkpoint = open_checkpoint(folder)  # what is broken shows now, and not on first use
    count = bytes_in(folder)
    facts = {
        "model": options.model,
        "folder": str(folder),
        "bytes": count,
        "pickled": checkpoint.pickled,
    }
    if options.json:
        print(json_line(facts))
        return
    say(f"{folder}: {size(count)}")
    if checkpoint.pickled:
        local_name = options.model.rstrip("/").rpartition("/")[2]
        tell(
            "its weights are pickled; make a folder that loads at once: "
            f"anymamba convert {options.model} ./{local_name}"
        )
    else:
        tell(f'try it: anymamba generate "Mamba is" -m {options.model}')

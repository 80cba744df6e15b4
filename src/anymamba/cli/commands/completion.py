"""`anymamba completion`: a script that lets a shell complete commands, options and values."""

from __future__ import annotations

from dataclasses import dataclass

from anymamba.cli.options.fields import flag, option
from anymamba.cli.terminal.output import json_line

DESCRIPTION = """\
Print a script that lets a shell complete commands, options, their values and file names. It is
made from the commands as they are in this version.
"""
EXAMPLES = """\
examples:
  anymamba completion bash > ~/.local/share/bash-completion/completions/anymamba
  anymamba completion zsh > ~/.zfunc/_anymamba
  anymamba completion fish > ~/.config/fish/completions/anymamba.fish
"""
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Options:
    """What `anymamba completion` is asked for."""

    shell: str = option(choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    json: bool = flag("--json", "print one JSON object")


def run(options: Options) -> None:
    """Print the script."""
    from anymamba.cli.completion_scripts import SCRIPTS

    script = SCRIPTS[options.shell]()
    print(json_line({"shell": options.shell, "script": script}) if options.json else script)

"""The completion scripts of three shells, made from the commands' argument parsers."""

from __future__ import annotations

import argparse
from argparse import Action
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from anymamba.cli.main import COMMANDS, build_parser

_FILES = ("FILE", "FOLDER", "MODEL", "DATA", "DST", "SRC DST")


@dataclass(frozen=True)
class Command:
    """A command, its options, and its other arguments."""

    name: str
    options: list[Action]
    arguments: list[Action]


def command_tree() -> list[Command]:
    """Every command. Imports all of their modules, which no other command does."""
    top = build_parser(COMMANDS)
    (branches,) = (action.choices for action in top._actions if isinstance(action.choices, dict))
    return [
        Command(
            name,
            [action for action in parser._actions if action.option_strings],
            [action for action in parser._actions if not action.option_strings],
        )
        for name, parser in branches.items()
    ]


def choices_of(action: Action) -> str:
    """The values that an option may have; empty where they are not a list."""
    return " ".join(map(str, action.choices or ()))


def takes_value(action: Action) -> bool:
    """Whether a value follows an option."""
    return action.nargs != 0


def takes_file(action: Action) -> bool:
    """Whether a value is the name of a file or folder."""
    return action.metavar in _FILES


def help_of(action: Action) -> str:
    """What an option does, in a line."""
    return (action.help or "").replace("%%", "%")


def bash() -> str:
    """A function for bash: first what the option before the cursor takes, then all options."""
    commands = command_tree()
    names = " ".join(command.name for command in commands)
    return f"""\
# bash completion for anymamba; made by: anymamba completion bash
_anymamba() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}"
    local command="${{COMP_WORDS[1]}}" options="" values="" files=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        mapfile -t COMPREPLY < <(compgen -W "{names} --help --version" -- "$word")
        return
    fi
    case "$command" in
{"".join(map(bash_command, commands))}    esac
    case "$command $before" in
{"".join(line for command in commands for line in bash_values(command))}    esac
    case "$word" in
        -*) mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word") ;;
        *) mapfile -t COMPREPLY < <(
            compgen -W "$values" -- "$word" || true
            if [ -n "$files" ]; then compgen -f -- "$word"; fi
        ) ;;
    esac
}}
complete -o filenames -F _anymamba anymamba"""


def bash_command(command: Command) -> str:
    """What stands after a command where no option waits for its value."""
    options = " ".join(name for option in command.options for name in option.option_strings)
    values = " ".join(filter(None, map(choices_of, command.arguments)))
    files = "yes" if any(map(takes_file, command.arguments)) else ""
    return f'        {command.name}) options="{options}" values="{values}" files="{files}" ;;\n'


def bash_values(command: Command) -> Iterable[str]:
    """What stands after each option that waits for a value."""
    for option in command.options:
        if takes_value(option):
            names = " | ".join(f'"{command.name} {name}"' for name in option.option_strings)
            values, files = choices_of(option), "yes" if takes_file(option) else ""
            yield f'        {names}) options="" values="{values}" files="{files}" ;;\n'


def zsh() -> str:
    """A function for zsh, which knows about options itself and is told what there are."""
    commands = command_tree()
    summaries = "\n".join(
        "        " + quoted(f"{command.name}:{COMMANDS[command.name]}") for command in commands
    )
    return f"""\
#compdef anymamba
# zsh completion for anymamba; made by: anymamba completion zsh
_anymamba() {{
    local -a commands
    commands=(
{summaries}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local command="$words[2]"
    shift words
    (( CURRENT -= 1 ))
    case "$command" in
{"".join(map(zsh_command, commands))}    esac
}}
if [ "$funcstack[1]" = "_anymamba" ]; then _anymamba "$@"; else compdef _anymamba anymamba; fi"""


def zsh_command(command: Command) -> str:
    """One command's call of zsh's `_arguments`."""
    specifications = [
        quoted(f"{repeats(option)}{name}[{escaped(help_of(option))}]{zsh_value(option)}")
        for option in command.options
        for name in option.option_strings
    ]
    specifications += [quoted(f"*{zsh_value(argument)}") for argument in command.arguments[:1]]
    lines = " \\\n            ".join(specifications)
    return f"        {command.name})\n            _arguments \\\n            {lines} ;;\n"


def repeats(option: Action) -> str:
    """What zsh wants before an option that may be given several times."""
    return "*" if isinstance(option, argparse._AppendAction) else ""


def zsh_value(option: Action) -> str:
    """What zsh completes as an option's value."""
    if not takes_value(option):
        return ""
    if option.choices:
        return f":value:({choices_of(option)})"
    return ":file:_files" if takes_file(option) else ":value: "


def escaped(text: str) -> str:
    """Text for between the brackets of zsh's specifications."""
    for sign in "\\[]:":
        text = text.replace(sign, f"\\{sign}")
    return text


def fish() -> str:
    """fish takes one line an option."""
    lines = ["# fish completion for anymamba; made by: anymamba completion fish"]
    lines.append("complete -c anymamba -f")
    for command in command_tree():
        first, summary = quoted("__fish_use_subcommand"), quoted(COMMANDS[command.name])
        lines.append(f"complete -c anymamba -n {first} -a {command.name} -d {summary}")
        here = f"complete -c anymamba -n {quoted(f'__fish_seen_subcommand_from {command.name}')}"
        lines += [f"{here} {fish_option(option)}" for option in command.options]
        lines += [f"{here} {value}" for value in map(fish_value, command.arguments) if value]
    return "\n".join(lines)


def fish_option(option: Action) -> str:
    """An option in fish's words."""
    parts = [
        f"-l {name.removeprefix('--')}" if name.startswith("--") else f"-s {name[1:]}"
        for name in option.option_strings
    ]
    if takes_value(option):
        parts += ["-r" if takes_file(option) else "-x", fish_value(option)]
    return " ".join(part for part in [*parts, f"-d {quoted(help_of(option))}"] if part)


def fish_value(option: Action) -> str:
    """What fish completes as a value."""
    if option.choices:
        return f"-a {quoted(choices_of(option))}"
    return "-F" if takes_file(option) else ""


def quoted(text: str) -> str:
    """One word of the shell. fish reads a backslash before a quote inside of quotes, and so
    takes the same way out of them as the others."""
    return "'" + text.replace("'", "'\\''") + "'"


SCRIPTS: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}

"""The completion scripts of three shells."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from anymamba.cli.command_tree import Command, Option, command_tree


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
    options = " ".join(name for option in command.options for name in option.names)
    values = " ".join(choice for argument in command.arguments for choice in argument.choices)
    files = "yes" if any(argument.takes_file for argument in command.arguments) else ""
    return f'        {command.name}) options="{options}" values="{values}" files="{files}" ;;\n'


def bash_values(command: Command) -> Iterable[str]:
    """What stands after each option that waits for a value."""
    for option in command.options:
        if option.takes_value:
            names = " | ".join(f'"{command.name} {name}"' for name in option.names)
            values, files = " ".join(option.choices), "yes" if option.takes_file else ""
            yield f'        {names}) options="" values="{values}" files="{files}" ;;\n'


def zsh() -> str:
    """A function for zsh, which knows about options itself and is told what there are."""
    commands = command_tree()
    summaries = "\n".join(
        "        " + quoted(f"{command.name}:{command.summary}") for command in commands
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
        quoted(f"{'*' if option.repeats else ''}{name}[{escaped(option.help)}]{zsh_value(option)}")
        for option in command.options
        for name in option.names
    ]
    specifications += [quoted(f"*{zsh_value(argument)}") for argument in command.arguments[:1]]
    lines = " \\\n            ".join(specifications)
    return f"        {command.name})\n            _arguments \\\n            {lines} ;;\n"


def zsh_value(option: Option) -> str:
    """What zsh completes as an option's value."""
    if not option.takes_value:
        return ""
    if option.choices:
        return f":value:({' '.join(option.choices)})"
    return ":file:_files" if option.takes_file else ":value: "


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
        first = quoted("__fish_use_subcommand")
        lines.append(
            f"complete -c anymamba -n {first} -a {command.name} -d {quoted(command.summary)}"
        )
        here = f"complete -c anymamba -n {quoted(f'__fish_seen_subcommand_from {command.name}')}"
        lines += [f"{here} {fish_option(option)}" for option in command.options]
        lines += [f"{here} {value}" for value in map(fish_value, command.arguments) if value]
    return "\n".join(lines)


def fish_option(option: Option) -> str:
    """An option in fish's words."""
    parts = [
        f"-l {name.removeprefix('--')}" if name.startswith("--") else f"-s {name[1:]}"
        for name in option.names
    ]
    if option.takes_value:
        parts += ["-x" if not option.takes_file else "-r", fish_value(option)]
    return " ".join(part for part in [*parts, f"-d {quoted(option.help)}"] if part)


def fish_value(option: Option) -> str:
    """What fish completes as a value."""
    if option.choices:
        return f"-a {quoted(' '.join(option.choices))}"
    return "-F" if option.takes_file else ""


def quoted(text: str) -> str:
    """One word of the shell. fish reads a backslash before a quote inside of quotes, and so
    takes the same way out of them as the others."""
    return "'" + text.replace("'", "'\\''") + "'"


SCRIPTS: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}

"""What shells are told about the commands."""

import shutil
import subprocess

import pytest

from anymamba.cli.completion_scripts import SCRIPTS
from anymamba.cli.main import COMMANDS, build_parser
from anymamba.cli.options.model import WEIGHTS
from tests.support import processes

BASH = shutil.which("bash")


def options_of(command):
    """The options, as the parser's own help lists them."""
    text = build_parser([command])._subparsers._group_actions[0].choices[command].format_usage()
    return {word.strip("[]|()") for word in text.split() if word.strip("[(").startswith("--")}


def completed(*words):
    """What bash offers in place of the last word, asked as bash asks."""
    program = (
        'source /dev/stdin <<<"$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _anymamba; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = processes.run(
        BASH, "-euc", program, "bash", SCRIPTS["bash"](), "anymamba", *words, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


needs_bash = pytest.mark.skipif(BASH is None, reason="bash is not installed")


@needs_bash
def test_bash_completes_commands():
    assert completed("") == {*COMMANDS, "--help", "--version"}
    assert completed("in") == {name for name in COMMANDS if name.startswith("in")}


@needs_bash
@pytest.mark.parametrize("command", COMMANDS)
def test_bash_completes_every_option(command):
    offered = completed(command, "--")
    assert options_of(command) <= offered
    assert offered == {option for option in offered if f"{option}\\b" and option.startswith("--")}


@needs_bash
def test_bash_completes_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").touch()
    assert completed("generate", "--weights", "") == set(WEIGHTS)
    assert completed("generate", "--weights", "int") == {"int8", "int4"}
    assert completed("generate", "--max-new-tokens", "") == set()
    assert completed("ingest", "") == {"book.txt"}
    assert completed("ingest", "book.txt", "--save-state", "b") == {"book.txt"}
    assert completed("completion", "") == {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize("command", COMMANDS)
def test_other_shells_know_every_option(shell, command):
    script = SCRIPTS[shell]()
    for option in options_of(command):
        name = option if shell == "zsh" else f"-l {option.removeprefix('--')} "
        assert name in script
    assert COMMANDS[command] in script


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_are_sound(shell):
    script = SCRIPTS[shell]()
    assert script.isascii()
    interpreter = shutil.which(shell)
    if interpreter is not None:
        subprocess.run([interpreter, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_command_prints_the_script(shell, anymamba):
    done = anymamba("completion", shell)
    assert (done.status, done.err, done.out) == (0, "", SCRIPTS[shell]() + "\n")


def test_an_unknown_shell_is_refused(anymamba):
    assert "'tcsh'" in anymamba("completion", "tcsh").complaint

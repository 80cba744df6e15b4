"""The dispatcher: what it imports, how it complains, how it ends."""

import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from anymamba import __version__
from anymamba.cli import main as main_module
from anymamba.cli.main import COMMANDS, build_parser, main
from anymamba.errors import InputError
from tests.support import processes
from tests.support.cli import buffered
from tests.support.processes import imported_by


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_import_nothing_slow(argument):
    program = (
        "from anymamba.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
    )
    slow = {"torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "safetensors"}
    assert not slow & imported_by(program, argument)


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"anymamba {__version__}\n"


def test_the_command_is_the_one_that_minds_early_interrupts():
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert settings["project"]["scripts"] == {"anymamba": "anymamba.__main__:main"}


def test_python_m_is_the_same_program():
    command = [sys.executable, "-m", "anymamba", "--version"]
    assert subprocess.check_output(command, text=True) == f"anymamba {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help_text_with_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"\n  anymamba {command}" in shown.partition("examples:")[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fly"], "there is no command 'fly' (see anymamba --help)"),
        (["generat"], "there is no command 'generat'; did you mean generate?"),
        (["--fly"], "there is no option --fly (see anymamba --help)"),
        (["info", "--fly"], "there is no option --fly (see anymamba info --help)"),
        (["generate", "-x"], "there is no option -x"),
        (
            ["generate", "a", "--temprature=0.5"],
            "there is no option --temprature; did you mean --temperature? "
            "(see anymamba generate --help)",
        ),
        (["train", "--learning-rat", "1", "--bacth", "2"], "did you mean --batch?"),
        (["info", "a", "b"], "'b' is one argument too many (see anymamba info --help)"),
        (["--version=3"], "see anymamba --help"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, named, anymamba):
    assert named in anymamba(*arguments).complaint


def test_without_arguments_the_help_is_shown(anymamba):
    done = anymamba()
    assert (done.status, done.err) == (0, "")
    assert done.out == build_parser([]).format_help()


@pytest.mark.parametrize(
    ("short", "option", "value"),
    [("-m", "model", "nowhere"), ("-n", "max_new_tokens", "7"), ("-t", "threads", "1")],
)
def test_short_names_of_the_commonest_options(short, option, value):
    for command in ("generate", "chat"):
        arguments = build_parser([command]).parse_args([command, short, value])
        assert str(getattr(arguments, option)) == value


def test_an_error_of_many_lines_is_printed_in_one(monkeypatch, anymamba):
    def fail(argv):
        raise InputError("first\n  second\nthird")

    monkeypatch.setattr(main_module, "run_command", fail)
    assert anymamba("info").complaint == "anymamba: first second third\n"


def test_an_interrupt_is_quiet(monkeypatch, anymamba):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "run_command", interrupt)
    done = anymamba("info")
    assert (done.status, done.out, done.err) == (130, "", "")


def test_an_interrupt_while_the_program_is_imported_is_quiet():
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'argparse': raise KeyboardInterrupt\n"
        "from anymamba.__main__ import main\n"
        "assert 'argparse' not in sys.modules\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.exit(main())\n"
    )
    done = processes.python("-c", program, "info")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["models"], ["generate", "a"]])
def test_a_closed_pipe_is_quiet(arguments):
    """The reader is gone before the first byte, which is the worst case."""
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    done = subprocess.run(
        [sys.executable, "-m", "anymamba", *arguments],
        env=buffered(),
        stdout=writing_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_without_a_character_does_not_end_the_program():
    program = (
        "import sys\n"
        "from anymamba.cli import main as m\n"
        "m.run_command = lambda argv: print('caf\\u00e9')\n"
        "sys.exit(m.main([]))\n"
    )
    done = processes.python("-c", program, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf?\n", "")


def test_a_pipe_that_is_closed_on_windows(monkeypatch):
    """There it is called an invalid argument."""

    def run(argv):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(main_module, "run_command", run)
    monkeypatch.setattr(main_module, "forget", lambda stream: None)
    with pytest.raises(OSError, match="Invalid argument"):
        main([])
    monkeypatch.setattr(main_module, "os", SimpleNamespace(name="nt"))
    assert main([]) == 141


@pytest.mark.skipif(os.name != "posix", reason="locales as POSIX has them")
def test_files_and_pipes_get_utf_8_whatever_the_locale():
    """As commands read it; Windows would write its code page, and its ends of lines."""
    program = (
        "import sys\n"
        "from anymamba.cli import main as m\n"
        "assert sys.stdout.encoding.lower() not in ('utf-8', 'utf8')\n"
        "sys.stdout.reconfigure(newline='\\r\\n')\n"
        "m.run_command = lambda argv: print('caf\\u00e9 \\U0001f40d')\n"
        "sys.exit(m.main([]))\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"}
    done = processes.python("-c", program, env=environment | plain, text=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == "caf\u00e9 \U0001f40d\n".encode()


def test_a_defect_of_the_program_is_not_hidden():
    """Status 1 and a traceback, which is what there is to report."""
    program = (
        "import sys\n"
        "from anymamba.cli import main as m\n"
        "m.run_command = lambda argv: 1 / 0\n"
        "sys.exit(m.main([]))\n"
    )
    done = processes.python("-c", program)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_prompt_may_be_a_command_s_name():
    program = (
        "import sys\n"
        "from anymamba.cli.main import main\n"
        "status = main(['generate', 'chat', '--max-new-tokens', '1'])\n"
        "assert 'anymamba.cli.commands.text.chat' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    assert processes.python("-c", program).returncode == 0


@pytest.mark.parametrize("status", ["0", "1", "2", "130", "141"])
def test_the_help_text_tells_what_the_exit_status_means(status, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"\n  {status} " in capsys.readouterr().out.partition("exit status:")[2]

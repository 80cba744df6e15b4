"""`anymamba run` is `python` with the drop-in: compared with `python` itself."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support import processes
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

PYTHON = [sys.executable]
RUN = [sys.executable, "-m", "anymamba", "run"]

PROGRAM = '''
"""A program that tells what it sees, and ends as it is told to."""
import os, sys

def fail():
    raise LookupError("not found")

names = sorted(name for name in globals() if name != "__warningregistry__")
print(sys.argv, sys.path[0], __name__, __file__, __package__, __doc__, names)
print(sys.modules["__main__"].fail is fail, sys.stdout.errors, file=sys.stderr)
match sys.argv[1:]:
    case ["exit", status]: sys.exit(int(status))
    case ["message"]: sys.exit("a message")
    case ["fail"]: fail()
    case ["chain"]:
        try: fail()
        except LookupError as error: raise RuntimeError("and then") from error
    case ["refuse"]:
        from anymamba.errors import InputError
        raise InputError("this is the program's own affair")
    case ["hook"]:
        sys.excepthook = lambda *caught: print("hooked", caught[0].__name__, caught[2].tb_lineno)
        fail()
'''


def outcome(command: list[str], folder: Path) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = processes.run(*command, cwd=folder, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "program.py").write_text(PROGRAM)
    (tmp_path / "inner" / "broken.py").write_text("x = (\n")
    (tmp_path / "inner" / "__main__.py").write_text(PROGRAM)
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        "inner/program.py",
        "inner/program.py -m --help -- --force x",
        "inner/program.py exit 0",
        "inner/program.py exit 7",
        "inner/program.py message",
        "inner/program.py fail",
        "inner/program.py chain",
        "inner/program.py refuse",
        "inner/program.py hook",
        "inner/broken.py",
        "inner fail",
        "packed.zip fail",
        "-m inner.program",
        "-m inner.program --help -m x",
        "-m inner.program fail",
        "-m inner exit 3",
        "-m no_such_module",
    ],
)
def test_a_program_runs_as_under_python(arguments: str, folder: Path) -> None:
    words = arguments.split()
    assert outcome(RUN + words, folder) == outcome(PYTHON + words, folder)


def test_an_interrupted_program_shows_where(folder: Path) -> None:
    (folder / "program.py").write_text("def wait():\n    raise KeyboardInterrupt\nwait()\n")
    status, _, shown = outcome([*RUN, "program.py"], folder)
    # Python ends itself by the signal, which a shell reports as 130.
    assert status == 130
    assert shown == outcome([*PYTHON, "program.py"], folder)[2]


def test_a_link_leads_to_the_modules_beside_the_script(folder: Path) -> None:
    (folder / "inner" / "beside.py").write_text("NAME = 'beside'\n")
    (folder / "inner" / "linked.py").write_text("import beside; print(beside.NAME)\n")
    (folder / "link.py").symlink_to(folder / "inner" / "linked.py")
    assert outcome([*RUN, "link.py"], folder) == (0, "beside\n", "")


def test_the_programs_threads_and_exit_functions_still_see_it(folder: Path) -> None:
    (folder / "program.py").write_text(
        "import atexit, sys\n"
        "def last(): print(sys.modules['__main__'].last is last)\n"
        "atexit.register(last)\n"
    )
    assert outcome([*RUN, "program.py"], folder) == (0, "True\n", "")


@pytest.mark.parametrize("option", [[], ["--no-decode-steps"]])
def test_decode_steps_have_a_switch(option: list[str], folder: Path) -> None:
    (folder / "program.py").write_text(
        "import sys\nprint('MixersFinder' in [type(f).__name__ for f in sys.meta_path])\n"
    )
    assert outcome([*RUN, *option, "program.py"], folder) == (0, f"{not option}\n", "")


def test_the_drop_in_is_active(folder: Path, warm: Warm) -> None:
    (folder / "program.py").write_text(
        "import importlib.metadata, anymamba.dropin, causal_conv1d, sys\n"
        "from anymamba.cli.main import main\n"
        "assert anymamba.dropin.is_installed()\n"
        "print(importlib.metadata.version('causal-conv1d'), causal_conv1d.__name__)\n"
        "main(['info'])\n"
    )
    status, said, complaint = outcome([warm.python, *RUN[1:], "program.py"], folder)
    assert (status, complaint) == (0, "")
    first, *rest = said.splitlines()
    assert first == "1.7.0 anymamba.dropin.causal_conv1d"
    assert [line.split(maxsplit=2)[2] for line in rest if line.startswith("drop in")] == [
        "active: mamba_ssm and causal_conv1d are AnyMamba's"
    ]


SPAWNING = """
import importlib.metadata, multiprocessing, sys
# Installed, or this fails in each process that imports this module anew.
version = importlib.metadata.version("causal-conv1d")

def look(depth):
    print(depth, __name__, version, flush=True)
    if depth < 2:
        start(look, depth + 1)

def make_on_cuda(depth):
    import causal_conv1d, torch
    print(causal_conv1d.__name__, torch.zeros(1, device="cuda").device, flush=True)

def start(function, depth):
    process = multiprocessing.get_context(sys.argv[1]).Process(target=function, args=(depth,))
    process.start()
    process.join()
    assert process.exitcode == 0

if __name__ == "__main__":
    start(globals()[sys.argv[2]], 1)
"""


@pytest.mark.parametrize("words", ["program.py", "-m program"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_started_anew_have_it_too(
    method: str, words: str, tmp_path: Path
) -> None:
    """As all of multiprocessing's are on macOS and Windows; and those that they start in turn."""
    (tmp_path / "program.py").write_text(SPAWNING)
    status, printed, shown = outcome([*RUN, *words.split(), method, "look"], tmp_path)
    assert status == 0, shown
    assert printed.splitlines() == ["1 __mp_main__ 1.7.0", "2 __mp_main__ 1.7.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_processes_that_are_started_anew_have_cuda_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SPAWNING)
    command = [*RUN, "program.py", "spawn", "make_on_cuda"]
    status, printed, shown = outcome(command, tmp_path)
    assert (status, printed) == (0, "anymamba.dropin.causal_conv1d cpu\n"), shown


FORK = "import selective_scan_cuda\nNAME = 'of the fork'\n"


@pytest.mark.parametrize(
    ("words", "said", "told"),
    [
        ("program.py", "of the fork", "is the program's own, from"),
        ("-m program", "of the fork", "is the program's own, from"),
        ("--force program.py", "None", "is passed over: --force"),
    ],
)
def test_a_package_beside_the_program_goes_first(
    words: str, said: str, told: str, tmp_path: Path, warm: Warm
) -> None:
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(FORK)
    (tmp_path / "causal_conv1d").mkdir()  # a clone without modules, which Python passes over
    (tmp_path / "program.py").write_text(
        "import causal_conv1d, mamba_ssm, selective_scan_cuda\n"
        "print(getattr(mamba_ssm, 'NAME', None), selective_scan_cuda.__name__)\n"
        "print(causal_conv1d.__name__)\n"
    )
    status, printed, shown = outcome([warm.python, *RUN[1:], *words.split()], tmp_path)
    assert (status, printed.splitlines()) == (
        0,
        [f"{said} anymamba.dropin.selective_scan_cuda", "anymamba.dropin.causal_conv1d"],
    )
    assert told in shown
    assert shown.startswith("anymamba: ")
    assert shown.count("\n") == 1


def test_an_installed_fork_is_left_alone_where_asked(tmp_path: Path) -> None:
    (tmp_path / "site" / "mamba_ssm").mkdir(parents=True)
    (tmp_path / "site" / "mamba_ssm" / "__init__.py").write_text(FORK)
    (tmp_path / "program.py").write_text("import mamba_ssm\nprint(mamba_ssm.__name__)\n")
    path = ["env", f"PYTHONPATH={tmp_path / 'site'}"]
    asked = outcome([*path, *RUN, "--own", "mamba_ssm", "program.py"], tmp_path)
    assert asked == (0, "mamba_ssm\n", "")
    assert outcome([*path, *RUN, "program.py"], tmp_path)[1] == "anymamba.dropin.mamba_ssm\n"


CUDA_FROM_THE_START = """
import importlib.util, os, sys
assert "torch" not in sys.modules
assert importlib.util.find_spec("torch")  # as libraries find out whether it is installed
os.environ["SET_BEFORE_TORCH"] = "1"
import torch
x = torch.zeros(2, device="cuda")
import threading
thread = threading.Thread(target=lambda: print(x.cuda().device, torch.ones(1).to(0).device))
thread.start()
thread.join()
import torch._dynamo  # which looks through PyTorch's functions, those that are stood in for too
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_is_the_cpu_before_the_first_import_of_the_packages(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CUDA_FROM_THE_START)
    status, printed, shown = outcome([*RUN, "program.py"], tmp_path)
    assert (status, printed) == (0, "cpu cpu\n"), shown
    assert shown == "anymamba: no CUDA here: what this program puts there is on the CPU\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "anymamba: anymamba run needs a script (see anymamba run --help)"),
        (["-m"], "anymamba: anymamba run needs a module after -m (see anymamba run --help)"),
        (
            ["absent.py", "--help"],
            "anymamba: cannot open the program 'absent.py': No such file or directory",
        ),
    ],
)
def test_a_missing_program_is_named_in_one_line(
    words: list[str], complaint: str, tmp_path: Path
) -> None:
    assert outcome(RUN + words, tmp_path) == (2, "", complaint + "\n")

"""How a command starts: what it imports, and what it does without."""

import pytest

from anymamba.cli.main import COMMANDS, module_of
from tests.cli.options.test_common_options import arguments
from tests.support import processes

# What takes long to import, or is not there in a plain installation.
SLOW = {
    *("torch", "transformers", "jinja2", "huggingface_hub", "httpx", "requests", "tqdm", "yaml"),
    *("safetensors", "gguf", "asyncio", "multiprocessing", "email", "http", "ssl", "sqlite3"),
    *("unittest", "xml", "importlib.metadata", "concurrent"),
}


def imported_by(*arguments, before=""):
    """The modules that are there when a command has ended, which it must do well."""
    program = f"{before}\nfrom anymamba.cli.main import main\nassert main(sys.argv[1:]) == 0"
    return processes.imported_by(program, *arguments)


# These write models, train, run other programs, serve, or need a network.
LONG = {"quantize", "convert", "merge", "run", "train", "finetune", "evaluate", "download", "serve"}


@pytest.mark.parametrize("command", sorted({*COMMANDS} - LONG))
def test_a_command_imports_nothing_slow(command, tiny, tmp_path):
    modules = imported_by(*arguments(command, tiny, tmp_path))
    assert SLOW & modules == set()
    if command != "completion":  # which has to look at all
        others = {module_of(name) for name in COMMANDS if name != command}
        assert others & modules == set()
    if command in ("info", "completion"):
        assert "numpy" not in modules


def test_generate_imports_only_what_it_needs():
    modules = imported_by("generate", "ROMEO:", "--max-new-tokens", 1)
    unneeded = {"quantization", "calibration", "gguf_reading", "convert", "chat_template"}
    assert {f"anymamba.runtime.{name}" for name in unneeded} & modules == set()
    assert {"anymamba.modeling", "anymamba.ops", "anymamba.minimal"} & modules == set()


MISSING = "for name in {names}: sys.modules[name] = None"


def refused(names, *arguments):
    """What a command says where some packages are not installed."""
    program = (
        f"import sys\n{MISSING.format(names=names)}\n"
        "from anymamba.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = processes.python("-c", program, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_without_the_core_and_pytorch_it_is_said_what_to_install():
    complaint = refused(["anymamba._core", "torch"], "generate", "a")
    assert "native core" in complaint
    assert "compiler" in complaint
    assert "pip install 'anymamba[torch]'" in complaint


@pytest.mark.parametrize("command", ["chat", "score"])
def test_other_commands_need_the_core(command, tiny, tmp_path):
    words = arguments(command, tiny, tmp_path)
    assert "native core" in refused(["anymamba._core"], *words)


def test_a_gpu_needs_pytorch():
    complaint = refused(["torch"], "generate", "a", "--device", "cuda")
    assert "'torch'" in complaint
    assert "pip install 'anymamba[torch]'" in complaint


def test_no_torch_is_needed():
    names = ["torch", "transformers", "huggingface_hub", "jinja2", "safetensors"]
    imported_by("generate", "ROMEO:", "--max-new-tokens", 3, before=MISSING.format(names=names))

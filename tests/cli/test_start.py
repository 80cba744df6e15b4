"""How a command starts: what it imports, and what it does without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anymamba.cli.main import COMMANDS, module_of

# What takes long to import, or is not there in a plain installation.
SLOW = {
    *("torch", "transformers", "jinja2", "huggingface_hub", "httpx", "requests", "tqdm", "yaml"),
    *("safetensors", "gguf", "asyncio", "multiprocessing", "email", "http", "ssl", "sqlite3"),
    *("unittest", "xml", "importlib.metadata", "concurrent"),
}


def imported_by(*arguments, before=""):
    """The modules that are there when a command has ended, which it must do well."""
    program = (
        f"import sys\n{before}\n"
        "from anymamba.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "print(*sys.modules, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, input="")
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def other_commands(modules, command):
    return {module_of(name) for name in COMMANDS if name != command} & modules


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("ROMEO:\nHow now, my lord?\n")
    return file


@pytest.fixture
def passages(tmp_path):
    file = tmp_path / "passages.jsonl"
    file.write_text('{"text": "to be or not to be"}\n')
    return file


def commands(text, passages, folder):
    return {
        "generate": ("ROMEO:", "--max-new-tokens", 3),
        "chat": ("--max-new-tokens", 3),
        "ingest": (text, "--save-state", folder / "a.state"),
        "info": (text.parent / "model",),
        "models": (),
        "score": (text,),
        "inspect": ("ROMEO:", "--picture", folder / "a.html"),
        "lambada": (passages,),
        "bench": (
            *("--weights", "f32", "--threads", 1, "--repeats", 1),
            *("--prompt-tokens", 4, "--new-tokens", 2),
        ),
        "completion": ("bash",),
    }


# These write models, train, run other programs, or need a network.
LONG = {"quantize", "convert", "merge", "run", "train", "finetune", "evaluate", "download"}


@pytest.mark.parametrize("command", sorted({*COMMANDS} - LONG))
def test_a_command_imports_nothing_slow(command, text, passages, tiny, tmp_path):
    (tmp_path / "model").symlink_to(tiny)
    arguments = commands(text, passages, tmp_path)[command]
    modules = imported_by(command, *arguments)
    assert SLOW & modules == set()
    if command != "completion":  # which has to look at all
        assert other_commands(modules, command) == set()
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
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_without_the_core_and_pytorch_it_is_said_what_to_install():
    complaint = refused(["anymamba._core", "torch"], "generate", "a")
    assert "native core" in complaint
    assert "compiler" in complaint
    assert "pip install 'anymamba[torch]'" in complaint


@pytest.mark.parametrize("command", ["chat", "score"])
def test_other_commands_need_the_core(command, text):
    arguments = [str(text)] if command == "score" else []
    assert "native core" in refused(["anymamba._core"], command, *arguments)


def test_a_gpu_needs_pytorch():
    complaint = refused(["torch"], "generate", "a", "--device", "cuda")
    assert "'torch'" in complaint
    assert "pip install 'anymamba[torch]'" in complaint


def test_no_torch_is_needed():
    names = ["torch", "transformers", "huggingface_hub", "jinja2", "safetensors"]
    imported_by("generate", "ROMEO:", "--max-new-tokens", 3, before=MISSING.format(names=names))

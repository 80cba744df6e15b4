"""Nothing that a terminal obeys comes out of a file and reaches it."""

import ast
import json
import re
import shutil
import struct
from pathlib import Path

import pytest

import anymamba.cli
from anymamba.checkpoint.io.messages import escaped
from anymamba.cli.terminal import output
from anymamba.cli.terminal.table import columns, table
from anymamba.runtime.convert.conversion import convert
from anymamba.runtime.loading import load

ESCAPE = "\x1b]0;x\x07\x1b[31m\x9b2J\r\u202e"
REFUSES = "{{ raise_exception("
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def with_header(file: Path, change) -> None:
    """Change the header of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def folder_with(tiny, place, change_config=None, change_header=None, template=None):
    shutil.copytree(tiny, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | (change_config or {})))
    if change_header:
        with_header(place / "model.safetensors", change_header)
    if template:
        (place / "chat_template.jinja").write_text(template)
    return place


def state_file(tiny, place):
    engine = load(tiny)
    engine.prefill(engine.state(), "abc").save(place)
    with_header(place, lambda header: header["__metadata__"].update(weights_digest=ESCAPE))
    return place


def gguf_file(tiny, place):
    place = place.with_suffix(".gguf")
    convert(tiny, place, "gguf")
    key = b"general.name"
    place.write_bytes(place.read_bytes().replace(key, b"\x1b[31m" + key[5:], 1))
    return place


def renamed(header):
    name = next(name for name in header if name != "__metadata__")
    header[name + ESCAPE] = header.pop(name)


MAKERS = {
    "a state": state_file,
    "a GGUF file": gguf_file,
    "a config": lambda tiny, place: folder_with(
        tiny, place, {"architectures": [ESCAPE], "dtype": ESCAPE}
    ),
    "an activation": lambda tiny, place: folder_with(tiny, place, {"hidden_act": ESCAPE}),
    "a tensor": lambda tiny, place: folder_with(tiny, place, change_header=renamed),
    "a file's name": lambda tiny, place: folder_with(tiny, place.with_name("m\x1b[31m\x9b")),
    "a template": lambda tiny, place: folder_with(
        tiny, place, template=REFUSES + repr(ESCAPE) + ") }}"
    ),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_no_command_shows_them(maker, tiny, tmp_path, anymamba, monkeypatch):
    place = maker(tiny, tmp_path / "m")
    text = tmp_path / "a.txt"
    text.write_text("To be")
    prompts = tmp_path / "a.jsonl"
    prompts.write_text('"a"\n')
    commands = [
        ("info", place),
        ("score", text, "--model", place),
        ("generate", "a", "--model", place, "--max-new-tokens", 1, "--temperature", 0),
        ("generate", "--prompts", prompts, "--model", place, "--max-new-tokens", 1),
        ("convert", place, tmp_path / "converted"),
        ("quantize", place, tmp_path / "quantized"),
        ("ingest", text, "--save-state", tmp_path / "s", "--model", place),
        ("lambada", prompts, "--model", place),
        ("merge", place, tmp_path / "merged"),
        ("chat", "--model", place, "--max-new-tokens", 1),
    ]
    for command in commands:
        monkeypatch.setattr("sys.stdin", text.open())
        done = anymamba(*command)
        assert OBEYED.search(done.err) is None, command
        if command[0] not in ("generate", "chat"):  # a model's text into a pipe is as it is
            assert OBEYED.search(done.out) is None, command
        assert len(done.err) < 10_000


@pytest.mark.parametrize("length", [100, 5_000_000])
def test_what_a_template_says_is_short(length, tiny, tmp_path, anymamba, monkeypatch):
    template = REFUSES + f"'ab' * {length}) }}}}"
    place = folder_with(tiny, tmp_path / "m", template=template)
    (tmp_path / "a").write_text("hello\n")
    monkeypatch.setattr("sys.stdin", (tmp_path / "a").open())
    done = anymamba("chat", "--model", place)
    assert done.status == 2
    assert len(done.err.splitlines()) == 1
    assert len(done.err) < 5000


def test_a_model_s_text_is_escaped_on_a_terminal_and_whole_in_a_pipe(capsys, monkeypatch):
    output.write("a\x1b[31mb")
    assert capsys.readouterr().out == "a\x1b[31mb"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.write("a\x1b[31mb\n\té")
    assert capsys.readouterr().out == "a\\x1b[31mb\n\té"


def test_every_character_that_a_terminal_obeys_is_escaped():
    every = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2100)]))
    assert OBEYED.search(escaped(every)) is None
    assert escaped("é\n\tab \u4e2d") == "é\n\tab \u4e2d"
    assert "\n" not in table([("a", "b\nc")])
    assert len(columns([("a", "b")]).splitlines()) == 1


def test_commands_print_through_say_or_as_json():
    """json_line escapes by itself; all else may hold what came out of a file."""
    for file in sorted(Path(anymamba.cli.__path__[0]).rglob("*.py")):
        if file.name == "output.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("sys.stdout.write", "sys.stderr.write"), file.name
            if called == "print":
                assert ast.unparse(node.args[0]).startswith("json_line("), (
                    f"{file.name}, line {node.lineno}: use say or tell"
                )

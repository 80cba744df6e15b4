"""Names of files that no system call takes, and names in one's home."""

import pytest

LONG = "a" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a", "--save-state", LONG),
        ("generate", "a", "--state", LONG),
        ("generate", "a", "--tokenizer", LONG),
        ("generate", "a", "--model", LONG),
        ("generate", "a", "--model", f"{LONG}.gguf"),
        ("ingest", LONG, "--save-state", "a.state"),
        ("info", LONG),
        ("score", LONG),
        ("lambada", LONG),
        ("bench", LONG),
        ("quantize", LONG, "out"),
        ("quantize", "MODEL", LONG),
        ("quantize", "MODEL", "out", "--calibrate", LONG),
        ("convert", LONG, "out"),
        ("convert", "MODEL", LONG),
        ("convert", "MODEL", f"{LONG}.gguf"),
    ],
)
def test_a_name_that_is_too_long(words, tiny, tmp_path, monkeypatch, typed, anymamba):
    monkeypatch.chdir(tmp_path)
    typed(b"a\n")
    done = anymamba(*(str(tiny) if word == "MODEL" else word for word in words))
    assert (done.status, done.out) == (2, "")
    assert "too long" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [LONG, "a\0b"])
@pytest.mark.parametrize("command", ["/save", "/load"])
def test_in_a_chat(command, name, tiny, typed, anymamba):
    data = f"{command} {name}\n".encode()
    typed(data)
    assert "path" in anymamba("chat", "--model", tiny).complaint


def test_home_is_written_out(tiny, tmp_path, monkeypatch, typed, anymamba):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("To be, or not to be")
    model = ("--model", tiny)
    assert anymamba("ingest", "~/a.txt", "--save-state", "~/a.state", *model).status == 0
    assert (tmp_path / "a.state").is_file()
    lines = b"/load ~/a.state\n/save ~/b.state\n"
    typed(lines)
    assert "saved 19 tokens" in anymamba("chat", *model).err
    assert (tmp_path / "b.state").read_bytes() == (tmp_path / "a.state").read_bytes()
    assert anymamba("score", "~/a.txt", *model).status == 0


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_what_to_do_is_said_in_options(command, tiny, tmp_path, anymamba):
    assert "--overwrite" in anymamba(command, tiny, tmp_path).complaint

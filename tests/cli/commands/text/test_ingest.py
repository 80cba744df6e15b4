"""`anymamba ingest`: texts of any length become a state."""

import random

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from anymamba.assets import bundled_model
from anymamba.runtime.loading import load
from tests.support.reference import greedy
from tests.support.tolerance import assert_same, naming

WORDS = ["to be ", "or not, ", "été\n", "King's ", "1234 ", "\n\n"]


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A text of several blocks, which are small here."""
    monkeypatch.setattr("anymamba.cli.text.files.BLOCK_BYTES", 1024)
    file = tmp_path / "book.txt"
    file.write_text("".join(random.Random(0).choices(WORDS, k=700)))
    return file


def assert_same_states(first, second):
    """Up to where a text is cut for the native core, which changes sums' order."""
    for name, block in load_file(first).items():
        with naming(name):
            assert_same(block, load_file(second)[name])


def test_what_was_read_is_known_afterwards(tiny, tmp_path, anymamba):
    (tmp_path / "a.txt").write_text("To be, or ")
    (tmp_path / "b.txt").write_text("not")
    state = tmp_path / "a.state"
    options = ("--model", tiny)
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    done = anymamba("ingest", *files, "--save-state", state, *options, "--json")
    assert done.json["figures"]["tokens"] == done.json["figures"]["bytes"] == 13
    assert done.json["state"] == str(state)
    few = ("--temperature", 0, "--max-new-tokens", 9, "--json")
    done = anymamba("generate", "", "--state", state, *options, *few)
    assert done.json["new_tokens"] == greedy(tiny, "To be, or not", 9)


@pytest.mark.slow
def test_a_long_text_is_read_as_one(book, tmp_path, anymamba):
    assert anymamba("ingest", book, "--save-state", tmp_path / "a.state").status == 0
    engine = load()
    whole = engine.prefill(engine.state(), book.read_text())
    whole.save(tmp_path / "b.state")
    assert engine.load_state(tmp_path / "a.state").token_count == whole.token_count
    assert_same_states(tmp_path / "a.state", tmp_path / "b.state")


@pytest.mark.slow
def test_reading_can_go_on(book, tmp_path, typed, anymamba):
    text = book.read_bytes()
    half = tmp_path / "half.txt"
    half.write_bytes(text[:1_500])
    assert anymamba("ingest", half, "--save-state", tmp_path / "half.state").status == 0
    typed(text[1_500:])
    options = ("--state", tmp_path / "half.state", "--save-state", tmp_path / "a.state")
    done = anymamba("ingest", "-", *options, "--json").json
    assert done["figures"]["bytes"] == len(text) - 1_500
    assert anymamba("ingest", book, "--save-state", tmp_path / "b.state").status == 0
    assert_same_states(tmp_path / "a.state", tmp_path / "b.state")


def test_the_mark_of_the_beginning_stands_there_once(tmp_path, anymamba):
    """Some tokenizers put a token before each text."""
    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    assert isinstance(tokenizer.model, models.BPE)
    assert isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    mark = tokenizer.id_to_token(0)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("to be")
    options = ("--tokenizer", tmp_path / "tokenizer.json", "--json")
    first, second = tmp_path / "a.state", tmp_path / "b.state"
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    done = anymamba("ingest", *files, "--save-state", first, *options).json
    assert done["figures"]["tokens"] == 11
    done = anymamba("ingest", files[0], "--state", first, "--save-state", second, *options).json
    assert done["figures"]["tokens"] == 5


@pytest.mark.slow
def test_figures_and_progress_go_to_standard_error(book, tmp_path, monkeypatch, anymamba):
    monkeypatch.setattr("anymamba.cli.terminal.progress.SECONDS_IN_FILE", 0.0)
    state = tmp_path / "a.state"
    done = anymamba("ingest", book, "--save-state", state)
    *progress, figures = done.err.splitlines()
    assert progress
    assert all("tokens/s" in line and "%" in line for line in progress)
    # Each token is a byte: the share is that of what the model has read, not of the file's.
    for line in progress:
        share, tokens = line.split("%, ")
        read = int(tokens.split()[0].replace(",", ""))
        assert abs(int(share) - 100 * read / book.stat().st_size) <= 0.5
    assert figures.startswith(f"read: {book.stat().st_size} tokens, ")
    assert figures.endswith(f"; state: {state}")
    assert done.out == ""
    quiet = anymamba("ingest", book, "--save-state", state, "--quiet")
    assert len(quiet.err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_short_files(content, tmp_path, anymamba):
    (tmp_path / "a.txt").write_bytes(content)
    done = anymamba("ingest", tmp_path / "a.txt", "--save-state", tmp_path / "a.state", "--json")
    assert done.json["figures"]["tokens"] == len(content)


def test_mistakes_are_found_before_anything_is_read(book, tmp_path, monkeypatch, anymamba):
    def never(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("anymamba.cli.commands.text.ingest.open_engine", never)
    state = tmp_path / "a.state"
    assert (
        "missing.txt"
        in anymamba("ingest", book, tmp_path / "missing.txt", "--save-state", state).complaint
    )
    nowhere = tmp_path / "nowhere" / "a.state"
    assert "nowhere" in anymamba("ingest", book, "--save-state", nowhere).complaint
    assert "--save-state" in anymamba("ingest", book).complaint


def test_a_file_that_is_no_text_leaves_no_state(tmp_path, anymamba):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    state = tmp_path / "a.state"
    complaint = anymamba("ingest", tmp_path / "a.txt", "--save-state", state).complaint
    assert "a.txt' is not UTF-8 text: see its byte 3" in complaint
    assert not state.exists()

"""Paths as users give them, and where they are taken."""

import pytest

import anymamba
from anymamba.checkpoint.io.paths import user_path
from anymamba.errors import CheckpointError, InputError, StateError

LONG = "é" * 200


def test_what_no_system_call_takes_is_refused(tmp_path):
    for path in ("", "a\0b", LONG, tmp_path / LONG / "a", 5, None, b"a"):
        with pytest.raises(InputError, match="path"):
            user_path(path, InputError)


def test_what_is_not_there_is_no_matter_of_paths(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "a" / "b", tmp_path / "file" / "a"):
        assert user_path(path) == path
    assert str(user_path("~no-such-user/a")) == "~no-such-user/a"


@pytest.mark.parametrize("path", ["a\0b", LONG, 5])
def test_functions_refuse_such_paths_by_their_own_errors(path):
    engine = anymamba.load()
    with pytest.raises(CheckpointError, match="path"):
        anymamba.load(path)
    with pytest.raises(CheckpointError, match="path"):
        anymamba.load(tokenizer=path).tokenize("a")
    with pytest.raises(CheckpointError, match="path"):
        engine.state().save(path)
    with pytest.raises(StateError, match="path"):
        engine.load_state(path)


def test_home_is_written_out_by_functions_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    engine = anymamba.load()
    engine.prefill(engine.state(), "To be").save("~/a.state")
    assert (tmp_path / "a.state").is_file()
    assert engine.load_state("~/a.state").token_count == 5

"""A folder is replaced whole or not at all, and a destination is never the source."""

import errno
import os

import pytest

from anymamba.checkpoint.atomic_folder import check_apart, write_folder
from anymamba.errors import CheckpointError, ConfigError
from tests.support.files import one_line


def test_apart(tmp_path):
    (tmp_path / "model").mkdir()
    check_apart(tmp_path / "model", tmp_path / "other")
    check_apart(tmp_path / "model", tmp_path / "model" / "inside")
    for place in ("model", "model/../model", "."):
        with pytest.raises(ConfigError, match="would replace the source"):
            check_apart(tmp_path / "model", tmp_path / place)


def test_a_second_name_of_the_source(tmp_path):
    """As Model is of model on most Macs and on Windows; a hard link has two on all systems."""
    (tmp_path / "model.gguf").write_bytes(b"")
    os.link(tmp_path / "model.gguf", tmp_path / "Model.gguf")
    with pytest.raises(ConfigError, match="would replace the source"):
        check_apart(tmp_path / "model.gguf", tmp_path / "Model.gguf")


class Refused(PermissionError):
    """What Windows says of a folder of which a virus scanner has a file open."""

    winerror = 32


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    return tmp_path / "model"


def write_new(folder):
    (folder / "config.json").write_text("new")


def refusing(monkeypatch, *numbers, error=Refused):
    """Moves are refused by their numbers, from 0 on, those that are tried again counted."""
    replace, tried = os.replace, []

    def move(*places):
        tried.append(places)
        if len(tried) - 1 in numbers:
            raise error(errno.EACCES, "The process cannot access the file")
        replace(*places)

    monkeypatch.setattr("os.replace", move)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return tried


TRIES = 5


def test_a_folder_is_replaced_and_nothing_is_left(tmp_path, model, monkeypatch):
    refusing(monkeypatch, 0, 2)  # a moment each
    write_folder(model, write_new)
    assert (model / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [model]


# The first move sets the old folder aside, and the next five are refused.
@pytest.mark.parametrize("of_the_way_back", [0, 1, 4])
def test_a_folder_that_cannot_be_replaced_is_back(tmp_path, model, monkeypatch, of_the_way_back):
    tried = refusing(monkeypatch, *range(1, 1 + TRIES + of_the_way_back))
    with pytest.raises(CheckpointError, match="end the programs that have it open"):
        write_folder(model, write_new)
    assert len(tried) == 1 + TRIES + of_the_way_back + 1
    assert (model / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("moment", ["between the moves", "in a pause", "after the moves"])
def test_ctrl_c_leaves_a_folder_that_is_whole(tmp_path, model, monkeypatch, moment):
    replace, tried = os.replace, []

    def move(*places):
        tried.append(places)
        if moment == "in a pause" and len(tried) == 2:
            raise Refused(errno.EACCES, "The process cannot access the file")
        replace(*places)
        if len(tried) == {"between the moves": 1, "after the moves": 2}.get(moment):
            raise KeyboardInterrupt

    def pause(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", move)
    monkeypatch.setattr("time.sleep", pause)
    with pytest.raises(KeyboardInterrupt):
        write_folder(model, write_new)
    expected = "new" if moment == "after the moves" else "old"
    assert (model / "config.json").read_text() == expected
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("error", [Refused, KeyboardInterrupt])
def test_what_cannot_be_put_back_is_kept_and_named(tmp_path, model, monkeypatch, error):
    refusing(monkeypatch, *range(1, 20), error=error)
    told = CheckpointError if error is Refused else KeyboardInterrupt
    with pytest.raises(told) as caught:
        write_folder(model, write_new)
    (kept,) = tmp_path.rglob("config.json")
    assert kept.read_text() == "old"
    if error is Refused:
        assert f"it is now {str(kept.parent)!r}" in str(caught.value)
        one_line(caught.value)

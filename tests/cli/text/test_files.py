"""Texts in blocks: files, standard input, and what is no text."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anymamba.cli.text import files as text_files
from anymamba.cli.text.files import read_blocks, read_text, size_of
from anymamba.errors import InputError


@given(st.text(), st.integers(1, 9))
def test_blocks_are_cut_between_characters(tmp_path_factory, text, size):
    file = tmp_path_factory.getbasetemp() / "blocks.txt"
    file.write_bytes(text.encode())
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", size)
        assert "".join(read_blocks(str(file), counted.append)) == text
    assert sum(counted) == len(text.encode())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(
    ("data", "at"), [(b"ab\xff", 2), (b"\xc3\xa9\xe2\x82", 2), (b"caf\xe9 au lait", 3)]
)
def test_what_is_no_text_is_refused_at_its_byte(data, at, size, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    with pytest.raises(InputError, match=rf"a.txt' is not UTF-8 text: see its byte {at}$"):
        read_text(str(file))


def test_line_ends_stay_what_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_text(str(tmp_path / "a.txt")) == "a\r\nb\rc\n"


def test_standard_input_is_read_and_left_open(monkeypatch, typed):
    typed("é\n".encode())
    assert read_text("-") == "é\n"
    assert not sys.stdin.closed
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="no standard input"):
        read_text("-")


def test_files_that_cannot_be_read(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "missing"), "a\0b"):
        with pytest.raises(InputError, match=r"cannot (read|use)"):
            read_text(name)


def test_sizes_add_up_where_they_are_known(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"")
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert size_of(names) == 5
    assert size_of([*names, "-"]) is None
    assert size_of([*names, "/dev/stdin"]) in (None, 5)
    with pytest.raises(InputError, match="missing"):
        size_of([*names, str(tmp_path / "missing")])

"""Text that appears while its tokens are made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anymamba.cli.text_stream import TextStream


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def stream_of(tokens, stops=(), decode=decode_bytes):
    """The pieces shown, one list for each token and one for the end; and the stream."""
    pieces: list[str] = []
    stream = TextStream(decode, pieces.append, stops)
    shown = []
    for token in tokens:
        stream.add(token)
        shown.append("".join(pieces))
        pieces.clear()
        if stream.stopped:
            break
    stream.finish()
    shown.append("".join(pieces))
    assert "".join(shown) == stream.text
    return shown, stream


@given(st.text())
def test_a_character_is_shown_with_its_last_byte(text):
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    shown, stream = stream_of(text.encode())
    expected = [piece for char in text for piece in [""] * (len(char.encode()) - 1) + [char]]
    assert shown == [*expected, ""]
    assert not stream.stopped


@given(st.binary())
def test_bytes_that_are_no_text_are_replaced_as_in_one_go(data):
    _, stream = stream_of(data)
    assert stream.text == decode_bytes(data)


@given(st.text("ab\u00e9", max_size=12), st.lists(st.text("ab\u00e9", min_size=1), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stops):
    _, stream = stream_of(text.encode(), stops)
    # Of all beginnings of the text, the shortest that holds a stop string ends it.
    for length in range(len(text) + 1):
        found = [text[:length].find(stop) for stop in stops if stop in text[:length]]
        if found:
            assert stream.stopped
            assert stream.text == text[: min(found)]
            return
    assert not stream.stopped
    assert stream.text == text


def test_only_what_may_become_a_stop_string_is_held_back():
    shown, stream = stream_of(b"one END, an END.", ["END."])
    assert shown[:9] == ["o", "n", "e", " ", "", "", "", "END,", " "]
    assert stream.stopped
    assert stream.text == "one END, an "


def test_what_was_held_back_is_shown_at_the_end():
    shown, stream = stream_of(b"so E", ["END"])
    assert shown == ["s", "o", " ", "", "E"]
    assert not stream.stopped


def test_a_decoder_that_drops_the_first_space_drops_no_other():
    words = ["one", " two", " three"]

    def decode(tokens):
        return "".join(words[token] for token in tokens).lstrip(" ")

    shown, _ = stream_of([1, 2, 0, 1], decode=decode)
    assert shown == ["two", " three", "one", " two", ""]


def test_tokens_without_text_do_not_cost_the_next_its_space():
    words = ["", " two"]

    def decode(tokens):
        return "".join(words[token] for token in tokens).lstrip(" ")

    shown, _ = stream_of([1, 0, 1], decode=decode)
    assert shown == ["two", "", " two", ""]


@pytest.mark.parametrize("stop", ["x", "xx"])
def test_nothing_follows_a_stop_string(stop):
    pieces: list[str] = []
    stream = TextStream(decode_bytes, pieces.append, [stop])
    for token in b"axxb":
        stream.add(token)
    stream.finish()
    assert pieces == ["a"]

"""Passages of JSON lines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anymamba.cli.text.passages import Passage, passages_in
from anymamba.errors import InputError

TEXTS = ["to be or not", "one line\n\nanother  word ", "déjà vu"]
PASSAGES = [
    Passage("to be or", " not"),
    Passage("one line\n\nanother ", " word"),
    Passage("déjà", " vu"),
]


@given(st.lists(st.integers(1, 40)))
def test_passages_do_not_depend_on_blocks(sizes):
    text = "".join(json.dumps({"text": passage}) + "\n" for passage in TEXTS) + "\n \n"
    blocks = []
    for size in sizes:
        blocks, text = [*blocks, text[:size]], text[size:]
    assert list(passages_in([*blocks, text], "a.jsonl")) == PASSAGES


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", 'no object with a "text"'),
        ('{"text": 3}', 'no object with a "text"'),
        ('{"words": "a b"}', 'no object with a "text"'),
        ('{"text": "word"}', "no two words"),
        ('{"text": " word "}', "no two words"),
        ('{"text": ""}', "no two words"),
    ],
)
def test_a_line_that_is_no_passage_is_named(line, reason):
    found = passages_in(['{"text": "to be"}\n\n', line], "a.jsonl")
    assert next(found) == Passage("to", " be")
    with pytest.raises(InputError, match=rf"line 3 of 'a.jsonl' .*{reason}"):
        next(found)


def test_a_mark_of_utf_8_at_the_beginning_is_no_text():
    assert next(passages_in(['\N{BYTE ORDER MARK}{"text": "to be"}'], "a")) == Passage("to", " be")


def test_half_of_a_surrogate_pair_is_named():
    with pytest.raises(InputError, match="line 1 of 'a' holds half of a surrogate pair"):
        list(passages_in(['{"text": "to \\ud800"}'], "a"))

"""`anymamba lambada`: last words."""

import json
import math

import numpy as np
import pytest

from tests.support.files import with_head
from tests.support.reference import greedy, log_probabilities


@pytest.fixture
def passages(tiny, tmp_path):
    """Some whose last word the tiny model knows, and some that it does not."""
    known = []
    for context in ("To be", "or not to", "a b c"):
        # What the model writes after a space, up to the next one, as far as it is text.
        word = bytes(greedy(tiny, context + " ", 3))
        known.append((context, word))
    texts = ["To be or not", "the question is here", "a b"]
    texts += [f"{context} {word.decode()}" for context, word in known if is_word(word)]
    file = tmp_path / "passages.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file, texts


def is_word(word):
    return word.isascii() and word.decode().isprintable() and b" " not in word


def by_hand(folder, text):
    """Whether each byte of the last word, with its space, is the likeliest; and its surprise."""
    context = text.rpartition(" ")[0]
    rows = log_probabilities(folder, text)[len(context) - 1 :]
    word = list(text[len(context) :].encode())
    return (rows.argmax(1) == word).all(), -rows[np.arange(len(word)), word].sum()


def test_the_figures_are_those_of_the_reference(tiny, passages, anymamba):
    file, texts = passages
    expected = [by_hand(tiny, text) for text in texts]
    done = anymamba("lambada", file, "--model", tiny, "--json").json
    assert done["passages"] == len(texts)
    assert done["right"] == sum(known for known, _ in expected)
    assert done["accuracy"] == done["right"] / len(texts)
    mean = np.mean([nats for _, nats in expected])
    # float32 logits against float64: six digits in the exponent.
    assert done["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4 * mean)


def test_a_word_that_is_known_counts(tmp_path, anymamba):
    context = "KING RICHARD III:\nI am the"
    options = ("--temperature", 0, "--max-new-tokens", 20, "--json")
    text = anymamba("generate", context, *options).json["text"]
    assert text.startswith(" ")
    word = text.split()[0]
    passages = [{"text": f"{context} {word}"}, {"text": f"{context} {word[::-1]}"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, passages)))
    done = anymamba("lambada", tmp_path / "a.jsonl", "--json").json
    assert (done["passages"], done["right"], done["accuracy"]) == (2, 1, 0.5)


def test_the_first_passages_alone(tiny, passages, anymamba):
    file, _ = passages
    done = anymamba("lambada", file, "--model", tiny, "--limit", 2, "--json").json
    assert done["passages"] == 2


def test_a_table_for_people(tiny, passages, typed, anymamba):
    file, texts = passages
    typed(file.read_bytes())
    done = anymamba("lambada", "-", "--model", tiny)
    assert f"of {len(texts)})" in done.out
    assert done.err == ""


@pytest.mark.parametrize(
    ("content", "reason"), [("", "no passages"), ("{}", '"text"'), ("words", "line 1")]
)
def test_files_that_hold_no_passages(content, reason, tmp_path, anymamba):
    (tmp_path / "a.jsonl").write_text(content)
    assert reason in anymamba("lambada", tmp_path / "a.jsonl").complaint


def test_a_loss_beyond_all_floats(tiny, tmp_path, anymamba):
    (tmp_path / "a.jsonl").write_text('{"text": "to be"}')
    options = ("lambada", tmp_path / "a.jsonl", "--model")
    model = with_head(tiny, tmp_path / "model", lambda head: head * 1000)
    assert anymamba(*options, model, "--json").json["perplexity"] is None
    assert anymamba(*options, model).out.splitlines()[1] == "perplexity  inf"

"""Text that appears while its tokens are made."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from anymamba.assets import bundled_model
from anymamba.checkpoint.tokenizer import read_tokenizer
from anymamba.errors import InputError
from anymamba.runtime.generation.detokenizer import StreamingDetokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def stream_of(tokens, stop=(), decode=decode_bytes):
    """The pieces given out, one for each token and one for the end; and the stream."""
    stream = StreamingDetokenizer(decode, stop)
    return [*map(stream.add, tokens), stream.finish()], stream


def cut(data, sizes):
    """The bytes in tokens of these sizes, and their decoder. What is left over is one token."""
    tokens = []
    for size in sizes:
        tokens.append(data[:size])
        data = data[size:]
    tokens.append(data)

    def decode(ids):
        return b"".join(tokens[id] for id in ids).decode("utf-8", errors="replace")

    return range(len(tokens)), decode


SIZES = st.lists(st.integers(0, 9), max_size=60)
# Characters of one to four bytes, and the one that decoders put for what is none.
TEXTS = st.text() | st.text("a é€😀" + REPLACEMENT, max_size=60)


@given(TEXTS, SIZES)
def test_the_pieces_are_the_text_however_it_is_cut(text, sizes):
    tokens, decode = cut(text.encode(), sizes)
    pieces, stream = stream_of(tokens, decode=decode)
    assert "".join(pieces) == text
    assert stream.stop_string is None


@given(
    st.binary() | st.lists(st.sampled_from(["a", "é", "€", "😀"]).map(str.encode)).map(b"".join),
    SIZES,
)
# Characters of which every token ends within one: decoded from a later token on, it begins in one.
@example("😀".encode() * 40, [2] + [4] * 38)
@example("€".encode() * 60, [1] + [3] * 57)
@example(b"\xff" * 60, [1] * 60)
@example(b"\xe2\x82" * 30 + "€".encode(), [1] * 63)
@example(b"\xf0\x9f\x98" * 20 + "😀".encode(), [1] * 64)
def test_bytes_that_are_no_text_are_replaced_as_in_one_go(data, sizes):
    tokens, decode = cut(data, sizes)
    pieces, _ = stream_of(tokens, decode=decode)
    assert "".join(pieces) == decode_bytes(data)


@given(st.text())
def test_a_character_is_given_out_with_its_last_byte(text):
    text = text.replace(REPLACEMENT, "")
    pieces, _ = stream_of(text.encode())
    expected = [piece for char in text for piece in [""] * (len(char.encode()) - 1) + [char]]
    assert pieces == [*expected, ""]


def test_only_what_may_become_a_character_is_held_back():
    # Of five wrong bytes, three may yet turn out to be the beginning of one, to whoever sees
    # replacements only.
    pieces, _ = stream_of(b"\xff\xff\xff\xff\xffa")
    assert pieces == ["", "", "", REPLACEMENT, REPLACEMENT, REPLACEMENT * 3 + "a", ""]


def first_stop(text, stops):
    """The text before the stop string that is complete first, and that string."""
    for length in range(len(text) + 1):
        found = [(text[:length].find(stop), stop) for stop in stops if stop in text[:length]]
        if found:
            at, stop = min(found)
            return text[:at], stop
    return text, None


@given(
    st.text("ab\u00e9", max_size=20),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=6), max_size=4),
    SIZES,
)
@example("aab\u00e9b", ["ab\u00e9", "b"], [9])
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(text, stops, sizes):
    tokens, decode = cut(text.encode(), sizes)
    pieces, stream = stream_of(tokens, stops, decode)
    assert ("".join(pieces), stream.stop_string) == first_stop(text, stops)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop_string(text, stops):
    stream, given_out = StreamingDetokenizer(decode_bytes, stops), ""
    for at, token in enumerate(text.encode()):
        given_out += stream.add(token)
        if stream.stop_string is not None:
            break
        held = text[len(given_out) : at + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_only_the_beginning_of_a_stop_string_is_held_back():
    pieces, stream = stream_of(b"one END, an END.", ["END."])
    assert pieces[:9] == ["o", "n", "e", " ", "", "", "", "END,", " "]
    assert "".join(pieces) == "one END, an "
    assert stream.stop_string == "END."


def test_what_was_held_back_comes_at_the_end():
    pieces, stream = stream_of(b"so E\xc3", ["END"])
    assert pieces == ["s", "o", " ", "", "", "E" + REPLACEMENT]
    assert stream.stop_string is None


@pytest.mark.parametrize("stop", ["x", "xx"])
def test_nothing_follows_a_stop_string(stop):
    pieces, stream = stream_of(b"axxb", [stop])
    assert "".join(pieces) == "a"
    assert stream.finish() == ""


def test_a_stop_string_may_come_with_the_end():
    pieces, stream = stream_of(b"a\xc3", [REPLACEMENT])
    assert pieces == ["a", "", ""]
    assert stream.stop_string == REPLACEMENT


def test_an_ended_stream_has_no_more_to_give():
    pieces, stream = stream_of(b"a\xc3")
    assert pieces == ["a", "", REPLACEMENT]
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop string is empty"):
        StreamingDetokenizer(decode_bytes, ["END", ""])


def test_no_tokens():
    assert stream_of([])[0] == [""]


# Decoders of the tokenizers library. Each is held to the text that it makes of all tokens at once.


def tokenizer_of(tokens, decoder, special=()):
    tokenizer = Tokenizer(BPE({token: id for id, token in enumerate(tokens)}, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.decoder = decoder
    return tokenizer


BYTE_LEVEL = tokenizer_of(
    # In this alphabet Ġ is a space, â, Ĥ, ¬ are the bytes of €, ð, Ł, ĺ, Ģ those of 😀.
    ["a", "Ġ", "Ġb", "â", "Ĥ", "¬", "âĤ", "¬â", "Ĥ¬", "ð", "Ł", "ĺ", "Ģ", "ðŁ", "ĺĢ", "ĺĢðŁ", "ÿ"],
    decoders.ByteLevel(),
    ["<end>"],
)
SPACES_FIRST = tokenizer_of(["▁", "▁▁", "a", "▁b", "!"], decoders.Metaspace(), ["<end>"])
# As in Llama's tokenizers: a token for each byte of characters that have none of their own.
FALLBACK_TOKENS = ["▁", "▁▁", "a", "▁b", *(f"<0x{byte:02X}>" for byte in range(256))]
FALLBACK = tokenizer_of(
    FALLBACK_TOKENS,
    decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
    ["<end>"],
)


def ids_of(tokenizer, most=60):
    return st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=most)


@given(ids_of(BYTE_LEVEL))
def test_byte_level_decoders(ids):
    pieces, _ = stream_of(ids, decode=BYTE_LEVEL.decode)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids)


@given(ids_of(SPACES_FIRST))
def test_decoders_that_drop_the_first_space(ids):
    pieces, _ = stream_of(ids, decode=SPACES_FIRST.decode)
    assert "".join(pieces) == SPACES_FIRST.decode(ids)


@given(st.lists(st.sampled_from(["▁", "▁▁", "a", "▁b", "<end>", "é", "€", "😀"]), max_size=40))
def test_decoders_that_fall_back_to_bytes(parts):
    tokens = []
    for part in parts:
        is_token = part in FALLBACK_TOKENS or part == "<end>"
        tokens += [part] if is_token else [f"<0x{byte:02X}>" for byte in part.encode()]
    ids = [FALLBACK.token_to_id(token) for token in tokens]
    pieces, _ = stream_of(ids, decode=FALLBACK.decode)
    assert "".join(pieces) == FALLBACK.decode(ids)
    assert REPLACEMENT not in "".join(pieces)


@given(ids_of(FALLBACK))
def test_wrong_bytes_of_such_decoders_are_replaced(ids):
    """One wrong byte spoils those before it, which the library says only after they were shown."""
    pieces, _ = stream_of(ids, decode=FALLBACK.decode)
    whole = FALLBACK.decode(ids)
    if REPLACEMENT not in whole:
        assert "".join(pieces) == whole


@pytest.mark.parametrize("n_chars", [3, 60])
@pytest.mark.parametrize("char", ["é", "€", "😀", "\xff"])
def test_a_wrong_byte_of_such_decoders_loses_and_repeats_nothing(char, n_chars):
    data = b"\xff" + char.encode() * n_chars
    ids = [FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in data]
    pieces, _ = stream_of(ids, decode=FALLBACK.decode)
    text = "".join(pieces)
    # The library replaces all of the bytes. A long row of them is not read again from its
    # beginning, and what is no more spoilt by the wrong byte may come out as characters.
    assert FALLBACK.decode(ids) == REPLACEMENT * len(data)
    assert sum(1 if c == REPLACEMENT else len(c.encode()) for c in text) == len(data)
    if len(data) < 16:
        assert text == FALLBACK.decode(ids)


@given(st.text(max_size=40))
def test_the_bundled_tokenizer(text):
    tokenizer = read_tokenizer(bundled_model())
    pieces, _ = stream_of(tokenizer.encode(text).ids, decode=tokenizer.decode)
    assert "".join(pieces) == text


def strip_all(tokens):
    """A decoder that drops all spaces at the beginning."""
    words = ["one", " two", " ", ""]
    return "".join(words[token] for token in tokens).lstrip(" ")


@given(st.lists(st.integers(0, 3), max_size=40))
def test_a_decoder_that_drops_the_first_spaces_drops_no_other(ids):
    pieces, _ = stream_of(ids, decode=strip_all)
    assert "".join(pieces) == strip_all(ids)


@pytest.mark.parametrize(
    ("decode", "tokens"),
    [
        (decode_bytes, b"a"),
        (decode_bytes, b"\xff"),
        (decode_bytes, b"\xe2\x82"),
        (decode_bytes, REPLACEMENT.encode()),
        (cut("€".encode() * 2, [1, 3])[1], [0] + [1] * 3),
        (lambda ids: (b"\x82\xac\xe2" * len(ids)).decode(errors="replace"), [0]),
        (BYTE_LEVEL.decode, [BYTE_LEVEL.token_to_id("<end>")]),
        (BYTE_LEVEL.decode, [BYTE_LEVEL.token_to_id("Ġ")]),
        (BYTE_LEVEL.decode, [BYTE_LEVEL.token_to_id("ĺĢðŁ")]),
        (SPACES_FIRST.decode, [SPACES_FIRST.token_to_id("▁")]),
        (FALLBACK.decode, [FALLBACK.token_to_id("<0xFF>")]),
        (FALLBACK.decode, [FALLBACK.token_to_id("▁")]),
    ],
)
def test_a_token_costs_the_same_however_many_came_before(decode, tokens):
    lengths = []

    def counting(ids):
        lengths.append(len(ids))
        return decode(ids)

    stream = StreamingDetokenizer(counting)
    for _ in range(300):
        for token in tokens:
            stream.add(token)
    assert max(lengths) <= 80
    # Two to decode each, now and then one to see what the decoder drops, or four to shorten.
    assert len(lengths) <= 4 * 300 * len(tokens)

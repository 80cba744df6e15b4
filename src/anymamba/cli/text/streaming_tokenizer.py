"""Tokenizing a text of any length in constant memory, with the tokens of one go.

A text may be cut where the tokens of its two halves are those of the whole. Tokenizers split a
text into words before they merge characters, so that such borders stand between words. Which
ones depends on the tokenizer: some take the space to the word after it, some the line end to the
comma before it. So each border that looks right is tried on its surroundings, and taken if
cutting there changes nothing. A text without a border (one word of megabytes) is kept together
until one comes: exactness goes before memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

Encode = Callable[[str], Sequence[int]]
"""The tokens of a text, without any that mark its beginning or end."""

# Long enough that little time goes into trying borders, short enough to keep memory small.
LEAST_CHARACTERS = 1 << 15
# What a tokenizer sees around a border when it is tried. Words and runs of signs longer than
# that have no border inside that would be tried at all.
SURROUNDINGS = 256
MOST_TRIALS = 16
# A word's end; better before a space than before any other sign, as most tokenizers cut there.
BORDERS = (re.compile(r"(?<=\S)(?= \w)"), re.compile(r"(?<=\w)(?=[^\w ])"))


def texts_of_blocks(blocks: Iterable[str], encode: Encode) -> Iterator[str]:
    """A text in blocks that are cut where the tokens of its parts are those of the whole.

    Args:
        blocks: the text, cut anywhere between two characters.
        encode: the tokenizer.

    Example:
        >>> list(texts_of_blocks(["to", " be"], lambda text: list(text.encode())))
        ['to be']
    """
    text = ""
    wanted = LEAST_CHARACTERS
    for block in blocks:
        text += block
        if len(text) < wanted:
            continue
        border = find_border(text, encode)
        if border is None:
            # Twice as much before the next search, lest a text without borders be searched
            # again with each of its blocks.
            wanted = 2 * len(text)
            continue
        wanted = LEAST_CHARACTERS
        yield text[:border]
        text = text[border:]
    if text:
        yield text


def find_border(text: str, encode: Encode) -> int | None:
    """Where the text can be cut, late in it but with surroundings left to judge by."""
    last = len(text) - SURROUNDINGS
    if last <= 0:
        return None
    if is_unmerged(text, last, encode):
        return last
    for pattern in BORDERS:
        found = [match.start() for match in pattern.finditer(text, len(text) // 2, last)]
        for border in found[: -MOST_TRIALS - 1 : -1]:
            if changes_nothing(text, border, encode):
                return border
    return None


def changes_nothing(text: str, border: int, encode: Encode) -> bool:
    """Whether the tokens around a border are the same with a cut there."""
    before = text[max(0, border - SURROUNDINGS) : border]
    after = text[border : border + SURROUNDINGS]
    return [*encode(before), *encode(after)] == list(encode(before + after))


def is_unmerged(text: str, border: int, encode: Encode) -> bool:
    """Whether around a border each byte is a token of its own, as in models of bytes.

    Where no two neighbours were merged, none can be, whatever stands farther away.
    """
    around = text[max(0, border - SURROUNDINGS) : border + SURROUNDINGS]
    unmerged = len(encode(around)) == len(around.encode("utf-8", errors="surrogatepass"))
    return unmerged and changes_nothing(text, border, encode)

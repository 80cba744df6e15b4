"""Reading a tokenizer.json, which comes from a stranger like all of a model's files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.io import escaped, user_path
from anymamba.checkpoint.tokenizer.limits import check_limits
from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELP = (
    "Name a folder that has a tokenizer.json (tokenizer=, on the command line --tokenizer; the "
    "state-spaces/mamba models use that of EleutherAI/gpt-neox-20b), or give tokens, not text"
)
"""What to do where a model comes without a tokenizer."""

_MOST_BYTES = 1 << 28


def read_tokenizer(place: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer of the `tokenizers` library: a tokenizer.json, or the one in a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> read_tokenizer(bundled_model()).get_vocab_size()
        256
    """
    given = user_path(place)
    path = given / "tokenizer.json" if given.is_dir() else given
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer: {path} is missing. {HELP}")
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise CheckpointError(
                f"{str(path)!r} has {size:,} bytes, which no tokenizer of a Mamba has (at most "
                f"{_MOST_BYTES:,}); is it the right file?"
            )
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    return tokenizer_from_json(text, str(path))


def tokenizer_from_json(text: str | bytes, where: str) -> Tokenizer:
    """Make a tokenizer of the text of a tokenizer.json; `where` is what messages call it.

    Raises:
        CheckpointError: it cannot be read.

    Example:
        >>> tokenizer_from_json("{}", "an empty one")
        Traceback (most recent call last):
            ...
        anymamba.errors.CheckpointError: an empty one is no tokenizer that can be read: ...
    """
    from tokenizers import Tokenizer

    make: Any = Tokenizer.from_buffer if isinstance(text, bytes) else Tokenizer.from_str
    try:
        tokenizer: Tokenizer = make(text)
    except BaseException as error:
        raise_if_foreign(error)
        raise CheckpointError(
            f"{where} is no tokenizer that can be read: {reason_of(error)}"
        ) from None
    check_limits(tokenizer, text if isinstance(text, bytes) else text.encode(), where)
    # What trainers set would cut long texts off in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def raise_if_foreign(error: BaseException) -> None:
    """Raise again what does not come from the `tokenizers` library.

    It raises nothing narrower than Exception, and where it panics, what is no Exception at all.

    Example:
        >>> raise_if_foreign(ValueError("from the library"))
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


def reason_of(error: BaseException) -> str:
    """What the library says, on one line that a terminal can show.

    Example:
        >>> reason_of(ValueError("two\\nlines"))
        'two lines'
    """
    return escaped(" ".join(str(error).split()), 200)

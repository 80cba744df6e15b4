"""Texts to train on, and how they become one row of tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from anymamba.checkpoint.io import check_surrogates, listed, parse_json_lines, read_text, user_path
from anymamba.errors import InputError
from anymamba.training.settings import Settings

TEXT_ENDINGS = (".txt", ".md", ".text")
LINE_ENDINGS = (".jsonl", ".ndjson")
JSON_ENDINGS = (*LINE_ENDINGS, ".json")
# Files whose characters are no text of their own.
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
# The tokenizer works on so many documents at once, on all cores.
DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class TokenRow:
    """Documents one after the other.

    Attributes:
        tokens: (t,) their tokens.
        starts: (s,) where each document begins, the first at 0.
    """

    tokens: NDArray[np.uint32]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)


def texts_of(settings: Settings) -> tuple[list[str], list[str]]:
    """The documents to train on and those held out.

    Raises:
        InputError: nothing is there to read.
    """
    if settings.dataset is not None:
        place = (settings.dataset, settings.dataset_config, settings.dataset_split)
        documents = list(read_dataset(*place, settings.text_field))
    elif settings.data:
        documents = list(read_texts(settings.data, settings.text_field))
    else:
        raise InputError("there is nothing to train on: give --data FILE or --dataset NAME")
    if settings.validation_data:
        validation = list(read_texts(settings.validation_data, settings.text_field))
        if not validation:
            raise InputError(
                f"there is nothing to validate on: {listed(map(repr, settings.validation_data))} "
                "hold no text"
            )
        return documents, validation
    return held_out(documents, settings.validation_share)


def read_texts(names: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """The documents of text files (one each), of JSON (one a line or an item), and of folders.

    Raises:
        InputError: a file cannot be read, is a table, or is empty; or a line has no text.
    """
    for name in names:
        path = user_path(name, InputError)
        if path.is_dir():
            known = (*TEXT_ENDINGS, *JSON_ENDINGS)
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in known)
            if not files:
                raise InputError(f"the folder {name!r} has no file that ends in {', '.join(known)}")
            for file in files:
                yield from documents_of(file, text_field)
        else:
            yield from documents_of(path, text_field)


def documents_of(file: Path, text_field: str) -> Iterator[str]:
    """The documents of one file; empty ones are left out."""
    found: Iterable[str]
    if file.suffix.lower() in JSON_ENDINGS:
        found = (text_of(value, text_field, where) for value, where in values_in(file))
    else:
        found = [text_in(file)]
    yield from filter(None, found)


def text_in(file: Path) -> str:
    """What a file holds.

    Raises:
        InputError: it cannot be read, or is no text.
    """
    if file.suffix.lower() in TABLES:
        raise InputError(
            f"{str(file)!r} is a table, whose signs would be learned as text: make JSON lines of "
            "it, or name the folder that it is in by --dataset, which reads its columns"
        )
    return read_text(file)


def values_in(file: Path) -> Iterator[tuple[object, str]]:
    """The values in a file of JSON: one a line, or those of an array, or one; and what messages
    call each.

    Raises:
        InputError: the file cannot be read, or a value is not JSON, or holds what is no text.
    """
    whole = None
    if file.suffix.lower() not in LINE_ENDINGS:
        with suppress(ValueError, RecursionError):  # then there may be one a line
            whole = json.loads(text_in(file))
    if isinstance(whole, list):
        for number, value in enumerate(whole, start=1):
            check_surrogates(value, where := f"item {number} of {str(file)!r}")
            yield value, where
    elif whole is not None:
        check_surrogates(whole, repr(str(file)))
        yield whole, repr(str(file))
    else:
        yield from parse_json_lines([text_in(file)], repr(str(file)))


def text_of(value: object, text_field: str, where: str) -> str:
    """The text in a line's value."""
    found = value.get(text_field) if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise InputError(f"{where} has no text in {text_field!r}; --text-field names the field")
    return found


def read_dataset(name: str, config: str | None, split: str, text_field: str) -> Iterator[str]:
    """The texts of a Hugging Face dataset: a name on the hub, or a folder that `datasets` loads.

    Raises:
        InputError: there is no such dataset, or it has no such field, or no texts in it.
    """
    found = open_dataset(name, config, split)
    if text_field not in found.column_names:
        columns = ", ".join(found.column_names)
        raise InputError(f"the dataset {name!r} has no field {text_field!r}, it has {columns}")
    for number, text in enumerate(found[text_field]):
        if text is not None and not isinstance(text, str):
            raise InputError(
                f"row {number} of the dataset {name!r} has no text in {text_field!r}, but "
                f"{type(text).__name__}; --text-field names the field"
            )
        if text:
            yield text


def open_dataset(name: str, config: str | None, split: str) -> Any:
    """A split of a Hugging Face dataset, as `datasets` has it.

    Args:
        name: a name on the hub, or a folder: of data files, or as `save_to_disk` wrote it.
        config, split: which of its configurations and splits.

    Raises:
        InputError: there is no such dataset, or it cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    folder = user_path(name, InputError)
    told = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it all
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(folder)
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(folder)[split]
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        # What could not be read is said by the error below the one that nothing could be made.
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"there is no dataset {name!r} (split {split!r}): {reason}") from None
    finally:
        datasets.logging.set_verbosity(told)


def held_out(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """The documents before and after a border, which cuts the one that it falls into.

    Args:
        documents: in their order.
        share: how much of all characters comes after the border.

    Example:
        >>> held_out(["aaaaa", "bbbbb"], 0.3)
        (['aaaaa', 'bb'], ['bbb'])
    """
    left = int((1 - share) * sum(map(len, documents)))
    before, after = [], []
    for document in documents:
        before.append(document[:left])
        after.append(document[left:])
        left = max(left - len(document), 0)
    return list(filter(None, before)), list(filter(None, after))


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, end_of_text: bool = True
) -> TokenRow:
    """Documents as one row of tokens.

    Args:
        documents: texts.
        tokenizer: what makes tokens of them.
        end_of_text: whether the tokenizer's end token, where it has one, ends each document.
    """
    end = [tokenizer.eos_token_id] if end_of_text and tokenizer.eos_token_id is not None else []
    pieces: list[NDArray[np.uint32]] = []
    # Python 3.11 has no itertools.batched.
    remaining = iter(documents)
    while some := list(itertools.islice(remaining, DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [np.array([*ids, *end], dtype=np.uint32) for ids in encoded if ids]
    starts = np.cumsum([0, *map(len, pieces)], dtype=np.int64)[:-1]
    return TokenRow(np.concatenate([np.zeros(0, dtype=np.uint32), *pieces]), starts)

"""Examples to fine-tune on: conversations, prompts with their answers, or texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anymamba.checkpoint.io import user_path
from anymamba.errors import InputError
from anymamba.training.data.documents import JSON_ENDINGS, open_dataset, read_texts, values_in

Example = dict[str, Any]
"""Either a `text`, or a `prompt` and its `completion`: texts, or lists of messages."""

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}
{%- else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""
"""How a conversation is written down where the tokenizer does not say."""

FIELDS = "messages, prompt and completion, or text"


def read_examples(names: Sequence[str], text_field: str | None = None) -> list[Example]:
    """Read what files hold, for TRL's `SFTTrainer`.

    A conversation becomes one example an answer, with all that was said before for its prompt: so
    each answer is learned, and nothing else is, whatever the chat template can mark.

    Args:
        names: JSON, in lines (`.jsonl`) or as an array (`.json`), with `messages`, with `prompt`
            and `completion` (texts or lists of messages), or with `text`; text files and folders,
            as for `anymamba train`.
        text_field: the field that has the text; the others then do not count. None for the
            fields above.

    Returns:
        Examples of one kind.

    Raises:
        InputError: a file cannot be read, a line is none of these, or there are several kinds.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "talk.jsonl"
        >>> said = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
        >>> _ = file.write_text(json.dumps({"messages": said}))
        >>> read_examples([str(file)])[0]["completion"]
        [{'role': 'assistant', 'content': '4'}]
    """
    examples: list[Example] = []
    for name in names:
        path = user_path(name, InputError)
        if path.suffix.lower() in JSON_ENDINGS:
            for value, where in values_in(path):
                examples += examples_of(value, where, text_field)
        else:
            texts = read_texts([name], text_field or "text")
            examples += [{"text": text} for text in texts]
    return of_one_kind(examples)


def dataset_examples(
    name: str, config: str | None = None, split: str = "train", text_field: str | None = None
) -> list[Example]:
    """Read a Hugging Face dataset, whose rows have the fields that lines of JSON have.

    Args:
        name, config, split: as for `open_dataset`.
        text_field: as for `read_examples`.

    Raises:
        InputError: there is no such dataset, a row is none of these, or there are several kinds.
    """
    examples: list[Example] = []
    for number, row in enumerate(open_dataset(name, config, split)):
        examples += examples_of(row, f"row {number} of the dataset {name!r}", text_field)
    return of_one_kind(examples)


def of_one_kind(examples: list[Example]) -> list[Example]:
    """The examples, which TRL can only train on where they have the same fields.

    Raises:
        InputError: there are none, or they are of several kinds.
    """
    if not examples:
        raise InputError("there is nothing to train on: the data hold no examples")
    kinds = {kind_of(example) for example in examples}
    if len(kinds) > 1:
        raise InputError(
            f"the examples are of several kinds ({', '.join(sorted(kinds))}); give one"
        )
    return examples


def is_conversation(example: Example) -> bool:
    """Whether an example needs a chat template."""
    return isinstance(example.get("prompt"), list)


def kind_of(example: Example) -> str:
    """What it is, in words."""
    if "text" in example:
        return "texts"
    return "conversations" if is_conversation(example) else "prompts"


def examples_of(fields: object, where: str, text_field: str | None = None) -> Iterator[Example]:
    """The examples in one line."""
    if not isinstance(fields, dict):
        raise InputError(f"{where} is no JSON object; expected one with {FIELDS}")
    if text_field is not None:
        if text_field not in fields:
            names = ", ".join(map(repr, list(fields)[:8])) or "none"
            raise InputError(f"{where} has no field {text_field!r}; its fields are {names}")
        yield {"text": text_of(fields[text_field], where)}
    elif "messages" in fields:
        yield from answers_in(messages_of(fields["messages"], where), where)
    elif "prompt" in fields and "completion" in fields:
        both = {name: fields[name] for name in ("prompt", "completion")}
        read: Callable[[Any, str], Any] = text_of
        if isinstance(both["prompt"], list):
            read = messages_of
        yield {name: read(value, where) for name, value in both.items()}
    elif "text" in fields:
        yield {"text": text_of(fields["text"], where)}
    else:
        raise InputError(f"{where} has none of {FIELDS}")


def answers_in(messages: list[dict[str, str]], where: str) -> Iterator[Example]:
    """One example an answer, with all before it for its prompt."""
    places = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at]
    if not places:
        raise InputError(f"{where} has no answer: no message after the first is the assistant's")
    for at in places:
        yield {"prompt": messages[:at], "completion": messages[at : at + 1]}


def messages_of(value: Any, where: str) -> list[dict[str, str]]:
    """Messages, each with a role and a content."""
    names = ("role", "content")
    fits = isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in names)
        for message in value
    )
    if not value or not fits:
        raise InputError(
            f"{where} must have a list of messages with a role and a content, both text"
        )
    return [{name: message[name] for name in names} for message in value]


def text_of(value: object, where: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} must have texts that are not empty, got {type(value).__name__}")
    return value

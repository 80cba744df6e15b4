"""The chat template that comes with a tokenizer: how a conversation is written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anymamba.checkpoint.gguf import find_gguf
from anymamba.checkpoint.io import read_bounded, read_json_object
from anymamba.errors import CheckpointError
from anymamba.runtime.chat.template import Renderer
from anymamba.runtime.chat.tools import Tool, as_text, is_in

Message = dict[str, Any]
"""What was said: its `role` ("user" or "assistant") and its `content`, both text. The assistant's
may have `tool_calls`, and one with the role "tool" is the result of such a call."""

_FOR_TOOLS = "additional_chat_templates/tool_use.jinja"
"""Where Transformers writes the template for conversations with tools, if there is one."""

GGUF_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


@dataclass(frozen=True)
class ChatTemplate:
    """A template in the Jinja language, and the special tokens that it may name.

    Args:
        source: the template.
        special_tokens: texts by name, such as "bos_token".
        for_tools: another one for conversations with tools, where the model comes with two.
    """

    source: str
    special_tokens: dict[str, str]
    for_tools: str | None = None

    @property
    def knows_tools(self) -> bool:
        """Whether it writes tools and their calls down, in the form that is enforced here."""
        return is_in(self.source if self.for_tools is None else self.for_tools)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The conversation as text, up to where the model's answer begins."""
        takes_other = bool(tools) and self.for_tools is not None and self.knows_tools
        renderer = self._renderer_for_tools if takes_other else self._renderer
        if not (takes_other or is_in(self.source)):
            messages, tools = as_text(messages, tools), ()
        described = [tool.described for tool in tools]
        return renderer.render(messages, True, self.special_tokens, described)

    def start(self) -> None:
        """Start the process that runs it ahead of the first conversation."""
        self._renderer.start()

    def close(self) -> None:
        """End the process that is kept for the next conversation."""
        self._renderer.close()
        self._renderer_for_tools.close()

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.source)

    @cached_property
    def _renderer_for_tools(self) -> Renderer:
        return Renderer(self.for_tools or "")


def find_template(place: Path) -> ChatTemplate | None:
    """The template beside a tokenizer, which is a folder or a file, or None without one.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> find_template(bundled_model()) is None
        True
    """
    if (file := find_gguf(place)) is not None:
        return template_of_gguf(file)
    folder = place if place.is_dir() else place.parent
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file) if file.is_file() else {}
    several = settings.get("chat_template")
    source = read_own_file(folder / "chat_template.jinja") or of_several(several)
    named = of_several(several, "tool_use") if isinstance(several, list) else None
    for_tools = read_own_file(folder / _FOR_TOOLS) or named
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"chat_template in {str(file)!r} is no text, nor one of several")
    other = for_tools if isinstance(for_tools, str) else None
    return ChatTemplate(source, special_tokens(settings), other)


def template_of_gguf(file: Path) -> ChatTemplate | None:
    """The template in a GGUF file, whose special tokens are places in its vocabulary."""
    from anymamba.checkpoint.gguf.parts import read_gguf_files

    values = read_gguf_files(file).metadata
    source = values.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return None
    vocabulary = values.get("tokenizer.ggml.tokens")
    texts = dict(enumerate(vocabulary)) if isinstance(vocabulary, list) else {}
    tokens = {}
    for name, key in GGUF_SPECIAL.items():
        number = values.get(f"tokenizer.ggml.{key}_token_id")
        text = texts.get(number) if isinstance(number, int) else None
        if isinstance(text, str):
            tokens[name] = text
    other = values.get("tokenizer.chat_template.tool_use")
    return ChatTemplate(source, tokens, other if isinstance(other, str) else None)


def read_own_file(file: Path) -> str | None:
    """The template where it has a file of its own."""
    if not file.is_file():
        return None
    try:
        return read_bounded(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{str(file)!r} is not UTF-8 text: {error}") from None


def of_several(found: object, name: str = "default") -> object:
    """Of several templates with names, the one with this name."""
    if not isinstance(found, list):
        return found
    named = [entry for entry in found if isinstance(entry, dict)]
    return next((entry.get("template") for entry in named if entry.get("name") == name), found)


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens, each of them text or an object with its content."""
    tokens = {}
    for name in GGUF_SPECIAL:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens

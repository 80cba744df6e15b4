"""From a conversation to a prompt, and from an answer to calls of tools."""

from anymamba.runtime.chat.template import Renderer, render

__all__ = ["Renderer", "render"]

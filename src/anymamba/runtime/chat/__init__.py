"""From a conversation to a prompt."""

from anymamba.runtime.chat.template import render

__all__ = ["render"]

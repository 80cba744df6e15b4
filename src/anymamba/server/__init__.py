"""Models behind HTTP: OpenAI's interface, Anthropic's, and states that clients hold."""

from anymamba.server.app import app
from anymamba.server.service import Settings

__all__ = ["Settings", "app"]

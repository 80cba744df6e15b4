"""Models behind HTTP: OpenAI's interface, and states that clients can keep and continue from."""

from anymamba.server.app import app
from anymamba.server.service import Settings

__all__ = ["Settings", "app"]

"""One replica: the server's application as it is, which Ray calls instead of a socket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

BY_SESSION = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@serve.deployment(
    autoscaling_config={"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 16},
    max_ongoing_requests=256,
    request_router_config=RequestRouterConfig(request_router_class=BY_SESSION),
)
class Replica:
    """A model with its cache, which answers what other replicas would answer too."""

    def __init__(self, model: str, threads: int) -> None:
        import anymamba
        from anymamba.assets import bundled_model
        from anymamba.checkpoint import resolve
        from anymamba.runtime.chat.model_template import find_template
        from anymamba.server import Settings, app

        place = resolve(model) if model else bundled_model()
        name = model.rpartition("/")[2] or "bundled"
        settings = Settings(api_key=os.environ.get("ANYMAMBA_API_KEY"))
        engine = anymamba.load(place, threads=threads)
        self.app = app({name: engine}, {name: find_template(place)}, settings)
        self.app.state.service.start()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """What the application sends for a request. Closing this cancels it."""
        sent, asked = asyncio.Queue[Any](), [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            return asked.pop() if asked else await asyncio.Event().wait()

        scope["asgi"] = {"version": "3.0"}
        running = asyncio.ensure_future(self.app(scope, receive, sent.put))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            running.cancel()
            await asyncio.wait([running])

    def __del__(self) -> None:
        self.app.state.service.stop()

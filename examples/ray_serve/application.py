"""A server on several machines: each conversation goes to the replica that has read it.

serve run --working-dir . application:build model=state-spaces/mamba-130m-hf cpus=8
This is run in the example's folder. Without a model it serves the bundled one, a CPU for each.
"""

import hashlib
import json
from typing import Any

from ray import serve
from replica import Replica
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

SENT_ON = "type http_version method scheme path query_string root_path headers client server"
MOST_BYTES = 64 << 20  # of a body: the application says what is too much for it
BEGINNING = 64  # characters of a text, which its continuations begin with too


@serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Entrance:
    """Sends requests on, and streams the answers back."""

    def __init__(self, replicas: Any) -> None:
        self.replicas = replicas

    def __serve_build_asgi_app__(self) -> Starlette:
        return Starlette(routes=[Mount("/", self.send_on)])

    async def send_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, body = Request(scope, receive), bytearray()
        async for part in request.stream():
            body += part[: MOST_BYTES - len(body)]
        session = request.headers.get("x-session-id") or fingerprint(bytes(body))
        replicas = self.replicas.options(stream=True, session_id=session)
        kept = {name: scope[name] for name in SENT_ON.split() if name in scope}
        async for message in replicas.answer.remote(kept, bytes(body)):
            await send(message)


def fingerprint(body: bytes) -> str:
    """How a conversation begins: its messages up to the user's first one, or a text's start."""
    try:
        asked = json.loads(body)
        messages = asked.get("messages", [])
        first = [message["role"] for message in messages].index("user") + 1 if messages else 0
        begins = [asked.get("model"), messages[:first], asked.get("prompt", "")[:BEGINNING]]
        return hashlib.sha256(json.dumps(begins).encode()).hexdigest()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""  # any replica says what is wrong with it


def build(arguments: dict[str, str]) -> serve.Application:
    """The application that `serve run` starts."""
    model, cpus = arguments.get("model", ""), int(arguments.get("cpus", "1"))
    return Entrance.bind(Replica.options(ray_actor_options={"num_cpus": cpus}).bind(model, cpus))

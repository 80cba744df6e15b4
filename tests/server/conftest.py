"""A server with a small model, on a port of its own, and a client of each kind."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import numpy as np
import uvicorn

import anymamba
from anymamba import Engine
from anymamba.errors import InputError
from anymamba.runtime.chat.model_template import ChatTemplate
from anymamba.runtime.generation.grammar import Constraint
from anymamba.server import Settings, app

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
# The arguments of a tool.
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The bundled one: it has a tokenizer, and takes a moment to load."""
    return anymamba.load()


@contextmanager
def serving(engine: Engine, template: str = TEMPLATE, **settings: Any) -> Iterator[str]:
    """A server's address while it runs. The model has the names "m" and "m:adapter"."""
    engines = {"m": engine, "m:adapter": engine, "plain": engine}
    templates = dict.fromkeys(("m", "m:adapter"), ChatTemplate(template, {}))
    application = app(engines, templates, Settings(shutdown_seconds=1, **settings))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def address(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("cache")
    with serving(engine, cache_dir=folder, parallel=4, queue=64) as found:
        yield found


def fails_later(constraint: Constraint, ids: Sequence[int], scores_v: object = None) -> Any:
    """A constraint that fails when a text has begun."""
    if len(ids) > 3:
        raise InputError("the grammar fails")
    return np.arange(256) == ord("a")

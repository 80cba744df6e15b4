"""`anymamba serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from anymamba.cli.load_engine import model_name, open_engine, tokenizer_place
from anymamba.cli.options.argument_types import byte_count
from anymamba.cli.options.fields import flag, integer_option, option
from anymamba.cli.options.model import AdapterOptions, EngineOptions
from anymamba.errors import InputError, MissingDependencyError

DESCRIPTION = """\
Serve a model behind OpenAI's interface: completions, chats, streams, and states that clients keep.
What a model has read of a text is one block of fixed size, and is kept: a second turn of a
conversation costs what its new words cost, over a restart too where there is a folder for it.
"""
EXAMPLES = """\
examples:
  anymamba serve
  anymamba serve -m state-spaces/mamba-130m-hf --weights int8 --port 8080
  anymamba serve -m models/codestral-int4 --cache-dir ~/.cache/states --api-key secret
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
      -d '{"prompt": "ROMEO:", "max_tokens": 30}'

ANYMAMBA_API_KEY is the key where --api-key is not given. By default only programs on this machine
reach the server: --host 0.0.0.0 opens it to the network.
"""
SERVING = ("serving",)
_MOST_PORT = 65_535


@dataclass(frozen=True)
class Options(AdapterOptions, EngineOptions):
    """What `anymamba serve` is asked for."""

    host: str = option(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        group=SERVING,
        help="the address to listen at (default: 127.0.0.1, this machine alone)",
    )
    port: int = integer_option(
        "--port",
        low=0,
        high=_MOST_PORT,
        default=8000,
        group=SERVING,
        help="the port to listen at; 0 takes a free one (default: 8000)",
    )
    name: str | None = option(
        "--name",
        metavar="NAME",
        group=SERVING,
        help="what clients call the model (default: its folder's or hub name)",
    )
    api_key: str | None = option(
        "--api-key", metavar="KEY", group=SERVING, help="what clients must send as a bearer token"
    )
    parallel: int = integer_option(
        "--parallel",
        low=1,
        high=4096,
        default=16,
        group=SERVING,
        help="how many texts are written at the same time (default: 16)",
    )
    queue: int = integer_option(
        "--queue",
        low=1,
        high=1 << 20,
        default=256,
        group=SERVING,
        help="how many requests may wait (default: 256)",
    )
    cache_memory: int = option(
        "--cache-memory",
        metavar="SIZE",
        type=byte_count,
        default=1 << 30,
        group=SERVING,
        help="memory for states of texts that were read before, such as 500M or 2G (default: 1G)",
    )
    cache_dir: str | None = option(
        "--cache-dir",
        metavar="FOLDER",
        group=SERVING,
        help="keep states as files there too, over a restart",
    )
    cache_dir_size: int = option(
        "--cache-dir-size",
        metavar="SIZE",
        type=byte_count,
        default=16 << 30,
        group=SERVING,
        help="how large the folder may become (default: 16G)",
    )
    no_page: bool = flag("--no-page", "no page to chat in at /", group=SERVING)


def run(options: Options) -> None:
    """Load the model, and serve until a signal comes."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"the server needs {' and '.join(missing)}: pip install 'anymamba[server]'"
        )
    api_key = os.environ.get("ANYMAMBA_API_KEY") if options.api_key is None else options.api_key
    if api_key is not None and (not api_key or not api_key.isascii() or not api_key.isprintable()):
        raise InputError("the API key is empty or not plain text, expected ASCII characters")
    from anymamba.cli.terminal.output import tell
    from anymamba.runtime.chat.model_template import find_template
    from anymamba.server import Settings, app
    from anymamba.server.guard import is_loopback
    from anymamba.server.listening import listen

    engine = open_engine(options)
    engine.prefill(engine.state(), [0])  # broken weights show now, and not to the first client
    name = options.name or Path(model_name(options)).name
    settings = Settings(
        api_key=api_key,
        parallel=options.parallel,
        queue=options.queue,
        cache_bytes=options.cache_memory,
        cache_dir=None if options.cache_dir is None else Path(options.cache_dir),
        cache_dir_bytes=options.cache_dir_size,
        page=not options.no_page,
    )
    template = find_template(tokenizer_place(options))
    application = app({name: engine}, {name: template}, settings)
    if api_key is None and not is_loopback(options.host):
        tell(f"anymamba: warning: whoever reaches {options.host} may use it: give an --api-key")
    say = partial(_say_where, tell, name, settings.page)
    listen(application, options.host, options.port, settings.shutdown_seconds, say)


def _say_where(tell: Callable[[str], object], name: str, has_page: bool, address: str) -> None:
    page = f"; chat in a browser at {address}" if has_page else ""
    tell(f"anymamba: {name} is served at {address}/v1{page}; Ctrl-C ends it")

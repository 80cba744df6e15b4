"""`anymamba serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from anymamba.cli.load_adapters import adapters_in, open_adapters, own_bytes
from anymamba.cli.load_engine import model_name, open_engine, tokenizer_place
from anymamba.cli.options.argument_types import byte_count, number
from anymamba.cli.options.fields import flag, integer_option, option
from anymamba.cli.options.model import AdapterOptions, EngineOptions
from anymamba.cli.terminal.sizes import size
from anymamba.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from anymamba.runtime.chat.model_template import ChatTemplate
    from anymamba.runtime.engine import Engine
    from anymamba.server import Settings

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
  anymamba serve -m models/base --adapters models/adapters
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
      -d '{"prompt": "ROMEO:", "max_tokens": 30}'

ANYMAMBA_API_KEY is the key where --api-key is not given. By default only programs on this machine
reach the server: --host 0.0.0.0 opens it to the network.
"""
SERVING = ("serving",)
LIMITS = ("limits",)
_TOKENIZER = "tokenizer.json"
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
    state_memory: int = option(
        "--state-memory",
        metavar="SIZE",
        type=byte_count,
        default=1 << 30,
        group=SERVING,
        help="memory for states that clients keep by /v1/states (default: 1G)",
    )
    adapters: str | None = option(
        "--adapters",
        metavar="FOLDER",
        group=SERVING,
        help="a folder of folders with LoRA or DoRA adapters, which clients call NAME:FOLDER; each "
        "takes the memory of the matrices that it changes",
    )
    most_adapters: int = integer_option(
        "--most-adapters",
        high=1024,
        default=8,
        group=SERVING,
        help="how many adapters there may be (default: 8)",
    )
    prompt_tokens: int = integer_option(
        "--prompt-tokens",
        high=1 << 40,
        default=1 << 20,
        group=LIMITS,
        help="how long a prompt may be (default: 1048576)",
    )
    most_tokens: int = integer_option(
        "--most-tokens",
        high=1 << 40,
        default=1 << 20,
        group=LIMITS,
        help="how many tokens a request may ask for, its answers together (default: 1048576)",
    )
    body_size: int = option(
        "--body-size",
        metavar="SIZE",
        type=byte_count,
        default=16 << 20,
        group=LIMITS,
        help="how large a body of a request may be (default: 16M)",
    )
    chunk_tokens: int = integer_option(
        "--chunk-tokens",
        high=1 << 20,
        default=256,
        group=LIMITS,
        help="how much of all prompts is read between two tokens of other texts (default: 256)",
    )
    shutdown_seconds: float = option(
        "--shutdown-seconds",
        metavar="SECONDS",
        type=number(0, 86_400),
        default=30.0,
        group=LIMITS,
        help="how long what runs may go on after SIGTERM (default: 30)",
    )


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
    from anymamba.server import app
    from anymamba.server.guard import is_loopback
    from anymamba.server.listening import listen

    engines, templates = _models(options, tell)
    settings = _settings(options, api_key)
    application = app(engines, templates, settings)
    if api_key is None and not is_loopback(options.host):
        tell(f"anymamba: warning: whoever reaches {options.host} may use it: give an --api-key")
    say = partial(_say_where, tell, engines, settings)
    listen(application, options.host, options.port, settings.shutdown_seconds, say)


def _models(
    options: Options, tell: Callable[[str], object]
) -> tuple[dict[str, Engine], dict[str, ChatTemplate | None]]:
    """The model and its adapters, each with its chat template."""
    from anymamba.runtime.chat.model_template import find_template

    if options.adapters is not None and options.adapter is not None:
        raise InputError("give --adapter, which is merged into the model, or --adapters, not both")
    folders: dict[str, Path] = {}
    if options.adapters is not None:
        folders = adapters_in(options.adapters, options.most_adapters, tell)
    engine = open_engine(options)
    engine.prefill(engine.state(), [0])  # broken weights show now, and not to the first client
    name = options.name or Path(model_name(options)).name
    place = tokenizer_place(options)
    engines, templates = {name: engine}, {name: find_template(place)}
    if folders:
        for adapter, adapted in open_adapters(options, engine, folders).items():
            adapted.prefill(adapted.state(), [0])
            engines[f"{name}:{adapter}"] = adapted
            has_own = options.tokenizer is None and (folders[adapter] / _TOKENIZER).is_file()
            own = find_template(folders[adapter]) if has_own else None
            templates[f"{name}:{adapter}"] = own or templates[name]
    return engines, templates


def _settings(options: Options, api_key: str | None) -> Settings:
    from anymamba.server import Settings

    return Settings(
        api_key=api_key,
        parallel=options.parallel,
        queue=options.queue,
        chunk_tokens=options.chunk_tokens,
        cache_bytes=options.cache_memory,
        cache_dir=None if options.cache_dir is None else Path(options.cache_dir),
        cache_dir_bytes=options.cache_dir_size,
        body_bytes=options.body_size,
        page=not options.no_page,
        prompt_tokens=options.prompt_tokens,
        most_tokens=options.most_tokens,
        state_bytes=options.state_memory,
        shutdown_seconds=options.shutdown_seconds,
    )


def _say_where(
    tell: Callable[[str], object], engines: Mapping[str, Engine], settings: Settings, address: str
) -> None:
    """What is served where, and what it takes."""
    (name, base), *adapters = engines.items()
    page = f"; chat in a browser at {address}" if settings.page else ""
    tell(f"anymamba: {name} is served at {address}/v1{page}; Ctrl-C ends it")
    row = size(base.state().nbytes)
    tell(
        f"anymamba: {base.n_parameters:,} parameters in {base.weight_type} take "
        f"{size(base.weight_bytes)}, each of {settings.parallel} texts at a time {row}, and states "
        f"of texts that were read before up to {size(settings.cache_bytes)}"
    )
    for adapted, engine in adapters:
        tell(f"anymamba: {adapted} takes {size(own_bytes(engine, base))} more")

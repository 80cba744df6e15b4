"""The engine that the options ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anymamba.cli.options.model import AdapterOptions, EngineOptions, ModelOptions

if TYPE_CHECKING:
    from anymamba.runtime.engine import Engine
    from anymamba.runtime.state import State


def open_engine(options: EngineOptions) -> Engine:
    """Load the model, and tell a remark on its weights."""
    from anymamba.cli.terminal.output import tell
    from anymamba.runtime.loading import load

    engine = load(
        options.model,
        weights=options.weights,
        threads=options.threads,
        matmul_dtype=options.matmul_dtype,
        deterministic=options.deterministic,
        adapter=adapter_of(options),
        tokenizer=options.tokenizer,
        offline=options.offline,
    )
    if engine.weights.remark is not None:
        tell(f"anymamba: {engine.weights.remark}")
    return engine


def adapter_of(options: ModelOptions) -> str | None:
    """The adapter, for commands that take one."""
    return options.adapter if isinstance(options, AdapterOptions) else None


def tokenizer_place(options: ModelOptions) -> Path:
    """The folder or file that the tokenizer comes from."""
    from anymamba.checkpoint.io import user_path

    if options.tokenizer is not None:
        return user_path(options.tokenizer)
    adapter = adapter_of(options)
    if adapter is not None and (user_path(adapter) / "tokenizer.json").is_file():
        return user_path(adapter)
    return model_place(options)


def model_place(options: ModelOptions) -> Path:
    """The folder or GGUF file that the model lies in."""
    from anymamba.checkpoint import resolve
    from anymamba.checkpoint.gguf import find_gguf
    from anymamba.checkpoint.io import user_path
    from anymamba.runtime.loading import model_of

    model = model_of(options.model, adapter_of(options))
    file = find_gguf(user_path(model))
    return file or resolve(model, offline=options.offline)


def model_name(options: ModelOptions) -> str:
    """What the output calls the model."""
    if options.model is None:
        return adapter_of(options) or "bundled"
    return options.model


def beginning_state(engine: Engine, file: str | None) -> State:
    """The state in a file, or an empty one."""
    return engine.state() if file is None else engine.load_state(file)


def beginning_tokens(engine: Engine) -> list[int]:
    """The tokens that the tokenizer puts before a text; with most there are none."""
    plain, marked = engine.tokenize("a", special=False), engine.tokenize("a")
    places = range(len(marked) - len(plain) + 1)
    start = next((at for at in places if marked[at : at + len(plain)] == plain), 0)
    return marked[:start]

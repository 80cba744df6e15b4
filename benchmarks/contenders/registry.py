"""Which peers there are, which of them are installed, and how to install the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anymamba import MambaForCausalLM
from common.shapes import Shape
from common.tables import Row, not_measured
from contenders.interface import Contender

__all__ = ["LLAMA_QUANTIZED", "LLAMA_TYPES", "MAMBAPY", "MINIMAL", "PEERS", "TRANSFORMERS", "Peers"]

TRANSFORMERS = "Transformers"
TRANSFORMERS_MAMBAPY = "Transformers + mambapy"
MAMBAPY = "mamba.py"
MINIMAL = "minimal.py"
LLAMA_TYPES = {"llama.cpp f32": "f32", "llama.cpp f16": "f16"}
# Beside our own quantized weights only.
LLAMA_QUANTIZED = {"llama.cpp q8_0": "q8_0", "llama.cpp q4_0": "q4_0"}


@dataclass(frozen=True)
class Peer:
    """The packages that a peer needs, and how to install them."""

    modules: tuple[str, ...]
    install: str

    def missing(self) -> str | None:
        """Why it cannot be measured, or None."""
        absent = [name for name in self.modules if find_spec(name) is None]
        if not absent:
            return None
        return f"not measured: {' and '.join(absent)} not installed ({self.install})"


_LLAMA = Peer(("llama_cpp", "gguf"), "make bench-peers, or pip install llama-cpp-python gguf")
PEERS = {
    TRANSFORMERS: Peer(("transformers",), "pip install transformers"),
    TRANSFORMERS_MAMBAPY: Peer(("transformers", "mambapy"), "pip install mambapy"),
    MAMBAPY: Peer(("mambapy",), "pip install mambapy"),
    MINIMAL: Peer((), ""),
    **dict.fromkeys(LLAMA_TYPES, _LLAMA),
}


class Peers:
    """The peers of one model, built when they are asked for.

    Args:
        shape: the model's.
        source: the model whose weights they get.
        wanted: False measures none of them, and says so.
        folder: where llama.cpp's files may be written.
    """

    def __init__(
        self, shape: Shape, source: MambaForCausalLM, wanted: bool, folder: Path | None = None
    ) -> None:
        self._shape, self._source, self._wanted, self._folder = shape, source, wanted, folder

    def missing(self, name: str) -> Row | None:
        """A row that says why a peer cannot be measured, or None."""
        reason = PEERS.get(name, _LLAMA).missing() if self._wanted else "not measured: --no-peers"
        return None if reason is None else not_measured(name, reason)

    def build(self, name: str) -> Contender:
        """A peer that is installed."""
        kind = (LLAMA_TYPES | LLAMA_QUANTIZED).get(name)
        if kind is not None:
            assert self._folder is not None, "llama.cpp needs a folder for its file"
            path = self._folder / f"{kind}.gguf"
            if not path.exists():
                _load("common.gguf_file", "write_gguf")(self._source, path, kind)
            llama: Contender = _load("contenders.llama_model", "Llama")(path)
            return llama
        made: Contender = _torch_class(name)(self._shape, self._source)
        return made


def _torch_class(name: str) -> Callable[..., Any]:
    if name == TRANSFORMERS_MAMBAPY:
        make = _load("contenders.transformers_model", "Transformers")
        return lambda shape, source: make(shape, source, mambapy=True)
    return _load(
        *{
            TRANSFORMERS: ("contenders.transformers_model", "Transformers"),
            MAMBAPY: ("contenders.mambapy_model", "MambaPy"),
            MINIMAL: ("contenders.minimal_model", "Minimal"),
        }[name]
    )


def _load(module: str, name: str) -> Callable[..., Any]:
    """Peers are imported only where they are installed and wanted."""
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded

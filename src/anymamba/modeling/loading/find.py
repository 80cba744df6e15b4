"""From what a user names to the files that a model is loaded from: base, adapter, GGUF."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from anymamba.checkpoint import read_config, resolve
from anymamba.checkpoint.io import read_json_object, shown, user_path
from anymamba.errors import CheckpointError, MissingDependencyError
from anymamba.modeling.gguf import find_mamba_gguf, gguf_config, hub_pattern
from anymamba.modeling.loading.arguments import take_place

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Found:
    """What a name leads to."""

    path: Path
    """The model's folder, or its GGUF file."""
    adapter: str | None = None
    """The folder of the adapter to load on it, or its hub id."""
    name: str | None = None
    """The model's own name, where the adapter's was given."""
    adapter_keywords: dict[str, Any] = field(default_factory=dict)
    adapter_name: str = "default"

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path.is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The fields of the model's config, in Transformers' names."""
        return gguf_config(self.path) if self.is_gguf else read_config(self.path)[1]


def find_model(name: str | os.PathLike[str], keywords: dict[str, Any]) -> Found:
    """Find the files of a model, downloading them if they are not local.

    Args:
        name: a folder, a GGUF file or a hub id; or a folder with an adapter of PEFT's.
        keywords: of the call of `from_pretrained`; those about places are taken out.

    Raises:
        CheckpointError: there is no such folder or file, or an adapter names no model.
        HubError: it is neither here nor to be had from the hub.
    """
    place = take_place(keywords)
    gguf_file = keywords.pop("gguf_file", None)
    adapter_keywords = dict(keywords.pop("adapter_kwargs", None) or {})
    # AutoModel looks for an adapter itself, and names the model by then.
    adapter = adapter_keywords.pop("_adapter_model_path", None)
    called = keywords.pop("adapter_name", "default")
    path = _path_of(name, gguf_file, place, keywords.get("use_safetensors"))
    if path.is_file() or not (path / _ADAPTER).is_file():
        adapter = None if adapter is None else os.fspath(adapter)
        return Found(path, adapter, None, adapter_keywords, called)
    if (path / "config.json").is_file():  # a whole model with an adapter beside it
        return Found(path, str(path), None, adapter_keywords, called)
    base = read_json_object(path / _ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"the adapter in {str(path)!r} does not say which model it belongs to; load that "
            "model, and the adapter with its load_adapter"
        )
    # Revision and subfolder are the adapter's.
    place = {key: place[key] for key in place if key not in ("revision", "subfolder")}
    of_base = _path_of(base, None, place, keywords.get("use_safetensors"))
    return Found(of_base, str(path), base, adapter_keywords, called)


def load_adapter(model: Any, found: Found) -> dict[str, Any] | None:
    """Load the adapter that was found, if any, and return what Transformers tells of it.

    Raises:
        MissingDependencyError: PEFT is not installed.
    """
    if found.adapter is None:
        return None
    try:
        import peft  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            f"{found.adapter!r} is an adapter, and loading it needs PEFT: pip install peft"
        ) from None
    info = model.load_adapter(
        found.adapter, adapter_name=found.adapter_name, adapter_kwargs=found.adapter_keywords
    )
    return dict(info.to_dict())


def _path_of(
    name: str | os.PathLike[str],
    gguf_file: str | None,
    place: dict[str, Any],
    use_safetensors: bool | None,
) -> Path:
    if gguf_file is None:
        file = find_mamba_gguf(user_path(name))
        if file is not None:
            return file
        return resolve(name, **place, use_safetensors=use_safetensors)
    folder = resolve(name, **place, weights=False, also=(hub_pattern(gguf_file),))
    path = folder / user_path(gguf_file)
    if not path.is_file():
        raise CheckpointError(f"gguf_file: {str(folder)!r} has no file {shown(gguf_file)}")
    return path

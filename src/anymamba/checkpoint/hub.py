"""From a model's name to a local folder: as it is, or downloaded from the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from anymamba.checkpoint.files import ADAPTER_NAMES
from anymamba.checkpoint.gguf.sentencepiece_file import NAMES
from anymamba.checkpoint.io import user_path
from anymamba.errors import CheckpointError, HubError

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *NAMES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index*.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index*.json")
_LOCAL_HELP = "or give the path of a local folder that holds config.json and the weights"


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    offline: bool = False,
    subfolder: str | None = None,
    force_download: bool = False,
    weights: bool = True,
    use_safetensors: bool | None = None,
    also: tuple[str, ...] = (),
) -> Path:
    """Find a model's folder, downloading it if it is not local.

    A local folder is taken as it is, also where a hub id is spelt the same. Of a model on the
    hub, only what AnyMamba reads is downloaded, and pickled weights only where there are no
    others. `HF_ENDPOINT`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` count as they are set now.

    Args:
        model: a local folder, or a hub id such as `state-spaces/mamba-130m-hf`.
        revision: a branch, tag or commit of the hub's repository; by default `main`.
        cache_dir: where downloads are kept; by default where all of the hub's are.
        token: for private and gated models; True takes the one that was logged in with.
        offline: use what was downloaded before, and no network.
        subfolder: the folder inside of the model's folder or repository that is meant.
        force_download: download again what was downloaded before.
        weights: whether the weights are wanted; without them only the small files are fetched.
        use_safetensors: True to fetch no pickles, False to fetch no safetensors.
        also: names of other files to fetch, in which `*` stands for anything.

    Returns:
        A folder that exists.

    Raises:
        CheckpointError: `model` names a local path, and there is no such folder.
        HubError: the model is not on the hub, not open to you, or the hub is out of reach and
            the model was not downloaded before. The message tells what to do.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> resolve(folder) == Path(folder)
        True
    """
    local = user_path(model)
    if model and local.is_dir():  # Path("") would be the current folder
        folder = local
    elif isinstance(model, os.PathLike) or local.exists() or _looks_like_path(model):
        kind = "is a file" if local.is_file() else "is neither a folder nor a file"
        state = kind if local.exists() else "does not exist"
        raise CheckpointError(
            f"the folder {str(model)!r} {state}; give the folder that holds config.json"
        )
    else:
        request = {
            "repo_id": model,
            "revision": revision,
            "cache_dir": cache_dir or os.environ.get("HF_HUB_CACHE") or None,
            "token": token,
            "endpoint": os.environ.get("HF_ENDPOINT") or None,
            "local_files_only": offline or _is_on("HF_HUB_OFFLINE"),
            "force_download": force_download,
        }
        inside = f"{subfolder}/" if subfolder else ""
        fetch = partial(_snapshot, request, inside, (*SMALL_FILES, *also))
        folder = _download(fetch, inside, use_safetensors) if weights else fetch(())
    folder = folder / (subfolder or "")
    if not folder.is_dir():
        raise CheckpointError(f"{str(model)!r} has no subfolder {subfolder!r}")
    return folder


def _looks_like_path(model: str) -> bool:
    is_path = model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1
    return is_path or model[1:2] == ":"  # a drive of Windows, as in C:/models


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "on", "yes", "true")


def _download(
    fetch: Callable[[tuple[str, ...]], Path], inside: str, use_safetensors: bool | None
) -> Path:
    """Download a model without its pickles, and if that brought no weights, with them."""
    if use_safetensors is False:
        return fetch((*ADAPTER_NAMES, *_PICKLES))
    snapshot = fetch((*ADAPTER_NAMES, *_SAFETENSORS))
    found = (_SAFETENSORS[0], ADAPTER_NAMES[1])
    if use_safetensors is None and not any(any((snapshot / inside).glob(one)) for one in found):
        snapshot = fetch(_PICKLES)
    return snapshot


def _snapshot(
    request: Mapping[str, Any], inside: str, small: tuple[str, ...], weights: tuple[str, ...]
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            **request,
            allow_patterns=[inside + name for name in (*small, *weights)],
            ignore_patterns=[inside + "*/*"],  # the hub's * crosses folders
        )
    except Exception as error:  # the hub's client, its HTTP library and the disk: many kinds
        raise HubError(_why_not(request, error)) from error
    return Path(folder)


def _why_not(request: Mapping[str, Any], error: Exception) -> str:
    from huggingface_hub import errors

    model, hub = repr(request["repo_id"]), request["endpoint"] or "the hub"
    nowhere = f"there is no file or folder {model} here"
    # A gated repository is a kind of one not found, so it comes first.
    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated on {hub}: accept its terms there and pass a token, {_LOCAL_HELP}"
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{model} has no revision {request['revision']!r} on {hub}: choose one its page lists"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{nowhere}, and no such model on {hub}: check the name, "
            f"pass a token if it is private, {_LOCAL_HELP}"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{nowhere}, nor a model on {hub}, whose ids are like 'owner/name': check the name"
    if isinstance(error, errors.LocalEntryNotFoundError) and request["local_files_only"]:
        return (
            f"{nowhere}, and no such model (or not all of it) in the cache, and AnyMamba was told "
            f"to work offline (offline, HF_HUB_OFFLINE): go online once, {_LOCAL_HELP}"
        )
    cause = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{nowhere}, and it could not be downloaded from {hub} ({cause[0][:200]}): check the "
        f"network, {_LOCAL_HELP}"
    )

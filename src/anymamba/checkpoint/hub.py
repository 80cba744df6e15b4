"""From a model's name to a local folder: as it is, or downloaded from the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from anymamba.checkpoint.io import user_path
from anymamba.errors import CheckpointError, HubError

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index*.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index*.json")
# A folder may hold an adapter of PEFT's, alone or beside a model.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
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
        folder = _download(
            _Request(
                model=model,
                inside=f"{subfolder}/" if subfolder else "",
                revision=revision,
                cache_dir=cache_dir or os.environ.get("HF_HUB_CACHE") or None,
                token=token,
                endpoint=os.environ.get("HF_ENDPOINT") or None,
                offline=offline or _is_on("HF_HUB_OFFLINE"),
                force=force_download,
                weights=weights,
                use_safetensors=use_safetensors,
                also=also,
            )
        )
    folder = folder / (subfolder or "")
    if not folder.is_dir():
        raise CheckpointError(f"{str(model)!r} has no subfolder {subfolder!r}")
    return folder


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "on", "yes", "true")


@dataclass(frozen=True)
class _Request:
    """What to ask the hub for."""

    model: str
    inside: str
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None
    endpoint: str | None
    offline: bool
    force: bool
    weights: bool
    use_safetensors: bool | None
    also: tuple[str, ...]


def _download(request: _Request) -> Path:
    """Download a model without its pickles, and if that brought no weights, with them."""
    if not request.weights:
        return _snapshot(request, ())
    if request.use_safetensors is False:
        return _snapshot(request, (*_ADAPTER, *_PICKLES))
    snapshot = _snapshot(request, (*_ADAPTER, *_SAFETENSORS))
    found = [_SAFETENSORS[0], _ADAPTER[1]]
    if request.use_safetensors is None and not any(
        any((snapshot / request.inside).glob(pattern)) for pattern in found
    ):
        snapshot = _snapshot(request, _PICKLES)
    return snapshot


def _snapshot(request: _Request, weights: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = (*SMALL_FILES, *weights, *request.also)
    try:
        folder = snapshot_download(
            request.model,
            revision=request.revision,
            cache_dir=Path(request.cache_dir) if request.cache_dir else None,
            token=request.token,
            endpoint=request.endpoint,
            local_files_only=request.offline,
            force_download=request.force,
            allow_patterns=[request.inside + name for name in wanted],
            ignore_patterns=[request.inside + "*/*"],  # the hub's * crosses folders
        )
    except Exception as error:  # the hub's client, its HTTP library and the disk: many kinds
        raise HubError(_why_not(request, error)) from error
    return Path(folder)


def _why_not(request: _Request, error: Exception) -> str:
    from huggingface_hub import errors

    model, hub = repr(request.model), request.endpoint or "the hub"
    nowhere = f"there is no file or folder {model} here"
    # A gated repository is a kind of one not found, so it comes first.
    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated on {hub}: accept its terms there and pass a token, {_LOCAL_HELP}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {request.revision!r} on {hub}: choose one its page lists"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{nowhere}, and no such model on {hub}: check the name, "
            f"pass a token if it is private, {_LOCAL_HELP}"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{nowhere}, nor a model on {hub}, whose ids are like 'owner/name': check the name"
    if isinstance(error, errors.LocalEntryNotFoundError) and request.offline:
        return (
            f"{nowhere}, and no such model (or not all of it) in the cache, and AnyMamba was told "
            f"to work offline (offline, HF_HUB_OFFLINE): go online once, {_LOCAL_HELP}"
        )
    cause = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{nowhere}, and it could not be downloaded from {hub} ({cause[0][:200]}): check the "
        f"network, {_LOCAL_HELP}"
    )

"""The file of a saved state: what stands in it, and whether it belongs to a model.

A state file is a safetensors file of two blocks, for b texts that were read side by side:

| tensor | shape | type |
| --- | --- | --- |
| `conv_states` | (n_layer, b, e, k) | any floating one |
| `ssm_states` | (n_layer, b, e, n) | F32, or BF16 where it was saved so |
| `logits` | (b, v) | optional: what the model said of the token that follows |

Its metadata has the format's name and version, the sizes of the model (`model`), how many tokens
each row has read (`token_counts`), and if known a digest of the weights (`weights_digest`).
`MambaCache` and the runtime's `State` write and read the same files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymamba.checkpoint.architecture import ARCHITECTURES, MAMBA, architecture_of
from anymamba.checkpoint.io import shown, user_path
from anymamba.checkpoint.safetensors import SafetensorsHeader, TensorRecord, read_header
from anymamba.checkpoint.shapes import model_shape
from anymamba.errors import CheckpointError, StateError

_FORMAT = "anymamba.state"
_FORMAT_VERSION = "1"
_BLOCKS = ("conv_states", "ssm_states")
_LOGITS = "logits"

IDENTIFYING = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "state_size", "conv_kernel"),
    *("num_heads", "head_dim", "n_groups"),
)
"""What a model must have in common with a state, where its architecture has such a field."""


@dataclass(frozen=True)
class StateFile:
    """A state file, opened: its header was read and checked, its blocks were not read.

    Args:
        source: how messages call it.
        token_counts: how many tokens each row has read.
        weights_digest: of the weights that made it, if whoever saved it knew.
        tensors: where each block is.
        metadata: the fields of its header.
    """

    source: str
    token_counts: tuple[int, ...]
    weights_digest: str | None
    tensors: Mapping[str, TensorRecord]
    metadata: Mapping[str, str]

    def check_digest(self, expected: str) -> None:
        """Refuse a state of other weights; one that does not say what made it is accepted.

        Raises:
            StateError: the file has another digest.
        """
        if self.weights_digest is not None and self.weights_digest != expected:
            raise StateError(
                f"{self.source} belongs to weights with digest {shown(self.weights_digest[:16])}, "
                f"this model's is {expected[:16]!r}; use it with the weights it was made by"
            )


def state_identity(config: Mapping[str, Any]) -> dict[str, str | int]:
    """What a model must have in common with a state: its kind and sizes.

    Args:
        config: fields in Transformers' names; those left out have Transformers' defaults.

    Returns:
        The fields that decide the shapes of a state, by Transformers' names.

    Raises:
        ConfigError: a field makes no sense.

    Example:
        >>> state_identity({"hidden_size": 8, "num_hidden_layers": 2})["intermediate_size"]
        16
    """
    fields = model_shape(config).fields
    sizes = {name: fields[name] for name in IDENTIFYING if name in fields}
    return {"model_type": architecture_of(config).name, **sizes}


def state_shapes(identity: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a layer's window and state.

    Args:
        identity: what `state_identity` says of the model.

    Example:
        >>> state_shapes(state_identity({"hidden_size": 8, "state_size": 4}))
        ((16, 4), (16, 4))
    """
    letters = {"intermediate_size": "e", "state_size": "n", "conv_kernel": "k"}
    letters |= {"num_heads": "h", "head_dim": "p"}
    sizes = {letter: identity.get(name, 0) for name, letter in letters.items()}
    sizes["m"] = identity.get("n_groups", 0) * sizes["n"]
    # A user's own class may have a name of its own, and is a Mamba.
    return ARCHITECTURES.get(identity.get("model_type", MAMBA.name), MAMBA).states(sizes)


def state_metadata(
    identity: Mapping[str, str | int], token_counts: Sequence[int], digest: str | None = None
) -> dict[str, str]:
    """The metadata of a state file.

    Args:
        identity: what `state_identity` says of the model.
        token_counts: how many tokens each row has read.
        digest: of the model's weights, if it is to be checked when the state is loaded.

    Returns:
        The fields of the file's header.

    Example:
        >>> state_metadata({"hidden_size": 8}, [3])["token_counts"]
        '[3]'
    """
    metadata = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "model": json.dumps(dict(identity)),
        "token_counts": json.dumps(list(token_counts)),
    }
    return metadata if digest is None else metadata | {"weights_digest": digest}


def read_state_file(
    path: str | os.PathLike[str],
    identity: Mapping[str, str | int],
    read: Callable[[Path], SafetensorsHeader] = read_header,
) -> StateFile:
    """Read and check the header of a state file.

    Args:
        path: the file.
        identity: what `state_identity` says of the model that is to continue from it.
        read: reads the header; give another where the file is open already.

    Returns:
        Where its blocks are. Their shapes are those of this model's states. Whether the weights
        are the same is for `StateFile.check_digest` to say.

    Raises:
        StateError: there is no such file, it is broken, or it belongs to another model.

    Example:
        >>> read_state_file("nowhere", {})
        Traceback (most recent call last):
            ...
        anymamba.errors.StateError: state file 'nowhere' does not exist
    """
    source = f"state file {str(path)!r}"
    place = user_path(path, StateError)
    if not place.is_file():
        raise StateError(f"{source} does not exist")
    try:
        header = read(place)
    except CheckpointError as error:
        raise StateError(f"{source} is broken: {error}; save the state again") from error
    metadata, tensors = header.metadata, header.tensors
    if metadata.get("format") != _FORMAT or tensors.keys() - {_LOGITS} != set(_BLOCKS):
        raise StateError(f"{source} is not a state that AnyMamba saved")
    version = metadata.get("format_version")
    if version != _FORMAT_VERSION:
        raise StateError(
            f"{source} has format version {shown(version)} and this release reads "
            f"{_FORMAT_VERSION!r}; use the release of AnyMamba that wrote it"
        )
    check_identity(_json(metadata, "model", source), identity, source)
    counts = _token_counts(metadata, source)
    _check_blocks(tensors, len(counts), identity, source)
    return StateFile(source, counts, metadata.get("weights_digest"), tensors, metadata)


def check_identity(saved: Any, expected: Mapping[str, str | int], source: str) -> None:
    """Refuse a state whose sizes are not the model's.

    Args:
        saved: what the state's file or owner says of its model.
        expected: what `state_identity` says of the model at hand.
        source: what the state is called in the message.

    Raises:
        StateError: the message names the first field that differs, and both values.

    Example:
        >>> check_identity({"hidden_size": 8}, {"hidden_size": 16}, "this state")
        Traceback (most recent call last):
            ...
        anymamba.errors.StateError: this state belongs to a model with hidden_size=8, this model \
has hidden_size=16; use it with the model it was made by
    """
    if not isinstance(saved, dict):
        raise StateError(f"{source} is broken: its 'model' is no mapping")
    for name, value in expected.items():
        if saved.get(name) != value:
            raise StateError(
                f"{source} belongs to a model with {name}={shown(saved.get(name))}, this model has "
                f"{name}={value!r}; use it with the model it was made by"
            )


def check_finite_blocks(
    blocks: Mapping[str, Any], isfinite: Callable[[Any], Any], state: str
) -> None:
    """Refuse to write a state from which nothing could go on.

    Its blocks are NumPy's arrays or PyTorch's tensors, and `isfinite` the function of that library.

    Raises:
        StateError: a block holds NaN or infinity.
    """
    for name, block in blocks.items():
        if not isfinite(block).all():
            raise StateError(
                f"{state} holds NaN or infinity in its {name}, and nothing could go on from it: it "
                "was not written; the model's weights are broken, or what was assigned"
            )


def _json(metadata: Mapping[str, str], key: str, source: str) -> Any:
    try:
        return json.loads(metadata[key])
    # RecursionError: a hostile file may nest brackets without end.
    except (KeyError, ValueError, RecursionError) as error:
        raise StateError(f"{source} is broken: its {key!r} cannot be read") from error


_MOST_TOKENS = 1 << 53  # so that every program that reads JSON can count on


def _token_counts(metadata: Mapping[str, str], source: str) -> tuple[int, ...]:
    found = _json(metadata, "token_counts", source)
    counts = found if isinstance(found, list) else [None]
    if not all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in counts):
        raise StateError(f"{source} is broken: its token counts are not integers from 0 to 2^53")
    return tuple(counts)


def _check_blocks(
    tensors: Mapping[str, TensorRecord], batch: int, identity: Mapping[str, str | int], source: str
) -> None:
    """Check what the file holds against what its header and the model say."""
    rows, (window, state) = (identity["num_hidden_layers"], batch), state_shapes(identity)
    expected = {"conv_states": (*rows, *window), "ssm_states": (*rows, *state)}
    for name, shape in expected.items():
        found = tensors[name].shape
        if found != shape:
            raise StateError(f"{source} is broken: {name} has shape {found}, expected {shape}")
    windows, states = tensors["conv_states"].dtype, tensors["ssm_states"].dtype
    if not windows.startswith(("F", "BF")):
        raise StateError(
            f"{source} is broken: conv_states has type {windows}, expected a floating one"
        )
    if states not in ("F32", "BF16"):
        raise StateError(f"{source} is broken: ssm_states has type {states}, expected F32 or BF16")
    logits = tensors.get(_LOGITS)
    if logits is not None and (len(logits.shape) != 2 or logits.shape[0] != batch):
        raise StateError(
            f"{source} is broken: logits has shape {logits.shape}, expected ({batch}, vocabulary)"
        )

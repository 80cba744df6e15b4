"""What a model remembers of a text, as a value: it can be copied, saved, and continued from.

However long the text is, this is a few megabytes at most. To read on from a state costs what the
new tokens cost, and nothing for those that were read before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cached_property
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import (
    StateFile,
    TensorBytes,
    check_finite_blocks,
    check_identity,
    read_state_file,
    state_identity,
    state_metadata,
    write_atomically,
    write_safetensors,
)
from anymamba.checkpoint.dtypes import as_float32, to_bfloat16
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.safetensors.mmap import FileMap
from anymamba.errors import InputError, StateError
from anymamba.runtime.state.batch_state import BatchState


class Identity:
    """Which model a state belongs to: its sizes, and a digest of its weights.

    Args:
        config: the config's fields in Transformers' names.
        vocabulary: how many tokens the model has.
        compute_digest: reads all weights to tell which they are.
        arithmetic: the types of the weights and of the products, such as "int8-float32". States
            may go from one to another; what follows differs in the last digits.

    Attributes:
        sizes: the fields that decide the shapes of a state.

    Example:
        >>> identity = Identity({"hidden_size": 8}, 50280, lambda: "4e05fedd")
        >>> identity.sizes["intermediate_size"], identity.digest
        (16, '4e05fedd')
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        vocabulary: int,
        compute_digest: Callable[[], str],
        arithmetic: str = "f32-float32",
    ) -> None:
        self.sizes = state_identity(config)
        self.vocabulary = vocabulary
        self.arithmetic = arithmetic
        self._compute_digest = compute_digest

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits. Computing them takes about a second per gigabyte."""
        return self._compute_digest()


class State:
    """What a model remembers of one text. `Engine.state` makes an empty one.

    Args:
        identity: the model that it belongs to.
        blocks: the memory of one text; by default of one of which nothing was read.

    Attributes:
        identity: the model that it belongs to.

    Example:
        >>> import anymamba
        >>> engine = anymamba.load()
        >>> state = engine.prefill(engine.state(), "ROMEO:")
        >>> state
        State(6 tokens, 173 kB)
    """

    def __init__(self, identity: Identity, blocks: BatchState | None = None) -> None:
        self.identity = identity
        self._blocks = BatchState.empty(identity.sizes, 1) if blocks is None else blocks

    def __repr__(self) -> str:
        return f"State({self.token_count} tokens, {self.nbytes / 1000:.0f} kB)"

    @property
    def conv_states(self) -> NDArray[np.float32]:
        """(n_layer, 1, e, k), the last k inputs of each layer's convolution, oldest first."""
        return self._blocks.conv

    @property
    def ssm_states(self) -> NDArray[np.float32]:
        """(n_layer, 1, e, n), the state of each channel of each layer."""
        return self._blocks.ssm

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """(v,), what the model says of the next token; None if nothing says it yet."""
        return self._blocks.logits[0]

    @property
    def token_count(self) -> int:
        """How many tokens were read."""
        return int(self._blocks.counts[0])

    @property
    def nbytes(self) -> int:
        """The bytes that are kept."""
        logits = self.logits
        kept = self.conv_states.nbytes + self.ssm_states.nbytes
        return kept if logits is None else kept + logits.nbytes

    def copy(self) -> State:
        """Return a state that shares no memory with this one: the way to fork a text.

        `copy.copy` and `copy.deepcopy` do the same.

        Example:
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> state = engine.prefill(engine.state(), "ROMEO:")
            >>> fork = engine.prefill(state.copy(), " But")
            >>> state.token_count, fork.token_count
            (6, 10)
        """
        return State(self.identity, self._blocks.take([0]))

    def __copy__(self) -> State:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self.copy()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a State cannot be pickled, since it belongs to the engine that made it: write it with "
            "State.save, and read it with Engine.load_state"
        )

    def assign(self, conv_states: NDArray[Any], ssm_states: NDArray[Any], token_count: int) -> None:
        """Overwrite what is remembered, by what another program remembered for this model.

        Args:
            conv_states: (n_layer, 1, e, k).
            ssm_states: (n_layer, 1, e, n).
            token_count: how many tokens were read.

        Raises:
            InputError: a shape does not fit, or the count is no whole number of at least 0.

        Example:
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> state, other = engine.state(), engine.prefill(engine.state(), "ROMEO:")
            >>> state.assign(other.conv_states, other.ssm_states, other.token_count)
            >>> state.token_count
            6
        """
        if type(token_count) is not int or token_count < 0:
            raise InputError(
                f"token_count must be a whole number of at least 0, got {token_count!r}"
            )
        for name, given, own in (
            ("conv_states", conv_states, self.conv_states),
            ("ssm_states", ssm_states, self.ssm_states),
        ):
            if np.shape(given) != own.shape:
                raise InputError(f"{name} has shape {np.shape(given)}, expected {own.shape}")
        self._blocks = BatchState(
            np.array(conv_states, np.float32, order="C"),
            np.array(ssm_states, np.float32, order="C"),
            np.array([token_count], np.int64),
            [None],
        )

    def batch_of(self, identity: Identity) -> BatchState:
        """What the state holds, for the model of this identity, which goes on from it.

        Raises:
            StateError: the state belongs to another model.
        """
        if self.identity is not identity:
            check_identity(self.identity.sizes, identity.sizes, "this state")
            if self.identity.digest != identity.digest:
                raise StateError(
                    "this state belongs to a model of the same sizes with other weights; use it "
                    "with the engine that made it"
                )
        return self._blocks

    def save(
        self, path: str | os.PathLike[str], dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        """Write the state to a safetensors file, atomically. `MambaCache.load` reads it too.

        Args:
            path: the file; an existing one is replaced.
            dtype: "bfloat16" halves the file and rounds the state to 3 digits, so that what
                follows differs a little from what would have followed.

        Raises:
            InputError: there is no such dtype.
            StateError: the state holds NaN or infinity, and nothing could go on from it.
            CheckpointError: the file cannot be written.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> file = Path(tempfile.mkdtemp()) / "romeo.state"
            >>> engine.prefill(engine.state(), "ROMEO:").save(file)
            >>> engine.load_state(file)
            State(6 tokens, 173 kB)
        """
        if dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        blocks = {"conv_states": self.conv_states, "ssm_states": self.ssm_states}
        if self.logits is not None:
            blocks["logits"] = self.logits[None]
        check_finite_blocks(blocks, np.isfinite, "the state")
        tensors = {name: _bytes_of(block, dtype) for name, block in blocks.items()}
        digest = self.identity.digest
        metadata = state_metadata(self.identity.sizes, [self.token_count], digest)
        write_atomically(path, lambda part: write_safetensors(part, tensors, metadata))


def check_state(state: object) -> State:
    """Refuse what is not a state.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(state, State):
        raise InputError(
            "expected a state, as Engine.state makes it and load_state reads it, got "
            f"{shown(state)}"
        )
    return state


def load_state(path: str | os.PathLike[str], identity: Identity) -> State:
    """Read a state that `State.save` or `MambaCache.save` wrote, for the model of this identity.

    Raises:
        StateError: there is no such file, it is broken, it belongs to another model or to other
            weights, or holds several texts.

    Example:
        >>> load_state("nowhere", Identity({}, 50280, lambda: ""))
        Traceback (most recent call last):
            ...
        anymamba.errors.StateError: state file 'nowhere' does not exist
    """
    # Closed in any case: Windows would not remove a broken file that is still mapped.
    with closing(FileMap()) as files:
        return _load_state(files, path, identity)


def _load_state(files: FileMap, path: str | os.PathLike[str], identity: Identity) -> State:
    # Of one open file, which another process may replace by a newer state at any moment.
    file = read_state_file(path, identity.sizes, files.header)
    if len(file.token_counts) != 1:
        raise StateError(
            f"{file.source} holds {len(file.token_counts)} texts, expected one; load it by "
            "MambaCache.load, and take a row of it by to_state"
        )
    _check_logits(file, identity.vocabulary)
    if file.weights_digest is not None:  # else ours need not be computed
        file.check_digest(identity.digest)
    blocks = {name: _read_block(files, file, name) for name in file.tensors}
    counts = np.array(file.token_counts, np.int64)
    logits = [*blocks["logits"]] if "logits" in blocks else [None]
    memory = BatchState(blocks["conv_states"], blocks["ssm_states"], counts, logits)
    return State(identity, memory)


def _bytes_of(block: NDArray[np.float32], dtype: str) -> TensorBytes:
    if dtype == "bfloat16":
        return TensorBytes("BF16", block.shape, to_bfloat16(block).tobytes())
    return TensorBytes("F32", block.shape, block.tobytes())


def _read_block(files: FileMap, file: StateFile, name: str) -> NDArray[np.float32]:
    """A block as float32, in memory of its own."""
    record = file.tensors[name]
    if record.dtype not in ("F32", "F16", "BF16"):
        raise StateError(
            f"{file.source} has {name} as {record.dtype}, expected F32, F16 or BF16; save it again "
            "from a MambaCache of such a type"
        )
    block = as_float32(files.array(record), copy=True)
    if not np.isfinite(block).all():
        raise StateError(
            f"{file.source} is broken: {name} holds NaN or infinity; read the text again"
        )
    return block


def _check_logits(file: StateFile, vocabulary: int) -> None:
    logits = file.tensors.get("logits")
    if logits is not None and logits.shape != (1, vocabulary):
        raise StateError(
            f"{file.source} belongs to a model with a vocabulary of {logits.shape[1]}, this model "
            f"has {vocabulary}; use it with the model it was made by"
        )

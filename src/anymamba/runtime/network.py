"""A model in the native core, and the two calls that advance texts: one token, or a chunk.

A call advances the memory of its texts, their numbers of tokens and the logits of what comes next
as one: no Ctrl-C comes in between, so that whatever happens a state is what its count says, and
can be continued. Where the core hears Ctrl-C or lacks memory, the state is what it was before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import call
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymamba.arithmetic import check_matmul_dtype, matmul_dtype_from_environment
from anymamba.checkpoint import model_shape
from anymamba.checkpoint.architecture import (
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    architecture_of,
    in_layer,
    is_matrix,
)
from anymamba.checkpoint.dtypes import dtype_of
from anymamba.checkpoint.finite import say_what_is_broken
from anymamba.errors import CheckpointError, ConfigError
from anymamba.renamed import old_names
from anymamba.runtime.native import (
    core,
    epsilon_of,
    head_settings,
    mixer_epsilon_of,
    wanted_threads,
)
from anymamba.runtime.state import BatchState
from anymamba.runtime.tokenizer import check_vocabulary

if TYPE_CHECKING:
    from anymamba.checkpoint.quantization import Tensor
    from anymamba.runtime.weights import Weights

__getattr__ = old_names(__name__)

CHUNK_TOKENS = 512
"""How many tokens a call reads at most, all texts together: enough for products at full speed,
few enough for little memory."""

_MOST_ROWS = 64
"""More texts than these advance faster as one matrix product."""


class Network:
    """A model's forward pass. Threads may use one at the same time, each with its own blocks.

    Args:
        weights: the model's tensors; they are used where they lie.
        threads: how many threads compute; None leaves the choice to the environment.
        matmul_dtype: "float32", or "bfloat16" to round what is multiplied with bfloat16 weights;
            None leaves the choice to the environment.

    Raises:
        BackendError: there is no such type, or this processor does not multiply it.
        ConfigError: bfloat16 was asked for, and none of the matrices is stored in it.
        MissingDependencyError: the native core is not installed.
        CheckpointError: the config asks for what the core does not compute. All that advances texts
            raises it too, before anything is read, where a file of the weights was shortened.
    """

    def __init__(
        self, weights: Weights, threads: int | None = None, matmul_dtype: str | None = None
    ) -> None:
        self.threads = wanted_threads(threads)
        self.matmul_dtype = _wanted_matmul_dtype(matmul_dtype, weights.tensors)
        self.vocabulary = weights.tensors[EMBEDDINGS].shape[0]
        self._check_files = weights.check
        self._tensors = weights.tensors
        self._core = core()
        self._model = self._core.Model(**_table(weights), constant=True)

    def step(self, blocks: BatchState, tokens_b: NDArray[np.int64]) -> None:
        """Let each text read one token; `blocks` and their logits advance in place."""
        if blocks.rows > _MOST_ROWS:
            self.read(blocks, list(tokens_b[:, None]))
            return
        logits = self._logits_of(blocks)
        rounds = self.matmul_dtype == "bfloat16"
        arguments = (tokens_b, None, blocks.conv, blocks.ssm, logits, rounds)
        keep = partial(setattr, blocks, "logits", logits)
        self._advance(blocks, partial(self._model.step, *arguments), 1, keep)

    def read(self, blocks: BatchState, sequences: Sequence[NDArray[np.int64]]) -> None:
        """Let each text read some tokens; `blocks` and their logits advance in place.

        Args:
            blocks: b texts.
            sequences: what each of them reads, which may be nothing.
        """
        lengths = np.array([ids.size for ids in sequences], np.int64)
        if not lengths.any():
            return
        reading = np.flatnonzero(lengths)
        ends = np.cumsum(lengths)
        logits_bv = self._logits_of(blocks)
        all_read = reading.size == lengths.size
        logits = logits_bv if all_read else np.empty((reading.size, self.vocabulary), np.float32)
        keep: list[Callable[[], object]] = [partial(setattr, blocks, "logits", logits_bv)]
        if not all_read:
            keep.insert(0, partial(logits_bv.__setitem__, reading, logits))
        self._read(blocks, sequences, ends[reading] - 1, logits, *keep)

    def read_all(self, blocks: BatchState, ids_l: NDArray[np.int64]) -> NDArray[np.float32]:
        """Let one text read some tokens, and return the logits (l, v) after each of them."""
        logits_lv = np.empty((ids_l.size, self.vocabulary), np.float32)
        if ids_l.size:
            last_bv = np.empty((1, self.vocabulary), np.float32)
            self._read(
                blocks,
                [ids_l],
                np.arange(ids_l.size),
                logits_lv,
                partial(last_bv.__setitem__, slice(None), logits_lv[-1:]),
                partial(setattr, blocks, "logits", last_bv),
            )
        return logits_lv

    def check_tokens(self, ids: NDArray[np.integer]) -> None:
        """Refuse tokens that the model does not have, before anything is read."""
        check_vocabulary(ids, self.vocabulary, "the text")

    def check_numbers(self, logits_bv: NDArray[np.float32]) -> None:
        """Refuse logits of a model whose weights hold NaN or infinity.

        A NaN that a text reads stays in its state, and is in all that is said afterwards.

        Raises:
            CheckpointError: the message names the tensor.
        """
        largest_b = logits_bv.max(axis=1)
        if not np.isfinite(largest_b).all():
            raise say_what_is_broken(float(largest_b.max()), self._tensors)

    def _read(
        self,
        blocks: BatchState,
        sequences: Sequence[NDArray[np.int64]],
        positions_w: NDArray[np.int64],
        logits_wv: NDArray[np.float32],
        *keep: Callable[[], object],
    ) -> None:
        lengths = np.array([ids.size for ids in sequences], np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        tokens = np.concatenate(sequences)
        states = (blocks.conv, blocks.ssm)
        rounds = self.matmul_dtype == "bfloat16"
        arguments = (tokens, None, offsets, positions_w, *states, logits_wv, rounds)
        self._advance(blocks, partial(self._model.read, *arguments), lengths, *keep)

    def _advance(
        self,
        blocks: BatchState,
        compute: Callable[[], None],
        tokens: NDArray[np.int64] | int,
        *keep: Callable[[], object],
    ) -> None:
        """Compute, keep what comes of it, and count the tokens; all of it or nothing."""
        self._check_files()
        if self._core.threads() != self.threads:
            self._core.set_threads(self.threads)
        count = partial(np.add, blocks.counts, tokens, out=blocks.counts)
        # Python looks for Ctrl-C between its own instructions: here there are none in between, as
        # there would be in NumPy's functions, which ask in Python whose they are.
        steps: tuple[Callable[[], object], ...] = (compute, *keep, count)
        deque(map(call, steps), maxlen=0)

    def _logits_of(self, blocks: BatchState) -> NDArray[np.float32]:
        if blocks.logits is not None:
            return blocks.logits
        return np.zeros((blocks.rows, self.vocabulary), np.float32)


def _wanted_matmul_dtype(name: str | None, tensors: Mapping[str, Tensor]) -> str:
    if name is None:
        return matmul_dtype_from_environment()
    check_matmul_dtype(name, "matmul_dtype")
    narrow = any(
        isinstance(tensor, np.ndarray) and dtype_of(tensor) == "BF16" and is_matrix(key)
        for key, tensor in tensors.items()
    )
    if name == "bfloat16" and not narrow:
        raise ConfigError(
            "matmul_dtype='bfloat16' is for weights in bfloat16, and this model has none; give "
            "weights='bf16' too (on the command line --weights bf16)"
        )
    return name


def _table(weights: Weights) -> dict[str, Any]:
    """What the core's model is made of."""
    config, tensors = weights.config, weights.tensors
    try:
        eps, mixer_eps = epsilon_of(config), mixer_epsilon_of(config)
        heads = head_settings(config)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    architecture, shape = architecture_of(config), model_shape(config)
    widths = architecture.norm_widths(shape.dt_rank, shape.d_state)
    norms = {name: np.ones(width, np.float32) for name, width in widths.items()}
    core_layer, layers = architecture.core_layer, range(shape.n_layer)
    return {
        "embeddings": _given(tensors[EMBEDDINGS]),
        "head": _given(tensors.get(HEAD, tensors[EMBEDDINGS])),
        "norm": tensors[FINAL_NORM],
        "eps": eps,
        "mixer_eps": mixer_eps or 0.0,
        "layers": [core_layer(partial(_of_layer, tensors, index)) | norms for index in layers],
        **heads,
    }


def _of_layer(tensors: Mapping[str, Tensor], index: int, name: str) -> Any:
    return _given(tensors.get(in_layer(index, name)))


def _given(tensor: Tensor | None) -> Any:
    return tensor if tensor is None or isinstance(tensor, np.ndarray) else tensor.arrays()

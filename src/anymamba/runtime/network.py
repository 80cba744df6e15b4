"""A model in the native core, and the calls that advance texts.

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
from anymamba.runtime.state import BatchState, Identity
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
        deterministic: whether a text's logits are the same bits whatever is computed beside it and
            however it is cut into calls. Quantized weights always are; others take longer for it.

    Raises:
        BackendError: there is no such type, or this processor does not multiply it.
        ConfigError: bfloat16 was asked for, and none of the matrices is stored in it.
        MissingDependencyError: the native core is not installed.
        CheckpointError: the config asks for what the core does not compute. All that advances texts
            raises it too, before anything is read, where a file of the weights was shortened.
    """

    def __init__(
        self,
        weights: Weights,
        threads: int | None = None,
        matmul_dtype: str | None = None,
        deterministic: bool = False,
    ) -> None:
        self.threads = wanted_threads(threads)
        self.matmul_dtype = _wanted_matmul_dtype(matmul_dtype, weights.tensors)
        self.vocabulary, self.width = weights.tensors[EMBEDDINGS].shape
        self._check_files = weights.check
        self._tensors = weights.tensors
        self._core = core()
        quantized = any(not isinstance(tensor, np.ndarray) for tensor in weights.tensors.values())
        self.deterministic = deterministic or quantized
        arithmetic = f"{weights.weight_type}-{self.matmul_dtype}"
        if deterministic:
            arithmetic += "-deterministic"
        self.identity = Identity(weights.config, self.vocabulary, weights.digest, arithmetic)
        table = _table(weights)
        self._model = self._core.Model(**table, constant=True, in_order=self.deterministic)

    def advance(
        self, blocks: BatchState, rows: Sequence[int], sequences: Sequence[NDArray[np.int64]]
    ) -> None:
        """Let some texts read some tokens; their rows of `blocks` advance in place.

        Args:
            blocks: the texts' memory.
            rows: which of them read, each named once.
            sequences: what each of them reads. One that reads nothing stays as it is.
        """
        reading = [(row, ids) for row, ids in zip(rows, sequences, strict=True) if ids.size]
        if not reading:
            return
        slots_r = np.array([row for row, _ in reading])
        lengths_r = np.array([ids.size for _, ids in reading])
        tokens_l = np.concatenate([ids for _, ids in reading])
        logits_rv = np.empty((len(reading), self.vocabulary), np.float32)
        if tokens_l.size == len(reading) <= _MOST_ROWS:
            compute = partial(self._model.step, tokens_l, None)
        else:
            ends_r = np.cumsum(lengths_r)
            offsets = np.concatenate([[0], ends_r])
            compute = partial(self._model.read, tokens_l, None, offsets, ends_r - 1)
        rounds = self.matmul_dtype == "bfloat16"
        compute = partial(compute, blocks.conv, blocks.ssm, logits_rv, rounds, slots_r)
        self._advance(blocks, compute, slots_r, lengths_r, logits_rv)

    def read_all(
        self, blocks: BatchState, ids_l: NDArray[np.int64], row: int = 0
    ) -> NDArray[np.float32]:
        """Let a row's text read some tokens, and return the logits (l, v) after each of them."""
        logits_lv = np.empty((ids_l.size, self.vocabulary), np.float32)
        if ids_l.size:
            positions_l, offsets = np.arange(ids_l.size), np.array([0, ids_l.size])
            slots_r, rounds = np.array([row]), self.matmul_dtype == "bfloat16"
            arguments = (ids_l, None, offsets, positions_l, blocks.conv, blocks.ssm)
            compute = partial(self._model.read, *arguments, logits_lv, rounds, slots_r)
            last_bv = np.empty((1, self.vocabulary), np.float32)
            keep = partial(last_bv.__setitem__, slice(None), logits_lv[-1:])
            self._advance(blocks, compute, slots_r, offsets[1:], last_bv, keep)
        return logits_lv

    def read_hidden(
        self, blocks: BatchState, rows: Sequence[int], sequences: Sequence[NDArray[np.int64]]
    ) -> list[NDArray[np.float32]]:
        """Let some texts read some tokens, as `advance`; return what the last norm gives for them.

        Returns:
            (l, d) for each text. What comes next is not computed, and `blocks` do not say it.
        """
        reading = [(row, ids) for row, ids in zip(rows, sequences, strict=True) if ids.size]
        offsets = np.cumsum([0, *(ids.size for _, ids in reading)])
        hidden_ld = np.empty((offsets[-1], self.width), np.float32)
        if reading:
            slots_r = np.array([row for row, _ in reading])
            tokens_l = np.concatenate([ids for _, ids in reading])
            positions_l = np.arange(tokens_l.size)
            rounds = self.matmul_dtype == "bfloat16"
            read = partial(self._model.read, tokens_l, None, offsets, positions_l)
            compute = partial(
                read, blocks.conv, blocks.ssm, hidden_ld, rounds, slots_r, without_head=True
            )
            self._advance(blocks, compute, slots_r, np.diff(offsets), [None] * len(reading))
        ends = np.cumsum([ids.size for ids in sequences])
        return np.split(hidden_ld, ends[:-1])

    def check_tokens(self, ids: NDArray[np.integer]) -> None:
        """Refuse tokens that the model does not have, before anything is read."""
        check_vocabulary(ids, self.vocabulary, "the text")

    def check_numbers(self, logits: NDArray[np.float32]) -> None:
        """Refuse logits of a model whose weights hold NaN or infinity.

        A NaN that a text reads stays in its state, and is in all that is said afterwards.

        Raises:
            CheckpointError: the message names the tensor.
        """
        largest = logits.max()  # NaN where one is
        if not np.isfinite(largest):
            raise say_what_is_broken(float(largest), self._tensors)

    def _advance(
        self,
        blocks: BatchState,
        compute: Callable[[], None],
        slots_r: NDArray[np.int64],
        lengths_r: NDArray[np.int64],
        logits_r: Sequence[NDArray[np.float32] | None] | NDArray[np.float32],
        *more: Callable[[], object],
    ) -> None:
        """Compute, keep the logits of the rows, and count their tokens; all of it or nothing."""
        self._check_files()
        if self._core.threads() != self.threads:
            self._core.set_threads(self.threads)
        counts_b, logits_b = blocks.counts.copy(), blocks.logits.copy()
        for slot, length, logits_v in zip(
            slots_r.tolist(), lengths_r.tolist(), logits_r, strict=True
        ):
            counts_b[slot] += length
            logits_b[slot] = logits_v
        keep = partial(vars(blocks).update, logits=logits_b, counts=counts_b)
        # Python looks for Ctrl-C between its own instructions: here there are none in between, as
        # there would be in NumPy's functions, which ask in Python whose they are.
        steps: tuple[Callable[[], object], ...] = (compute, *more, keep)
        deque(map(call, steps), maxlen=0)


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

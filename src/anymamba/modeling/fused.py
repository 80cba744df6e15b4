"""The whole model in one call of the native core: one token, or a chunk of a prompt.

The core works on the model's own weights, through a table of pointers that was checked when it
was made. The table is used only while it still describes the model: before each call the modules,
their hooks and every weight's address are compared with what they were. What is in a weight may
change as it likes, for nothing that follows from it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anymamba.errors import InputError
from anymamba.layers.native import Part, core_tensors
from anymamba.modeling.quantized import QuantizedEmbedding, QuantizedLinear
from anymamba.modeling.state import MambaState
from anymamba.ops import backend, matmul_dtype
from anymamba.ops.backends import BACKENDS
from anymamba.ops.native import TYPES, core
from anymamba.ops.tracing import runs_now
from anymamba.ops.watch import ModuleWatch

MOST_ROWS = 64
"""Batches above this decode faster as matrix products."""

CHUNK_TOKENS = 512
"""A prompt is read in chunks of so many tokens, all rows together: long enough for products at
full speed, short enough for little memory."""

CHUNK_TOKENS_ON_GPUS = 8192
"""The same on a GPU, which a few hundred tokens do not fill; not measured on one yet."""

# What decides the result of a convolution beside its weights; `why_not_fusable` looks at it.
_OF_CONVOLUTIONS = ("stride", "dilation", "groups", "padding_mode")
_BLOCK = re.compile(r"layers\.\d+")


class FusableModel(Protocol):
    """A language model that says what it consists of."""

    config: Any

    def fused_parts(self) -> Iterable[Part]:
        """The head, the embeddings, the final norm, the layers, and everything in them."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As every module has it."""


def table_of(model: FusableModel, input_ids: Tensor) -> Table | None:
    """The model as the native core reads these ids, or None where its modules must be called."""
    ids_fit = input_ids.device.type == "cpu" and input_ids.dtype in (torch.int32, torch.int64)
    if torch.is_grad_enabled() or not runs_now(input_ids) or not ids_fit:
        return None
    return None if why_not_table(model) is not None else _TABLES[model]


def why_not_table(model: FusableModel) -> str | None:
    """As `why_not_fused`, and a current table of the model is kept where there is no reason."""
    table = _TABLES.get(model)
    if table is not None and table.is_current():
        return None
    _TABLES.pop(model, None)
    reason = why_not_fused(model)
    if reason is None:
        _TABLES[model] = Table(cast(nn.Module, model), model.fused_parts())
    return reason


def fits(cache: MambaState) -> bool:
    """Whether the core can work on a state where it lies."""
    return (
        cache.device.type == "cpu"
        and cache.dtype in TYPES
        and cache.conv_states.is_contiguous()
        and cache.ssm_states.is_contiguous()
    )


def why_not_fused(model: FusableModel) -> str | None:
    """The reason why single tokens go through the model's modules one by one, or None.

    Example:
        >>> from anymamba import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9))
        >>> _ = model.lm_head.register_forward_hook(lambda *_: None)
        >>> why_not_fused(model)
        'lm_head: it has hooks'
    """
    chosen = backend()
    if chosen not in ("auto", "cpu"):
        return f"the backend {chosen!r} is chosen"
    missing = BACKENDS["cpu"].missing()
    if missing is not None:
        return missing
    if model.config.hidden_act not in ("silu", "swish"):
        return f"the activation is {model.config.hidden_act}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    parts = list(model.fused_parts())
    if not any(part.name.startswith("layers.") for part in parts):
        return "it has no layers"
    for part in parts:
        reason = part.why_not_usual()
        if reason is not None:
            return f"{part.name}: {reason}"
    for name, weight in model.named_parameters():
        if weight.device.type != "cpu" or weight.dtype not in TYPES or not weight.is_contiguous():
            return f"{name} is {weight.dtype} on {weight.device}, or not contiguous"
    return None


class Table:
    """The weights' pointers, and what must not have changed for them to be right.

    Args:
        model: the module that holds all parts.
        parts: its `fused_parts`, all of them as the core expects them.
    """

    def __init__(self, model: nn.Module, parts: Iterable[Part]) -> None:
        parts = list(parts)
        settings = {name for part in parts for name in part.settings}
        modules = [part.module for part in parts]
        self._watch = ModuleWatch(model, modules, (*settings, *_OF_CONVOLUTIONS))
        by_name = {part.name: part for part in parts}
        head, norm = by_name["lm_head"], by_name["norm_f"].module
        assert head.shape is not None
        self._vocabulary = head.shape[0]
        blocks = [part.module for part in parts if _BLOCK.fullmatch(part.name)]
        self._model = core().Model(
            _weight_of(by_name["embeddings"].module),
            _weight_of(head.module),
            norm.weight.detach(),
            norm.variance_epsilon,
            [_layer(block) for block in blocks],
            **blocks[0].mixer.core_settings(),
        )

    def is_current(self) -> bool:
        """Whether the model still is what the pointers say."""
        return self._watch.holds()

    def run(self, input_ids: Tensor, cache: MambaState, wanted: int) -> Tensor:
        """Read what each row goes on with.

        Args:
            input_ids: (b, l), the new tokens of each row.
            cache: the state before them; advanced in place.
            wanted: how many positions of each row, from its end, get logits; at most l.

        Returns:
            (b, wanted, v) in float32.

        Raises:
            InputError: a token is not in the vocabulary; the cache is then what it was.
        """
        batch, length = input_ids.shape
        if length == 1 and batch <= MOST_ROWS:
            return self._step(input_ids, cache)
        return self._read(input_ids, cache, wanted)

    def _step(self, input_ids: Tensor, cache: MambaState) -> Tensor:
        """(b, 1, v) logits; the cache advances."""
        logits = self._logits(input_ids.shape[0])
        core()
        tokens = input_ids.reshape(-1).long().contiguous()
        try:
            self._model.step(
                tokens, None, cache.conv_states, cache.ssm_states, logits, _rounds_to_bfloat16()
            )
        except ValueError as error:
            raise InputError(f"input_ids: {error}") from error
        return logits[:, None]

    def _read(self, input_ids: Tensor, cache: MambaState, wanted: int) -> Tensor:
        """(b, wanted, v) logits; the cache advances."""
        batch, length = input_ids.shape
        self._check_tokens(input_ids)
        core()
        columns = max(CHUNK_TOKENS // max(batch, 1), 1)
        logits = self._logits(batch, wanted)
        unwanted = length - wanted
        for start in range(0, length, columns):
            chunk = input_ids[:, start : start + columns]
            stop = max(start + chunk.shape[1] - unwanted, 0)  # how many logits there are then
            here = min(stop, chunk.shape[1])
            logits[:, stop - here : stop] = self._read_chunk(chunk, cache, here)
        return logits

    def _read_chunk(self, ids_bl: Tensor, cache: MambaState, wanted: int) -> Tensor:
        """The last (b, wanted, v) logits of a chunk that fits into memory."""
        batch, length = ids_bl.shape
        rows_b = torch.arange(batch + 1, device="cpu") * length
        positions_bw = rows_b[:-1, None] + torch.arange(length - wanted, length, device="cpu")
        logits = self._logits(batch * wanted)
        self._model.read(
            ids_bl.reshape(-1).long().contiguous(),
            None,
            rows_b,
            positions_bw.reshape(-1),
            cache.conv_states,
            cache.ssm_states,
            logits,
            _rounds_to_bfloat16(),
        )
        return logits.view(batch, wanted, self._vocabulary)

    def _logits(self, *rows: int) -> Tensor:
        # Named, for a program may have set other defaults.
        return torch.empty(*rows, self._vocabulary, dtype=torch.float32, device="cpu")

    def _check_tokens(self, input_ids: Tensor) -> None:
        """Before anything is read, so that a wrong token leaves the state as it was."""
        if input_ids.numel() == 0:
            return
        low, high = input_ids.min(), input_ids.max()
        if low < 0 or high >= self._vocabulary:
            wrong = int(low) if low < 0 else int(high)
            raise InputError(
                f"input_ids: token {wrong} is not in the vocabulary of {self._vocabulary}"
            )


def _rounds_to_bfloat16() -> bool:
    return matmul_dtype() == "bfloat16"


def _layer(block: Any) -> dict[str, Any]:
    """One layer's tensors, the model's own memory every one of them."""
    norms = {"norm": block.norm.weight, **block.mixer.norm_weights()}
    tensors = core_tensors(block.mixer, block.mixer.architecture, _weight_of)
    return tensors | {name: weight.detach() for name, weight in norms.items()}


def _weight_of(module: Any) -> Any:
    """A layer's matrix as the native core takes it."""
    if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
        return module.parts()
    return module.weight.detach()


_TABLES: WeakKeyDictionary[FusableModel, Table] = WeakKeyDictionary()

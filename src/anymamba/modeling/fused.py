"""The whole model in one call of the native core: one token, or a stretch of a prompt.

The core works on the model's own weights, through a table of pointers that was checked when it
was made. The table is used only while it still describes the model: before each call the modules,
their hooks and every weight's address are compared with what they were. What is in a weight may
change as it likes, for nothing that follows from it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from anymamba.errors import InputError
from anymamba.modeling.quantized import QuantizedEmbedding, QuantizedLinear
from anymamba.ops import backend, matmul_dtype
from anymamba.ops.backends import BACKENDS
from anymamba.ops.fusable import why_not_plain
from anymamba.ops.native import core
from anymamba.ops.tracing import runs_now
from anymamba.ops.watch import ModuleWatch

if TYPE_CHECKING:
    from anymamba.modeling.cache import MambaCache
    from anymamba.modeling.config import MambaConfig
    from anymamba.modeling.mamba import MambaForCausalLM

__all__ = ["CHUNK_TOKENS", "MOST_ROWS", "Table", "fits", "table_of", "why_not_fused"]

MOST_ROWS = 64
"""Batches above this decode faster as matrix products."""

CHUNK_TOKENS = 512
"""A prompt is read in stretches of so many tokens, all rows together: long enough for products at
full speed, short enough for little memory."""

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def table_of(model: MambaForCausalLM, input_ids: Tensor) -> Table | None:
    """The model as the native core runs it, or None where its modules must be called.

    Args:
        model: the language model.
        input_ids: (b, l), what is to be read.
    """
    ids_fit = input_ids.device.type == "cpu" and input_ids.dtype in (torch.int32, torch.int64)
    if torch.is_grad_enabled() or not runs_now(input_ids) or not ids_fit:
        return None
    return None if why_not_table(model) is not None else _TABLES[model]


def why_not_table(model: MambaForCausalLM) -> str | None:
    """As `why_not_fused`, and a current table of the model is kept where there is no reason."""
    table = _TABLES.get(model)
    if table is not None and table.is_current():
        return None
    _TABLES.pop(model, None)
    reason = why_not_fused(model)
    if reason is None:
        _TABLES[model] = Table(model)
    return reason


def fits(cache: MambaCache) -> bool:
    """Whether the core can work on a state where it lies."""
    return (
        cache.device.type == "cpu"
        and cache.dtype in _TYPES
        and cache.conv_states.is_contiguous()
        and cache.ssm_states.is_contiguous()
    )


def why_not_fused(model: MambaForCausalLM) -> str | None:
    """The reason why single tokens go through the model's modules one by one, or None.

    Args:
        model: the language model.

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
    if not len(model.backbone.layers):
        return "it has no layers"
    for name, module, kind in _parts(model):
        reason = why_not_plain(module, kind) or _why_not_usual(name, module, model)
        if reason is not None:
            return f"{name}: {reason}"
    for name, weight in model.named_parameters():
        if weight.device.type != "cpu" or weight.dtype not in _TYPES or not weight.is_contiguous():
            return f"{name} is {weight.dtype} on {weight.device}, or not contiguous"
    return None


def _parts(model: MambaForCausalLM) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """Every module of the model, with the class that belongs in its place."""
    from anymamba.modeling.mamba import MambaBlock, MambaMixer, MambaModel, MambaRMSNorm

    yield "lm_head", model.lm_head, _kind(model.lm_head, nn.Linear)
    yield "backbone", model.backbone, MambaModel
    yield "embeddings", model.backbone.embeddings, _kind(model.backbone.embeddings, nn.Embedding)
    yield "norm_f", model.backbone.norm_f, MambaRMSNorm
    for index, block in enumerate(model.backbone.layers):
        name = f"layers.{index}"
        yield name, block, MambaBlock
        if type(block) is not MambaBlock:
            return
        yield f"{name}.norm", block.norm, MambaRMSNorm
        yield f"{name}.mixer", block.mixer, MambaMixer
        if type(block.mixer) is not MambaMixer:
            return
        yield f"{name}.mixer.conv1d", block.mixer.conv1d, nn.Conv1d
        act = block.mixer.act
        yield f"{name}.mixer.act", act, nn.SiLU if type(act) is nn.SiLU else SiLUActivation
        for projection in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            module = getattr(block.mixer, projection)
            yield f"{name}.mixer.{projection}", module, _kind(module, nn.Linear)


def _kind(module: nn.Module, usual: type[nn.Module]) -> type[nn.Module]:
    """What belongs in a place: the usual class, or our own quantized one where it stands there."""
    ours = QuantizedLinear if usual is nn.Linear else QuantizedEmbedding
    return ours if type(module) is ours else usual


# What decides a module's result beside its weights.
_SETTINGS = (
    "variance_epsilon",
    "max_norm",
    "stride",
    "dilation",
    "groups",
    "padding_mode",
    "ssm_state_size",
    "time_step_rank",
)


def _why_not_usual(name: str, module: nn.Module, model: MambaForCausalLM) -> str | None:
    """Why a module of the right class computes something else than the core would."""
    config: Any = model.config
    part = name.rpartition(".")[2]
    if part in ("lm_head", "x_proj") and module.bias is not None:
        return "it has a bias"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it limits the norm of what it returns"
    eps = getattr(module, "variance_epsilon", None)
    if eps is not None and eps != model.backbone.norm_f.variance_epsilon:
        return "its epsilon is not that of the final norm"
    for setting, told in {
        "ssm_state_size": config.state_size,
        "time_step_rank": config.time_step_rank,
    }.items():
        if getattr(module, setting, told) != told:
            return f"its {setting} is not what the config says"
    expected = _matrix_shapes(config).get(part)
    if expected is not None and _shape_of(module) != expected:
        return f"its weight is {_shape_of(module)}, and the config says {expected}"
    return None


def _matrix_shapes(config: MambaConfig) -> dict[str, tuple[int, int]]:
    d, e, n = config.hidden_size, config.intermediate_size, config.state_size
    r, v = int(config.time_step_rank), config.vocab_size
    return {
        "embeddings": (v, d),
        "lm_head": (v, d),
        "in_proj": (2 * e, d),
        "x_proj": (r + 2 * n, e),
        "dt_proj": (e, r),
        "out_proj": (d, e),
    }


def _shape_of(module: Any) -> tuple[int, ...]:
    if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
        return module.n, module.k
    return tuple(module.weight.shape)


class Table:
    """The weights' pointers, and what must not have changed for them to be right."""

    def __init__(self, model: MambaForCausalLM) -> None:
        modules = [module for _, module, _ in _parts(model)]
        self._watch = ModuleWatch(model, modules, _SETTINGS)
        backbone = model.backbone
        self._vocabulary = model.config.vocab_size
        self._model = core().Model(
            _weight_of(backbone.embeddings),
            _weight_of(model.lm_head),
            backbone.norm_f.weight.detach(),
            backbone.norm_f.variance_epsilon,
            [_layer(block) for block in backbone.layers],
        )

    def is_current(self) -> bool:
        """Whether the model still is what the pointers say."""
        return self._watch.holds()

    def run(self, input_ids: Tensor, cache: MambaCache, wanted: int) -> Tensor:
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

    def _step(self, input_ids: Tensor, cache: MambaCache) -> Tensor:
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

    def _read(self, input_ids: Tensor, cache: MambaCache, wanted: int) -> Tensor:
        """(b, wanted, v) logits; the cache advances."""
        batch, length = input_ids.shape
        self._check_tokens(input_ids)
        core()
        columns = max(CHUNK_TOKENS // max(batch, 1), 1)
        logits = self._logits(batch, wanted)
        unwanted = length - wanted
        for start in range(0, length, columns):
            stretch = input_ids[:, start : start + columns]
            stop = max(start + stretch.shape[1] - unwanted, 0)  # how many logits there are then
            here = min(stop, stretch.shape[1])
            logits[:, stop - here : stop] = self._read_stretch(stretch, cache, here)
        return logits

    def _read_stretch(self, ids_bl: Tensor, cache: MambaCache, wanted: int) -> Tensor:
        """The last (b, wanted, v) logits of a stretch that fits into memory."""
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
    mixer = block.mixer
    tensors = {
        "norm": block.norm.weight,
        "in_proj_bias": mixer.in_proj.bias,
        "conv_weight": mixer.conv1d.weight[:, 0],
        "conv_bias": mixer.conv1d.bias,
        "dt_bias": mixer.dt_proj.bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "out_proj_bias": mixer.out_proj.bias,
    }
    small = {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    projections = ("in_proj", "x_proj", "dt_proj", "out_proj")
    return small | {name: _weight_of(getattr(mixer, name)) for name in projections}


def _weight_of(module: Any) -> Any:
    """A layer's matrix as the native core takes it."""
    if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
        return module.parts()
    return module.weight.detach()


_TABLES: WeakKeyDictionary[nn.Module, Table] = WeakKeyDictionary()

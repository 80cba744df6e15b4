"""The tensors of an architecture: one table each, and what follows from it.

Whatever needs to know which tensors a model has asks here: their shapes, GGUF's and the native
core's names for them, which of them are quantized, which an adapter may change. A second
architecture is a second table.

Shapes are written in the letters of `anymamba.minimal`:

    v  vocabulary      d  model width     e  inner width
    n  states          r  rank of dt      k  convolution width
    h  heads           p  head's width    m  B's width in all groups, g n
    g  groups          w  group's width, e / g
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from anymamba.checkpoint.io import shown
from anymamba.errors import ConfigError

if TYPE_CHECKING:
    from anymamba.checkpoint.shapes import ModelShape

Role = Literal["large matrix", "small matrix", "convolution", "vector", "decay"]
"""What a tensor is for. A large matrix may be quantized; a small one is sensitive, and bfloat16 at
least. The others stay as they are, or float32. The decay is A, as the logarithm of its negative."""


def _dimensions(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    known = {"1": 1, **sizes}
    words = [word.split("+") for word in shape.split()]
    return tuple(sum(int(t[:-1] or 1) * known[t[-1]] for t in terms) for terms in words)


@dataclass(frozen=True)
class TensorRow:
    """A tensor of an architecture.

    Args:
        name: Transformers' name; of a layer's tensor the part that follows the layer's number.
        shape: a word in the letters above for each dimension, as "r+2n e".
        role: what it is for.
        core: the native core's name.
        gguf: GGUF's name, or None where llama.cpp has no such tensor.
        flag: the field of `ModelShape` that says whether a model has it; None for always.
        gguf_shape: its shape in GGUF, where that is another one of as many numbers.
    """

    name: str
    shape: str
    role: Role
    core: str
    gguf: str | None
    flag: str | None = None
    gguf_shape: str | None = None

    @property
    def module(self) -> str:
        """The last word of the name of the module that owns it.

        Example:
            >>> MAMBA.layer[1].module
            'in_proj'
        """
        return self.name.split(".")[-2]

    def dimensions(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers, where `sizes` has the number that each letter stands for.

        Example:
            >>> TensorRow("x", "r+2n e", "small matrix", "x", None).dimensions(dict(r=3, n=4, e=8))
            (11, 8)
        """
        return _dimensions(self.shape, sizes)


@dataclass(frozen=True)
class Architecture:
    """All tensors of an architecture, in the order of the forward pass.

    Args:
        name: Transformers' `model_type`.
        gguf: GGUF's `general.architecture`.
        causal_lm: the class of its language model, as `architectures` of a config names it.
        embeddings: the embedding table.
        layer: the tensors of each layer.
        norm: the scale of the norm after the last layer.
        head: the language model's head.
        window, state: the shapes of what a layer carries from token to token.
        defaults: Transformers' values of the fields that decide the tensors, and of other switches.
        special_tokens: Transformers' values of the tokens that begin, end and fill texts.
        norms_maps: whether each mixer norms dt, B and C, without a gain.
    """

    name: str
    gguf: str
    causal_lm: str
    embeddings: TensorRow
    layer: tuple[TensorRow, ...]
    norm: TensorRow
    head: TensorRow
    window: str
    state: str
    defaults: Mapping[str, int | bool]
    special_tokens: Mapping[str, int]
    norms_maps: bool = False

    def norm_widths(self, r: int, n: int) -> dict[str, int]:
        """The widths of the norms of dt, B and C by the core's names; none without such norms.

        Example:
            >>> FALCON_MAMBA.norm_widths(3, 16), MAMBA.norm_widths(3, 16)
            ({'dt_norm': 3, 'B_norm': 16, 'C_norm': 16}, {})
        """
        return {"dt_norm": r, "B_norm": n, "C_norm": n} if self.norms_maps else {}

    @property
    def outside(self) -> tuple[TensorRow, ...]:
        """The tensors that are in no layer."""
        return self.embeddings, self.norm, self.head

    def shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """The shapes of a model's tensors, by Transformers' names.

        Example:
            >>> from anymamba.checkpoint import model_shape
            >>> shapes = MAMBA.shapes(model_shape({"hidden_size": 8, "num_hidden_layers": 1}))
            >>> shapes["backbone.layers.0.mixer.conv1d.weight"]
            (16, 1, 4)
        """

        return self._of_all(shape, lambda row: row.dimensions(shape.sizes))

    def gguf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """The shapes that a model's tensors have in GGUF, by Transformers' names.

        Args:
            shape: the model's.

        Example:
            >>> from anymamba.checkpoint import model_shape
            >>> shapes = MAMBA.gguf_shapes(model_shape({"hidden_size": 8, "num_hidden_layers": 1}))
            >>> shapes["backbone.layers.0.mixer.conv1d.weight"]
            (16, 4)
        """
        return self._of_all(shape, lambda r: _dimensions(r.gguf_shape or r.shape, shape.sizes))

    def _of_all(
        self, shape: ModelShape, shape_of: Callable[[TensorRow], tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        def has(row: TensorRow) -> bool:
            return row.flag is None or bool(getattr(shape, row.flag))

        layer = {row.name: shape_of(row) for row in self.layer if has(row)}
        shapes = {EMBEDDINGS: shape_of(self.embeddings)}
        for index in range(shape.n_layer):
            shapes |= {in_layer(index, name): numbers for name, numbers in layer.items()}
        rest = (row for row in (self.norm, self.head) if has(row))
        return shapes | {row.name: shape_of(row) for row in rest}

    def states(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a layer's window and state.

        Args:
            sizes: the number that each letter stands for.

        Example:
            >>> MAMBA.states({"e": 16, "n": 8, "k": 4})
            ((16, 4), (16, 8))
        """
        return _dimensions(self.window, sizes), _dimensions(self.state, sizes)

    def core_layer(self, get: Callable[[str], Any]) -> dict[str, Any]:
        """A layer's tensors by the native core's names; a convolution's (e, 1, k) as (e, k).

        Args:
            get: gives the tensor of a name in `layer`, or None for one that the model lacks.

        Example:
            >>> import numpy as np
            >>> MAMBA.core_layer(lambda name: np.ones((2, 1, 4)))["conv_weight"].shape
            (2, 4)
        """
        found = {row.core: get(row.name) for row in self.layer}
        # One filter a channel.
        squeezed = {r.core: found[r.core][:, 0] for r in self.layer if r.role == "convolution"}
        return found | squeezed

    def adapted(self) -> tuple[str, ...]:
        """The modules that an adapter may change: those with matrices, but for the head.

        Example:
            >>> MAMBA.adapted()[:2]
            ('embeddings', 'in_proj')
        """
        return tuple(r.module for r in (self.embeddings, *self.layer) if r.role.endswith("matrix"))


MAMBA = Architecture(
    name="mamba",
    gguf="mamba",
    causal_lm="MambaForCausalLM",
    embeddings=TensorRow(
        "backbone.embeddings.weight", "v d", "large matrix", "embeddings", "token_embd.weight"
    ),
    layer=(
        TensorRow("norm.weight", "d", "vector", "norm", "attn_norm.weight"),
        # x and its gate z
        TensorRow("mixer.in_proj.weight", "2e d", "large matrix", "in_proj", "ssm_in.weight"),
        TensorRow("mixer.in_proj.bias", "2e", "vector", "in_proj_bias", None, "bias"),
        # One filter a channel.
        TensorRow(
            *("mixer.conv1d.weight", "e 1 k", "convolution", "conv_weight", "ssm_conv1d.weight"),
            gguf_shape="e k",
        ),
        TensorRow("mixer.conv1d.bias", "e", "vector", "conv_bias", "ssm_conv1d.bias", "conv_bias"),
        # What the step size is made of, B and C.
        TensorRow("mixer.x_proj.weight", "r+2n e", "small matrix", "x_proj", "ssm_x.weight"),
        TensorRow("mixer.dt_proj.weight", "e r", "small matrix", "dt_proj", "ssm_dt.weight"),
        TensorRow("mixer.dt_proj.bias", "e", "vector", "dt_bias", "ssm_dt.bias"),
        TensorRow("mixer.A_log", "e n", "decay", "A_log", "ssm_a"),
        TensorRow("mixer.D", "e", "vector", "D", "ssm_d"),
        TensorRow("mixer.out_proj.weight", "d e", "large matrix", "out_proj", "ssm_out.weight"),
        TensorRow("mixer.out_proj.bias", "d", "vector", "out_proj_bias", None, "bias"),
    ),
    norm=TensorRow("backbone.norm_f.weight", "d", "vector", "norm_f", "output_norm.weight"),
    head=TensorRow("lm_head.weight", "v d", "large matrix", "head", "output.weight", "untied"),
    window="e k",
    state="e n",
    defaults={
        "vocab_size": 50280,
        "hidden_size": 768,
        "state_size": 16,
        "num_hidden_layers": 32,
        "expand": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
    },
    special_tokens={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
)
"""Mamba-1, as Transformers names its tensors."""

FALCON_MAMBA = replace(
    MAMBA, name="falcon_mamba", causal_lm="FalconMambaForCausalLM", norms_maps=True
)
"""Falcon-Mamba. llama.cpp tells it from Mamba by `mamba.ssm.dt_b_c_rms`."""

MAMBA2 = replace(
    MAMBA,
    name="mamba2",
    gguf="mamba2",
    causal_lm="Mamba2ForCausalLM",
    layer=(
        TensorRow("norm.weight", "d", "vector", "norm", "attn_norm.weight"),
        # The gate z, x, B, C and what the step size is made of.
        TensorRow("mixer.in_proj.weight", "2e+2m+h d", "large matrix", "in_proj", "ssm_in.weight"),
        TensorRow("mixer.in_proj.bias", "2e+2m+h", "vector", "in_proj_bias", None, "bias"),
        # One filter a channel of x, B and C.
        TensorRow(
            *("mixer.conv1d.weight", "e+2m 1 k", "convolution", "conv_weight", "ssm_conv1d.weight"),
            gguf_shape="e+2m k",
        ),
        TensorRow(
            "mixer.conv1d.bias", "e+2m", "vector", "conv_bias", "ssm_conv1d.bias", "conv_bias"
        ),
        TensorRow("mixer.dt_bias", "h", "vector", "dt_bias", "ssm_dt.bias"),
        TensorRow("mixer.A_log", "h", "decay", "A_log", "ssm_a", gguf_shape="h 1"),
        TensorRow("mixer.D", "h", "vector", "D", "ssm_d", gguf_shape="h 1"),
        TensorRow(
            *("mixer.norm.weight", "e", "vector", "gated_norm", "ssm_norm.weight"),
            flag="gated_norm",
            gguf_shape="g w",
        ),
        TensorRow("mixer.out_proj.weight", "d e", "large matrix", "out_proj", "ssm_out.weight"),
        TensorRow("mixer.out_proj.bias", "d", "vector", "out_proj_bias", None, "bias"),
    ),
    window="e+2m k",
    state="h p n",
    defaults={
        **MAMBA.defaults,
        "vocab_size": 32768,
        "hidden_size": 4096,
        "state_size": 128,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "use_gated_norm": True,
        "gate_after_norm": False,
        "tie_word_embeddings": False,
    },
    special_tokens={"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
)
"""Mamba-2. Its state has heads, each with one decay."""

ARCHITECTURES = {each.name: each for each in (MAMBA, FALCON_MAMBA, MAMBA2)}

EMBEDDINGS = MAMBA.embeddings.name
FINAL_NORM = MAMBA.norm.name
HEAD = MAMBA.head.name

_ROLES = {
    row.name: row.role
    for architecture in ARCHITECTURES.values()
    for row in (*architecture.outside, *architecture.layer)
}
_BEFORE = re.compile(r".*\blayers\.\d+\.")

_BACKBONE_PARTS = ("embeddings.", "layers.", "norm_f.")
# Left by PEFT, Lightning and Trainers; by DataParallel; by torch.compile, also amid a name.
_WRAPPERS = ("base_model.", "model.", "module.")
_COMPILED = "_orig_mod."


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model.

    Args:
        config: fields in Transformers' names; without `model_type` they are Mamba's.

    Raises:
        ConfigError: there is no such architecture here.

    Example:
        >>> architecture_of({"model_type": "falcon_mamba"}).norms_maps
        True
    """
    name = config.get("model_type", MAMBA.name)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = " or ".join(map(repr, ARCHITECTURES))
        raise ConfigError(f"model_type is {shown(name)}, expected {known}")
    return ARCHITECTURES[name]


def special_token(config: Mapping[str, Any], name: str) -> Any:
    """The token that begins, ends or fills texts.

    Args:
        config: fields in Transformers' names.
        name: "bos_token_id", "eos_token_id" or "pad_token_id".

    Returns:
        What the config has, or what Transformers takes where it says nothing.

    Example:
        >>> special_token({"model_type": "mamba2"}, "eos_token_id")
        2
    """
    return config.get(name, architecture_of(config).special_tokens[name])


def in_layer(index: int | str, name: str) -> str:
    """Transformers' full name of a layer's tensor, by its name in the layer.

    Example:
        >>> in_layer(3, "mixer.D")
        'backbone.layers.3.mixer.D'
    """
    return f"backbone.layers.{index}.{name}"


def role_of(name: str) -> Role | None:
    """What a tensor is for, by its full name or that in its layer; None if there is no such tensor.

    Example:
        >>> role_of("backbone.layers.3.mixer.A_log"), role_of("mixer.D"), role_of("score.weight")
        ('decay', 'vector', None)
    """
    return _ROLES.get(_BEFORE.sub("", name))


def is_matrix(name: str) -> bool:
    """Whether a tensor is a matrix that multiplies: one worth storing in fewer bits.

    Example:
        >>> is_matrix("backbone.layers.0.mixer.in_proj.weight")
        True
        >>> is_matrix("backbone.layers.0.mixer.conv1d.weight")
        False
    """
    return role_of(name) in ("large matrix", "small matrix")


def to_transformers_name(name: str) -> str:
    """Translate a tensor's name, in whichever layout, to the one Transformers uses.

    Three namings exist, Transformers', the original one and that of `minimal.py`, and each may come
    without its `backbone.` prefix. They differ in the embedding table alone, so one rule reads them
    all. Programs that wrap a model before they save it put a prefix of their own in front of every
    name (`model.`, `module.`, `_orig_mod.`), which is removed.

    Args:
        name: as a file or a state dict spells it.

    Returns:
        Transformers' name. A name that no layout knows is returned as it is, so that the check
        against the expected names can report it in the words of the file.

    Example:
        >>> to_transformers_name("backbone.embedding.weight")  # original
        'backbone.embeddings.weight'
        >>> to_transformers_name("layers.3.mixer.A_log")  # minimal, or a bare MambaModel
        'backbone.layers.3.mixer.A_log'
        >>> to_transformers_name("lm_head.weight")
        'lm_head.weight'
        >>> to_transformers_name("model.backbone.norm_f.weight")  # from inside a Trainer's module
        'backbone.norm_f.weight'
    """
    part = name.replace(_COMPILED, "")
    while part.startswith(_WRAPPERS):
        part = part.partition(".")[2]
    if part.startswith("lm_head."):
        return part
    part = part.removeprefix("backbone.")
    if part.startswith("embedding."):
        part = part.replace("embedding.", "embeddings.", 1)
    return f"backbone.{part}" if part.startswith(_BACKBONE_PARTS) else name

"""Which tensors a model of a given config has, and of which shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD, architecture_of
from anymamba.checkpoint.io import listed, shown
from anymamba.errors import CheckpointError, ConfigError

# A config is a few bytes that ask for any amount of memory: refuse what no machine can hold.
_MOST = 2**31 - 1
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class ModelShape:
    """What of a config decides the tensors' shapes, in the paper's words.

    Args:
        vocab_size: number of tokens, v.
        d_model: width of the residual stream, d.
        n_layer: number of layers.
        d_inner: inner width, e.
        d_state: state size, n.
        dt_rank: rank of the step size, r.
        d_conv: convolution width, k.
        bias: whether the projections into and out of a mixer have a bias.
        conv_bias: whether the convolution has a bias.
        tied: whether the head is the embedding table.
        heads, head_dim, groups: h, p and g of an architecture with heads, else 0.
        gated_norm: whether its mixers have a norm beside their gate.
    """

    vocab_size: int
    d_model: int
    n_layer: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int
    bias: bool
    conv_bias: bool
    tied: bool
    heads: int = 0
    head_dim: int = 0
    groups: int = 0
    gated_norm: bool = True

    @property
    def untied(self) -> bool:
        """Whether the head is a matrix of its own."""
        return not self.tied

    @property
    def fields(self) -> dict[str, Any]:
        """The same in Transformers' names, but for `expand`."""
        heads = {"num_heads": self.heads, "head_dim": self.head_dim, "n_groups": self.groups}
        return {
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layer,
            "intermediate_size": self.d_inner,
            "state_size": self.d_state,
            **(heads if self.heads else {"time_step_rank": self.dt_rank}),
            "conv_kernel": self.d_conv,
            "vocab_size": self.vocab_size,
            "use_bias": self.bias,
            "use_conv_bias": self.conv_bias,
            "tie_word_embeddings": self.tied,
        }

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers by the letters of `anymamba.checkpoint.architecture`."""
        numbers = (self.vocab_size, self.d_model, self.d_inner, self.d_state, self.dt_rank)
        heads = (self.heads, self.head_dim, self.groups * self.d_state)
        groups = (self.groups, self.d_inner // max(self.groups, 1))
        return dict(zip("vdenrkhpmgw", (*numbers, self.d_conv, *heads, *groups), strict=True))


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Take the shape of a model from its config.

    Args:
        config: fields in Transformers' names; those left out have Transformers' defaults.

    Returns:
        The shape, 'auto' resolved.

    Raises:
        ConfigError: a field is not of its type, or outside of what any machine could hold.

    Example:
        >>> shape = model_shape({"hidden_size": 40, "expand": 2})
        >>> shape.d_inner, shape.dt_rank
        (80, 3)
    """
    defaults = architecture_of(config).defaults
    given = {name: config.get(name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        if not isinstance(default, bool):
            _count(name, given[name])
        elif not isinstance(given[name], bool):
            raise ConfigError(f"{name} must be true or false, got {shown(given[name])}")
    d_model = given["hidden_size"]
    rank = config.get("time_step_rank", "auto")
    shape = ModelShape(
        vocab_size=given["vocab_size"],
        d_model=d_model,
        n_layer=given["num_hidden_layers"],
        d_inner=given["expand"] * d_model,
        d_state=given["state_size"],
        dt_rank=-(-d_model // 16) if rank == "auto" else _count("time_step_rank", rank),
        d_conv=given["conv_kernel"],
        bias=given["use_bias"],
        conv_bias=given["use_conv_bias"],
        tied=given["tie_word_embeddings"],
        heads=given.get("num_heads", 0),
        head_dim=given.get("head_dim", 0),
        groups=given.get("n_groups", 0),
        gated_norm=given.get("use_gated_norm", True),
    )
    _check_heads(shape)
    return shape


def _check_heads(shape: ModelShape) -> None:
    if shape.heads and shape.heads * shape.head_dim != shape.d_inner:
        raise ConfigError(
            f"num_heads {shape.heads} times head_dim {shape.head_dim} must be expand times "
            f"hidden_size, {shape.d_inner}"
        )
    if shape.heads and shape.heads % shape.groups:
        raise ConfigError(f"n_groups {shape.groups} must divide num_heads {shape.heads}")


def _count(name: str, value: object) -> int:
    most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
    # bool is a kind of int, and a model with True layers is a mistake.
    if type(value) is not int or not 1 <= value <= most:
        auto = " or 'auto'" if name == "time_step_rank" else ""
        raise ConfigError(
            f"{name} must be a whole number from 1 to {most}{auto}, got {shown(value)}"
        )
    return value


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """List the tensors that a model's files must hold.

    Args:
        config: fields in Transformers' names; those left out have Transformers' defaults.

    Returns:
        Shape by Transformers' name, in the order of the forward pass. A tied model has no
        `lm_head.weight`.

    Raises:
        ConfigError: a field makes no sense.

    Example:
        >>> shapes = expected_shapes({"hidden_size": 8, "num_hidden_layers": 1})
        >>> shapes["backbone.layers.0.mixer.conv1d.weight"]
        (16, 1, 4)
    """
    return architecture_of(config).shapes(model_shape(config))


def check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Compare the tensors that are there with those that must be, and name every difference.

    A head that is found and not expected is no difference: files of tied models may repeat it.

    Args:
        found: shape by name, as stored.
        expected: shape by name, as `expected_shapes` gives it.
        where: what was read, a folder as a rule, for the message.

    Raises:
        CheckpointError: tensors are missing, unexpected or of a wrong shape. One message names
            all of them, of a long list the first ten.

    Example:
        >>> check_tensors({"a": (2,)}, {"a": (2,)}, "here")
        >>> check_tensors({"a": (2,)}, {"b": (2,)}, "here")
        Traceback (most recent call last):
            ...
        anymamba.errors.CheckpointError: the tensors in here do not fit its config: missing b; \
unexpected 'a'
    """
    unexpected = found.keys() - expected.keys() - {HEAD}
    defects = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [shown(name) for name in found if name in unexpected],
        "of a wrong shape": [
            f"{name} is {_dimensions(found[name])}, expected {_dimensions(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    told = "; ".join(f"{what} {listed(names)}" for what, names in defects.items() if names)
    if told:
        raise CheckpointError(f"the tensors in {where} do not fit its config: {told}")


def check_repeated_head(tensors: Mapping[str, Any], where: object) -> None:
    """Refuse a tied model's stored head that is not the embedding table: one would be lost.

    `tensors` has both by Transformers' names, as NumPy's arrays or PyTorch's tensors.

    Raises:
        CheckpointError: the two differ.

    Example:
        >>> import numpy as np
        >>> check_repeated_head({HEAD: np.ones((3, 2)), EMBEDDINGS: np.ones((3, 2))}, "here")
    """
    head, table = tensors[HEAD], tensors[EMBEDDINGS]
    if tuple(head.shape) != tuple(table.shape) or not (head == table).all():
        raise CheckpointError(
            f"the config in {where} ties {HEAD} to {EMBEDDINGS}, but the two "
            "differ there; set tie_word_embeddings to false to use both"
        )


def _dimensions(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a scalar"

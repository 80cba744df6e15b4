"""Folders with quantized weights: what their config says, and which tensors they must hold.

A quantized matrix has other tensors in place of its `weight`: `weight_q`, the whole numbers,
`weight_scales`, and `weight_minima` where zero does not lie in the middle. Which matrices are
quantized shows in the tensors' names, and in how many bits and groups in their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from anymamba.checkpoint.architecture import role_of
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.shapes import expected_shapes
from anymamba.errors import ConfigError

FORMAT = "anymamba"
"""What a config calls our format, under the key `format`.

Not under `quant_method`: Transformers only warns of a method that it does not know, and fills the
weights that it misses with random numbers. Without that key it refuses the folder."""
FORMAT_VERSION = 1
"""Of the folders that are written and read here."""
BITS: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}
"""The types of quantized weights, and how many bits a number takes in them."""
GROUPS = (32, 64, 128)
"""How many weights may share a scale."""
PARTS = ("_q", "_scales", "_minima")
"""What the names of a quantized matrix's tensors have behind that of the matrix."""


def is_quantized(name: str, shape: tuple[int, ...], group: int) -> bool:
    """Whether a tensor is quantized where a model is: a large matrix whose rows the group divides.

    Example:
        >>> [is_quantized("lm_head.weight", (10, 64), group) for group in (32, 128)]
        [True, False]
    """
    return role_of(name) == "large matrix" and shape[1] % group == 0


def quantized_bits(config: Mapping[str, Any]) -> int | None:
    """In how many bits a config says that its weights are kept.

    Args:
        config: fields in Transformers' names.

    Returns:
        8 or 4, or None where nothing is quantized.

    Raises:
        ConfigError: another program quantized the weights, or a newer release of this one.

    Example:
        >>> fields = {"format": "anymamba", "format_version": 1, "bits": 4}
        >>> quantized_bits({"quantization_config": fields})
        4
        >>> quantized_bits({"quantization_config": {"quant_method": "gptq"}})
        Traceback (most recent call last):
            ...
        anymamba.errors.ConfigError: the weights are quantized by 'gptq', and only those of \
'anymamba' can be read here; take the model as it was before, and `anymamba quantize` it
    """
    fields = config.get("quantization_config")
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise ConfigError(f"quantization_config must be an object, got {shown(fields)}")
    if "quant_method" in fields or fields.get("format") != FORMAT:
        found = fields.get("quant_method", fields.get("format"))
        raise ConfigError(
            f"the weights are quantized by {shown(found)}, and only those of {FORMAT!r} can be "
            "read here; take the model as it was before, and `anymamba quantize` it"
        )
    version, bits = fields.get("format_version"), fields.get("bits")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"quantization_config has format_version {shown(version)}, and this release reads "
            f"{FORMAT_VERSION}; use the release of AnyMamba that wrote it"
        )
    if type(bits) is not int or bits not in (8, 4):
        raise ConfigError(f"quantization_config has bits {shown(bits)}, expected 8 or 4")
    return bits


def quantized_shapes(
    config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """List the tensors that a quantized model's files must hold, for `check_tensors`.

    Args:
        config: fields in Transformers' names.
        found: shape by name, as stored. They decide which matrices are quantized, and how.

    Returns:
        Shape by Transformers' name.

    Raises:
        ConfigError: a field makes no sense.

    Example:
        >>> sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 10}
        >>> found = {"backbone.embeddings.weight_q": (10, 32)}
        >>> shapes = quantized_shapes(sizes, found)
        >>> list(shapes.items())[:2]
        [('backbone.embeddings.weight_q', (10, 32)), ('backbone.embeddings.weight_scales', (10, 1))]
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_shapes(config).items():
        if is_quantized(name, shape, GROUPS[0]) and any(name + part in found for part in PARTS):
            shapes |= _parts_of(name, shape, found)
        else:
            shapes[name] = shape
    return shapes


def _parts_of(
    name: str, shape: tuple[int, ...], found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """What stands for a matrix (n, k), where the parts that are there decide between formats."""
    n, k = shape
    q, scales, minima = (name + part for part in PARTS)
    by_bits = [(n, k), (n, k // 2)]
    # Of the groups that fit, the largest is the usual one.
    by_group = [(n, k // group) for group in reversed(GROUPS) if k % group == 0]
    expected = {
        q: found[q] if found.get(q) in by_bits else by_bits[0],
        scales: found[scales] if found.get(scales) in by_group else by_group[0],
    }
    return expected | ({minima: expected[scales]} if minima in found else {})

"""Merging an adapter into a model's weights, in float32, as PEFT's `merge_and_unload` does.

LoRA adds a product of two thin matrices to a weight, W' = W + s B A (https://arxiv.org/abs/2106.09685,
section 4.1). DoRA then brings each row of the sum to a length of its own,
W'' = m W' / |W'| (https://arxiv.org/abs/2402.09353, equation 5). Of an embedding table, W is what
PEFT calls the transposed weight.

Only the matrices that are adapted are copied; the others stay mapped. A head tied to an adapted
embedding table gets the table as it was, because the adapter never touched the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD
from anymamba.checkpoint.dtypes import as_dtype, as_float32, check_fits_float16, dtype_of
from anymamba.checkpoint.io import shown
from anymamba.errors import CheckpointError
from anymamba.runtime.adapters.adapter_file import Adapter, Change
from anymamba.runtime.weights import Weights, check_weight_type, to_weight_type

if TYPE_CHECKING:
    from anymamba.checkpoint.quantization import Tensor


def merge_adapter(
    weights: Weights, adapter: Adapter, weight_type: str = "auto", shared: Weights | None = None
) -> Weights:
    """Merge an adapter into a model's weights, and bring all of them into a storage.

    Args:
        weights: the model's weights as they are stored ("auto").
        adapter: what `read_adapter` returned.
        weight_type: one of `WEIGHT_TYPES`. By "auto" a merged matrix is stored as it was before:
            in its type, or rounded to as many bits in groups of the same size.
        shared: the same weights in that storage, where they are in use already: what the adapter
            leaves as it is takes no memory then.

    Returns:
        Weights in which the adapted matrices are copies. Their digest is another, so that a
        state of the model without the adapter is refused.

    Raises:
        CheckpointError: the adapter does not fit the model, or makes NaN or infinity of it.
        ConfigError: there is no such type, or it cannot be made of these weights.

    Example:
        >>> from pathlib import Path
        >>> from anymamba.assets import bundled_model
        >>> from anymamba.checkpoint import open_checkpoint
        >>> from anymamba.runtime.weights import load_weights
        >>> weights = load_weights(open_checkpoint(bundled_model()))
        >>> table = weights.tensors["backbone.embeddings.weight"]
        >>> v, d = table.shape
        >>> A, B = np.ones((1, v), np.float32), np.ones((d, 1), np.float32)
        >>> change = Change(A, B, scaling=0.5, transposed=True)
        >>> adapter = Adapter(Path("x"), {"backbone.embeddings.weight": change}, "x")
        >>> both = merge_adapter(weights, adapter).tensors
        >>> both["lm_head.weight"] is table
        True
        >>> before, after = (as_float32(t) for t in (table, both["backbone.embeddings.weight"]))
        >>> bool(abs(after - before - 0.5).max() < 0.01)  # bfloat16's rounding
        True
    """
    check_weight_type(weight_type)
    weights.check()
    tensors = dict(weights.tensors)
    config = dict(weights.config)
    check_fits(adapter, tensors)
    if EMBEDDINGS in adapter.changes and HEAD not in tensors:
        tensors[HEAD] = tensors[EMBEDDINGS]
        config["tie_word_embeddings"] = False
    result: dict[str, Tensor] = {}
    known = {} if shared is None else shared.tensors
    for name, tensor in tensors.items():
        if (change := adapter.changes.get(name)) is not None:
            wide = merged(as_float32(tensor), change, name)
            result[name] = _stored(name, wide, tensor, weight_type)
        elif weight_type == "auto" or name in known:
            result[name] = known.get(name, tensor)
        else:
            result |= to_weight_type({name: tensor}, weight_type)

    def digest() -> str:
        return hashlib.sha256(f"{weights.digest()}\n{adapter.digest}".encode()).hexdigest()

    own = weights.weight_type if weight_type == "auto" else weight_type
    return replace(weights, config=config, tensors=result, weight_type=own, digest=digest)


def merged(weight_nk: NDArray[np.float32], change: Change, name: str) -> NDArray[np.float32]:
    """One matrix (n, k) with its adapter merged, in float32; messages call it `name`.

    Raises:
        CheckpointError: the result holds NaN or infinity.

    Example:
        >>> A, B = np.ones((1, 2), np.float32), np.ones((2, 1), np.float32)
        >>> merged(np.eye(2, dtype=np.float32), Change(A, B, scaling=2.0), "W").tolist()
        [[3.0, 2.0], [2.0, 3.0]]
    """
    with np.errstate(all="ignore"):  # what comes of it is looked at below
        product = change.B @ change.A
        result = (product.T if change.transposed else product) * np.float32(change.scaling)
        result += weight_nk
        if change.magnitude is not None:
            # Lengths of rows; of an embedding table, whose weight PEFT transposes, of columns.
            lengths = np.linalg.norm(result, axis=0 if change.transposed else 1)
            factors = change.magnitude / lengths
            result *= factors if change.transposed else factors[:, None]
    if not np.isfinite(result).all():
        raise CheckpointError(
            f"with the adapter, {name} holds NaN or infinity; does it belong to this model?"
        )
    return np.ascontiguousarray(result)


def check_fits(adapter: Adapter, tensors: Mapping[str, Any]) -> None:
    """Refuse an adapter whose matrices the model does not have, or has in other shapes.

    Raises:
        CheckpointError: the message names the matrix.

    Example:
        >>> from pathlib import Path
        >>> check_fits(Adapter(Path("x"), {}, ""), {})
    """
    for name, change in adapter.changes.items():
        shape = tensors[name].shape if name in tensors else None
        if shape != change.shape:
            has = "which the model lacks" if shape is None else f"and the model has {shape}"
            raise CheckpointError(
                f"the adapter in {str(adapter.folder)!r} changes {shown(name)} of shape "
                f"{change.shape}, {has}; it belongs to another model"
            )


def _stored(name: str, wide: NDArray[np.float32], before: Tensor, weight_type: str) -> Tensor:
    """A merged matrix in the type asked for, which by "auto" is that of the matrix before."""
    if weight_type in ("f32", "bf16") or (weight_type != "auto" and isinstance(before, np.ndarray)):
        return to_weight_type({name: wide}, weight_type)[name]
    if isinstance(before, np.ndarray):
        if dtype_of(before) == "F16":
            check_fits_float16(f"with the adapter, {name}", wide)
        return as_dtype(wide, dtype_of(before))
    if weight_type != "auto":
        # Refuses other bits, as it does without an adapter.
        to_weight_type({name: before}, weight_type)
    from anymamba.checkpoint.quantization import quantize

    return quantize(wide, before.bits, before.group, symmetric=before.symmetric, name=name)

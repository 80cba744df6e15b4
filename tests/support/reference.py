"""The model once more in plain numpy, in float64 and one step after the other."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def words(length: int, seed: int = 1) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


def reference_logits(
    tensors: dict[str, np.ndarray],
    ids: list[int],
    eps: float = 1e-5,
    group: int | None = None,
    operand: Callable[[str, Any], Any] | None = None,
) -> Any:
    """(l, v) logits in float64, one token after the other, as the paper has it.

    With a group, the large products round their activations to bytes as `rounded` does. `operand`
    says for each matrix by name what its product makes of its activations.
    """
    operand = operand or partial(_large_ones, group)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    embeddings = wide["backbone.embeddings.weight"]
    x_ld = embeddings[ids]
    layer = 0
    while f"backbone.layers.{layer}.norm.weight" in wide:
        prefix = f"backbone.layers.{layer}."
        own = {n.removeprefix(prefix): t for n, t in wide.items() if n.startswith(prefix)}
        operand_here = partial(_in_layer, operand, prefix)
        x_ld = x_ld + _mixer(own, _norm(x_ld, own["norm.weight"], eps), operand_here)
        layer += 1
    x_ld = _norm(x_ld, wide["backbone.norm_f.weight"], eps)
    head = "lm_head.weight" if "lm_head.weight" in wide else "backbone.embeddings.weight"
    return operand(head, x_ld) @ wide[head].T


def _large_ones(group: int | None, name: str, x: Any) -> Any:
    return x if name.endswith(("x_proj.weight", "dt_proj.weight")) else rounded(x, group)


def _in_layer(operand: Callable[[str, Any], Any], prefix: str, name: str, x: Any) -> Any:
    return operand(prefix + name, x)


def rounded(x_lk: Any, group: int | None) -> Any:
    """Each row's groups as whole numbers from -127 to 127 times a scale."""
    if group is None:
        return x_lk
    parts = x_lk.reshape(len(x_lk), -1, group)
    largest = np.abs(parts).max(axis=2, keepdims=True)
    return (np.rint(parts * (127 / largest)) * (largest / 127)).reshape(x_lk.shape)


def _norm(x_ld: Any, weight_d: Any, eps: float) -> Any:
    return x_ld / np.sqrt((x_ld**2).mean(axis=-1, keepdims=True) + eps) * weight_d


def _silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def _mixer(own: dict[str, Any], x_ld: Any, operand: Callable[[str, Any], Any]) -> Any:
    def product(matrix: str, x: Any) -> Any:
        name = f"mixer.{matrix}.weight"
        return operand(name, x) @ own[name].T

    xz = product("in_proj", x_ld) + own.get("mixer.in_proj.bias", 0)
    x_le, z_le = np.split(xz, 2, axis=-1)
    filters_ek = own["mixer.conv1d.weight"][:, 0]
    k = filters_ek.shape[1]
    padded = np.concatenate([np.zeros((k - 1, x_le.shape[1])), x_le])
    x_le = np.stack([(padded[t : t + k].T * filters_ek).sum(axis=1) for t in range(len(x_le))])
    x_le = _silu(x_le + own.get("mixer.conv1d.bias", 0))
    A_en = -np.exp(own["mixer.A_log"])
    n, r = A_en.shape[1], own["mixer.dt_proj.weight"].shape[1]
    step, B_ln, C_ln = np.split(product("x_proj", x_le), [r, r + n], axis=-1)
    delta_le = np.log1p(np.exp(product("dt_proj", step) + own["mixer.dt_proj.bias"]))
    state_en, y_le = np.zeros_like(A_en), np.empty_like(x_le)
    for t in range(len(x_le)):
        delta_e1 = delta_le[t][:, None]
        state_en = np.exp(delta_e1 * A_en) * state_en + delta_e1 * B_ln[t] * x_le[t][:, None]
        y_le[t] = state_en @ C_ln[t] + own["mixer.D"] * x_le[t]
    out = product("out_proj", y_le * _silu(z_le))
    return out + own.get("mixer.out_proj.bias", 0)


def greedy(folder: Path, prompt: str, length: int) -> list[int]:
    """The likeliest token of a model of bytes, `length` times."""
    tensors, tokens = load_file(folder / "model.safetensors"), list(prompt.encode())
    for _ in range(length):
        tokens.append(int(reference_logits(tensors, tokens)[-1].argmax()))
    return tokens[-length:]


def log_probabilities(folder: Path, text: str) -> np.ndarray:
    """Of all bytes where each of the text's but the first stands, given those before it."""
    rows = reference_logits(load_file(folder / "model.safetensors"), list(text.encode())[:-1])
    return rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)

"""The tiny model by hand, a token at a time: what the commands must come to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

__all__ = ["greedy", "log_probabilities"]


class Reference:
    """One layer of Mamba in plain numpy, in the letters of the paper."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        prefix = "backbone.layers.0."
        self.layer = {name.removeprefix(prefix): tensors[name] for name in tensors}
        self.embeddings, self.head = (
            tensors["backbone.embeddings.weight"],
            tensors["lm_head.weight"],
        )
        e, self.k = self.layer["mixer.conv1d.weight"][:, 0].shape
        self.n = self.layer["mixer.A_log"].shape[1]
        self.window_ek = np.zeros((e, self.k))
        self.state_en = np.zeros((e, self.n))

    def logits(self, token: int) -> np.ndarray:
        """Read a token."""
        w, n = {name: value.astype(np.float64) for name, value in self.layer.items()}, self.n
        hidden = self.embeddings[token].astype(np.float64)
        x, z = np.split(w["mixer.in_proj.weight"] @ normed(hidden), 2)
        self.window_ek = np.column_stack([self.window_ek[:, 1:], x])
        x = silu((self.window_ek * w["mixer.conv1d.weight"][:, 0]).sum(1) + w["mixer.conv1d.bias"])
        low, B, C = np.split(w["mixer.x_proj.weight"] @ x, [-2 * n, -n])
        delta = np.logaddexp(0, w["mixer.dt_proj.weight"] @ low + w["mixer.dt_proj.bias"])
        decay_en = np.exp(delta[:, None] * -np.exp(w["mixer.A_log"]))
        self.state_en = decay_en * self.state_en + (delta * x)[:, None] * B
        y = (self.state_en @ C + w["mixer.D"] * x) * silu(z)
        return self.head @ normed(hidden + w["mixer.out_proj.weight"] @ y)


def normed(x: np.ndarray) -> np.ndarray:
    # The tiny model's norms have weights of 1.
    return x / np.sqrt((x**2).mean() + 1e-5)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def greedy(folder: Path, prompt: str, length: int) -> list[int]:
    """The likeliest token, `length` times."""
    model = Reference(folder)
    for byte in prompt.encode():
        logits = model.logits(byte)
    tokens: list[int] = []
    while len(tokens) < length:
        tokens.append(int(logits.argmax()))
        logits = model.logits(tokens[-1])
    return tokens


def log_probabilities(folder: Path, text: str) -> np.ndarray:
    """Of each byte but the first, given those before it; and what is likeliest there."""
    model = Reference(folder)
    data = text.encode()
    rows = np.array([model.logits(byte) for byte in data[:-1]])
    rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
    return rows

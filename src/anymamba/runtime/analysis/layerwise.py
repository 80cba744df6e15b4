"""A model run one layer at a time, so that what each of its parts computes can be looked at.

This is for `calibration` and `inspection`: `Network` runs a model faster, and shows nothing on the
way. A layer is

    hidden = hidden + out_proj(mixed(normed(hidden)))

where `normed` is what `in_proj` reads and `mixed` what `out_proj` reads. Shapes have the letters
of `anymamba.minimal` and `anymamba.minimal_mamba2`: b texts, l tokens of each, d model width, e
inner width, n states, r rank, h heads, p channels of a head, g groups of heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.architecture import MAMBA2, architecture_of, in_layer
from anymamba.checkpoint.quantization import QuantizedArray
from anymamba.renamed import old_names
from anymamba.runtime.native import core, epsilon_of, head_settings, mixer_epsilon_of

__getattr__ = old_names(__name__)

Matrix = NDArray[np.float32] | QuantizedArray
"""A weight (n, k); one that is quantized is multiplied with as `Network` does it."""


@dataclass(frozen=True)
class Selected:
    """What a layer's scan reads of a text; with heads dt is (b, l, h), B and C are (b, l, g n).

    Args:
        x_ble: the convolved input, which is written into the state.
        z_ble: the gate.
        dt_ble: what the step size is made of: Delta = softplus(dt + bias).
        B_bln: where in the state x is written.
        C_bln: from where in the state is read.
    """

    x_ble: NDArray[np.float32]
    z_ble: NDArray[np.float32]
    dt_ble: NDArray[np.float32]
    B_bln: NDArray[np.float32]
    C_bln: NDArray[np.float32]


@dataclass(frozen=True)
class Written:
    """What one text writes into a layer's states, by r rates of decay and the states of each.

    Args:
        delta_lr: how long each step lasts.
        A_rn: how fast each state decays.
        size_lr, size_ln: the magnitudes of what is written, as a product of two.
    """

    delta_lr: NDArray[np.float64]
    A_rn: NDArray[np.float32]
    size_lr: NDArray[np.float64]
    size_ln: NDArray[np.float64]


@dataclass
class Layer(ABC):
    """The tensors of a layer in float32; `in_proj` and `out_proj` may be quantized.

    Args:
        norm: (d,), scale of the norm.
        in_proj, in_proj_bias: (2e, d), with heads (2e + 2 g n + h, d); its bias or None.
        conv_weight, conv_bias: (e, k), with heads (e + 2 g n, k), one filter a channel; its bias or
            None.
        dt_bias: (e,), with heads (h,).
        A: (e, n), with heads (h,), decay rates, negative.
        D: (e,), with heads (h,), the share of x that passes by the state.
        out_proj, out_proj_bias: (d, e), and (d,) or None.
        epsilon: of the norm.
        mixer_epsilon: of the norms inside the mixer, or None where there are none.
    """

    norm: NDArray[np.float32]
    in_proj: Matrix
    in_proj_bias: NDArray[np.float32] | None
    conv_weight: NDArray[np.float32]
    conv_bias: NDArray[np.float32] | None
    dt_bias: NDArray[np.float32]
    A: NDArray[np.float32]
    D: NDArray[np.float32]
    out_proj: Matrix
    out_proj_bias: NDArray[np.float32] | None
    epsilon: float
    mixer_epsilon: float | None

    @staticmethod
    def read(
        index: int, tensor: Callable[[str], NDArray[np.float32] | None], config: Mapping[str, Any]
    ) -> Layer:
        """Collect a layer's tensors: `tensor` gives that of a name of Transformers', or None."""
        architecture = architecture_of(config)
        tensors = architecture.core_layer(lambda name: tensor(in_layer(index, name)))
        tensors["conv_weight"] = np.ascontiguousarray(tensors["conv_weight"])
        tensors["A"] = -np.exp(tensors.pop("A_log"))
        tensors["mixer_epsilon"] = mixer_epsilon_of(config)
        tensors["epsilon"] = epsilon_of(config)
        if architecture is MAMBA2:
            return LayerWithHeads(**tensors, **head_settings(config))
        return LayerWithScan(**tensors)

    @abstractmethod
    def selected(self, normed_bld: NDArray[np.float32]) -> Selected:
        """What the scan reads: made of the text, which is what selection means."""

    @abstractmethod
    def scanned(self, found: Selected) -> NDArray[np.float32]:
        """What `out_proj` reads, (b, l, e), of what was selected before."""

    @abstractmethod
    def written(self, found: Selected) -> Written:
        """What the first text wrote."""

    def convolved(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The causal convolution with its activation, each text by itself."""
        y = np.empty(x.shape, np.float32)
        core().conv(x, self.conv_weight, self.conv_bias, True, None, None, 0, False, y, None)
        return y

    def normed(self, hidden_bld: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `in_proj` reads, (b, l, d)."""
        return normed(hidden_bld, self.norm, self.epsilon)

    def mixed(self, normed_bld: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `out_proj` reads, (b, l, e): convolved, scanned and gated, each text by itself."""
        return self.scanned(self.selected(normed_bld))

    def added(
        self, hidden_bld: NDArray[np.float32], mixed_ble: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """What the next layer reads, (b, l, d)."""
        return hidden_bld + linear(mixed_ble, self.out_proj, self.out_proj_bias)

    def run(self, hidden_bld: NDArray[np.float32]) -> NDArray[np.float32]:
        """The whole layer, (b, l, d) to (b, l, d)."""
        return self.added(hidden_bld, self.mixed(self.normed(hidden_bld)))


@dataclass
class LayerWithScan(Layer):
    """A layer of Mamba or Falcon-Mamba.

    Args:
        x_proj: (r + 2n, e).
        dt_proj: (e, r).
    """

    x_proj: NDArray[np.float32]
    dt_proj: NDArray[np.float32]

    def selected(self, normed_bld: NDArray[np.float32]) -> Selected:
        """As the base says."""
        xz = linear(normed_bld, self.in_proj, self.in_proj_bias)
        e, (r, n) = self.conv_weight.shape[0], (self.dt_proj.shape[1], self.A.shape[1])
        x_ble, z_ble = xz[..., :e], xz[..., e:]
        convolved = self.convolved(x_ble)
        projected = linear(convolved, self.x_proj)
        low_rank, B_bln, C_bln = (
            self._mapped(part) for part in np.split(projected, [r, r + n], -1)
        )
        return Selected(convolved, z_ble, linear(low_rank, self.dt_proj), B_bln, C_bln)

    def _mapped(self, part: NDArray[np.float32]) -> NDArray[np.float32]:
        """A part of what x_proj gave, after its norm where the architecture has one."""
        if self.mixer_epsilon is None:
            return part
        return normed(part, np.ones(part.shape[-1], np.float32), self.mixer_epsilon)

    def scanned(self, found: Selected) -> NDArray[np.float32]:
        """As the base says."""
        B_blgn, C_blgn = found.B_bln[..., None, :], found.C_bln[..., None, :]
        y_ble = np.empty(found.x_ble.shape, np.float32)
        core().scan(
            *(found.x_ble, found.dt_ble, self.A, B_blgn, C_blgn, self.D, found.z_ble),
            *(self.dt_bias, True, None, None, 0, False, y_ble, None, None),
        )
        return y_ble

    def written(self, found: Selected) -> Written:
        """As the base says."""
        delta_le = _softplus(found.dt_ble[0], self.dt_bias)
        size_ln = np.abs(found.B_bln[0]).astype(np.float64)
        return Written(delta_le, self.A, np.abs(delta_le * found.x_ble[0]), size_ln)


@dataclass
class LayerWithHeads(Layer):
    """A layer of Mamba-2.

    Args:
        gated_norm: (e,), scale of the norm beside the gate, or None.
        groups: g.
        dt_limit: the least and the largest step size.
        norm_before_gate: whether the norm comes first.
    """

    gated_norm: NDArray[np.float32] | None
    groups: int
    dt_limit: tuple[float, float]
    norm_before_gate: bool

    def selected(self, normed_bld: NDArray[np.float32]) -> Selected:
        """As the base says."""
        e, channels = self.out_proj.shape[1], len(self.conv_weight)
        projected = linear(normed_bld, self.in_proj, self.in_proj_bias)
        z_ble, xBC, dt_blh = np.split(projected, [e, e + channels], -1)
        x_ble, B, C = np.split(self.convolved(xBC), [e, (e + channels) // 2], -1)
        return Selected(x_ble, z_ble, dt_blh, B, C)

    def scanned(self, found: Selected) -> NDArray[np.float32]:
        """As the base says."""
        B_blgn, C_blgn = self._in_groups(found.B_bln), self._in_groups(found.C_bln)
        y_ble = np.empty(found.x_ble.shape, np.float32)
        gated_later = self.gated_norm is not None and self.norm_before_gate
        z_ble = None if gated_later else found.z_ble
        core().ssd(
            *(found.x_ble, found.dt_ble, self.A, B_blgn, C_blgn, self.D, z_ble),
            *(self.dt_bias, True, self.dt_limit, None, None, 0, False, y_ble, None),
        )
        if self.gated_norm is None:
            return y_ble
        ones = np.ones(len(self.gated_norm) // self.groups, np.float32)
        assert self.mixer_epsilon is not None
        normed_blgp = normed(self._in_groups(y_ble), ones, self.mixer_epsilon)
        normed_ble = normed_blgp.reshape(found.x_ble.shape) * self.gated_norm
        return normed_ble * _silu(found.z_ble) if gated_later else normed_ble

    def written(self, found: Selected) -> Written:
        """As the base says: of all of a head at once, for it decays at one rate."""
        h = len(self.A)
        delta_lh = _softplus(found.dt_ble[0], self.dt_bias).clip(*self.dt_limit)
        x_lh = np.abs(found.x_ble[0]).reshape(len(delta_lh), h, -1).sum(axis=2, dtype=np.float64)
        B_lg = np.abs(self._in_groups(found.B_bln[0])).sum(axis=2, dtype=np.float64)
        size_lh = delta_lh * x_lh * B_lg.repeat(h // self.groups, axis=-1)
        return Written(delta_lh, self.A[:, None], size_lh, np.ones((len(delta_lh), 1)))

    def _in_groups(self, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        return tensor.reshape(*tensor.shape[:-1], self.groups, -1)


def _silu(z: NDArray[np.float32]) -> NDArray[np.float32]:
    half_z = np.float32(0.5) * z
    gate: NDArray[np.float32] = half_z * (1 + np.tanh(half_z))  # no number is too large for it
    return gate


def _softplus(dt_lr: NDArray[np.float32], bias_r: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.logaddexp(0.0, dt_lr.astype(np.float64) + bias_r)


def linear(
    x: NDArray[np.float32], weight: Matrix, bias_n: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Multiply rows (..., k) by a matrix (n, k) as `Network` does: by a quantized one, rounded.

    Example:
        >>> linear(np.ones((1, 2, 3), np.float32), np.ones((1, 3), np.float32)).tolist()
        [[[3.0], [3.0]]]
    """
    native = core()
    rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    y = np.empty((rows.shape[0], weight.shape[0]), np.float32)
    if isinstance(weight, QuantizedArray):
        native.quantized_product(rows, weight.q, weight.scales, weight.minima, bias_n, y)
    else:
        native.product(rows, weight.T, bias_n, y)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def normed(
    hidden: NDArray[np.float32], weight_d: NDArray[np.float32], epsilon: float
) -> NDArray[np.float32]:
    """Divide each row by the root of its mean square, and scale it.

    Example:
        >>> normed(np.float32([[3, 4]]), np.ones(2, np.float32), 0.0).round(4).tolist()
        [[0.8485000133514404, 1.1313999891281128]]
    """
    rows = np.ascontiguousarray(hidden.reshape(-1, hidden.shape[-1]))
    result, scale = np.empty_like(rows), np.empty(rows.shape[0], np.float32)
    core().norm(rows, None, weight_d, epsilon, result, None, scale)
    return result.reshape(hidden.shape)

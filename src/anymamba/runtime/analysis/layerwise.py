"""A model run one layer at a time, so that what each of its parts computes can be looked at.

This is for `calibration` and `inspection`: `Network` runs a model faster, and shows nothing on the
way. A layer is

    hidden = hidden + out_proj(mixed(normed(hidden)))

where `normed` is what `in_proj` reads and `mixed` what `out_proj` reads. Shapes have the letters
of `anymamba.minimal`: b texts, l tokens of each, d model width, e inner width, n states, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.architecture import architecture_of, in_layer
from anymamba.checkpoint.quantization import QuantizedArray
from anymamba.renamed import old_names
from anymamba.runtime.native import core, epsilon_of, mixer_epsilon_of

__getattr__ = old_names(__name__)

Matrix = NDArray[np.float32] | QuantizedArray
"""A weight (n, k); one that is quantized is multiplied with as `Network` does it."""


@dataclass(frozen=True)
class Selected:
    """What a layer's scan reads of a text.

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


@dataclass
class Layer:
    """The tensors of a layer in float32; `in_proj` and `out_proj` may be quantized.

    Args:
        norm: (d,), scale of the norm.
        in_proj, in_proj_bias: (2e, d), and (2e,) or None.
        conv_weight, conv_bias: (e, k), one filter a channel, and (e,) or None.
        x_proj: (r + 2n, e).
        dt_proj, dt_bias: (e, r) and (e,).
        A: (e, n), decay rates, negative.
        D: (e,), the share of x that passes by the state.
        out_proj, out_proj_bias: (d, e), and (d,) or None.
        epsilon: of the norm.
        mixer_epsilon: of the norms of dt, B and C, or None where there are none.
    """

    norm: NDArray[np.float32]
    in_proj: Matrix
    in_proj_bias: NDArray[np.float32] | None
    conv_weight: NDArray[np.float32]
    conv_bias: NDArray[np.float32] | None
    x_proj: NDArray[np.float32]
    dt_proj: NDArray[np.float32]
    dt_bias: NDArray[np.float32]
    A: NDArray[np.float32]
    D: NDArray[np.float32]
    out_proj: Matrix
    out_proj_bias: NDArray[np.float32] | None
    epsilon: float
    mixer_epsilon: float | None

    @classmethod
    def read(
        cls,
        index: int,
        tensor: Callable[[str], NDArray[np.float32] | None],
        config: Mapping[str, Any],
    ) -> Layer:
        """Collect a layer's tensors: `tensor` gives that of a name of Transformers', or None."""

        tensors = architecture_of(config).core_layer(lambda name: tensor(in_layer(index, name)))
        tensors["conv_weight"] = np.ascontiguousarray(tensors["conv_weight"])
        tensors["A"] = -np.exp(tensors.pop("A_log"))
        tensors["mixer_epsilon"] = mixer_epsilon_of(config)
        return cls(**tensors, epsilon=epsilon_of(config))

    def normed(self, hidden_bld: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `in_proj` reads, (b, l, d)."""
        return normed(hidden_bld, self.norm, self.epsilon)

    def selected(self, normed_bld: NDArray[np.float32]) -> Selected:
        """What the scan reads: made of the text, which is what selection means."""
        xz = linear(normed_bld, self.in_proj, self.in_proj_bias)
        e, (r, n) = self.conv_weight.shape[0], (self.dt_proj.shape[1], self.A.shape[1])
        x_ble, z_ble = xz[..., :e], xz[..., e:]
        convolved = np.empty(x_ble.shape, np.float32)
        core().conv(
            x_ble, self.conv_weight, self.conv_bias, True, None, None, 0, False, convolved, None
        )
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

    def mixed(self, normed_bld: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `out_proj` reads, (b, l, e): convolved, scanned and gated, each text by itself."""
        return self.scanned(self.selected(normed_bld))

    def scanned(self, found: Selected) -> NDArray[np.float32]:
        """The same of what was selected before."""
        B_blgn, C_blgn = found.B_bln[..., None, :], found.C_bln[..., None, :]
        y_ble = np.empty(found.x_ble.shape, np.float32)
        core().scan(
            *(found.x_ble, found.dt_ble, self.A, B_blgn, C_blgn, self.D, found.z_ble),
            *(self.dt_bias, True, None, None, 0, False, y_ble, None, None),
        )
        return y_ble

    def added(
        self, hidden_bld: NDArray[np.float32], mixed_ble: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """What the next layer reads, (b, l, d)."""
        return hidden_bld + linear(mixed_ble, self.out_proj, self.out_proj_bias)

    def run(self, hidden_bld: NDArray[np.float32]) -> NDArray[np.float32]:
        """The whole layer, (b, l, d) to (b, l, d)."""
        return self.added(hidden_bld, self.mixed(self.normed(hidden_bld)))


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

"""One layer's part of a model's state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LayerState"]


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one layer carries from the tokens it has read to those that follow.

    Both tensors are views of a `MambaCache`, so that what a mixer writes into them is in the cache.
    There is no method `to`, on purpose: accelerate's hooks copy everything that has one to the
    device of a module, and what is written into a copy is lost. The state stays where it lies, and
    a mixer on another device fetches its part and writes it back.

    Attributes:
        window_bek: (b, e, k), the last k inputs of the layer's convolution, oldest first.
        state_ben: (b, e, n), the state of each channel, float32.

    Example:
        >>> from anymamba import MambaCache, MambaConfig
        >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=2), 1)
        >>> _ = cache.layer(1).state_ben.fill_(1.0)
        >>> cache.ssm_states.mean((1, 2, 3)).tolist()
        [0.0, 1.0]
    """

    window_bek: Tensor
    state_ben: Tensor

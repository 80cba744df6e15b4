"""A Mamba model's state as a Transformers cache, and as a state of the torch-free runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from anymamba.checkpoint import check_identity
from anymamba.errors import InputError
from anymamba.modeling.state import MambaState, model_identity
from anymamba.renamed import old_names

if TYPE_CHECKING:
    from anymamba.runtime.engine import Engine
    from anymamba.runtime.state import State

__getattr__ = old_names(__name__)


class MambaCache(MambaState, Cache):
    """What a Mamba model carries from the tokens it has read to those that follow.

    Pass it to `forward` or `generate` as `cache`; each call continues where the
    last one ended and updates it in place. It is a Transformers `Cache`, with the constructor and
    the update methods of Transformers' historical `MambaCache`.

    Args:
        config: the model's configuration (AnyMamba's or Transformers').
        max_batch_size: b, the number of rows.
        dtype: storage of `conv_states`; results are exact if it is as wide as the model's own
            type. `ssm_states` are always float32.
        device: where the blocks live; PyTorch's default device if None.

    Attributes:
        conv_states: (n_layer, b, e, k), the last k inputs of each convolution, oldest first.
        ssm_states: (n_layer, b, e, n), the state of each channel, float32.
        token_counts: (b,) int64, how many tokens each row has read; masked ones do not count.

    Raises:
        InputError: for a batch size that is no integer >= 0, or a dtype that is not floating.

    Example:
        >>> from anymamba.modeling.config import MambaConfig
        >>> config = MambaConfig(hidden_size=8, num_hidden_layers=2)
        >>> cache = MambaCache(config, max_batch_size=3, dtype=torch.float32)
        >>> cache.conv_states.shape, cache.ssm_states.shape
        (torch.Size([2, 3, 16, 4]), torch.Size([2, 3, 16, 16]))
        >>> cache.get_seq_length()
        0
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_batch_size: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        # Transformers would keep one object a layer; here all layers share two blocks.
        Cache.__init__(self, layers=[])
        MambaState.__init__(self, config, max_batch_size, dtype, device)

    @torch.no_grad()
    def update_conv_state(  # type: ignore[override]
        self, layer_idx: int, new_conv_state: Tensor, cache_position: Tensor
    ) -> Tensor:
        """Append a layer's newest convolution inputs to its window, in place.

        Args:
            layer_idx: which layer.
            new_conv_state: (b, e, w), the inputs in order; w >= k replaces the whole window by
                the last k of them, a smaller w moves the window on by w.
            cache_position: (any length,) integers >= 0, the positions of these inputs; checked
                and otherwise not needed, as a window needs no positions.

        Returns:
            `conv_states[layer_idx]`, (b, e, k), the updated window itself.

        Raises:
            InputError: if an argument does not fit this cache.

        Example:
            >>> from anymamba.modeling.config import MambaConfig
            >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=1), 1)
            >>> new = torch.ones(1, 16, 1)
            >>> cache.update_conv_state(0, new, torch.tensor([0]))[0, 0]
            tensor([0., 0., 0., 1.], dtype=torch.float16)
        """
        window_bek = self._layer(self.conv_states, layer_idx, "update_conv_state")
        _check_cache_position(cache_position)
        shape = tuple(new_conv_state.shape)
        if len(shape) != 3 or shape[:2] != window_bek.shape[:2]:
            b, e, k = window_bek.shape
            raise InputError(
                f"MambaCache.update_conv_state: new_conv_state must have shape ({b}, {e}, width) "
                f"for this cache, got {shape}"
            )
        k, width = self.conv_kernel_size, shape[2]
        if 0 < width < k:
            window_bek[..., :-width] = window_bek[..., width:].clone()
        if width > 0:
            window_bek[..., -min(width, k) :] = new_conv_state[..., -k:]
        return window_bek

    @torch.no_grad()
    def update_ssm_state(self, layer_idx: int, new_ssm_state: Tensor) -> Tensor:
        """Replace a layer's state, in place.

        Args:
            layer_idx: which layer.
            new_ssm_state: (b, e, n), the new state.

        Returns:
            `ssm_states[layer_idx]`, (b, e, n), the updated state itself.

        Raises:
            InputError: if an argument does not fit this cache.

        Example:
            >>> from anymamba.modeling.config import MambaConfig
            >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=1), 1)
            >>> float(cache.update_ssm_state(0, torch.ones(1, 16, 16)).mean())
            1.0
        """
        state_ben = self._layer(self.ssm_states, layer_idx, "update_ssm_state")
        if new_ssm_state.shape != state_ben.shape:
            raise InputError(
                f"MambaCache.update_ssm_state: new_ssm_state must have shape "
                f"{tuple(state_ben.shape)} for this cache, got {tuple(new_ssm_state.shape)}"
            )
        return state_ben.copy_(new_ssm_state)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """`update_ssm_state` by the name and argument order of Transformers 5."""
        return self.update_ssm_state(layer_idx, recurrent_states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a layer's window (b, e, k), or None while no token was read."""
        window_bek = self._layer(self.conv_states, layer_idx, "get_conv_state")
        return window_bek if self.has_previous_state() else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a layer's state (b, e, n), or None while no token was read."""
        state_ben = self._layer(self.ssm_states, layer_idx, "get_recurrent_state")
        return state_ben if self.has_previous_state() else None

    # Rows: what beams, several answers to one prompt, and finished rows need.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what row `beam_idx[i]` was; beam_idx: (b,) integers."""
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make `repeats` neighbouring copies of each row."""
        self._take_rows(
            torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` names: integers, or a boolean for each row."""
        self._take_rows(torch.arange(self.batch_size, device=self.device)[indices])

    # The runtime's states.

    @classmethod
    def from_state(
        cls,
        state: State,
        config: PreTrainedConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Self:
        """Copy a state of the torch-free runtime: a cache of one row.

        Args:
            state: what an `anymamba.Engine` has read.
            config: the configuration of the model that will continue from it.
            dtype: storage of `conv_states`.
            device: where the blocks live; PyTorch's default device if None.

        Raises:
            StateError: the state belongs to a model of other sizes.

        Example:
            >>> import anymamba
            >>> from anymamba.assets import bundled_model
            >>> engine = anymamba.load()
            >>> state = engine.prefill(engine.state(), "ROMEO:")
            >>> config = anymamba.MambaConfig.from_pretrained(bundled_model())
            >>> MambaCache.from_state(state, config)
            MambaCache(layers=7, batch=1, tokens=[6], dtype=torch.float32, device=cpu)
        """
        check_identity(state.identity.sizes, model_identity(config), "this state")
        cache = cls(config, 1, dtype, device)
        cache.conv_states.copy_(torch.from_numpy(state.conv_states))
        cache.ssm_states.copy_(torch.from_numpy(state.ssm_states))
        cache.token_counts.fill_(state.token_count)
        return cache

    def to_state(self, engine: Engine, row: int = 0) -> State:
        """Copy one row as a state of the torch-free runtime.

        Args:
            engine: the runtime's engine that will continue from it, on the same weights: a cache
                does not know what made it.
            row: which row.

        Returns:
            The state. It does not know which token follows, so that the engine wants at least one
            token more before it generates.

        Raises:
            StateError: the engine's model has other sizes.
            InputError: there is no such row.

        Example:
            >>> import anymamba
            >>> from anymamba.assets import bundled_model
            >>> config = anymamba.MambaConfig.from_pretrained(bundled_model())
            >>> MambaCache(config, 2).to_state(anymamba.load(), row=1).token_count
            0
        """
        if not isinstance(row, int) or not 0 <= row < self.batch_size:
            raise InputError(
                f"MambaCache.to_state: row must be an integer from 0 to {self.batch_size - 1}, "
                f"got {row!r}"
            )
        state = engine.state()
        check_identity(model_identity(self.config), state.identity.sizes, "this cache")
        rows = slice(row, row + 1)
        state.assign(
            self.conv_states[:, rows].detach().float().cpu().numpy(),
            self.ssm_states[:, rows].detach().cpu().numpy(),
            int(self.token_counts[row]),
        )
        return state

    # What else `generate` may ask of a cache.

    @property
    def is_compileable(self) -> bool:
        """True: no shape depends on how much was read."""
        return True

    @property
    def is_initialized(self) -> bool:
        """True: the blocks exist from the start."""
        return True

    @property
    def is_croppable(self) -> bool:
        """False: a state cannot forget its last tokens."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """True for each layer: all of them are recurrent."""
        return [True] * len(self)

    @property
    def is_sliding(self) -> list[bool]:
        """False for each layer: none holds a window of tokens."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """False for each layer: all of them hold something."""
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read by the row that has read most."""
        return int(self.token_counts.max()) if self.batch_size else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return (tokens read so far + query_length, 0), as a cache of keys would."""
        return self.get_seq_length() + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Return whether any row has read a token."""
        return self.get_seq_length() > 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raise InputError: a state cannot forget its last tokens."""
        raise InputError(
            "MambaCache.crop: a state cannot forget tokens; continue from a clone() of before"
        )

    def activate_past_recording(self) -> None:
        """Raise InputError: nothing could be rolled back to what was recorded."""
        raise InputError(
            "MambaCache.activate_past_recording: a state cannot be rolled back, so assisted "
            "decoding is not possible; generate without an assistant"
        )

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: only the present is kept."""
        return False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Raise InputError: there are no keys and values here."""
        raise InputError(
            "MambaCache.update: a Mamba state has no keys and values; "
            "use update_conv_state and update_ssm_state"
        )

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the blocks exist from the start."""

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Do nothing: the state is too small to be worth moving between layers."""

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Do nothing: nothing was offloaded."""


def _check_cache_position(cache_position: Tensor) -> None:
    wanted = "MambaCache.update_conv_state: cache_position must be a 1-D tensor of integers >= 0"
    if not isinstance(cache_position, Tensor):
        raise InputError(f"{wanted}, got {type(cache_position).__name__}")
    integers = not (cache_position.is_floating_point() or cache_position.dtype == torch.bool)
    if cache_position.ndim != 1 or not integers:
        raise InputError(
            f"{wanted}, got {cache_position.dtype} of shape {tuple(cache_position.shape)}"
        )
    # A compiled graph cannot branch on values.
    if not torch.compiler.is_compiling() and bool((cache_position < 0).any()):
        raise InputError(f"{wanted}, got {cache_position.min().item()}")

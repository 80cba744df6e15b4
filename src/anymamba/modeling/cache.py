"""The state of a Mamba model between calls.

Everything a model remembers of the tokens it has read is two blocks of memory, whatever their
number: the last k inputs of each layer's convolution, and each layer's state. So a state is a
value: it can be copied, moved, saved, and handed from one call to the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from anymamba.checkpoint import (
    StateFile,
    check_identity,
    read_state_file,
    state_dict_digest,
    state_metadata,
    write_atomically,
)
from anymamba.errors import InputError, StateError
from anymamba.modeling.layer_state import LayerState

if TYPE_CHECKING:
    from anymamba.runtime.engine import Engine
    from anymamba.runtime.state import State

__all__ = ["MambaCache", "config_of", "model_identity"]

_BLOCKS = ("conv_states", "ssm_states")

_Self = TypeVar("_Self", bound="MambaCache")


class MambaCache(Cache):
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

    conv_states: Tensor
    ssm_states: Tensor
    token_counts: Tensor

    def __init__(
        self,
        config: PreTrainedConfig,
        max_batch_size: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        # Transformers would keep one object a layer; here all layers share two blocks.
        super().__init__(layers=[])
        if not isinstance(max_batch_size, int) or max_batch_size < 0:
            raise InputError(
                f"MambaCache: max_batch_size must be an integer >= 0, got {max_batch_size!r}"
            )
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"MambaCache: dtype must be a floating torch.dtype, got {dtype!r}")
        self.config = config
        self.intermediate_size: int = config.intermediate_size
        self.ssm_state_size: int = config.state_size
        self.conv_kernel_size: int = config.conv_kernel
        rows = (config.num_hidden_layers, max_batch_size, self.intermediate_size)
        self.conv_states = torch.zeros(*rows, self.conv_kernel_size, dtype=dtype, device=device)
        self.ssm_states = torch.zeros(
            *rows, self.ssm_state_size, dtype=torch.float32, device=device
        )
        self.token_counts = torch.zeros(max_batch_size, dtype=torch.int64, device=device)

    @classmethod
    def for_model(
        cls: type[_Self],
        model: PreTrainedModel,
        max_batch_size: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> _Self:
        """Make the state of a model that has read nothing.

        It has as many layers as the model has now, also where some were cut or repeated after the
        config was written.

        Args:
            model: the model that will use it.
            max_batch_size: b, the number of rows.
            dtype: storage of `conv_states`; the model's own type if None.
            device: where the blocks live; the model's if None.

        Example:
            >>> from anymamba import MambaConfig, MambaForCausalLM
            >>> config = MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=4)
            >>> model = MambaForCausalLM(config)
            >>> model.backbone.layers = model.backbone.layers[:3]
            >>> MambaCache.for_model(model)
            MambaCache(layers=3, batch=1, tokens=[0], dtype=torch.float32, device=cpu)
        """
        return cls(
            config_of(model),
            max_batch_size,
            model.dtype if dtype is None else dtype,
            model.device if device is None else device,
        )

    def __repr__(self) -> str:
        return (
            f"MambaCache(layers={len(self)}, batch={self.batch_size}, "
            f"tokens={self.token_counts.tolist()}, dtype={self.dtype}, device={self.device})"
        )

    def __len__(self) -> int:
        return self.conv_states.shape[0]

    @property
    def batch_size(self) -> int:
        """b, the number of rows now; beams and selections change it."""
        return self.conv_states.shape[1]

    @property
    def max_batch_size(self) -> int:
        """The same as `batch_size`, by its historical name."""
        return self.batch_size

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of `conv_states`."""
        return self.conv_states.dtype

    @property
    def device(self) -> torch.device:
        """Where the blocks live."""
        return self.conv_states.device

    # Reading and writing one layer.

    def layer(self, layer_idx: int) -> LayerState:
        """Return one layer's part: views, so that writing into them writes into this cache.

        Args:
            layer_idx: the layer's place in the model's list of layers.

        Raises:
            InputError: there is no such layer.

        Example:
            >>> from anymamba.modeling.config import MambaConfig
            >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=2), 3)
            >>> cache.layer(1).window_bek.shape
            torch.Size([3, 16, 4])
        """
        window_bek = self._layer(self.conv_states, layer_idx, "layer")
        return LayerState(window_bek, self.ssm_states[layer_idx])

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

    def _layer(self, block: Tensor, layer_idx: int, method: str) -> Tensor:
        if not isinstance(layer_idx, int) or not 0 <= layer_idx < len(self):
            shown = layer_idx if isinstance(layer_idx, int) else type(layer_idx).__name__
            raise InputError(
                f"MambaCache.{method}: layer_idx must be an integer from 0 to {len(self) - 1}, "
                f"got {shown}"
            )
        return block[layer_idx]

    # The state as a whole.

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything: zeros in place, as in a new cache."""
        for block in (self.conv_states, self.ssm_states, self.token_counts):
            block.zero_()

    def clone(self: _Self) -> _Self:
        """Return a copy that shares no memory with this one: the way to fork a text.

        Example:
            >>> from anymamba.modeling.config import MambaConfig
            >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=1), 1)
            >>> fork = cache.clone()
            >>> _ = fork.update_ssm_state(0, torch.ones(1, 16, 16))
            >>> float(cache.ssm_states.sum())
            0.0
        """
        return self._map(torch.clone, torch.clone)

    def to(
        self: _Self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool | None = None,
    ) -> _Self:
        """Move the state, or change the storage type of `conv_states`, as `Tensor.to` does.

        Args:
            device: where to; a dtype in its place is taken as the dtype.
            dtype: new type of `conv_states`; `ssm_states` stay float32.
            non_blocking: where it is given, this cache itself is moved, for that is how
                accelerate's hooks move what a model is called with: the model must then go on
                from the caller's state, and not from a copy that nobody sees again.

        Returns:
            This cache if nothing changes or `non_blocking` is given, else a new one.

        Example:
            >>> from anymamba.modeling.config import MambaConfig
            >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=1), 1)
            >>> cache.to("cpu") is cache, cache.to(torch.float32).dtype
            (True, torch.float32)
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        waits_not = bool(non_blocking)
        moved = self._map(
            lambda window: window.to(device=device, dtype=dtype, non_blocking=waits_not),
            lambda rest: rest.to(device=device, non_blocking=waits_not),
        )
        if non_blocking is not None:
            vars(self).update(vars(moved))
            return self
        return self if moved.conv_states is self.conv_states else moved

    def _map(
        self: _Self, of_window: Callable[[Tensor], Tensor], of_rest: Callable[[Tensor], Tensor]
    ) -> _Self:
        other = copy.copy(self)
        other.conv_states = of_window(self.conv_states)
        other.ssm_states = of_rest(self.ssm_states)
        other.token_counts = of_rest(self.token_counts)
        return other

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

    @torch.no_grad()
    def _take_rows(self, rows: Tensor) -> None:
        rows = rows.to(self.device)
        for name, row_axis in (("conv_states", 1), ("ssm_states", 1), ("token_counts", 0)):
            block = getattr(self, name)
            taken = block.index_select(row_axis, rows)
            # In place where the size stays: a compiled or captured step keeps the address.
            if taken.shape == block.shape:
                block.copy_(taken)
            else:
                setattr(self, name, taken)

    # Files.

    def save(self, path: str | Path, *, model: PreTrainedModel | None = None) -> None:
        """Write the state to a safetensors file, atomically.

        Args:
            path: the file; an existing one is replaced.
            model: the model the state belongs to; with it, a digest of its weights goes into the
                file, and `load` refuses another model's weights.

        Raises:
            StateError: if `model` does not have this cache's sizes, or a block holds NaN or
                infinity, from which nothing could go on.

        Example:
            >>> import tempfile
            >>> from anymamba.modeling.config import MambaConfig
            >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=1), 2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache.save(folder + "/prompt.safetensors")
            ...     MambaCache.load(folder + "/prompt.safetensors", config=cache.config)
            MambaCache(layers=1, batch=2, tokens=[0, 0], dtype=torch.float16, device=cpu)
        """
        identity = model_identity(self.config)
        digest = None
        if model is not None:
            check_identity(identity, model_identity(config_of(model)), "this cache")
            digest = state_dict_digest(model.state_dict())
        metadata = state_metadata(identity, self.token_counts.tolist(), digest)
        blocks = {name: getattr(self, name).contiguous() for name in _BLOCKS}
        for name, block in blocks.items():
            if not torch.isfinite(block).all():
                raise StateError(
                    f"the cache holds NaN or infinity in its {name}, and nothing could go on from "
                    "it: it was not written; the model's weights are broken"
                )
        write_atomically(Path(path), lambda part: save_file(blocks, part, metadata=metadata))

    @classmethod
    def load(
        cls: type[_Self],
        path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        model: PreTrainedModel | None = None,
        device: torch.device | str | None = None,
    ) -> _Self:
        """Read a state that `save` wrote, after checking that it belongs to the model.

        Args:
            path: the file.
            config: the configuration of the model that will continue from it, or
            model: that model, whose weights are then checked too if the file has their digest.
            device: where to put the state; the model's device, or PyTorch's default, if None.

        Returns:
            The state, in the type it was saved in.

        Raises:
            StateError: if the file is broken, or was written for another model.
            InputError: if not exactly one of `config` and `model` is given.
        """
        target_config = config if model is None else config_of(model)
        if target_config is None or (config is not None and model is not None):
            raise InputError("MambaCache.load: give either the config or the model it is for")
        file = read_state_file(path, model_identity(target_config))
        if model is not None and file.weights_digest is not None:
            file.check_digest(state_dict_digest(model.state_dict()))
        blocks = _read_blocks(path, file)
        if device is None and model is not None:
            device = model.device
        cache = cls(target_config, len(file.token_counts), blocks["conv_states"].dtype, device)
        for name in _BLOCKS:
            getattr(cache, name).copy_(blocks[name])
        cache.token_counts.copy_(torch.tensor(file.token_counts, dtype=torch.int64))
        return cache

    # The runtime's states.

    @classmethod
    def from_state(
        cls: type[_Self],
        state: State,
        config: PreTrainedConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> _Self:
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
        """Refuse: a state cannot forget its last tokens.

        Raises:
            InputError: always.
        """
        raise InputError(
            "MambaCache.crop: a state cannot forget tokens; continue from a clone() of before"
        )

    def activate_past_recording(self) -> None:
        """Refuse: nothing could be rolled back to what was recorded.

        Raises:
            InputError: always.
        """
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
        """Refuse: there are no keys and values here.

        Raises:
            InputError: always.
        """
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


def config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Return a model's config, with as many layers as the model has now.

    Args:
        model: a Mamba whose list of layers may have been cut, or given more layers.

    Returns:
        The model's own config where it says the truth, else a copy that does.
    """
    layers = getattr(model.base_model, "layers", None)
    if layers is None or len(layers) == model.config.num_hidden_layers:
        return model.config
    config = copy.copy(model.config)
    # Not through the setter, which refuses a model without layers.
    vars(config)["num_hidden_layers"] = len(layers)
    return config


def model_identity(config: PreTrainedConfig) -> dict[str, str | int]:
    """Return what a model must have in common with a state: its kind and sizes.

    Args:
        config: the model's configuration.

    Returns:
        The fields that decide the shapes of a state, by their names in the config.

    Example:
        >>> from anymamba.modeling.config import MambaConfig
        >>> model_identity(MambaConfig(hidden_size=8, num_hidden_layers=2))["intermediate_size"]
        16
    """
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "state_size", "conv_kernel")
    return {"model_type": config.model_type} | {name: getattr(config, name) for name in sizes}


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


def _read_blocks(path: str | Path, state: StateFile) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != state.metadata:
                raise StateError(f"{state.source} was replaced while it was read; load it again")
            return {name: file.get_tensor(name) for name in _BLOCKS}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise StateError(f"{state.source} is broken: {reason}; save the state again") from error

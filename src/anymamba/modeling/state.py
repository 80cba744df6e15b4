"""The state of a Mamba model between calls, as a value.

Everything a model remembers of the tokens it has read is two blocks of memory, whatever their
number: the last k inputs of each layer's convolution, and each layer's state. So a state is a
value: it can be copied, moved, saved, and handed from one call to the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from anymamba.checkpoint import (
    StateFile,
    check_finite_blocks,
    check_identity,
    read_state_file,
    state_dict_digest,
    state_metadata,
    write_atomically,
)
from anymamba.checkpoint.state_file import IDENTIFYING, state_shapes
from anymamba.errors import InputError, StateError

_BLOCKS = ("conv_states", "ssm_states")


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one layer carries from the tokens it has read to those that follow.

    Both tensors are views of a `MambaState`, so that what a mixer writes into them is in the cache.
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


class MambaState:
    """The state of a batch. `MambaCache` adds Transformers' protocol, and explains the arguments
    and attributes.
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
        name = type(self).__name__
        if not isinstance(max_batch_size, int) or max_batch_size < 0:
            raise InputError(
                f"{name}: max_batch_size must be an integer >= 0, got {max_batch_size!r}"
            )
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"{name}: dtype must be a floating torch.dtype, got {dtype!r}")
        self.config = config
        rows = (config.num_hidden_layers, max_batch_size)
        window, state = state_shapes(model_identity(config))
        self.intermediate_size, self.conv_kernel_size = window
        self.ssm_state_size = state[-1]
        self.conv_states = torch.zeros(*rows, *window, dtype=dtype, device=device)
        self.ssm_states = torch.zeros(*rows, *state, dtype=torch.float32, device=device)
        self.token_counts = torch.zeros(max_batch_size, dtype=torch.int64, device=device)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        max_batch_size: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Make the state of a model that has read nothing.

        It has as many layers as the model has now, also where some were cut or repeated after the
        config was written.

        Args:
            model: the model that will use it.
            max_batch_size: b, the number of rows.
            dtype: storage of `conv_states`; the model's own type if None.
            device: where the blocks live; the model's if None.

        Example:
            >>> from anymamba import MambaCache, MambaConfig, MambaForCausalLM
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
            f"{type(self).__name__}(layers={len(self)}, batch={self.batch_size}, "
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

    def layer(self, layer_idx: int) -> LayerState:
        """Return one layer's part: views, so that writing into them writes into this cache.

        Args:
            layer_idx: the layer's place in the model's list of layers.

        Raises:
            InputError: there is no such layer.

        Example:
            >>> from anymamba import MambaCache, MambaConfig
            >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=2), 3)
            >>> cache.layer(1).window_bek.shape
            torch.Size([3, 16, 4])
        """
        window_bek = self._layer(self.conv_states, layer_idx, "layer")
        return LayerState(window_bek, self.ssm_states[layer_idx])

    def _layer(self, block: Tensor, layer_idx: int, method: str) -> Tensor:
        if not isinstance(layer_idx, int) or not 0 <= layer_idx < len(self):
            shown = layer_idx if isinstance(layer_idx, int) else type(layer_idx).__name__
            raise InputError(
                f"{type(self).__name__}.{method}: layer_idx must be an integer from 0 to "
                f"{len(self) - 1}, got {shown}"
            )
        return block[layer_idx]

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything: zeros in place, as in a new cache."""
        for block in (self.conv_states, self.ssm_states, self.token_counts):
            block.zero_()

    def clone(self) -> Self:
        """Return a copy that shares no memory with this one: the way to fork a text.

        Example:
            >>> from anymamba import MambaCache, MambaConfig
            >>> cache = MambaCache(MambaConfig(hidden_size=8, num_hidden_layers=1), 1)
            >>> fork = cache.clone()
            >>> _ = fork.update_ssm_state(0, torch.ones(1, 16, 16))
            >>> float(cache.ssm_states.sum())
            0.0
        """
        return self._map(torch.clone, torch.clone)

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool | None = None,
    ) -> Self:
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
            >>> from anymamba import MambaCache, MambaConfig
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
        self, of_window: Callable[[Tensor], Tensor], of_rest: Callable[[Tensor], Tensor]
    ) -> Self:
        other = copy.copy(self)
        other.conv_states = of_window(self.conv_states)
        other.ssm_states = of_rest(self.ssm_states)
        other.token_counts = of_rest(self.token_counts)
        return other

    # Rows.

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
            >>> from anymamba import MambaCache, MambaConfig
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
        check_finite_blocks(blocks, torch.isfinite, "the cache")
        write_atomically(Path(path), lambda part: save_file(blocks, part, metadata=metadata))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        model: PreTrainedModel | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
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
            raise InputError(f"{cls.__name__}.load: give either the config or the model it is for")
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


def config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Return a model's config, or a copy with as many layers as the model has now."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None or len(layers) == model.config.num_hidden_layers:
        return model.config
    config = copy.copy(model.config)
    # Not through the setter, which refuses a model without layers.
    vars(config)["num_hidden_layers"] = len(layers)
    return config


def model_identity(config: PreTrainedConfig) -> dict[str, str | int]:
    """Return what a model must have in common with a state: its type and sizes, by field.

    Example:
        >>> from anymamba import MambaConfig
        >>> model_identity(MambaConfig(hidden_size=8, num_hidden_layers=2))["intermediate_size"]
        16
    """
    sizes = {name: getattr(config, name) for name in IDENTIFYING if hasattr(config, name)}
    return {"model_type": config.model_type, **sizes}


def _read_blocks(path: str | Path, state: StateFile) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != state.metadata:
                raise StateError(f"{state.source} was replaced while it was read; load it again")
            return {name: file.get_tensor(name) for name in _BLOCKS}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise StateError(f"{state.source} is broken: {reason}; save the state again") from error
